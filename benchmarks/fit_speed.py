"""Fit the constants of catalog/speed.json on published measurements, and say how far off they are.

    python -m benchmarks.fit_speed            # prints constants and errors
    python -m benchmarks.fit_speed --write    # and writes catalog/speed.json, docs/speed.md

Rows: tests/data/decode_speed.csv and training_speed.csv, each with its source. A model of seconds
that is linear in its constants is fitted by least absolute relative errors. Errors are those of
tokens a second: in sample, and of each source with constants from all other sources.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.engine_samples import (
    batches,
    eager_samples,
    graphs_samples,
    grpo_step,
    training_launches,
)
from benchmarks.least_errors import Fitted, fitted, median, percentile
from benchmarks.speed_samples import (
    BORROWED,
    CEILINGS,
    Sample,
    attention_group,
    cache_group,
    decode_group,
    decode_samples,
    layer_group,
    prefill_group,
    prefill_samples,
    rows_of,
    training_samples,
    unfit,
)

ROOT = Path(__file__).parent.parent
FILE, PAGE = ROOT / "catalog" / "speed.json", ROOT / "docs" / "speed.md"
MARKS = ("<!-- errors -->", "<!-- /errors -->")  # around the table in docs/speed.md


def errors(samples: Iterable[Sample], constants: Fitted) -> list[float]:
    """|predicted / measured - 1| of tokens a second."""
    return [abs(s.seconds / guess(s, constants) - 1) for s in samples]


def guess(sample: Sample, constants: Fitted) -> float:
    return sum(constants[name] * x for name, x in sample.features.items())


def left_out(samples: list[Sample]) -> dict[tuple[str, str], list[float]]:
    """(source, class) -> errors with constants from all other sources.

    Rows of a class that fewer than two others of other sources are of are left aside.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for source in sorted({s.source for s in samples}):
        others = [s for s in samples if s.source != source]
        have = Counter(s.kind for s in others)
        asked = [s for s in samples if s.source == source and have[s.kind] >= 2]
        names = {name for s in others for name in s.features}
        asked = [s for s in asked if s.features.keys() <= names]
        if asked:
            constants = fitted(others)
            for s in asked:
                found.setdefault((source, s.kind), []).extend(errors([s], constants))
    return found


class Result(NamedTuple):
    """A fit, and its errors in sample and left out: of all rows, and by hardware class."""

    constants: Fitted
    inside: list[float]
    outside: list[float]
    kinds: dict[str, tuple[list[float], list[float]]]


def result(name: str, samples: list[Sample], tell: Callable[[str], None]) -> Result:
    """Fit, judge, and print by class and source."""
    constants = fitted(samples)
    inside, parts = errors(samples, constants), left_out(samples)
    outside = [error for part in parts.values() for error in part]
    tell(f"\n{name}: {len(samples)} rows, {len({s.source for s in samples})} sources")
    tell("  " + ", ".join(f"{key} {value:.4g}" for key, value in constants.items()))
    tell(f"  in sample        {_words(inside)}")
    tell(
        f"  left out         {_words(outside)}, {len(outside)} rows" if outside else "  left out: -"
    )
    kinds = {}
    for kind in sorted({s.kind for s in samples}):
        mine = [e for s, e in zip(samples, inside, strict=True) if s.kind == kind]
        others = [e for (_, k), part in parts.items() if k == kind for e in part]
        kinds[kind] = mine, others
        tell(f"    {kind:<20}{len(mine):4}  in {_words(mine)}   out {_words(others)}")
    for (source, kind), part in sorted(parts.items(), key=lambda item: -len(item[1]))[:8]:
        tell(f"    without {source[:44]:<46}{kind:<16}{len(part):4}  {_words(part)}")
    worst = sorted(zip(inside, samples, strict=True), key=lambda pair: -pair[0])[:5]
    for error, s in worst:
        tell(f"    {100 * error:4.0f} %  {s.told}")
    return Result(constants, inside, outside, kinds)


def _words(values: list[float]) -> str:
    if not values:
        return "-"
    return f"median {100 * median(values):4.1f} %, 90th {100 * percentile(values, 90):5.1f} %"


def stated(found: Result, basis: str) -> dict[str, Any]:
    """What a report says of an engine: the 90th percentile, left out where that can be."""
    values = found.outside if len(found.outside) > 5 else found.inside
    return {
        "relative": round(percentile(values, 90), 3),
        "percentile": 90,
        "n": len(values),
        "basis": basis,
    }


def seen(kind: str, found: dict[str, Result]) -> list[str]:
    """What was measured on cards of this class."""
    return [name for name in ("llama.cpp", "training") if kind in found[name].kinds]


