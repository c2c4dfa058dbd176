"""`make coefficients`: bytes of decoder layers as polynomials of tokens, for catalog/coefficients/.

    python -m fitcheck.bench.coefficients            # every model without a flow (flows.py)
    python -m fitcheck.bench.coefficients lfm2       # the model types whose names begin so

One layer of each kind is traced on meta in every run of RUNS, at three lengths: memory above what
was alive before is a + b RT + c RT^2 bytes at each allocation (R sequences of T tokens), solved
exactly and held against a further length. Of the heights only those that can be the highest are
kept. LoRA's rank enters as r (d + e RT). fitcheck/coefficients.py reads what is written here.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from fitcheck import catalog
from fitcheck.bench.layer_trace import (
    META,
    Kind,
    Skipped,
    Traced,
    decoder_layers,
    prepared,
    traced,
)
from fitcheck.bench.polynomials import basis, highest, single
from fitcheck.errors import FitCheckError
from fitcheck.flows import FLOWS
from fitcheck.model import Model
from fitcheck.plan import Plan
from fitcheck.weights import has_closed_form

ROOT = Path(catalog.ROOT) / "coefficients"
ROWS = 2  # sequences: a product of several heads is another one than of one row
RANKS = (16, 64, 32)  # two to solve, one to check


# What the estimate may be asked: "precision tuning mask". fp16 takes what bf16 takes.
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"tuning": "full"},
    "lora:all-linear": {"tuning": "lora", "lora_targets": "all-linear"},
    "lora:attention": {"tuning": "lora", "lora_targets": "attention"},
    "qlora:all-linear": {"tuning": "qlora", "lora_targets": "all-linear"},
    "nf4": {"tuning": "full"},  # frozen: the forward pass alone
    "int8": {"tuning": "full"},
}
# Of no method's defaults where rows are padded.
RARE = [("bf16", "lora:all-linear"), ("bf16-autocast", "lora:attention"), ("fp32", "full")]
RUNS: dict[str, dict[str, Any]] = {
    f"{precision} {tuning} {padding}": TUNINGS[tuning]
    | {"precision": precision, "padding": padding}
    for padding in ("none", "padded")
    for precision, tunings in {
        "bf16": ("full", "lora:all-linear", "nf4", "int8"),
        "bf16-mixed": ("full",),
        "bf16-autocast": TUNINGS,
        "fp32": ("full",),
    }.items()
    for tuning in tunings
    if padding == "none" or (precision, tuning) not in RARE
}
RUNS["bf16 full eager"] = {**RUNS["bf16 full none"], "attention": "eager"}
LOOPS = ("falcon_mamba", "jamba", "mamba", "recurrent_gemma")  # over tokens, in Python


def lengths(kind: Kind, band: str, loops: bool) -> tuple[int, ...]:
    """Three lengths to solve for and one to check, in multiples of every chunk there is.

    Short ones where Python loops over tokens or chunks; long ones for flash attention, which takes
    a workspace of its own for few tokens.
    """
    if loops and kind.label == "linear_attention":
        return (128, 256, 384, 512)
    if "attention" not in kind.label.replace("linear_attention", "") and kind.label:
        return (512, 768, 1024, 1536)
    if not kind.window:
        return (1024, 1536, 2048, 3072)
    if band == "long":
        return tuple(-(-kind.window // 256) * 256 + 512 * i for i in (2, 3, 4, 6))
    step = min(256, (kind.window - 1) // 4)
    return (step, 2 * step, 3 * step, 4 * step)


def coefficients(model: Model) -> dict[str, Any]:
    """Everything the estimate needs to know of a model's layers, as JSON."""
    plan = Plan(model=model, gpu=catalog.find_gpu("A100-SXM4-80GB"), method="sft", sequence=256)
    plan = plan.change(micro_batch=1, batch=1, checkpointing=False, precision="bf16", tuning="full")
    module, found = prepared(plan, None)
    config = module.config.get_text_config()
    if getattr(config, "num_kv_shared_layers", 0):
        raise FitCheckError(
            f"{model.id} cannot be traced layer by layer: some layers read the keys of others",
            "",
        )
    places = {place: i for i, kind in enumerate(found) for place in kind.places}
    entry: dict[str, Any] = {
        "kinds": [{"label": kind.label, "window": kind.window} for kind in found],
        "order": "".join(str(places[i]) for i in range(len(places))),
        "step": step(config),
        "fp32": kept_in_fp32(model, module),
        "state": state(module, found),
        "adapters": {},
        "runs": {},
    }
    for name, wishes in RUNS.items():
        try:
            entry["runs"][name] = run(plan.change(**wishes), name, entry)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as fault:
            entry["runs"][name] = f"{type(fault).__name__}: {fault}"[:160]
    return entry


