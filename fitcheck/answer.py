"""check(): names and wishes -> Plan -> Report. What the command line, the screen and a script call.

report = check("llama-3.1-8b", method="ppo", gpu="rtx 4090", tuning="lora")
report.verdict, report.peak_bytes
"""

from __future__ import annotations

import dataclasses
import os.path
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fitcheck import catalog
from fitcheck.errors import FitCheckError
from fitcheck.fit import fit
from fitcheck.gpu import GPU, UsableMemory
from fitcheck.model import Model
from fitcheck.plan import KNOBS, LORA_TARGETS, Plan
from fitcheck.report import Report
from fitcheck.rules import choice_error, flag_of
from fitcheck.timings import with_timings

DEFAULT_MODEL = "meta-llama/Llama-3.1-8B"
PRETENDED = "NVIDIA GeForce RTX 4090"  # where there is no card: the largest common consumer card


def check(model: str | Model = DEFAULT_MODEL, **wishes: Any) -> Report:
    """Does it fit? wishes: fields of Plan by name; `gpu` a name, by default this machine's card.

    Raises FitCheckError for unknown names, contradictory knobs, architectures not covered.
    """
    plan, card = _resolve(model, wishes)
    report = with_timings(fit(plan, catalog.stated_error(plan.method, "estimate")))
    if plan.method == "inference" and plan.engine != "transformers":
        from fitcheck import engines  # what its users ask next

        report = replace(report, notes=(*report.notes, *engines.facts(plan, report.phases)))
    report = advised(report)
    return replace(report, notes=(card, *report.notes)) if card else report


def advised(report: Report, limit: int = 5) -> Report:
    """The report with the changes that make its plan fit, the cheapest first; as it is if it fits.

    Where nothing makes it fit: those that save most.
    """
    if report.verdict == "fits":
        return report
    from fitcheck.advice import best  # what fits needs none

    try:
        return replace(report, advice=tuple(best(report.plan, report, limit)))
    except FitCheckError:  # a dry run of what the estimate does not cover
        return report


def resolve(model: str | Model = DEFAULT_MODEL, **wishes: Any) -> Plan:
    """A Plan from names: looks up the catalog and, without `gpu`, this machine."""
    return _resolve(model, wishes)[0]


def _resolve(model: str | Model, wishes: Mapping[str, Any]) -> tuple[Plan, str]:
    """The plan, and what to say of a card that was not asked for by name."""
    found = find_model(model) if isinstance(model, str) else model
    if not isinstance(found, Model):
        raise FitCheckError(f"a model cannot be {found!r}", "its name, such as 'llama-3.1-8b'")
    fields, card = resolve_fields(wishes)
    return Plan(model=found, **fields), card


def find_model(text: str) -> Model:
    """The model a name means: the catalog's, else that of the Hub, of a folder or of a GGUF file.

    A name of the catalog needs no network. A Hub id of another owner is not a loose name.
    """
    if text.endswith(".gguf") or text.startswith(("./", "../", "/", "~", ".\\")):
        return _read(text)
    try:
        found = catalog.find_model(text)
    except FitCheckError as fault:
        if "/" not in text and not os.path.isdir(text):
            raise
        return _read(text, fault)
    owner, slash, name = text.partition("/")
    own = owner.lower() == found.id.partition("/")[0].lower()
    if slash and " " not in text and ("@" in name or not own):
        return _read(text)
    return found


def _read(text: str, fault: FitCheckError | None = None) -> Model:
    from fitcheck import folder, hub  # no name of the catalog waits for it

    if fault and not (folder.is_hub_id(text) or os.path.isdir(text)):
        raise fault
    return hub.read(text)


