"""What stays on a card through a phase: weights, gradients, optimizer states of a role."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

from fitcheck import kernels, memory, quants, shards
from fitcheck.memory import Role
from fitcheck.plan import CHECKPOINT, Plan
from fitcheck.report import CACHED, OUTSIDE, Term

Terms = tuple[Term, ...]


@lru_cache(maxsize=8192)
def stays(
    kind: str, role: Role, optimizer: str, master: bool, cards: int = 1, flat: bool = False
) -> Terms:
    """Weights, gradients or optimizer states of one role, and how the allocator rounds them.

    cards: among how many they are split; flat: as one buffer.
    """
    name, found = role.name, []
    if kind == "weights":
        sizes = memory.weight_sizes(role, cards)
        how = partial(memory.weights_why, role)
    elif kind == "gradients":
        sizes = shards.split(memory.gradient_sizes(role), cards, flat)
        how = partial(memory.trained_why, role)
    else:
        sizes = memory.state_sizes(role, optimizer, master, paged=False)
        sizes = shards.split(sizes, cards, flat)
        how = partial(memory.states_why, role, optimizer, master)
    found.append(Term(kind, name, memory.total(sizes), partial(shards.share_why, cards, how)))
    if kind == "weights":
        if adapters := shards.split(memory.adapter_sizes(role), cards, False):
            why = f"LoRA rank {role.rank} on {role.targets}, {role.adapter} B each"
            found.append(Term("adapters", name, memory.total(adapters), why))
            sizes = sizes + adapters
    elif kind != "gradients" and optimizer.startswith("paged"):
        states = memory.state_sizes(role, optimizer, master, paged=True)
        paged = memory.total(shards.split(states, cards, flat))
        why = "CUDA managed memory: beside the allocator, may spill to RAM"
        found.append(Term("paged states", name, paged, why, OUTSIDE))
    return (*found, *_rounding(kind, name, sizes))


@lru_cache(maxsize=8192)
def quantized(role: Role, quant: str, engine: str = "transformers") -> Terms:
    """The weights of a model to run, in the type they are stored in."""
    model = role.model
    if engine == "llama.cpp":  # rows of an embedding are looked up in RAM (llama-model.cpp)
        held = quants.gguf_parts(model, quant)
        why = f"{model.id}: {held.bytes:,} B in {quant}, tensor by tensor"
        why += f"; the embedding's {held.embedding:,} B stay in RAM" if held.embedding else ""
        return (Term("weights", role.name, held.bytes - held.embedding, why),)
    if quant in quants.PLAIN:
        size = memory.total(memory.weight_sizes(role))
        return (Term("weights", role.name, size, partial(memory.weights_why, role)),)
    why = f"{model.id}: {model.params:,} parameters in {quant}, tensor by tensor"
    if model.checkpoint and quant == CHECKPOINT:
        held = model.checkpoint
        kinds = " + ".join(f"{size:,} in {name}" for name, size in held.types)
        why = f"{model.id}: {kinds} B, as its {held.format} files have them"
    return (Term("weights", role.name, quants.weight_bytes(model, quant), why),)


def _rounding(kind: str, name: str, sizes: memory.Sizes) -> Iterator[Term]:
    counted, cached = memory.rounding(sizes)
    if counted:
        why = f"{kind}: blocks of 512 B; from 10 MiB on, segments of 2 MiB"
        yield Term("allocator rounding", name, counted, why)
    if cached:
        yield Term("segment rests", name, cached, f"{kind}: reserved, not used", CACHED)


def fixed(plan: Plan) -> Iterator[Term]:
    """What is there whatever runs: the context, NCCL, the workspace of products."""
    if plan.gpu.vendor != "apple":
        why = "CUDA context and loaded kernels: an estimate, 256 to 492 MiB were seen"
        yield Term("CUDA context", "card", kernels.CONTEXT, why, OUTSIDE)
    yield from shards.nccl(plan)
    if size := kernels.cublas_workspace(plan.gpu):
        threads = 1 if plan.method == "inference" else 2
        why = f"{threads} x {size:,} B, one a thread that multiplies (forward, backward), kept"
        yield Term("cuBLAS workspace", "card", threads * size, why)
