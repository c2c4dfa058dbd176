"""The rows of a plan: which fields it has, what they may become, and the way there.

    fields_of(plan)                      # ["model", "method", "gpu", ..., "reference"]
    notch(plan, "batch", +1).batch       # 16
    put(plan, "tuning", "lora")          # the plan with that value, a default left a default

Everything derives from the fields of Plan; a field that is in no group below comes last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from fitcheck import catalog
from fitcheck.answer import parse, resolve_fields
from fitcheck.errors import FitCheckError
from fitcheck.gpu import GIB, GPU
from fitcheck.model import Model
from fitcheck.plan import KNOBS, METHODS, OFFLOADS, Plan
from fitcheck.rules import LARGEST
from fitcheck.text import gib

GROUPS = {
    "WHAT": ("model", "method"),
    "WHERE": ("gpu", "gpus", "nodes", "ram", "sharding"),
    "HOW": (
        *("tuning", "quant", "precision", "optimizer", "checkpointing", "lora_rank"),
        *("lora_targets", "adapter_precision", "attention", "padding", "loss", "kv_cache"),
    ),
    "BATCH": (
        *("batch", "micro_batch", "prompt", "response", "sequence", "context", "concurrency"),
        *("minibatch", "score_batch", "epochs", "group", "ptx_batch"),
    ),
    "ROLES": (
        *("reference", "reward_model", "reward_precision", "critic", "critic_tuning"),
        *("rollout", "rollout_memory", "rollout_sleep"),
    ),
    "MORE": ("offload", "empty_cache", "recipe"),
}
ALWAYS = ("model", "method", "gpu", "gpus", "nodes", "ram")
PICKED = ("model", "gpu", "reward_model", "critic")  # from the catalog
DOCS = {
    "model": "the policy, or the model to run",
    "method": "what runs",
    "gpu": "the card: this machine's, or an empty one that is pretended",
    "gpus": "how many cards",
    "nodes": "how many machines",
    "ram": "the host's memory",
}


@lru_cache(maxsize=1)
def groups() -> dict[str, tuple[str, ...]]:
    """The groups, with every field that none of them names in the last."""
    named = {name for names in GROUPS.values() for name in names}
    rest = tuple(name for name in KNOBS if name not in named)
    return GROUPS | {"MORE": (*GROUPS["MORE"], *rest)}


def rows_of(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    """Each group with the fields in it that this plan uses."""
    for title, names in groups().items():
        used = [name for name in names if name in ALWAYS or getattr(plan, name) is not None]
        if used:
            yield title, used


def fields_of(plan: Plan) -> list[str]:
    """The fields that this plan uses, in the order of the screen."""
    return [name for _, names in rows_of(plan) for name in names]


def doc(name: str) -> str:
    """What a field means, in a line."""
    return DOCS.get(name) or str(KNOBS[name]["doc"])


def shown(name: str, value: Any) -> str:
    """A value as a row shows it, and as the command line reads it."""
    if isinstance(value, Model):
        return value.id.rpartition("/")[2]
    if isinstance(value, GPU):
        return card_name(value)
    if value is None:
        return "unknown" if name == "ram" else "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(value) or "none"
    if name == "ram":
        return f"{gib(value)} GiB"
    return f"{value:g}" if isinstance(value, float) else str(value)


def card_name(gpu: GPU) -> str:
    """A card's name without its maker, which a narrow row has no room for."""
    return re.sub("^(NVIDIA GeForce|NVIDIA|AMD|Intel|Apple) | (Edition|Generation)$", "", gpu.name)


def put(plan: Plan, name: str, value: Any) -> Plan:
    """The plan with this value; FitCheckError where they do not go together.

    A value that is the default anyway is not set, so that it follows later changes of others.
    """
    if name in KNOBS:
        try:
            unset = plan.change(**{name: None})
        except FitCheckError:  # only together with the new value
            return plan.change(**{name: value})
        if getattr(unset, name) == value:
            return unset
    return plan.change(**{name: value})


def read(plan: Plan, name: str, words: str) -> Plan:
    """The plan with a value as a user types it: 32k, 64gib, on, a,b; FitCheckError if it is none.

    The names of models and cards are found loosely, as on the command line.
    """
    words = words.strip()
    if name == "model":
        return plan.change(model=catalog.find_model(words))
    if name == "method":
        return plan.change(method=words)
    if name == "gpu":
        return plan.change(gpu=catalog.find_gpu(words))
    if KNOBS.get(name, {}).get("kind") == "model":
        fields, _ = resolve_fields({name: words, "gpu": plan.gpu})
        return put(plan, name, fields[name])
    return put(plan, name, parse(name, words))


