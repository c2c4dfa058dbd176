"""What to measure on this machine: the plan that was asked for, or the largest sensible one.

plan, environment = plan_here(None, {"method": "ppo"})
plan.model.id            # "Qwen/Qwen2.5-1.5B": it fits this card with a tenth to spare
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fitcheck import catalog, kernels, machine
from fitcheck.advice.fix import judged
from fitcheck.answer import resolve
from fitcheck.errors import FitCheckError
from fitcheck.gpu import UsableMemory
from fitcheck.machine import Accelerator
from fitcheck.plan import Plan

# Dense language models of 0.1 to 72 B, each about twice the one before it, whose classes every
# transformers from 5.0 on has; not gated.
SENSIBLE = (
    *("Qwen/Qwen2.5-72B", "Qwen/Qwen2.5-32B", "Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-7B"),
    *("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-0.5B"),
    *("HuggingFaceTB/SmolLM2-360M", "HuggingFaceTB/SmolLM2-135M"),
)
SPARE = 1.1  # times the estimate's peak
# On a CPU: the catalog's smallest model, and a step of a second or two. Eager attention runs the
# same operators there as on a card.
TINY = "EleutherAI/pythia-14m"
SMALL: dict[str, Any] = {"batch": 4, "attention": "eager"}
SHORT: dict[str, dict[str, Any]] = {
    "ppo": {"prompt": 64, "response": 32, "epochs": 1},
    "grpo": {"prompt": 64, "response": 32, "group": 4},
    "inference": {"context": 128, "concurrency": 4, "attention": "eager"},
}


class Here(NamedTuple):
    """A plan for this machine, and the variables of the process that shall run it."""

    plan: Plan
    environment: dict[str, str]


def plan_here(
    model: str | None, fields: Mapping[str, Any], found: machine.Machine | None = None
) -> Here:
    """The plan on this machine's card; on a machine without one, for its CPU.

    found: the machine as it was before anything ran on it; by default as it is now.
    Without a model: the largest of SENSIBLE that the estimate says fits with a tenth to spare.
    FitCheckError for a card that is not here, and where nothing fits.
    """
    found = found or machine.detect()
    if not found.accelerators:
        wishes = dict(fields) if model else {**_small(fields), **fields}
        return Here(_in_ram(resolve(model or TINY, **wishes), found), {})
    card = _asked(found, fields.get("gpu"))
    ram = found.ram.usable_bytes if found.ram else None
    wishes = {"ram": ram, **fields, "gpu": card.card, "memory": card.usable}
    environment = {}
    if len(found.accelerators) > 1 and card.vendor == "nvidia" and card.uuid:
        environment["CUDA_VISIBLE_DEVICES"] = card.uuid
    elif len(found.accelerators) > 1 and card.vendor == "amd":
        environment["HIP_VISIBLE_DEVICES"] = str(card.index)
    return Here(resolve(model, **wishes) if model else _largest(wishes), environment)


def _in_ram(plan: Plan, found: machine.Machine) -> Plan:
    """The plan; FitCheckError where its step is too large for the memory of a CPU."""
    needed, usable = judged(plan).allocated_bytes, found.ram.usable_bytes if found.ram else None
    if usable is not None and needed > usable:
        raise FitCheckError(
            f"no GPU was found, and for this CPU the step is too large: it takes {needed:,} B of "
            f"RAM, {usable:,} B are usable",
            "leave out the model for a tiny one, or trace the step: fitcheck dryrun",
        )
    return plan


def _small(fields: Mapping[str, Any]) -> dict[str, Any]:
    method = fields.get("method", "ppo")
    own = SHORT.get(method, {"sequence": 128})
    return own if method == "inference" else SMALL | own


def _asked(found: machine.Machine, name: str | None) -> Accelerator:
    """The card of that name, or the freest one."""
    card = machine.best(found)
    assert card is not None
    if name is None:
        return card
    wanted = catalog.find_gpu(name)
    same = [other for other in found.accelerators if other.card.id == wanted.id]
    if not same:
        raise FitCheckError(
            f"a measurement runs on this machine's {card.name}, not on {wanted.name}",
            "leave out --gpu; `fitcheck check` and `fitcheck dryrun` answer for other cards",
        )
    return max(same, key=lambda other: other.free_bytes)


def _largest(wishes: Mapping[str, Any]) -> Plan:
    for name in SENSIBLE:
        plan = resolve(name, **wishes)
        report = judged(plan)
        if report.verdict == "fits" and SPARE * report.peak_bytes <= report.usable_bytes:
            return plan
    raise FitCheckError(
        f"no model fits with a tenth to spare: {plan.memory.why}",
        "name a model, or make it smaller: --tuning lora, --micro-batch 1, --sequence 512",
    )


def limited(plan: Plan, limit_bytes: int) -> Plan:
    """The plan on a card that gives its allocator no more than that."""
    context = kernels.CONTEXT
    why = f"{limit_bytes:,} B for the allocator (--limit) and {context:,} B outside of it"
    memory = UsableMemory(limit_bytes + context, 0, 0, False, why)
    return plan.change(memory=memory)
