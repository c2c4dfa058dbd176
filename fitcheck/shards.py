"""Several cards side by side: what each holds a share of, and what sharing takes beside it.

    cards(plan, "gradients")           # among how many cards gradients are split; 1: not at all
    working(plan, policy, "backward", "last layer")  # Terms that sharing adds while a role runs

All cards do the same, so one of them, the one with the largest share, stands for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from math import prod
from typing import NamedTuple

from fitcheck import memory
from fitcheck.memory import Role, Sizes
from fitcheck.plan import Plan
from fitcheck.report import CACHED, OUTSIDE, Term
from fitcheck.roles import BYTES
from fitcheck.weights import has_weights

MIB = 2**20
# What NCCL holds on a card for one communicator, outside the allocator. A rule of thumb of its
# issues (#391, #864, #986): 4 MiB a channel and peer (NCCL_BUFFSIZE), and its own kernels; up to
# 1.6 GB were reported. Not measured here.
NCCL = 512 * MIB
# DeepSpeed 0.19.8, runtime/zero/config.py: elements, whatever the model's size. Its
# allgather_bucket_size takes nothing: weights are gathered in place (runtime/utils.py,
# all_gather_dp_groups).
REDUCE_BUCKET = 500_000_000
SUB_GROUP = 1_000_000_000  # sub_group_size: stage 3 steps so much of a card's share at a time
LIVE_PARAMETERS = 1_000_000_000  # stage3_max_live_parameters; prefetching stays within it

STATES, GRADIENTS, WEIGHTS = "optimizer states", "gradients", "weights"
SPLIT = {  # ZeRO's stages (arXiv 1910.02054, figure 1); FSDP's FULL_SHARD is the third
    **{"none": (), "ddp": (), "zero1": (STATES,), "zero2": (STATES, GRADIENTS)},
    **{"zero3": (STATES, GRADIENTS, WEIGHTS), "fsdp": (STATES, GRADIENTS, WEIGHTS)},
}


def cards(plan: Plan, kind: str) -> int:
    """Among how many cards weights, gradients or optimizer states are split; 1: each holds all."""
    return plan.gpus if kind in SPLIT[plan.sharding] else 1


def stepped_at_once(plan: Plan, role: Role, size: int) -> int:
    """Of the `size` bytes that a whole step needs beside the states, those that a card needs."""
    share = -(-size // cards(plan, STATES))
    if plan.sharding != "zero3":
        return share
    elements = sum(prod(shape) * copies for shape, copies, _, _ in memory.trained(role))
    return min(share, -(-size * SUB_GROUP // max(1, elements)))


def gathers(plan: Plan) -> bool:
    """Whether weights are put together for each pass: of every role, the frozen ones too.

    TRL shards reference and reward model with the policy (prepare_deepspeed under ZeRO-3,
    prepare_fsdp); under ddp, zero1 and zero2 each card holds them whole.
    """
    return cards(plan, WEIGHTS) > 1


def split(sizes: Sizes, number: int, flat: bool) -> Sizes:
    """One card's share: of each tensor, or of all in one flat buffer; rounded up."""
    if number == 1:
        return sizes
    if flat:
        return [(-(-memory.total(sizes) // number), 1)]
    return [(-(-size // number), copies) for size, copies in sizes]


def is_flat(plan: Plan) -> bool:
    """DeepSpeed keeps the shares of gradients and states in one buffer, FSDP one by one."""
    return plan.sharding != "fsdp"


def in_ram(plan: Plan, kind: str) -> bool:
    """What goes to RAM with the optimizer: DeepSpeed's split gradients, FSDP's shares.

    ZeRO-Offload leaves only a bucket on the card (stage_1_and_2.py, stage3.py: cpu_offload); FSDP's
    CPUOffload takes weights, gradients and states together.
    """
    if "optimizer" not in (plan.offload or ()):
        return False
    if kind == WEIGHTS:
        return plan.sharding == "fsdp"
    return kind == GRADIENTS and cards(plan, kind) > 1


def always(plan: Plan, role: Role) -> Iterator[Term]:
    """What sharing keeps on the card for a role that trains, from its first step on."""
    if plan.sharding == "ddp":
        size = memory.total(memory.gradient_sizes(role))
        why = "DDP's buckets: a second copy of all gradients (gradient_as_bucket_view is off)"
        yield Term("reduce buckets", role.name, size, why)
    elif plan.sharding == "zero3":
        yield _reduce_bucket(role)
        if not in_ram(plan, GRADIENTS):
            yield Term("gradients", role.name, *_flat_gradients(role, plan.gpus))


def working(plan: Plan, role: Role, part: str, piece: str) -> tuple[Term, ...]:
    """What sharing adds while a piece of a role runs.

    part: forward, loss, backward or no-grad; piece: the moment's name, such as "last layer", or
    "held" between forward and backward, while something else runs.
    """
    if part == "backward" and plan.sharding in ("zero1", "zero2"):
        return (_reduce_bucket(role),)
    if not gathers(plan) or not role.base or role.stored == "int8":
        return ()
    width = gathered_width(plan, role)
    if plan.sharding == "zero3":
        return tuple(_fetched(role, width))
    return tuple(_wrapped(role, width, part, layers_gathered(plan, part, piece)))


def _fetched(role: Role, width: int) -> Iterator[Term]:
    """ZeRO-3 fetches module by module, and lets go what is not used again soon."""
    why = "the largest layer, or an embedding, gathered while it runs"
    found = units(role, width)
    largest = max(found.table, found.block)
    yield Term("unsharded block", role.name, largest, why)
    whole = memory.total(memory.weight_sizes(role))
    live = min(whole, LIVE_PARAMETERS * width)
    why = f"stage3_max_live_parameters {LIVE_PARAMETERS:,} x {width} B, at most all, less the block"
    yield Term("live parameters", role.name, max(0, live - largest), why)


def _wrapped(role: Role, width: int, part: str, layers: int) -> Iterator[Term]:
    """FSDP wraps each layer; embedding, last norm and head are the root, gathered to the end."""
    root, _, block = units(role, width)
    yield Term("unsharded root", role.name, root, "embedding, last norm and head, gathered")
    why = "one layer, gathered while it runs" + (", and the next one" if layers > 1 else "")
    yield Term("unsharded block", role.name, layers * block, why)
    if layers and part != "backward":
        why = "the next layer is gathered on another stream before this one's block is free"
        yield Term("prefetched block", role.name, block, why, CACHED)


def layers_gathered(plan: Plan, part: str, piece: str) -> int:
    """Layers that FSDP holds gathered at a moment.

    As torch 2.13 does it, on its fake process group (tests/fsdp_world.py): backward gathers the
    next layer (BACKWARD_PRE) before one runs; not where reentrant checkpointing runs it again.
    """
    if part == "backward":
        again = plan.checkpointing and plan.recipe == "hf-4.48"  # reentrant
        return {"logits": 1, "last layer": 1 if again else 2, "first layer": 1}.get(piece, 0)
    return int(piece in ("layers", "last layer"))


def hooked(plan: Plan, role: Role, hidden: int) -> Iterator[Term]:
    """What FSDP's hooks on frozen layers still hold when backward reaches the first layer.

    hidden: bytes of one layer's input. Each hook keeps the node of its layer's input, and reentrant
    checkpointing makes that input a leaf: it and its gradient live until backward is over
    (torch 2.13, fsdp/_runtime_utils.py, _register_post_backward_reshard_only_hook; counted by
    tests/fsdp_world.py). The gradients of the first two layers are there anyway, or yet to come.
    """
    layers = role.model.num_layers or 1
    frozen = role.tuning in ("lora", "qlora")
    if plan.sharding == "fsdp" and frozen and plan.checkpointing and plan.recipe == "hf-4.48":
        inputs, gradients = layers - 1, max(0, layers - 2)
        why = f"{inputs} inputs and {gradients} gradients of layers x {hidden:,} B (reentrant)"
        yield Term("held by FSDP's hooks", role.name, (inputs + gradients) * hidden, why)


def generation(plan: Plan, role: Role) -> tuple[Term, ...]:
    """All weights at once while transformers generates.

    TRL: ds3_gather_for_generation, on by default; FSDP.summon_full_params.
    """
    if not gathers(plan) or role.stored == "int8":
        return ()
    size = memory.total(memory.weight_sizes(role)) + memory.total(memory.adapter_sizes(role))
    return (Term("gathered weights", role.name, size, "all of them, for generation"),)


def nccl(plan: Plan) -> tuple[Term, ...]:
    """NCCL's own buffers, which no allocator sees; copies that serve have nothing to say."""
    if plan.gpus == 1 or plan.method == "inference":
        return ()
    why = "rule of thumb for one communicator (NVIDIA/nccl #391, #986); up to 1.6 GB were reported"
    return (Term("NCCL", "card", NCCL, why, OUTSIDE),)


def gathered_width(plan: Plan, role: Role) -> int:
    """Bytes per element of plain weights, gathered: FSDP's MixedPrecision makes 16 bits of fp32."""
    if plan.sharding == "fsdp" and plan.autocast:
        return min(role.weight, BYTES[plan.compute_dtype])
    return role.weight


class Units(NamedTuple):
    """Bytes outside of the layers, of the largest tensor there, of the largest layer."""

    root: int
    table: int
    block: int


@lru_cache(maxsize=4096)
def units(role: Role, width: int) -> Units:
    """What of a role's weights is gathered together.

    Scales of 4-bit weights are no parameters: nobody splits or gathers them. Of layers of several
    kinds, none is larger than what all kinds have in common and the most that one adds.
    """
    model, layers, sizes = role.model, role.model.num_layers or 1, _gathered(role, width)
    if not has_weights(model):  # its layers are known as a sum only
        table = (model.params_embedding or 0) * width
        root = table + model.head_params * width
        return Units(root, table, -(-max(0, memory.total(sizes) - root) // layers))
    mixtures = model.moe.moe_layers if model.moe else 0
    root, table, common, dense, mixed = 0, 0, 0.0, 0, 0
    for size, copies in sizes:
        if copies == 1:
            root, table = root + size, max(table, size)
        elif copies >= layers:
            common += size * copies / layers
        elif copies == mixtures:
            mixed += size
        else:
            dense += size
    return Units(root, table, int(common) + max(dense, mixed))


def gathered_bytes(role: Role, width: int) -> int:
    """All of a role's weights, gathered once."""
    return memory.total(_gathered(role, width))


def _gathered(role: Role, width: int) -> Sizes:
    """(bytes, copies) of each tensor, gathered: plain ones of `width` bytes an element."""
    sizes = []
    for shape, copies, kind, wide in memory.base_tensors(role.model, role.head):
        stored = role.stored if kind == "linear" else "plain"
        sizes.append((memory.stored_sizes(shape, 4 if wide else width, stored)[0], copies))
    return sizes


def _reduce_bucket(role: Role) -> Term:
    size = role.adapter if role.tuning in ("lora", "qlora") else role.weight
    why = f"DeepSpeed's reduce_bucket_size, {REDUCE_BUCKET:,} x {size} B"
    return Term("reduce bucket", role.name, REDUCE_BUCKET * size, why)


def _flat_gradients(role: Role, number: int) -> tuple[int, partial[str]]:
    size = memory.total(split(memory.gradient_sizes(role), number, flat=True))
    return size, partial(share_why, number, partial(memory.trained_why, role))


def share_why(number: int, why: partial[str]) -> str:
    """The sum behind a share."""
    return f"1/{number} of {why()}" if number > 1 else why()