def notch(plan: Plan, name: str, step: int) -> Plan | None:
    """The plan with this field one notch lower (step -1) or higher (+1); None: there is none.

    Values that do not go with the rest of the plan are passed over.
    """
    for value in further(plan, name, step):
        try:
            return put(plan, name, value)
        except FitCheckError:
            continue
    return None


def further(plan: Plan, name: str, step: int) -> Iterator[Any]:
    """The values in that direction, the nearest first."""
    value = getattr(plan, name)
    if name == "model":
        return _models(value, step)
    if name == "gpu":
        return _cards(value, step)
    kind = "int" if name in ALWAYS else KNOBS[name]["kind"]
    if name == "method" or kind in ("choice", "flag", "list", "model"):
        return _beside(choices(plan, name), value, step)
    return _sizes(name, value, step)


def choices(plan: Plan, name: str) -> list[Any]:
    """All values of a field that has a few of them; of a list, each alone and all that apply."""
    if name == "method":
        return list(METHODS)
    kind = KNOBS[name]["kind"]
    if kind == "flag":
        return [False, True]
    if name == "offload":
        held = tuple(part for part in OFFLOADS if _goes(plan, name, (part,)))
        alone = [(part,) for part in held]
        return [(), *alone, *([held] if len(held) > 1 else [])]
    return list(KNOBS[name]["choices"])


def _goes(plan: Plan, name: str, value: Any) -> bool:
    try:
        plan.change(**{name: value})
    except FitCheckError:
        return False
    return True


def _beside(values: list[Any], value: Any, step: int) -> Iterator[Any]:
    """Those before or after a value; one that is not among them (a model's name) is the last."""
    at = values.index(value) if value in values else len(values)
    yield from values[at + 1 :] if step > 0 else reversed(values[:at])


def _sizes(name: str, value: Any, step: int) -> Iterator[Any]:
    """The next power of two; of epochs and cards the next number; of a share the next tenth."""
    if name == "ram" and value is None:
        return
    if isinstance(value, float):
        tenth = round(value + step / 10, 1)
        if 0 < tenth < 1:
            yield tenth
    elif name in ("epochs", "gpus", "nodes"):
        if value + step >= 1:
            yield value + step
    else:
        unit = GIB if name == "ram" else 1
        number, least = value // unit, 0 if name == "ptx_batch" else 1
        lower = 1 << max(0, (number - 1).bit_length() - 1) if number > 1 else 0
        other = 1 << number.bit_length() if step > 0 else lower
        if least <= other * unit <= max(LARGEST, 2**44 * (name == "ram")) and other != number:
            yield other * unit


def ladder(plan: Plan, name: str) -> list[Any]:
    """Sizes to choose from: some notches to either side of the value, and itself."""
    value = getattr(plan, name)
    found = [] if value is None else [value]
    for step in (-1, 1):
        at = value
        for _ in range(6):
            at = next(_sizes(name, at, step), None) if at is not None else None
            if at is not None:
                found.append(at)
    return sorted(found)


def _models(model: Model, step: int) -> Iterator[Model]:
    """The smaller or larger models of the same family."""
    entries = catalog.model_entries()
    family = next((e["family"] for e in entries if e["id"] == model.id), None)
    kin = [e for e in entries if e["family"] == family and e.get("params")]
    return map(catalog.model, _ordered(kin, model.params, step, "params"))


def _ordered(rows: Iterable[dict[str, Any]], here: float, step: int, key: str) -> list[Any]:
    """The rows beyond a value, the nearest first."""
    beyond = [row for row in rows if (row[key] - here) * step > 0]
    return sorted(beyond, key=lambda row: row[key] * step)


def _cards(gpu: GPU, step: int) -> Iterator[GPU]:
    """The maker's cards of the same segment with less or more memory; of one size the usual."""
    rows = [
        row
        for row in catalog.rows(f"gpus/{gpu.vendor}.json", "gpus")
        if row["segment"] == gpu.segment
    ]
    sizes: dict[float, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row.get("usual") or 99, row.get("release") or "")):
        sizes.setdefault(row["memory_gib"], row)
    return map(GPU.from_json, _ordered(sizes.values(), gpu.memory_gib, step, "memory_gib"))
