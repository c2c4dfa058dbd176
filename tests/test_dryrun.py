"""`fitcheck dryrun`: the report of a traced step, its files, and what is said without torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fitcheck import FitCheckError, check, fit, resolve, worker
from fitcheck.cli import main
from fitcheck.difference import comparison, fullest
from fitcheck.progress import Bar
from fitcheck.report import ALLOCATED, Error, Report

SMALL = ["smollm2-135m", "--method", "sft", "--sequence", "256", "--batch", "2"]


@pytest.mark.oracle
def test_report_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"--{kind}={tmp_path / kind}" for kind in ("svg", "html", "snapshot")]
    assert main(["dryrun", *SMALL, "--gpu", "4090", "--json", *files]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["source"] == "dry-run" and values["verdict"] == "fits"
    estimate = check("smollm2-135m", gpu="4090", method="sft", sequence=256, batch=2)
    assert abs(estimate.allocated_bytes / values["allocated_bytes"] - 1) < 0.02
    assert values["reserved_bytes"] >= values["allocated_bytes"]
    guessed = {p.name: max(m.part(ALLOCATED) for m in p.moments) for p in estimate.phases}
    assert [phase["name"] for phase in values["phases"]] == list(guessed)
    assert (tmp_path / "svg").read_text().startswith("<svg")
    assert "<svg" in (tmp_path / "html").read_text()
    assert (tmp_path / "snapshot").stat().st_size > 10_000
    plan = resolve("smollm2-135m", gpu="4090", method="sft", sequence=256, batch=2)
    assert Report.from_json(values, plan).peak_bytes == values["peak_bytes"]


@pytest.mark.oracle
def test_out_of_memory_names_phase_and_module(capsys: pytest.CaptureFixture[str]) -> None:
    card = ["--gpu", "gtx 1050 ti"]  # 4 GB
    assert main(["dryrun", "qwen2.5-0.5b", "--method", "sft", "--sequence", "512", *card]) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    assert "runs out of memory in update." in " ".join(out.split())


def test_without_torch_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "find_spec", lambda name: None)
    with pytest.raises(FitCheckError) as fault:
        worker.dry_run(resolve("gpt2", gpu="4090", method="sft", sequence=256))
    assert "needs torch" in fault.value.message
    assert "fitcheck-rlhf[bench]" in fault.value.hint


@pytest.mark.oracle
def test_a_file_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["dryrun", *SMALL, "--gpu", "4090", f"--svg={tmp_path / 'no' / 'x.svg'}"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: cannot write")


@pytest.mark.oracle
@pytest.mark.parametrize(
    "wishes",
    [
        {"method": "ppo", "prompt": 256, "response": 128, "batch": 4},
        {"method": "sft", "tuning": "lora", "sequence": 512, "checkpointing": False},
        {"method": "inference", "concurrency": 4, "context": 2048},
    ],
    ids=lambda wishes: str(wishes["method"]),
)
def test_terms_are_those_of_the_estimate(wishes: dict[str, Any]) -> None:
    """Of one name, one role and about one size: 1 % of the phase, which a term is part of."""
    from fitcheck.bench.dryrun import dry_run

    plan = resolve("smollm2-135m", gpu="4090", **wishes)
    traced = {phase.name: phase for phase in dry_run(plan)[0].phases}
    for phase in fit(plan).phases:
        guess, seen = (
            {(t.role, t.name): t.bytes for t in fullest(p).terms if t.place == ALLOCATED}
            for p in (phase, traced[phase.name])
        )
        for key in guess.keys() | seen.keys():
            if key[1] not in LOOSE and not (phase.name == "load" and key[0] == "card"):
                off = abs(guess.get(key, 0) - seen.get(key, 0))
                assert off < 0.01 * fullest(phase).bytes, (phase.name, key)


LOOSE = ("allocator rounding", "gradients", "logits")  # at a near tie of two moments of backward


def test_comparison_goes_term_by_term() -> None:
    plan = resolve("gpt2", gpu="4090", method="sft", sequence=256)
    report = fit(plan)
    lines = comparison(report, report).splitlines()
    assert "  policy gradients" in "\n".join(lines)
    assert lines[-1].startswith("whole step")
    assert all(line.endswith(("+0.00 %", " -")) for line in lines[1:])


def test_the_bar_never_goes_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = Bar(["load", "rollout", "forward", "backward", "step"])
    micro = ["forward", "backward"] * 2
    said = ["load", *(["rollout", *micro, "step"] * 2)]
    shares = [bar.share(phase) for phase in said]
    assert shares == sorted(shares) and shares[0] == 0
    assert shares[said.index("step")] == 3 / 8 and shares[-1] == 7 / 8
    with bar:
        bar("step")
    assert capsys.readouterr().err == ""  # nobody watches
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with bar:
        bar("step")
    assert capsys.readouterr().err.endswith("tracing step\r\x1b[K")


@pytest.mark.oracle
def test_it_states_the_error_that_is_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    from fitcheck.bench import __main__ as process

    error = Error(0.02, 95, 3, "three runs")
    monkeypatch.setattr(
        process, "stated_error", lambda method, rung: error if rung == "dry-run" else None
    )
    monkeypatch.setattr(process, "gc", SimpleNamespace(disable=lambda: None))
    monkeypatch.setattr(process, "say", lambda **_: None)
    wishes = argparse.Namespace(snapshot=None, html=None, svg=None, timeline=False)
    plan = resolve("pythia-14m", gpu="4090", method="sft", sequence=16, batch=1)
    assert process.traced(plan, wishes)["error"] == error._asdict()
