"""check(): names and wishes -> Plan -> Report. What the command line, the screen and a script call.

    report = check("llama-3.1-8b", method="ppo", gpu="rtx 4090", tuning="lora")
    report.verdict, report.peak_bytes
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fitcheck import catalog
from fitcheck.errors import FitCheckError
from fitcheck.fit import fit
from fitcheck.gpu import GPU, UsableMemory
from fitcheck.model import Model
from fitcheck.plan import KNOBS, Plan
from fitcheck.report import Report

DEFAULT_MODEL = "meta-llama/Llama-3.1-8B"
PRETENDED = "NVIDIA GeForce RTX 4090"  # where there is no card: the largest common consumer card


def check(model: str | Model = DEFAULT_MODEL, **wishes: Any) -> Report:
    """Does it fit? wishes: fields of Plan by name; `gpu` a name, by default this machine's card.

    Raises FitCheckError for unknown names, contradictory knobs, architectures not covered.
    """
    from fitcheck import accuracy  # it asks this module for its plans

    plan, card = _resolve(model, wishes)
    report = fit(plan, accuracy.stated(plan.method, "estimate"))
    return replace(report, notes=(card, *report.notes)) if card else report


def resolve(model: str | Model = DEFAULT_MODEL, **wishes: Any) -> Plan:
    """A Plan from names: looks up the catalog and, without `gpu`, this machine."""
    return _resolve(model, wishes)[0]


def _resolve(model: str | Model, wishes: Mapping[str, Any]) -> tuple[Plan, str]:
    """The plan, and what to say of a card that was not asked for by name."""
    fields = {name: value for name, value in wishes.items() if value is not None}
    unknown = fields.keys() - KNOBS.keys() - {"method", "gpu", "gpus", "nodes", "ram", "memory"}
    if unknown:
        raise FitCheckError(
            f"a plan has no field {min(unknown)!r}", f"its fields: {', '.join(KNOBS)}"
        )
    fields["model"] = catalog.find_model(model) if isinstance(model, str) else model
    for name in ("reward_model", "critic"):
        value = fields.get(name)
        if isinstance(value, str) and value not in KNOBS[name]["choices"]:
            fields[name] = _scorer(value)
    for name in ("offload", "lora_targets"):
        value = fields.get(name)
        if isinstance(value, list) or (isinstance(value, str) and "," in value):
            fields[name] = tuple(value if isinstance(value, list) else value.split(","))
        elif name == "offload" and isinstance(value, str):
            fields[name] = (value,)
    if isinstance(fields.get("memory"), Mapping):
        fields["memory"] = UsableMemory(**fields["memory"])
    gpu, said = fields.get("gpu"), ""
    if gpu is None:
        card, said = this_machine()
        fields = card | fields
    elif isinstance(gpu, str):
        fields["gpu"] = catalog.find_gpu(gpu)
        said = fields["gpu"].assumed
    return Plan(**fields), said


def plan_from(values: Mapping[str, Any]) -> Plan:
    """The Plan that `to_json` wrote; untrusted: unknown fields and bad values are FitCheckErrors."""
    if not isinstance(values, Mapping) or not isinstance(values.get("model"), str):
        raise FitCheckError("this is not a plan", "a JSON object with at least a model")
    fields = dict(values)
    try:
        return resolve(fields.pop("model"), **fields)
    except (TypeError, AttributeError, ValueError) as fault:
        raise FitCheckError(f"this is not a plan: {fault}", "see `fitcheck check --json`") from fault


def this_machine() -> tuple[dict[str, Any], str]:
    """gpu, memory and ram of this computer's freest card (or of a pretended one), and a word on it."""
    from fitcheck import machine  # probing is only paid for when no card was named

    found = machine.detect()
    card = machine.best(found)
    if card is None:
        gpu = catalog.find_gpu(PRETENDED)
        return {"gpu": gpu}, f"no GPU was found here: an empty {gpu.name} is pretended (--gpu)"
    ram = found.ram.usable_bytes if found.ram else None
    said = f"this machine's {card.name}, as free as it is now"
    if len(found.accelerators) > 1:
        said += f" (the freest of {len(found.accelerators)} cards)"
    return {"gpu": card.card, "memory": card.usable, "ram": ram}, said


def _scorer(name: str) -> Model:
    """A reward model or a plain model by name."""
    try:
        return catalog.architecture(catalog.find_reward_model(name))
    except FitCheckError as fault:
        try:
            return catalog.find_model(name)
        except FitCheckError:
            raise fault from None


_UNITS = {"": 1, "k": 1024, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "g": 2**30, "m": 2**20}


def parse(name: str, text: str) -> Any:
    """The value of a field as a user types it: 32k, 64gib, on, a,b,c."""
    kind = KNOBS[name]["kind"] if name in KNOBS else "int"
    if kind == "flag":
        if text not in ("on", "off"):
            raise FitCheckError(f"--{name.replace('_', '-')} cannot be {text!r}", "on or off")
        return text == "on"
    if kind == "int":
        return _number(name, text)
    if kind == "share":
        try:
            return float(text)
        except ValueError:
            raise FitCheckError(f"--{name} cannot be {text!r}", "a share such as 0.3") from None
    if kind == "list" and text not in KNOBS[name]["choices"]:
        return tuple(part for part in text.split(",") if part)
    if name == "offload":
        return (text,)
    return text


def _number(name: str, text: str) -> int:
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower().replace("_", ""))
    if match is None or match[2] not in _UNITS:
        example = "64gib" if name == "ram" else "512 or 32k"
        raise FitCheckError(
            f"--{name.replace('_', '-')} cannot be {text!r}", f"a number such as {example}"
        )
    value = float(match[1]) * _UNITS[match[2]]
    if value != int(value) and name != "ram":
        raise FitCheckError(f"--{name.replace('_', '-')} cannot be {text!r}", "a whole number")
    return int(value)