def resolve_fields(wishes: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Plan's fields but the model, names looked up; and what to say of a card not named in full."""
    fields = {name: value for name, value in wishes.items() if value is not None}
    unknown = fields.keys() - KNOBS.keys() - {"method", "gpu", "gpus", "nodes", "ram", "memory"}
    if unknown:
        raise FitCheckError(
            f"a plan has no field {min(unknown)!r}", f"its fields: {', '.join(KNOBS)}"
        )
    for name in ("reward_model", "critic"):
        value = fields.get(name)
        if isinstance(value, str) and value not in KNOBS[name]["choices"]:
            fields[name] = _scorer(value)
    for name in ("offload", "lora_targets"):
        if name in fields:
            fields[name] = _listed(name, fields[name])
    if "memory" in fields:
        fields["memory"] = _memory(fields["memory"])
    gpu, said = fields.get("gpu"), ""
    if gpu is None:
        card, said = this_machine()
        fields = card | fields
    elif isinstance(gpu, str):
        fields["gpu"] = catalog.find_gpu(gpu)
        said = fields["gpu"].assumed
    elif not isinstance(gpu, GPU):
        raise FitCheckError(f"a GPU cannot be {gpu!r}", "its name, such as 'rtx 4090'")
    return fields, said


def _listed(name: str, value: Any) -> Any:
    """A list as Plan holds it, from JSON's list or from names by comma."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and (name == "offload" or value not in LORA_TARGETS):
        value = value.strip()
        parts = () if name == "offload" and value in ("", "none") else value.split(",")
        return tuple(part.strip() for part in parts)
    return value


def _memory(value: Any) -> UsableMemory:
    """The memory of a live card, as a Plan in JSON states it."""
    if isinstance(value, UsableMemory):
        return value
    kinds = {name: {"estimated": bool, "why": str}.get(name, int) for name in UsableMemory._fields}
    if not isinstance(value, Mapping) or value.keys() != kinds.keys():
        raise FitCheckError("memory is not that of a plan", f"an object of {', '.join(kinds)}")
    for name, kind in kinds.items():
        if type(value[name]) is not kind or (kind is int and not 0 <= value[name] <= 2**50):
            raise FitCheckError(f"memory: {name} cannot be {value[name]!r}", "bytes, 1 PiB at most")
    return UsableMemory(**value)


def plan_from(values: Mapping[str, Any]) -> Plan:
    """The Plan that `to_json` wrote; untrusted: FitCheckError for unknown fields and bad values."""
    if not isinstance(values, Mapping) or not isinstance(values.get("model"), str):
        raise FitCheckError("this is not a plan", "a JSON object with at least a model")
    fields = dict(values)
    try:
        read = {name: carried(row) for name, row in (fields.pop("models", None) or {}).items()}
        for name in ("reward_model", "critic"):
            said = fields.get(name)
            if isinstance(said, str) and said not in KNOBS[name]["choices"]:
                fields[name] = read.get(said) or _scorer(said, catalog.find_model)
        name = fields.pop("model")
        return resolve(read.get(name) or catalog.find_model(name), **fields)
    except (TypeError, AttributeError, ValueError) as fault:
        hint = "a plan is what `fitcheck check --json` prints under that name"
        raise FitCheckError(f"this is not a plan: {fault}", hint) from fault


def carried(row: Any) -> Model:
    """A model that came along with a plan; untrusted: FitCheckError unless its sizes are sizes."""
    if not isinstance(row, Mapping):
        raise FitCheckError(
            "a plan's model is no object", "it is what `fitcheck check --json` prints"
        )
    model = Model.from_json(row)
    sizes = {f.name: getattr(model, f.name) for f in dataclasses.fields(Model)}
    sizes = {n: v for n, v in sizes.items() if v is not None and n in _SIZES}
    flags = [model.tie_word_embeddings, model.mlp_bias, model.mlp_gated, model.qk_norm]
    texts = (model.id, model.name, model.model_type, model.status)
    if (
        len(sizes) < len(_SIZES) - 1  # max_position_embeddings may be unknown
        or not all(type(value) is int and 0 < value <= 2**50 for value in sizes.values())
        or not all(isinstance(flag, bool) for flag in flags)
        or not all(isinstance(text, str) and len(text) < 300 for text in texts)
    ):
        raise FitCheckError(f"{str(row.get('id'))[:80]}: a size of the plan's model is none", "")
    return model


_SIZES = (
    *("params", "params_embedding", "hidden_size", "num_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"),
    "max_position_embeddings",
)


def this_machine() -> tuple[dict[str, Any], str]:
    """gpu, memory and ram of this computer's freest card or of a pretended one; a word on it."""
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


def _scorer(name: str, find: Callable[[str], Model] = find_model) -> Model:
    """A reward model or a plain model by name; a full id means that model and no other."""
    rewards = catalog.rows("reward_models.json", "reward_models")
    if all(row.get("id") != name for row in rewards) and _is_model_id(name):
        return find(name)
    try:
        return catalog.architecture(catalog.find_reward_model(name))
    except FitCheckError as fault:
        try:
            return find(name)
        except FitCheckError:
            raise FitCheckError(fault.message, f"{fault.hint}; any model can score too") from None


def _is_model_id(name: str) -> bool:
    return any(entry.get("id") == name for entry in catalog.model_entries())


_UNITS = {"": 1, "k": 2**10, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "m": 2**20, "g": 2**30}
_EXAMPLES = {"ram": "64gib", "gpus": "1", "nodes": "1"}


def parse(name: str, text: str) -> Any:
    """The value of a field as a user types it: 32k, 64gib, on, a,b,c."""
    kind = KNOBS[name]["kind"] if name in KNOBS else "int"
    if kind == "flag":
        if text not in ("on", "off"):
            raise choice_error(name, text, ("on", "off"))
        return text == "on"
    if kind == "int":
        return _number(name, text)
    if kind == "share":
        try:
            return float(text)
        except ValueError:
            raise _wrong(name, text, "a share between 0 and 1, such as 0.3") from None
    return _listed(name, text) if kind == "list" else text


def _number(name: str, text: str) -> int:
    """A whole number, of ram in bytes; exact, however large."""
    example = f"a number such as {_EXAMPLES.get(name, '512 or 32k')}"
    digits = text.strip().lower().replace("_", "")
    match = re.fullmatch(r"(-?[0-9]{1,18})(?:\.([0-9]{1,9}))?\s*([a-z]*)", digits)
    if match is None or match[3] not in _UNITS:
        raise _wrong(name, text, example)
    fraction = match[2] or ""
    value, rest = divmod(int(match[1] + fraction) * _UNITS[match[3]], int(10 ** len(fraction)))
    if rest and name != "ram":
        raise _wrong(name, text, "a whole number")
    return value


def _wrong(name: str, text: str, hint: str) -> FitCheckError:
    shown = text if len(text) <= 40 else text[:37] + "..."
    return FitCheckError(f"{flag_of(name)} cannot be {shown!r}", hint)