def step(config: Any) -> int:
    """Tokens of a recurrent layer's chunk, to which it pads."""
    for name in ("mamba_chunk_size", "chunk_size", "ssm_chunk_size"):
        if size := getattr(config, name, None):
            return int(size)
    return 64 if "linear_attention" in (getattr(config, "layer_types", None) or ()) else 1


def kept_in_fp32(model: Model, module: Any) -> list[str]:
    """Last names of the weights that a 16-bit model keeps in fp32."""
    named = list(module.named_parameters())
    wide = {last(path) for path, p in named if p.dtype == torch.float32}
    narrow = {last(path) for path, p in named if p.dtype != torch.float32}
    if wide & narrow:
        raise FitCheckError(f"{model.id}: {wide & narrow} in two types", "name them by their place")
    return sorted(wide)


def last(path: str) -> str:
    return path.removesuffix(".weight").rpartition(".")[2]


def state(module: Any, found: tuple[Kind, ...]) -> int:
    """Bytes that the recurrent layers keep for one sequence, whatever its length."""
    ids = torch.zeros(ROWS, 64, dtype=torch.long, device=META)
    layers = [layer for layer in decoder_layers(module) if not isinstance(layer, Skipped)]
    hooks = [
        layer.register_forward_hook(lambda _, args, out: setattr(Skipped, "returned", out))
        for layer in layers
    ]
    with torch.no_grad():
        cache = transformers.DynamicCache(config=module.config.get_text_config())
        module.base_model(ids, use_cache=True, cache=cache)
    for hook in hooks:
        hook.remove()
    Skipped.returned = None
    total = 0
    for kind in found:
        layer = cache.layers[kind.place]
        states = [getattr(layer, name, {}) for name in ("conv_states", "recurrent_states")]
        held = [x.nbytes for tensors in states for x in tensors.values() if x is not None]
        modules = decoder_layers(module)[kind.place].modules()
        own = [x for m in modules for x in vars(m).values() if isinstance(x, torch.Tensor)]
        held += [x.nbytes for x in own if x.shape[:1] == (ROWS,)]  # recurrent_gemma's
        total += len(kind.places) * sum(held) // ROWS
    return total


def run(plan: Plan, name: str, entry: dict[str, Any]) -> list[Any]:
    """Each kind's heights in one run: a dict of polynomials, or two of them around a window."""
    tuning, _, targets = name.split()[1].partition(":")
    quant = {"qlora": "nf4", "nf4": "nf4", "int8": "int8"}.get(tuning)
    train = tuning not in ("nf4", "int8")
    modules = {}
    for rank in RANKS if targets else RANKS[:1]:
        modules[rank] = prepared(plan.change(lora_rank=rank) if targets else plan, quant)
    if targets and targets not in entry["adapters"]:
        entry["adapters"][targets] = adapters(*modules[RANKS[0]])
    result: list[Any] = []
    found = modules[RANKS[0]][1]
    for kind in found:
        bands = ("short", "long") if kind.window else ("",)
        made = {}
        for band in bands:
            one, two, three, four = lengths(kind, band, plan.model.model_type in LOOPS)
            points = [(RANKS[0], one), (RANKS[0], two), (RANKS[0], three)]
            points += [(RANKS[1], one), (RANKS[1], two)] if targets else []
            points += [(RANKS[2] if targets else RANKS[0], four)]
            traces = [
                traced(modules[rank][0], plan, (kind,), ROWS, length, train)[0]
                for rank, length in points
            ]
            matrix = [basis(ROWS, length, rank if targets else 0) for rank, length in points]
            made[band] = fitted(traces, matrix)
        result.append(made if kind.window else made[""])
    return result


