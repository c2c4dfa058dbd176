"""What the host must hold: loading and offloading need RAM; that verdict is part of the answer."""

from __future__ import annotations

from functools import lru_cache
from math import prod

from fitcheck import memory, quants
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
    process = Term("process", "host", PROCESS, "Python, torch and transformers: 692 MiB seen")
    loading = max((_loading(plan, role) for role in held.values()), key=lambda term: term.bytes)
    away = [_weights(role) for role in held.values() if role.name in (plan.offload or ())]
    if plan.offload and "optimizer" in plan.offload:
        away += [_optimizer(role) for role in held.values() if role.tuning]
    steady = (process, *away)
    load = (process, *(term for term in away if term.name == "offloaded weights"), loading)
    worst = max((("load", load), ("step", steady)), key=lambda pair: _sum(pair[1]))
    return Ram(_sum(worst[1]), plan.ram, worst[0], worst[1])


def _sum(terms: tuple[Term, ...]) -> int:
    return sum(term.bytes for term in terms)


@lru_cache(maxsize=4096)
def _loading(plan: Plan, role: Role) -> Term:
    """from_pretrained reads a model on the CPU, one at a time, before it moves to the card."""
    size = memory.total(memory.weight_sizes(role))
    if role.stored != "plain":  # quantized on the card from 16-bit weights
        size = 2 * sum(prod(s) * n for s, n, _, _ in memory.base_tensors(role.model, role.head))
    elif plan.quant:  # the checkpoint itself has that type
        size = quants.weight_bytes(role.model, plan.quant)
    return Term("loading", role.name, size, "read on the CPU, then moved to the card")


def _weights(role: Role) -> Term:
    size = memory.total(memory.weight_sizes(role))
    return Term("offloaded weights", role.name, size, "kept in RAM while not in use")


def _optimizer(role: Role) -> Term:
    parts = memory.trained(role)
    count = sum(prod(shape) * copies for shape, copies, _, _ in parts)
    gradients = sum(prod(shape) * copies * size for shape, copies, size, _ in parts)
    why = f"{count:,} parameters x {ADAM} B (fp32 weight, two states), and their gradients"
    return Term("optimizer on the CPU", role.name, ADAM * count + gradients, why)
