"""`fitcheck bench`: what is chosen, searched, shown and kept; real runs on a CPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_archive import PLAN, measurement

from fitcheck import archive, catalog, fit, here, machine, suite, worker
from fitcheck.cli import main
from fitcheck.errors import FitCheckError
from fitcheck.largest import searched
from fitcheck.measured import Measurement, Oom
from fitcheck.measured_text import measured_text
from fitcheck.plan import Plan
from fitcheck.progress import Bar

GIB = 2**30
TINY = ["pythia-14m", "--method", "sft", "--sequence", "16", "--batch", "2", "--attention", "eager"]


def computer(*cards: machine.Accelerator) -> machine.Machine:
    ram = machine.Ram(512 * GIB, 500 * GIB)
    return machine.Machine(accelerators=cards, ram=ram, cpus=8, system="", notes=(), raw=())


def card(gib: int, name: str = "rtx 4090", **fields: Any) -> machine.Accelerator:
    gpu = catalog.find_gpu(name)
    known = {"index": 0, "name": gpu.name, "vendor": "nvidia", "reserved_bytes": 0, "gpu": gpu}
    return machine.Accelerator(**{**known, "total_bytes": gib * GIB, **fields})


# --- what runs ---


def on(monkeypatch: pytest.MonkeyPatch, *cards: machine.Accelerator) -> None:
    monkeypatch.setattr(machine, "detect", lambda: computer(*cards))


@pytest.mark.parametrize("method", ["ppo", "sft", "inference"])
def test_the_largest_model_with_a_tenth_to_spare(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    for gib in (4, 8, 24, 80, 180):
        on(monkeypatch, card(gib))
        try:
            plan, _ = here.plan_here(None, {"method": method})
        except FitCheckError as fault:
            assert "no model fits with a tenth to spare" in fault.message
            continue
        assert plan.memory.usable_bytes == gib * GIB
        assert 1.1 * fit(plan).peak_bytes <= gib * GIB
        larger = here.SENSIBLE[: here.SENSIBLE.index(plan.model.id)]
        if larger:
            report = fit(plan.change(model=catalog.find_model(larger[-1])))
            assert 1.1 * report.peak_bytes > gib * GIB
        chosen.append(plan.model.params)
    assert chosen == sorted(chosen) and len(set(chosen)) >= 3


def test_sensible_models_come_largest_first() -> None:
    sizes = [catalog.find_model(name).params for name in here.SENSIBLE]
    assert sizes == sorted(sizes, reverse=True)


def test_without_a_card_a_tiny_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch)
    plan, environment = here.plan_here(None, {"method": "dpo"})
    assert (plan.model.id, plan.attention, environment) == (here.TINY, "eager", {})
    asked, _ = here.plan_here("qwen2.5-0.5b", {"gpu": "a100"})
    assert asked.prompt == 512  # a plan that is asked for is not made smaller


def test_a_cpu_is_asked_for_no_more_than_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch)
    assert here.plan_here("llama-3.1-8b", {"method": "sft"}).plan.model.num_layers == 32
    with pytest.raises(FitCheckError, match="too large: it takes") as fault:
        here.plan_here("llama-3.1-405b", {"method": "sft"})
    assert "fitcheck dryrun" in fault.value.hint


def test_the_card_that_is_judged_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    first = card(24, uuid="GPU-1", used_bytes=20 * GIB)
    second = card(80, "h100", index=1, uuid="GPU-2")
    on(monkeypatch, first, second)
    plan, environment = here.plan_here("qwen2.5-0.5b", {})
    assert (plan.gpu.id, environment) == (second.card.id, {"CUDA_VISIBLE_DEVICES": "GPU-2"})
    plan, environment = here.plan_here("qwen2.5-0.5b", {"gpu": "4090"})
    assert environment == {"CUDA_VISIBLE_DEVICES": "GPU-1"}
    assert plan.memory.usable_bytes == 4 * GIB
    with pytest.raises(FitCheckError, match="runs on this machine's .*, not on NVIDIA A100"):
        here.plan_here("qwen2.5-0.5b", {"gpu": "a100"})


def test_what_the_suite_itself_runs_is_not_taken_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = computer(card(80, "h100"))
    on(monkeypatch, card(80, "h100", used_bytes=70 * GIB))  # while another case is measured
    plan, _ = here.plan_here("qwen2.5-0.5b", {}, before)
    assert plan.memory.usable_bytes == 80 * GIB


def test_a_limit_is_what_the_allocator_may_take() -> None:
    limited = here.limited(PLAN, 10 * GIB)
    assert limited.memory.usable_bytes == 10 * GIB + 450 * 2**20
    assert "--limit" in limited.memory.why


# --- the search ---


@pytest.mark.parametrize("start", [1, 2, 7, 16, 40])
def test_search_from_any_start(start: int) -> None:
    for edge in range(41):
        asked: list[int] = []

        def fits(size: int, edge: int = edge, asked: list[int] = asked) -> bool:
            asked.append(size)
            return size <= edge

        assert searched(fits, start) == edge
        assert len(asked) == len(set(asked))  # each run costs a minute
        if start == edge:
            assert len(asked) == 2


# --- what is shown ---


def test_text(golden: Any) -> None:
    estimate = fit(PLAN)
    golden("bench", measured_text(measurement(), estimate, estimate, explain=True))


def test_text_of_a_failure() -> None:
    oom = Oom("update.step", 1, "torch._foreach_sqrt", 2**20, 2**19)
    report = replace(measurement().report, outcome="does-not-fit")
    text = measured_text(replace(measurement(), oom=oom, report=report), fit(PLAN), None)
    assert "DOES NOT FIT" in text
    assert "said fits" in text and "off what was measured" not in " ".join(text.split())


def test_the_bar_never_goes_back(capsys: pytest.CaptureFixture[str]) -> None:
    shares = []
    with Bar(["load", "a", "b"], "measuring", steps=2) as bar:
        for phase, step in (("load", 0), ("a", 1), ("b", 1), ("a", 1), ("a", 2), ("b", 2)):
            bar(phase, step)
            shares.append(bar.share(phase, step))
    assert shares == [0, 0, 0.25, 0.25, 0.5, 0.75]
    assert capsys.readouterr().err == ""  # nobody watches


# --- real runs on this CPU ---


@pytest.mark.oracle
def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *TINY, "--steps", "1", "--json", "--save", "--to", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    values = json.loads(captured.out)
    assert values["source"] == "measured" and values["verdict"] == "fits"
    predicted = values["predicted"]
    assert predicted["dry-run"]["source"] == "dry-run"
    assert predicted["dry-run"]["allocated_bytes"] == values["allocated_bytes"]
    assert predicted["estimate"]["allocated_bytes"] == pytest.approx(
        values["allocated_bytes"], rel=0.02
    )
    assert [r["phase"] for r in values["measurement"]["readings"]][0] == "load"
    (path,) = tmp_path.iterdir()
    assert archive.read(path).rung == "counted"
    assert str(path) in values["notes"][-1]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same traces and measurements, without the seconds that a process takes to start."""
    from fitcheck.bench import dryrun
    from fitcheck.bench.measure import Wishes, measure

    def measured(plan: Plan, options: Sequence[str], *_: Any, **__: Any) -> Measurement:
        wishes = dict(option.removeprefix("--").split("=") for option in options)
        limit = int(wishes["limit"]) if "limit" in wishes else None
        return measure(plan, Wishes(int(wishes["steps"]), limit))

    monkeypatch.setattr(worker, "measure", measured)
    monkeypatch.setattr(worker, "dry_run", lambda plan, *_, **__: dryrun.dry_run(plan)[0])


