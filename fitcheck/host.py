"""What the host must hold: loading and offloading need RAM; that verdict is part of the answer.

Several cards have a process each, and share one host.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

from fitcheck import memory, quants, shards
from fitcheck.memory import Role
from fitcheck.plan import Plan
from fitcheck.report import Ram, Term
from fitcheck.roles import roles

MIB = 2**20
# Resident size of Python with torch 2.13 (CUDA build), transformers and peft imported and a matrix
# product run: 692 MiB on Linux x86-64 (a real driver's own share is not in it).
PROCESS = 700 * MIB
ADAM = 12  # bytes per trained parameter of an Adam on the CPU: fp32 weight and two fp32 states


def ram(plan: Plan) -> Ram:
    """RAM at its worst: while the largest model is read, or while everything offloaded is there."""
    held = roles(plan)
    why = "Python, torch and transformers: 692 MiB seen" + _each(plan.gpus)
    process = Term("process", "host", PROCESS * plan.gpus, why)
    loading = max((_loading(plan, role) for role in held.values()), key=lambda term: term.bytes)
    away = [_weights(plan, role) for role in held.values() if role.name in (plan.offload or ())]
    if plan.offload and "optimizer" in plan.offload:
        away += [_optimizer(plan, role) for role in held.values() if role.tuning]
    steady = (process, *away)
    load = (process, *(term for term in away if term.name == "offloaded weights"), loading)
    worst = max((("load", load), ("step", steady)), key=lambda pair: _sum(pair[1]))
    return Ram(_sum(worst[1]), plan.ram, worst[0], worst[1])


def _sum(terms: tuple[Term, ...]) -> int:
    return sum(term.bytes for term in terms)


@lru_cache(maxsize=4096)
def _loading(plan: Plan, role: Role) -> Term:
    """from_pretrained reads a model on the CPU, one at a time, before it moves to the card.

    Each process reads its own; under FSDP the first alone (accelerate's cpu_ram_efficient_loading).
    """
    size = memory.total(memory.weight_sizes(role))
    if role.stored != "plain":  # quantized on the card from 16-bit weights
        size = 2 * sum(prod(s) * n for s, n, _, _ in memory.base_tensors(role.model, role.head))
    elif plan.quant:  # the checkpoint itself has that type
        size = quants.weight_bytes(role.model, plan.quant)
    readers = 1 if plan.sharding == "fsdp" else plan.gpus
    why = "read on the CPU, then moved to the card" + _each(readers)
    return Term("loading", role.name, size * readers, why)


def _each(number: int) -> str:
    return f", in {number} processes" if number > 1 else ""


def _weights(plan: Plan, role: Role) -> Term:
    number = shards.cards(plan, shards.WEIGHTS)
    size = memory.total(memory.weight_sizes(role, number)) * plan.gpus
    why = "kept in RAM while not in use" + _each(plan.gpus // number)
    return Term("offloaded weights", role.name, size, why)


def _optimizer(plan: Plan, role: Role) -> Term:
    """Of all cards together: split among them, or once for each."""
    parts = memory.trained(role)
    count = sum(prod(shape) * copies for shape, copies, _, _ in parts)
    gradients = sum(prod(shape) * copies * size for shape, copies, size, _ in parts)
    number = plan.gpus // shards.cards(plan, shards.STATES)
    why = f"{count:,} parameters x {ADAM} B (fp32 weight, two states), and their gradients"
    size = (ADAM * count + gradients) * number
    return Term("optimizer on the CPU", role.name, size, why + _each(number))
