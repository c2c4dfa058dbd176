"""What a person reads: golden screens, widths, words without colour."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest

from fitcheck import catalog, pace, text
from fitcheck.answer import check
from fitcheck.cli import main
from fitcheck.difference import comparison
from fitcheck.markdown import markdown
from fitcheck.report import ALLOCATED, OUTSIDE, Error, Moment, Phase, Ram, Report, Term

SCREENS = {
    "check-fits": "llama-3.1-8b --gpu a100-80 --method sft --tuning lora",
    "check-does-not-fit": "llama-3.1-8b --gpu 4090",
    "check-inference": "qwen2.5-7b --method inference --gpu 4090 --quant q4_k_m --context 32k "
    "--kv-cache q8_0 --ram 32gib",
    "check-host-too-small": "llama-3.1-8b --gpu h100 --method sft --tuning qlora --ram 8gib",
    "check-explain": "qwen2.5-0.5b --gpu 4090 --tuning qlora --reward-model rule --critic shared "
    "--explain",
    "check-markdown": "qwen2.5-7b --method grpo --gpu b200 --tuning lora --markdown",
}


@pytest.mark.parametrize("name", SCREENS)
def test_screens(
    name: str, golden: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *SCREENS[name].split()]) in (0, 1)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\x1b" not in captured.out
    if "markdown" not in name:
        assert max(map(len, captured.out.splitlines())) <= 80
    golden(name, captured.out)


def test_a_tight_screen(golden: Callable[[str, str], None]) -> None:
    golden("check-tight", text.report_text(tight()))


def answer(**wishes: Any) -> Report:
    return check("llama-3.1-8b", **{"gpu": "4090", "method": "sft", "tuning": "qlora", **wishes})


def tight() -> Report:
    """An answer whose error is larger than the room to spare."""
    error = Error(0.95, 95, 4, "peak allocated of 4 runs that were made up for this test")
    return dataclasses.replace(answer(sequence=4096), error=error, notes=())


# --- widths ---


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"method": "ppo", "tuning": "full"},
        {"method": "inference", "tuning": None},
        {"method": "grpo", "batch": 100_000_000, "tuning": "lora"},
        {"method": "ppo", "offload": "reward,critic", "ram": 2**31},
    ],
    ids=["qlora", "ppo", "inference", "absurd", "host"],
)
def test_no_line_is_wider_than_the_terminal(width: int, wishes: dict[str, Any]) -> None:
    report = answer(**wishes)
    for colour in (False, True):
        shown = text.report_text(report, width, colour, explain=True)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
        wide = [line for line in plain.splitlines() if len(line) > width]
        # A number or a name of its own may be longer than a very narrow terminal.
        assert not [line for line in wide if width >= 60 or " " in line.strip()], wide


def test_long_names_are_wrapped() -> None:
    model = max(catalog.models(), key=lambda model: len(model.id) * (model.model_type == "llama"))
    report = check(model, gpu="nvidia rtx pro 6000 blackwell server", method="inference")
    assert max(map(len, text.report_text(report, 60).splitlines())) <= 60
    assert model.id in text.report_text(report, 120)


# --- words ---


def test_colour_only_adds_escapes() -> None:
    report = answer()
    coloured = text.report_text(report, 80, colour=True)
    assert "\x1b[1;32m✓ FITS\x1b[0m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == text.report_text(report, 80)


@pytest.mark.parametrize(
    ("terminal", "environment", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),  # no-color.org: when present and not an empty string
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_when_there_is_colour(
    terminal: bool, environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    assert text.colourful() is expected


def test_verdicts_in_words() -> None:
    fits = answer()
    assert re.search(r"✓ FITS: \d+\.\d GiB to spare", text.verdict_lines(fits)[0])
    much = answer(method="ppo", tuning="full", batch=8)
    assert re.search(r"✗ DOES NOT FIT: \d+\.\d GiB too much", text.verdict_lines(much)[0])
    close = text.verdict_lines(tight())[0]
    assert re.search(r"≈ TIGHT: \d+\.\d GiB to spare, less than this answer may be off", close)
    poor = " ".join(text.verdict_lines(answer(ram=2**33)))
    assert re.search(r"✗ DOES NOT FIT: the host lacks \d+\.\d GiB of RAM; on the card \d", poor)


def made_of(*sizes: int, usable: int = 24 * 2**30) -> Report:
    """A report with one moment of terms of these sizes."""
    plan = answer().plan
    memory = plan.memory._replace(total_bytes=usable, reserve_bytes=0)
    terms = tuple(Term(f"term {n}", "policy", size, "") for n, size in enumerate(sizes))
    phase = Phase("load", (Moment("weights", terms),))
    return Report(dataclasses.replace(plan, memory=memory), (phase,), Ram(1, None, "load"))


def test_cache_that_must_be_given_back() -> None:
    cached = Term("segment rests", "policy", 2**31, "", "cached")
    report = made_of(23 * 2**30)
    moment = Moment("weights", (*report.phases[0].peak.terms, cached))
    report = dataclasses.replace(report, phases=(Phase("load", (moment,)),))
    assert report.verdict == "tight"
    assert "only if the allocator gives back 1.0 GiB" in text.verdict_lines(report)[0]


def test_a_replay_that_fails_by_fragmentation() -> None:
    report = dataclasses.replace(made_of(2**30), outcome="does-not-fit")
    assert "no gap is left for its largest block" in text.verdict_lines(report)[0]


def test_bytes_are_rounded_in_one_place() -> None:
    assert [text.gib(n) for n in (0, 2**30, 3 * 2**29, 2**40)] == ["0.0", "1.0", "1.5", "1024.0"]


# --- the bar ---


@pytest.mark.parametrize(
    "sizes", [(2**30,), (2**34, 2**33, 2**30, 1), (2**36,), tuple([2**28] * 12)]
)
@pytest.mark.parametrize("width", [40, 80, 100])
def test_the_bar_is_to_scale(sizes: tuple[int, ...], width: int) -> None:
    report = made_of(*sizes)
    cells, mark = text.bar(report, width)
    room = width - 4
    assert len(cells) == room + 2
    whole = max(sum(sizes), report.usable_bytes)
    filled = sum(cell in text.FILLS + text.REST for cell in cells)
    assert filled == round(sum(sizes) / whole * room)
    assert "24.0 GiB usable" in mark
    assert mark.index("▲") - 2 == min(room - 1, round(report.usable_bytes / whole * room))


def test_the_legend_adds_up() -> None:
    for report in (answer(), answer(method="ppo"), answer(method="inference", tuning=None)):
        lines = text.at_peak(report, 80)[1:]
        sizes = [float(re.findall(r"(\d+\.\d) +\d+ %$", line)[0]) for line in lines]
        assert sum(sizes) == pytest.approx(report.peak_bytes / 2**30, abs=0.05 * len(lines))
        assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
        assert len(lines) <= 7


def test_the_phase_table_adds_up() -> None:
    report = answer(method="ppo", tuning="lora")
    head, *lines = text.phase_table(report, 80)
    assert head.split()[2:] == ["policy", "reward", "critic", "other", "all", "s"]
    assert len(lines) == len(report.phases)
    for line, phase in zip(lines, report.phases, strict=True):
        name, *cells, seconds = line.removesuffix(" ◀").split()
        assert seconds == pace.cell(phase.seconds)
        assert name == phase.name
        *parts, total = map(float, cells)
        assert sum(parts) == pytest.approx(total, abs=0.05 * len(cells))
    assert [line for line in lines if "◀" in line] == [
        line for line in lines if line.startswith(report.peak_phase.name)
    ]


# --- markdown and the rest ---


def test_markdown_says_what_the_screen_says() -> None:
    report = answer(method="ppo")
    shown = markdown(report)
    assert shown.startswith(f"**{text.headline(report.plan)}**")
    assert all(f"| {phase.name} |" in shown for phase in report.phases)
    assert text.gib(report.peak_bytes) in shown
    columns = [line.count("|") for line in shown.splitlines() if line.startswith("|")]
    assert set(columns) == {4}


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"tuning": "full"}, "bf16-mixed: fp32 weights and gradients, adamw, bf16 autocast"),
        ({"tuning": "full", "precision": "bf16"}, "bf16: bf16 weights and gradients, adamw"),
        ({"tuning": "full", "precision": "bf16-master"}, "fp32 master weights"),
        ({"tuning": "lora", "adapter_precision": "bf16"}, "frozen bf16 base, bf16 adapters"),
        ({"tuning": "qlora", "checkpointing": False}, "frozen nf4 base, fp32 adapters, adamw"),
        (
            {"method": "inference", "tuning": None, "quant": "q4_k_m", "kv_cache": "q8_0"},
            "q4_k_m weights, q8_0 KV cache, bf16 compute",
        ),
    ],
)
def test_the_regime_is_always_said(wishes: dict[str, Any], words: str) -> None:
    report = answer(**wishes)
    assert words in text.regime(report.plan)
    joined = " ".join(text.report_text(report).split())
    assert words in joined


def test_comparison_of_two_rungs() -> None:
    estimate = answer()
    phases = []
    for phase in estimate.phases:
        terms = tuple(
            term._replace(bytes=2 * term.bytes) if term.place == ALLOCATED else term
            for term in phase.peak.terms
        )
        phases.append(Phase(phase.name, (Moment(phase.peak.name, terms),)))
    phases.append(Phase("extra", (Moment("x", (Term("x", "card", 2**20, "", OUTSIDE),)),)))
    traced = dataclasses.replace(estimate, phases=tuple(phases), source="dry-run")
    lines = comparison(estimate, traced).splitlines()
    assert len([line for line in lines if line[0] != " "]) == 1 + len(phases) + 1
    terms = [line for line in lines if line.startswith("  ")]
    assert terms and all(line.endswith(("-50.00 %", " -")) for line in terms)
    assert lines[-1].startswith("whole step")
    assert lines[-1].endswith("-50.00 %")
    assert [line for line in lines if line.startswith("extra")][0].split()[1] == "-"
