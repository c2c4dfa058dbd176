"""Layers that no tape plays: bytes as polynomials of tokens, traced by `make coefficients`.

catalog/coefficients/ holds a file a model type, read when a model of it is asked about, and an
index. A height is a + b RT + c RT^2 + r (d + e RT) bytes for R sequences of T tokens and LoRA's
rank r; of several polynomials the highest counts. fitcheck/bench/coefficients.py writes them from
transformers' own code as it runs without mamba-ssm, causal-conv1d and flash-linear-attention.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from fitcheck.errors import FitCheckError
from fitcheck.files import read
from fitcheck.flows import FLOWS
from fitcheck.model import Model
from fitcheck.ops import Setting
from fitcheck.weights import has_closed_form

Polys = list[list[float]]


class Layer(NamedTuple):
    """One layer in one run, its input included in every height; bytes, as activations.Cost."""

    hidden: int
    forward: int
    cached: int
    kept: int
    training: int
    backward: int
    replay: int  # its input outlives it, and its output's gradient waits while it runs again
    gradients: int


def is_traced(model: Model) -> bool:
    """Whether the model's layers are read here, not played on a tape."""
    return not (model.model_type in FLOWS and has_closed_form(model))


def missing(model: Model, tuning: str, targets: str | tuple[str, ...]) -> str:
    """What of the model was not traced, in words; empty when nothing is missing."""
    found = read("coefficients/index.json").get(model.sibling or model.id)
    name = f"the architecture {model.model_type}"
    if found is None or "why" in found:
        why = found["why"].partition(": ")[2] if found else ""
        return f"{name} ({why})" if why else name
    run = f"bf16-autocast {tuning}:{targets} none" if "lora" in tuning else "bf16 full none"
    if isinstance(why := entry(model)["runs"].get(run, "it was not traced"), str):
        return f"{run.split()[1]} of {name} ({why})"
    return ""


def _is_known(model: Model) -> bool:
    return "file" in read("coefficients/index.json").get(model.sibling or model.id, ())


def is_recurrent(model: Model) -> bool:
    """Whether some of its layers mix tokens by a recurrence or a convolution."""
    if not is_traced(model) or not _is_known(model):
        return False
    labels = {kind["label"] for kind in entry(model)["kinds"]}
    return bool(labels & {"linear_attention", "conv", "hybrid", "mamba"})


@lru_cache(maxsize=256)
def entry(model: Model) -> dict[str, Any]:
    """What was traced of a model; FitCheckError where nothing was."""
    found = read("coefficients/index.json").get(model.sibling or model.id)
    if found is None or "file" not in found:
        raise FitCheckError(
            f"{model.id}: the estimate does not cover the architecture {model.model_type}",
            "choose another model; `fitcheck models` marks what is covered",
        )
    entries = read(f"coefficients/{found['file']}")["models"]
    return next(e for e in entries if (model.sibling or model.id) in e["ids"])


def kept_in_fp32(model: Model) -> tuple[str, ...]:
    """Last names of the weights that a 16-bit model keeps in fp32; none where nothing is known."""
    return tuple(entry(model)["fp32"]) if _is_known(model) else ()


def state(model: Model) -> int:
    """Bytes that recurrent layers keep of one sequence; 0 for models that have none."""
    return int(entry(model)["state"]) if is_traced(model) and _is_known(model) else 0


def run_of(setting: Setting) -> str:
    """The name of the run that traced this setting."""
    precision = "fp32" if setting.compute == 4 else "bf16"
    if setting.autocast:
        precision = "bf16-mixed" if setting.weight == 4 else "bf16-autocast"
    tuning = setting.stored if setting.stored != "plain" else "full"
    if setting.adapter:
        tuning = f"{'qlora' if setting.stored == 'nf4' else 'lora'}:{setting.targets}"
        if setting.adapter != 4 or setting.stored == "int8":
            tuning += f" with adapters of {setting.adapter} bytes"
    mask = "padded" if setting.masked else "none"
    return f"{precision} {tuning} {'eager' if setting.kernel == 'eager' else mask}"


@lru_cache(maxsize=1024)
def kinds(model: Model, setting: Setting) -> list[dict[str, Any]]:
    """Each kind of layers in the run of this setting; FitCheckError where it was not traced."""
    run = run_of(setting)
    found: list[dict[str, Any]] | str = entry(model)["runs"].get(run, "not traced")
    if setting.card.capability < (8, 0):
        found, run = "traced for compute capability 8.0 and newer", "this card"
    if isinstance(found, str):
        raise FitCheckError(
            f"{model.id}: the estimate does not cover {run!r} of the architecture "
            f"{model.model_type}: {found}",
            "choose another precision, tuning or attention; `fitcheck dryrun` traces any",
        )
    return found


def order(model: Model) -> list[int]:
    """The kind of each layer, from the first to the last."""
    return [int(kind) for kind in entry(model)["order"]]


def stream(model: Model, setting: Setting) -> int:
    """Bytes per element of what flows from layer to layer."""
    last = kinds(model, setting)[order(model)[-1]]
    per_token: float = last.get("short", last)["hidden"][1]
    return round(per_token / model.hidden_size)


def layer(
    model: Model, setting: Setting, rows: int, length: int, kind: int,
    first: bool = False, accumulate: bool = False,
) -> Layer:  # fmt: skip
    """The figures of one kind's layer; first: nothing below it needs a gradient."""
    found, traced = kinds(model, setting)[kind], entry(model)
    if "short" in found:
        window = traced["kinds"][kind]["window"]
        found = found["long" if window <= length else "short"]
    if first and "first" in found:
        found = found["first"]
    step = traced["step"] if length > 1 else 1
    at = (rows, -(-length // step) * step, setting.rank)

    def high(name: str) -> int:
        return max((_value(poly, *at) for poly in found.get(name, ())), default=0)

    ends = "_accumulate" if accumulate else ""
    hidden, training = _value(found["hidden"], *at), high("training")
    return Layer(
        hidden=hidden,
        forward=high("forward"),
        cached=_value(found["cached"], *at),
        kept=_value(found.get("kept", []), *at),
        training=training,
        backward=high("accumulate" if accumulate else "backward"),
        replay=max(training + hidden, high(f"replay{ends}")),
        gradients=_value(found.get("gradients", []), *at),
    )


def _value(poly: list[float], rows: int, length: int, rank: int) -> int:
    tokens = rows * length
    terms = (1, tokens, tokens * length, rank, rank * tokens)
    return int(sum(c * term for c, term in zip(poly, terms, strict=False)))
