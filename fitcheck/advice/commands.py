"""A plan as the command that asks for it: `fitcheck check MODEL --gpu X --method ppo ...`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from fitcheck import catalog
from fitcheck.errors import FitCheckError
from fitcheck.gpu import GPU
from fitcheck.model import Model
from fitcheck.plan import KNOBS, Plan
from fitcheck.rules import flag_of

GIB = 2**30


def command(plan: Plan, verb: str = "check") -> str:
    """The command line that asks for this plan; a live card is this machine's, without --gpu."""
    return shlex.join(["fitcheck", verb, _name(plan.model), *_hardware(plan), *_words(_set(plan))])


def flags(changes: Mapping[str, Any]) -> str:
    """The flags of some fields, a model without any: `--tuning qlora --batch 4`."""
    model = [_name(changes["model"])] if "model" in changes else []
    rest = {name: value for name, value in changes.items() if name != "model"}
    return shlex.join([*model, *_words(rest)])


def _name(model: Model) -> str:
    """The id that the catalog or the Hub knows; a model read from a file does not tell its path."""
    return model.id if "/" in model.id else f"path/to/{model.id}"


def _set(plan: Plan) -> dict[str, Any]:
    names = [name for name in KNOBS if name in plan.given]
    return {"method": plan.method, **{name: getattr(plan, name) for name in names}}


def _hardware(plan: Plan) -> Iterable[str]:
    if plan.memory == plan.gpu.usable_memory() and (name := card_name(plan.gpu)):
        yield from ("--gpu", name)
    for name, usual in (("gpus", 1), ("nodes", 1), ("ram", None)):
        value = getattr(plan, name)
        if value != usual:
            yield from (flag_of(name), _size(value) if name == "ram" else str(value))


@lru_cache(maxsize=256)
def card_name(gpu: GPU) -> str:
    """The shortest name that means this very card in the catalog; empty when none does."""
    names = {name.lower().replace(" ", "-") for name in (gpu.id, gpu.name, *gpu.aliases)}
    for name in sorted(names, key=lambda name: (len(name), name)):
        try:
            if catalog.find_gpu(name) == gpu:
                return name
        except FitCheckError:
            continue  # this alias means several cards
    return ""


def _words(changes: Mapping[str, Any]) -> Iterable[str]:
    for name, value in changes.items():
        yield flag_of(name)
        yield _text(name, value)


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Model):
        return _name(value)
    if isinstance(value, tuple):
        return ",".join(value) or "none"
    return str(value)


def _size(size: int) -> str:
    return f"{size // GIB}gib" if size % GIB == 0 else str(size)