def class_row(kind: str, decode: Fitted, prefill: Fitted, seen: list[str]) -> dict[str, Any]:
    """All constants of one hardware class, the borrowed ones from the class most alike."""
    matmul, matmul_source, attention, attention_source = CEILINGS[kind]
    like = BORROWED.get(kind, kind)
    reading = prefill_group(like)
    return {
        "measured": seen,
        "matmul": matmul,
        "matmul_source": matmul_source,
        "attention": attention,
        "attention_source": attention_source,
        "bandwidth": _share(decode[f"weights {decode_group(like)}"]),
        "cache": _share(decode[f"cache {cache_group(like)}"]),
        "layer": _round(decode[f"layer {layer_group(like)}"]),
        "unpack": _round(decode.get(f"unpack {kind}", 0.0)),
        "prefill": _share(prefill[f"prefill {reading}"]),
        "prefill_attention": _share(prefill[f"attention {attention_group(reading)}"]),
        **(
            {"borrowed": f"decode and prefill of {like}: nobody measured this class"}
            if like != kind
            else {}
        ),
    }


def _share(cost: float) -> float:
    """A share of a rate from seconds at the full rate; a cost of nothing is a share of 100."""
    return _round(1 / max(cost, 0.01))


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def results(tell: Callable[[str], None]) -> dict[str, Result]:
    """Every fit, by the name under which its error is stated."""
    found = {
        "llama.cpp": result("decode, llama.cpp", decode_samples(), tell),
        "prefill": result("prefill, llama.cpp", prefill_samples(), tell),
        "training": result("training", training_samples(), tell),
        "graphs": result("decode, CUDA graphs", graphs_samples(), tell),
        "eager": result("decode, eager", eager_samples(), tell),
    }
    out = Counter(filter(None, map(unfit, rows_of("training_speed.csv"))))
    tell("\nnot fitted: tokens/s of batches, seconds of a GRPO step")
    for told, measured, predicted in batches():
        tell(f"  {told}: {measured:.0f} measured, {predicted:.0f} predicted")
    for prompt in (64, 256):
        measured, predicted = grpo_step(prompt)
        tell(f"  prompts of {prompt}: {measured:.1f} s measured, {predicted:.1f} s predicted")
    tell("\nrows of training not used: " + "; ".join(f"{n}, {why}" for why, n in out.items()))
    return found


def content(found: dict[str, Result]) -> dict[str, Any]:
    """What catalog/speed.json holds."""
    decode, prefill = found["llama.cpp"].constants, found["prefill"].constants
    training, graphs, eager = (found[n].constants for n in ("training", "graphs", "eager"))
    return {
        "note": "Written by benchmarks/fit_speed.py from tests/data/*_speed.csv; shares are of the "
        "rates on paper, layer in seconds, unpack in FLOP a weight.",
        "checked": "2026-11-27",
        "classes": {kind: class_row(kind, decode, prefill, seen(kind, found)) for kind in CEILINGS},
        "engines": {
            "graphs": {
                "bandwidth": _share(graphs["bandwidth"]),
                "layer": _round(graphs["layer"]),
                "layer_nf4": _round(graphs["layer"]),
                "backward": 0.0,
            },
            "eager": {
                "bandwidth": _share(graphs["bandwidth"]),
                "layer": _round(eager["layer"]),
                "layer_nf4": _round(eager["layer nf4"]),
                "backward": _round(training_launches() / eager["layer"] - 1),
            },
        },
        "training": {
            "slowdown": _round(training["slowdown"]),
            "width_bytes": _round(training["width bytes"]),
        },
        "errors": {
            "llama.cpp": stated(found["llama.cpp"], "decoding, each source left out"),
            "graphs": stated(found["graphs"], "decoding with vLLM and gpt-fast, in sample"),
            "eager": stated(found["eager"], "decoding with LitGPT on one A100, each row left out"),
            "training": stated(found["training"], "training, each source left out"),
        },
    }


def table(found: dict[str, Result]) -> str:
    """The errors as markdown: of each fit, all together and by hardware class."""
    lines = [
        "| fit | class | rows | in sample: median, 90th | left out: median, 90th |",
        "|---|---|---:|---:|---:|",
    ]
    for name, fit in found.items():
        rows = {"all": (fit.inside, fit.outside)} | (fit.kinds if len(fit.kinds) > 1 else {})
        for kind, (inside, outside) in rows.items():
            cells = [name, kind, str(len(inside)), _cell(inside), _cell(outside)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    """Median and 90th percentile in whole percent."""
    if not values:
        return "-"
    return f"{100 * median(values):.0f} %, {100 * percentile(values, 90):.0f} %"


def main() -> None:
    found = results(print)
    if "--write" in sys.argv[1:]:
        text = json.dumps(content(found), indent=1) + "\n"
        FILE.write_text(text, encoding="utf-8", newline="\n")
        before, start, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        _, end, after = rest.partition(MARKS[1])
        text = f"{before}{start}\n{table(found)}\n{end}{after}"
        PAGE.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