def adapters(module: Any, found: tuple[Kind, ...]) -> list[list[int]]:
    """[multiple of the rank, other side, copies] of every LoRA weight."""
    layers = decoder_layers(module)
    times = {id(p): 1 for p in module.parameters()}
    for kind in found:
        times |= {id(p): len(kind.places) for p in layers[kind.place].parameters()}
    if found[0].place != 0:
        times |= {id(p): 0 for p in layers[0].parameters()}
    counts: Counter[tuple[int, int]] = Counter()
    for path, p in module.named_parameters():
        if "lora_" in path:
            ranks, side = p.shape if "lora_A" in path else p.shape[::-1]
            counts[ranks // RANKS[0], side] += times[id(p)]
    return [[ranks, side, copies] for (ranks, side), copies in sorted(counts.items()) if copies]


FIELDS = ("training", "backward", "accumulate", "replay", "replay_accumulate")


def fitted(traces: Sequence[Traced], matrix: list[list[float]]) -> dict[str, Any]:
    """The polynomials of one layer, from traces of it at the points of the matrix's rows."""
    made: dict[str, Any] = {
        "hidden": single([t.hidden for t in traces], matrix),
        "forward": highest([t.forward for t in traces], matrix) if traces[0].forward else [],
        "cached": single([t.cached for t in traces], matrix),
    }
    if traces[0].training:
        made["kept"] = single([t.kept for t in traces], matrix)
        made["gradients"] = single([t.gradients for t in traces], matrix)
        for field in FIELDS:
            made[field] = highest([getattr(t, field) for t in traces], matrix)
    firsts = [t.first for t in traces]
    if all(first is not None for first in firsts):
        made["first"] = fitted([f for f in firsts if f is not None], matrix)
    return made


def main(names: list[str]) -> None:
    """Trace and write; one file a model type."""
    transformers.logging.set_verbosity_error()
    ROOT.mkdir(exist_ok=True)
    path = ROOT / "index.json"
    index = json.loads(path.read_text()) if path.exists() else {}
    todo: dict[str, dict[Any, list[Model]]] = {}
    for model in catalog.models():
        if model.is_verified and not (model.model_type in FLOWS and has_closed_form(model)):
            shape = (model.tensors, model.num_layers, model.num_attention_heads, repr(model.moe))
            todo.setdefault(model.model_type, {}).setdefault(shape, []).append(model)
    for kind, shapes in sorted(todo.items()):
        if names and not any(kind.startswith(name) for name in names):
            continue
        entries = []
        for group in shapes.values():
            ids = [model.id for model in group]
            try:
                entry = coefficients(group[0])
            except FitCheckError as fault:
                why = fault.message.partition("; got [")[0]
                index |= dict.fromkeys(ids, {"why": why})
                print(kind, ids[0], fault.message, flush=True)
                continue
            failed = [f"{k}: {v}" for k, v in entry["runs"].items() if isinstance(v, str)]
            print(kind, ids[0], entry["order"], entry["state"], *failed, sep="\n  ", flush=True)
            entries.append({"ids": ids, **entry})
            index |= dict.fromkeys(ids, {"file": f"{kind}.json"})
        if entries:
            write(kind, entries)
        lines = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(index.items()))
        path.write_text(f"{{\n{lines}\n}}\n")


def write(kind: str, entries: list[dict[str, Any]]) -> None:
    """One family's file: a run of a model a line."""
    import peft

    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    head = {
        "source": "python -m fitcheck.bench.coefficients",
        "checked": date.today().isoformat(),
        "versions": versions,
        "models": entries,
    }
    text = json.dumps(head, separators=(",", ":"))
    text = re.sub(
        r'(,|\{)("(?:ids|runs|kinds|models|\S+ \S+ (?:none|padded|eager))":)', r"\1\n\2", text
    )
    (ROOT / f"{kind}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