@pytest.mark.oracle
@pytest.mark.usefixtures("in_process")
def test_out_of_memory_tells_the_fixes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *TINY, "--steps", "1", "--limit", "200mib"]) == 1
    out = capsys.readouterr().out
    assert "ran out of memory in update." in " ".join(out.split())
    assert "said does-not-fit" in out
    assert "Fix      --" in out


@pytest.mark.oracle
@pytest.mark.usefixtures("in_process")
def test_the_largest_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """Memory for some micro-batch more than one, as the allocator's model counts it."""
    words = ["--until-oom", "--steps", "1", "--limit", "450mib", "--json"]
    assert main(["bench", *TINY, "--sequence", "64", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    largest = found["largest_micro_batch"]
    assert largest >= 1
    tried = {int(size): run["verdict"] for size, run in found["tried"].items()}
    assert tried[largest] != "does-not-fit" and tried[largest + 1] == "does-not-fit"
    assert found["dry_run"] == {str(largest): tried[largest], str(largest + 1): "does-not-fit"}


CASES = [
    suite.Case(here.TINY, {"method": "sft", "sequence": 16, "batch": 2, "attention": "eager"}),
    suite.Case(
        here.TINY, {"method": "sft", "sequence": 16, "batch": 2, "attention": "eager"}, "less"
    ),
]


@pytest.mark.oracle
@pytest.mark.usefixtures("in_process")
def test_a_suite_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "cases", lambda on_card: iter(CASES))
    words = ["bench", "--suite", "--to", str(tmp_path)]
    assert main([*words, "--minutes", "5"]) == 0
    first = capsys.readouterr().out
    assert "2 runs in" in first and "its outcome right on 2 of 2" in " ".join(first.split())
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(worker, "measure", None)  # all of it is there already
    assert main([*words, "--minutes", "0"]) == 0
    assert capsys.readouterr().out == first


def test_the_matrix_covers_what_it_should() -> None:
    every = list(suite.cases(on_card=True))
    assert len({json.dumps(case) for case in every}) == len(every)
    for method in ("sft", "dpo", "reward", "grpo", "ppo"):
        own = [case for case in every if case.fields["method"] == method]
        assert {case.fields.get("tuning") for case in own} >= {"full", "lora"}
        assert {case.fields.get("precision") for case in own} >= {"bf16", "bf16-mixed"}
        assert {case.fields.get("checkpointing", True) for case in own} == {True, False}
        assert {case.model for case in own} >= {*suite.SIZES, suite.SMALLER, *suite.LARGER}
    edges = {(case.edge, case.expandable) for case in every if case.edge}
    assert edges == {(edge, grown) for edge in suite.EDGES for grown in (False, True)}
    sizes = [catalog.find_model(case.model).params for case in every]
    assert min(sizes) < 0.2e9 and max(sizes) > 30e9
    first = every[:30]  # what ten minutes are enough for holds all kinds
    assert {case.model for case in first} == {suite.SIZES[0], suite.SIZES[-1]}
    assert any(case.edge for case in first) and any(case.expandable for case in first)


@pytest.mark.parametrize(
    ("row", "holds"),
    [
        (suite.Row("", 1.0, 0.01, 0.04, "fits", "fits", "fits"), True),
        (suite.Row("", 1.0, 0.03, 0.04, "fits", "fits", "fits"), False),
        (suite.Row("", 1.0, 0.01, -0.06, "fits", "fits", "fits"), False),
        (suite.Row("", 1.0, 0.01, 0.0, "fits", "tight", "tight"), False),
        (suite.Row("", 1.0, None, None, "does-not-fit", "tight", "does-not-fit"), True),
        (suite.Row("", 1.0, None, None, "does-not-fit", "fits", "does-not-fit"), False),
        (suite.Row("", None, None, None, "-", "-", "not run"), False),
    ],
)
def test_when_a_prediction_holds(row: suite.Row, holds: bool) -> None:
    assert row.holds is holds


def test_export_bundles_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive.save(archive.record(measurement(), None, None), tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--export", "--to", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("1 measurements in measurements.zip")


def test_steps_are_a_number_from_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--steps", "0"]) == 2
    assert "--steps cannot be 0" in capsys.readouterr().err
