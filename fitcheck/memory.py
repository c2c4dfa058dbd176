"""The arithmetic of what stays: weights, adapters, gradients, optimizer states, KV cache -> bytes.

To change a formula, change one function here. What comes and goes while a model runs is in
activations.py; which of it is alive together is in phases.py.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

from fitcheck import coefficients
from fitcheck.errors import FitCheckError
from fitcheck.flows import EXPERT_LINEARS, FLOWS
from fitcheck.layouts import LAYOUTS
from fitcheck.model import KVGroup, Model
from fitcheck.weights import has_weights, weights

MIB = 2**20
SMALL_8BIT = 4096  # bitsandbytes keeps states of smaller tensors in fp32 (min_8bit_size)
KV_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0, "fp8": 1.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
PAGED_FROM = 100_000  # elements from which bitsandbytes pages a state (optim/optimizer.py)


class Role(NamedTuple):
    """One model of a method: what it is made of and what of it trains.

    weight: bytes per element of plain weights. stored: how its block linears are kept. head: lm,
    score, value (lm and a score head), none. base: holds weights of its own (an adapter on the
    policy's base does not). tuning: full, lora, qlora, or "" when frozen.
    """

    name: str
    model: Model
    weight: int
    tuning: str = ""
    stored: str = "plain"
    head: str = "lm"
    base: bool = True
    adapter: int = 0
    rank: int = 0
    targets: str | tuple[str, ...] = "all-linear"


Tensors = tuple[tuple[tuple[int, ...], int, str, bool], ...]  # (shape, copies, kind, in fp32?)
Sizes = list[tuple[int, int]]  # (bytes of one tensor, copies)
Trained = list[tuple[tuple[int, ...], int, int, str]]  # (shape, copies, bytes per element, kind)


@lru_cache(maxsize=4096)
def base_tensors(model: Model, head: str) -> Tensors:
    """Tensors of the base and its head; an architecture without closed form is one lump."""
    if has_weights(model):
        flow = FLOWS.get(model.model_type)
        wide = flow.fp32 if flow else coefficients.kept_in_fp32(model)
        found = [
            (w.shape, w.copies, w.kind, w.name.rpartition(".")[2] in wide)
            for w in weights(model)
            if w.kind != "head" or head in ("lm", "value")
        ]
    else:
        lump = model.params if head in ("lm", "value") else model.backbone_params
        found = [((lump,), 1, "linear", False)]
    if head in ("score", "value"):
        found.append(((1, model.score_head_params), 1, "score", False))
    return tuple(found)


@lru_cache(maxsize=4096)
def adapter_tensors(
    model: Model, rank: int, targets: str | tuple[str, ...]
) -> tuple[tuple[tuple[int, ...], int, str], ...]:
    """LoRA's A and B of every targeted linear (arXiv 2106.09685): rank x inputs, outputs x rank."""
    if coefficients.is_traced(model):
        traced = coefficients.entry(model)["adapters"][str(targets)]
        return tuple(((ranks * rank, side), n, "adapter") for ranks, side, n in traced)
    place, flow = LAYOUTS[model.model_type].attention, FLOWS.get(model.model_type)
    experts = flow is not None and flow.adapted_experts and targets == "all-linear"
    found: list[tuple[tuple[int, ...], int, str]] = []
    for w in weights(model):
        leaf = w.name.rpartition(".")[2]
        if w.kind == "linear":
            if targets == "all-linear":
                chosen = not (experts and leaf in EXPERT_LINEARS)
            elif targets == "attention":
                chosen = w.name.startswith(place + ".")
            else:
                chosen = leaf in targets
            if chosen:
                found += [((rank, side), w.copies, "adapter") for side in w.shape]
        elif experts and w.kind == "router" and len(w.shape) == 2:
            found += [((rank, side), w.copies, "adapter") for side in w.shape]
        elif (
            experts and w.kind == "expert"
        ):  # a rank for each expert, two where gate and up are fused
            ranks = w.shape[0] * rank * (2 if leaf == "gate_up_proj" else 1)
            found += [((ranks, side), w.copies, "adapter") for side in w.shape[1:]]
    return tuple(found)


def stored_sizes(shape: tuple[int, ...], weight: int, stored: str) -> tuple[int, ...]:
    """Bytes of each tensor that keeps the weights of one linear layer (bitsandbytes 0.50).

    nf4: half a byte, one byte of scale per 64, fp32 per 256 scales, their mean, the 16 values;
    int8: one byte, and an fp32 scale per row.
    """
    elements = prod(shape)
    if stored == "nf4":
        scales = -(-elements // 64)
        return (-(-elements // 2), scales, 4 * -(-scales // 256), 4, 64)
    if stored == "int8":
        return (elements, 4 * shape[0]) if len(shape) > 1 else (elements,)
    return (elements * weight,)


def total(sizes: Sizes) -> int:
    return sum(size * copies for size, copies in sizes)


def rounding(sizes: Sizes) -> tuple[int, int]:
    """(bytes counted as allocated, bytes only reserved) that the allocator adds to these tensors.

    Blocks are multiples of 512 B. A tensor of 10 MiB or more has a segment of its own, a multiple
    of 2 MiB; a rest of up to 1 MiB is not split off and counts (c10 CUDACachingAllocator 2.13).
    """
    counted = cached = 0
    for size, copies in sizes:
        block = -(-size // 512) * 512
        rest = -block % (2 * MIB) if block >= 10 * MIB else 0
        if rest <= MIB:
            block, rest = block + rest, 0
        counted += (block - size) * copies
        cached += rest * copies
    return counted, cached


def weight_sizes(role: Role, cards: int = 1) -> Sizes:
    """(bytes of one tensor, copies) of everything the role holds in weights, adapters left out.

    cards: among how many each parameter is split. The scales of 4-bit weights are no parameters,
    and LLM.int8's cannot do without theirs: each card holds those whole.
    """
    cards = 1 if role.stored == "int8" else cards
    if not role.base:
        return [(role.model.score_head_params * role.adapter, 1)] if role.head == "score" else []
    sizes = []
    for shape, copies, kind, wide in base_tensors(role.model, role.head):
        stored = role.stored if kind == "linear" else "plain"
        size = (role.adapter or role.weight) if kind == "score" else role.weight
        size = 4 if wide else size
        first, *scales = stored_sizes(shape, size, stored)
        sizes += [(-(-first // cards), copies), *((part, copies) for part in scales)]
    if role.model.model_type == "gpt_neo":  # each layer holds a causal mask of its own, as a buffer
        sizes.append((role.model.max_position_embeddings**2, role.model.num_layers))
    return sizes


def trained(role: Role) -> Trained:
    """The tensors that get gradients; the towers of a vision model see no images here."""
    if role.tuning == "full":
        return [
            (shape, copies, 4 if wide else role.weight, kind)
            for shape, copies, kind, wide in base_tensors(role.model, role.head)
            if kind != "tower"
        ]
    if not role.tuning:
        return []
    found: Trained = [
        (shape, copies, role.adapter, kind)
        for shape, copies, kind in adapter_tensors(role.model, role.rank, role.targets)
    ]
    if role.head in ("score", "value"):
        found.append(((1, role.model.score_head_params), 1, role.adapter, "score"))
    return found


def adapter_sizes(role: Role) -> Sizes:
    """(bytes of one tensor, copies) of the LoRA weights, trained or not."""
    if not role.rank:
        return []
    found = adapter_tensors(role.model, role.rank, role.targets)
    return [(prod(shape) * role.adapter, copies) for shape, copies, _ in found]


def gradient_sizes(role: Role) -> Sizes:
    """(bytes of one gradient, copies): of the weight's own type."""
    return [(prod(shape) * size, copies) for shape, copies, size, _ in trained(role)]


def state_sizes(role: Role, optimizer: str, master: bool, paged: bool) -> Sizes:
    """(bytes of one state, copies) after the first step; the paged ones or those on the card."""
    sizes: Sizes = []
    for shape, copies, size, kind in trained(role):
        elements = prod(shape)
        managed = optimizer.startswith("paged") and elements >= PAGED_FROM
        if managed != paged:
            continue
        if master and size < 4:
            sizes.append((4 * elements, copies))
        states = _states(shape, elements, 4 if master else size, kind, optimizer)
        sizes += [(state, copies) for state in states]
    return sizes


def _states(
    shape: tuple[int, ...], elements: int, size: int, kind: str, optimizer: str
) -> tuple[int, ...]:
    """Bytes of each state of one tensor."""
    if optimizer == "sgd":
        return ()
    if optimizer.endswith("8bit"):
        if elements < SMALL_8BIT:
            return (4 * elements, 4 * elements)
        scales = 4 * -(-elements // 256)  # one fp32 scale a block of 256
        return (elements, elements, scales, scales)
    if optimizer == "lion":
        return (4 * elements,)  # bitsandbytes keeps 32-bit states in fp32 whatever the weight
    if optimizer == "adafactor":  # transformers': fp32 means of rows and of columns
        if len(shape) < 2:
            return (4 * elements,)
        return (4 * elements // shape[-1], 4 * elements // shape[-2])
    if optimizer == "muon" and _is_matrix(shape, kind):
        return (size * elements,)
    return (size * elements, size * elements)


def _is_matrix(shape: tuple[int, ...], kind: str) -> bool:
    """What Muon takes: the matrices of the blocks; embeddings, heads and norms go to AdamW."""
    return len(shape) == 2 and kind in ("linear", "router", "adapter")


def step_temporary(role: Role, optimizer: str, master: bool) -> tuple[int, str]:
    """(bytes, how) that the optimizer needs while it steps."""
    parts = trained(role)
    every = sum(prod(shape) * copies * (4 if master else size) for shape, copies, size, _ in parts)
    # fp32 copies of 16-bit gradients
    copies32 = sum(4 * prod(s) * n for s, n, size, _ in parts if size < 4) if master else 0
    if optimizer == "adamw":
        return copies32 + every, "foreach: square roots of all second moments at once"
    if optimizer == "adafactor":
        # One tensor at a time, its update beside the next; in 16 bits fp32 gradient and weight too.
        sizes = [prod(shape) * (16 if size < 4 else 8) for shape, _, size, _ in parts]
        return copies32 + max(sizes, default=0), "fp32 copies of the largest tensor"
    if optimizer == "muon":
        rest = sum(
            prod(shape) * copies * size
            for shape, copies, size, kind in parts
            if not _is_matrix(shape, kind)
        )
        matrices = [
            prod(shape) * (size + 2 + (2 if size > 2 else 0)) + 6 * min(shape) ** 2
            for shape, _, size, kind in parts
            if _is_matrix(shape, kind)
        ]  # its update, that in bf16, the next iterate, and three small squares
        return copies32 + max(rest, *matrices, 0), "square roots of AdamW's, or one matrix of Muon"
    return copies32, "fp32 copies of the gradients" if master else "none"


def kv_cache(model: Model, rows: int, tokens: int, k_bytes: float, v_bytes: float = 0) -> int:
    """K and V of `rows` sequences: sliding layers keep at most their window, MLA one latent.

    k_bytes, v_bytes: of one element; V's are K's where they are not given.
    """
    if model.kv_cache_groups is None:
        raise FitCheckError(
            f"what {model.id} caches for each token is not known, so generation is not modelled",
            "choose another model, or a method without generation (sft, dpo, reward)",
        )
    groups, sizes = model.kv_cache_groups, (k_bytes, v_bytes or k_bytes)
    kept = sum(_kept(g, *sizes) * min(tokens, g.window or tokens) for g in groups)
    return int(rows * (kept + recurrent_state(model)))


def recurrent_state(model: Model) -> int:
    """Bytes that recurrent and convolution layers keep of one sequence, whatever its length."""
    return coefficients.state(model)


def _kept(group: KVGroup, k_bytes: float, v_bytes: float) -> float:
    """Bytes of K and V of one token, in all layers of a group."""
    return group.layers * (group.k_elems_per_token * k_bytes + group.v_elems_per_token * v_bytes)


def kv_beyond(model: Model, rows: int, tokens: int, k_bytes: float, v_bytes: float) -> int:
    """What layers with a window still hold of a prompt that was just read, beyond their window.

    Their cache is a view of the whole prompt's keys and values until the next token comes:
    DynamicSlidingWindowLayer of transformers (cache_utils.py).
    """
    groups = model.kv_cache_groups or ()
    beyond = sum(_kept(g, k_bytes, v_bytes) * max(0, tokens - (g.window or tokens)) for g in groups)
    return int(rows * beyond)


def kv_growth(model: Model, rows: int, tokens: int, k_bytes: float) -> int:
    """While a cache grows by a token, the old K of one layer lies beside its longer copy."""
    groups = model.kv_cache_groups or ()
    sizes = [g.k_elems_per_token * min(tokens, g.window or tokens) for g in groups]
    return int(rows * max(sizes, default=0) * k_bytes)


def weights_why(role: Role) -> str:
    """The sum of a role's weights in words."""
    parts: dict[str, int] = {}
    for shape, copies, kind, wide in base_tensors(role.model, role.head) if role.base else ():
        name = "linear" if kind == "linear" and role.stored != "plain" else "other"
        name = "fp32" if wide and name == "other" and role.weight != 4 else name
        parts[name] = parts.get(name, 0) + prod(shape) * copies
    words = [f"{parts.get('other', 0):,} x {role.weight} B"]
    if "fp32" in parts:
        words.append(f"{parts['fp32']:,} kept in fp32")
    if "linear" in parts:
        words.append(f"{parts['linear']:,} in {role.stored}")
    return f"{role.model.id}: " + " + ".join(words)


def trained_why(role: Role) -> str:
    """The parameters that train, by the size of their type."""
    sums: dict[int, int] = {}
    for shape, copies, size, _ in trained(role):
        sums[size] = sums.get(size, 0) + prod(shape) * copies
    return " + ".join(f"{n:,} parameters x {size} B" for size, n in sums.items())


def states_why(role: Role, optimizer: str, master: bool) -> str:
    """What the optimizer keeps for each trained parameter."""
    count = sum(prod(shape) * copies for shape, copies, _, _ in trained(role))
    how = " with fp32 master weights" if master else ""
    return f"{optimizer}{how}, of {count:,} parameters"


def kv_why(model: Model, rows: int, tokens: int, k_bytes: float, v_bytes: float = 0) -> str:
    """The cache, group by group."""
    k, v = k_bytes, v_bytes or k_bytes
    parts = [
        f"{g.layers} {g.kind} layers x {min(tokens, g.window or tokens)} tokens x "
        + (
            f"{g.k_elems_per_token + g.v_elems_per_token} x {k:g} B"
            if k == v
            else f"({g.k_elems_per_token} x {k:g} B + {g.v_elems_per_token} x {v:g} B)"
        )
        for g in model.kv_cache_groups or ()
    ]
    state = recurrent_state(model)
    more = f" + {rows} recurrent states x {state:,} B" if state else ""
    return f"{rows} sequences x ({' + '.join(parts)}){more}"
