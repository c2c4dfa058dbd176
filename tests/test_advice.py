"""Advice: never a higher peak, nothing in a combination that it can do without, exact ceilings."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from time import process_time
from typing import Any

import pytest

from fitcheck import Plan, catalog, resolve, worker
from fitcheck.advice import Fix, best, ceilings, fixes, frontier, room, uncached
from fitcheck.advice.ceiling import level
from fitcheck.advice.changes import RANKS, divisors, family_of
from fitcheck.advice.commands import card_name, command
from fitcheck.advice.fix import judged, pace, slower
from fitcheck.answer import plan_from
from fitcheck.cli import main, parser
from fitcheck.errors import FitCheckError
from fitcheck.flags import plan_fields
from fitcheck.names import card_sizes
from fitcheck.report import CACHED, Moment, Phase, Report, Term
from fitcheck.verifying import verified

QUESTIONS: list[dict[str, Any]] = [
    {"model": "llama-3.1-8b", "gpu": "4090"},
    {"model": "llama-3.1-8b", "gpu": "4090", "tuning": "qlora", "lora_targets": "attention"},
    {"model": "llama-3.2-1b", "gpu": "3060", "batch": 16, "micro_batch": 4, "minibatch": 8},
    {"model": "qwen2.5-7b", "gpu": "3060", "method": "dpo", "tuning": "qlora", "micro_batch": 2},
    {"model": "qwen3-4b", "gpu": "a100", "method": "grpo", "batch": 16, "score_batch": 8},
    {"model": "gpt2", "gpu": "gtx 1060", "method": "sft", "checkpointing": False, "batch": 64}
    | {"sequence": 1024, "micro_batch": 16, "attention": "eager"},
    {"model": "qwen3-8b", "gpu": "rx 7900 xtx", "method": "inference", "context": 40960}
    | {"concurrency": 8},
    {"model": "llama-3.1-8b", "gpu": "4090", "gpus": 4, "method": "sft"},
    {"model": "pythia-1.4b", "gpu": "t4", "method": "reward", "sequence": 2048, "micro_batch": 4},
]


def plan_of(question: dict[str, Any]) -> Plan:
    return resolve(**question)


@cache
def asked(at: int) -> tuple[Plan, list[Fix]]:
    plan = plan_of(QUESTIONS[at])
    return plan, fixes(plan, judged(plan))


def parsed(text: str) -> Plan:
    """The plan that a printed command asks for."""
    program, *words = shlex.split(text)
    assert program == "fitcheck"
    args = parser(words[0]).parse_args(words)
    return resolve(args.model, **plan_fields(args))


questions = pytest.mark.parametrize("at", range(len(QUESTIONS)))


@questions
def test_no_advice_raises_the_peak_and_what_it_saves_is_the_difference(at: int) -> None:
    plan, found = asked(at)
    before = judged(plan).peak_bytes
    assert found
    for fix in found:
        after = judged(fix.plan)
        assert 0 < fix.saves == before - after.peak_bytes
        assert (fix.peak_bytes, fix.verdict) == (after.peak_bytes, after.verdict)


@questions
def test_the_printed_command_asks_for_the_advised_plan(at: int) -> None:
    plan, found = asked(at)
    assert parsed(command(plan)) == plan
    for fix in found:
        assert parsed(fix.command) == fix.plan


@questions
def test_what_fits_comes_first_and_then_what_costs_least(at: int) -> None:
    _, found = asked(at)
    verdicts = [fix.verdict for fix in found]
    assert verdicts[0] == "fits"
    assert verdicts == sorted(verdicts, key=("fits", "tight", "does-not-fit").index)
    for verdict in set(verdicts):
        ranks = [RANKS.index(fix.rank) for fix in found if fix.verdict == verdict]
        assert ranks == sorted(ranks)


@questions
def test_with_a_limit_the_search_ends_early_and_finds_the_same(at: int) -> None:
    plan, found = asked(at)
    report = judged(plan)
    for limit in (1, 3, 5):
        assert fixes(plan, report, limit) == found[:limit]
    enough = [fix for fix in found if fix.verdict != "does-not-fit"]
    assert best(plan, report, 5) == enough[:5]


def test_where_nothing_makes_it_fit_what_saves_most_comes_first() -> None:
    plan = resolve("mixtral-8x7b", gpu="a100", method="grpo", tuning="lora")
    found = best(plan, judged(plan), 5)
    assert {fix.verdict for fix in found} == {"does-not-fit"}
    saved = [fix.saves for fix in found]
    assert len(saved) == 5 and saved == sorted(saved, reverse=True)


@questions
def test_a_combination_needs_each_of_its_changes(at: int) -> None:
    plan, found = asked(at)
    for fix in found:
        if "; " not in fix.effect:
            continue
        for name in fix.changes:
            fewer = {field: value for field, value in fix.changes.items() if field != name}
            with suppress(FitCheckError):  # such as an adapter without its base
                assert judged(plan.change(**fewer)).verdict != "fits", (fix.flags, name)


def test_the_advice_is_in_every_answer(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["qwen2.5-7b", "--gpu", "3060", "--method", "dpo", "--tuning", "qlora"]
    assert main(["check", *words, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert 1 < len(answer["advice"]) <= 5
    for fix in answer["advice"]:
        again = judged(parsed(fix["command"]))
        assert (fix["verdict"], fix["peak_bytes"]) == (again.verdict, again.peak_bytes)
        assert fix["saves_bytes"] == answer["peak_bytes"] - fix["peak_bytes"]
        assert fix["verdict"] == "fits"
    assert main(["check", *words, "--gpu", "a100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["advice"] == []


PAGES = {
    "advise-does-not-fit": ["llama-3.1-8b", "--gpu", "4090", "--tuning", "qlora"],
    "advise-fits": ["llama-3.1-8b", "--gpu", "a100", "--tuning", "qlora", "--batch", "16"],
    "advise-inference": ["qwen3-8b", "--gpu", "rtx 3060", "--method", "inference"]
    + ["--context", "32k", "--concurrency", "4"],
}


@pytest.mark.parametrize("name", PAGES)
def test_advise(
    name: str, golden: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", *PAGES[name], "--dryrun", "off"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    if name == "advise-does-not-fit":
        golden(name, re.sub(r"\b\d+(\.\d+)?x", "?.??x", shown))  # times are speed.py's
    assert "How far each goes, all else as it is" in shown
    printed = re.findall(r"^ +\$ (fitcheck (?:.*\\\n)*.*)$", shown, re.MULTILINE)
    assert len(printed) == len(re.findall(r"^ ?\d+  ", shown, re.MULTILINE))
    for text in printed:
        assert judged(parsed(text.replace("\\\n", ""))).verdict != "does-not-fit"


def test_advise_json_holds_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["qwen3-4b", "--gpu", "a100", "--method", "sft", "--tuning", "lora"]
    assert main(["advise", *words, "--json"]) == 0  # it fits: nothing to check by the dry run
    answer = json.loads(capsys.readouterr().out)
    plan = resolve("qwen3-4b", gpu="a100", method="sft", tuning="lora")
    assert plan_from(answer["plan"]) == plan
    found = ceilings(plan)
    assert answer["ceilings"]["sequence"]["largest"] == found["sequence"].value
    more = room(plan, found)
    assert [fix["peak_bytes"] for fix in answer["room"]] == [fix.peak_bytes for fix in more]


def test_what_may_be_turned_up_still_fits_and_the_next_size_does_not() -> None:
    plan = resolve("qwen3-1.7b", gpu="4090", tuning="lora", score_batch=1, reward_precision="nf4")
    found = {fix.flags: fix for fix in room(plan, ceilings(plan))}
    before = judged(plan).peak_bytes
    for fix in found.values():
        assert fix.verdict == judged(fix.plan).verdict == "fits"
        assert fix.peak_bytes > before
    assert "--reward-precision bf16" in found
    assert "--tuning full" not in found  # 1.7 B in full PPO needs more than 24 GB
    assert room(resolve("llama-3.1-8b", gpu="4090"), {}) == []


def cached(report: Report, size: int) -> Report:
    """The report with so much more that the allocator only keeps."""
    term = Term("segment rests", "policy", size, "", CACHED)
    phases = tuple(
        Phase(p.name, (Moment(p.peak.name, (*p.peak.terms, term)),)) for p in report.phases
    )
    return replace(report, phases=phases)


def test_where_the_cache_alone_is_too_much_it_is_lessened() -> None:
    report = judged(resolve("llama-3.2-3b", gpu="4090", method="sft", tuning="lora"))
    assert report.verdict == "fits" and uncached(report) == []
    tight = cached(report, report.spare_bytes + 2**30)
    assert tight.verdict == "tight"
    found = uncached(tight)
    variable, command = found[0].command.split(" ", 1)
    assert variable == "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" == found[0].flags
    assert command.startswith("fitcheck dryrun ") and parsed(command) == tight.plan
    assert parsed(found[1].command) == tight.plan.change(empty_cache=True)
    for fix in found:
        assert fix.verdict == "tight" and fix in fixes(tight.plan, tight)
        assert fix.saves == tight.peak_bytes - tight.needed_bytes >= report.spare_bytes + 2**30
    much = judged(tight.plan.change(tuning="full"))  # what is allocated is too much
    assert much.verdict == "does-not-fit" and uncached(cached(much, 2**30)) == []


def test_what_fits_closely_is_checked_and_what_fits_well_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Plan] = []

    def dry_run(plan: Plan, *rest: Any) -> Report:
        asked.append(plan)
        return replace(
            judged(plan), source="dry-run", outcome="fits" if len(asked) > 1 else "tight"
        )

    monkeypatch.setattr(worker, "dry_run", dry_run)
    plan = resolve("qwen3-4b", gpu="a100", method="sft", tuning="lora")
    well = judged(plan)
    assert list(verified(well, fixes(plan, well))) == []
    limit = ceilings(plan)["sequence"].plan
    close = judged(limit)
    found = list(verified(close, fixes(limit, close)))
    assert [check.fix for check in found] == [None, *fixes(limit, close)[:3]]
    assert asked == [limit, *(fix.plan for fix in fixes(limit, close)[:3])]


@pytest.mark.oracle
def test_the_dry_run_confirms_the_first_advice_and_tells_expandable_segments() -> None:
    small = {"model": "smollm2-135m", "gpu": "gtx 1050 ti", "method": "dpo", "tuning": "lora"}
    plan = resolve(**small, sequence=1024, micro_batch=4)
    report = judged(plan)
    found = fixes(plan, report)
    checks = verified(report, found)
    own, first = next(checks), next(checks)
    assert own.fix is None and own.report.verdict == report.verdict == "does-not-fit"
    assert first.fix == found[0] and first.report.verdict == "fits"
    guessed = judged(found[0].plan).allocated_bytes
    assert first.report.allocated_bytes == pytest.approx(guessed, rel=0.02)
    variable = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    grown = worker.dry_run(plan, environment=variable)
    # Allocated but for the ends of blocks that are too small to be split off.
    assert grown.allocated_bytes == pytest.approx(own.report.allocated_bytes, rel=0.01)
    assert grown.reserved_bytes < own.report.reserved_bytes


FRONTS = [1, 2, 3, 4]


@pytest.mark.parametrize("at", FRONTS)
def test_on_the_frontier_less_memory_is_more_time(at: int) -> None:
    plan = plan_of(QUESTIONS[at])
    front = frontier(plan)
    before = judged(plan)
    assert len(front) > 1
    assert [fix.peak_bytes for fix in front] == sorted(fix.peak_bytes for fix in front)
    times = [fix.time for fix in front]
    assert times == sorted(times, reverse=True)
    for fix in front:
        after = judged(fix.plan)
        assert fix.changes.keys() <= {
            "checkpointing",
            "micro_batch",
            "loss",
            "optimizer",
            "offload",
        }
        assert (fix.peak_bytes, fix.time) == (after.peak_bytes, pace(after) / pace(before))
        beaten = fix.peak_bytes < before.peak_bytes and fix.time < 1
        dominated = fix.peak_bytes > before.peak_bytes and fix.time > 1
        assert beaten or not dominated


def test_time_is_that_of_a_sample() -> None:
    """Half the batch is half the step, but for the optimizer, whose step is as long as before."""
    plan = resolve("qwen3-8b", gpu="h100", method="sft", batch=8)
    assert 1 < slower(plan, plan.change(batch=4)) < 1.15
    assert slower(plan, plan.change(offload=("optimizer",))) > 1
    assert slower(plan, plan.change(checkpointing=False)) < 0.95


def test_a_batch_with_many_divisors_is_searched_as_quickly() -> None:
    """73,513,440 has 768 divisors; by trial division of all numbers this took seconds."""
    assert divisors(12) == [6, 4, 3, 2, 1]
    assert divisors(1) == []
    assert len(divisors(73_513_440)) == 767
    plan = resolve("llama-3.1-8b", gpu="4090", method="sft", batch=73_513_440)
    began = process_time()
    fixes(plan, judged(plan))
    assert len(frontier(plan)) > 1
    assert process_time() - began < 3


def test_cards_that_share_more_are_the_first_advice_of_several() -> None:
    plan, found = asked(7)
    assert plan.gpus == 4 and plan.sharding == "ddp"
    assert found[0].rank == "result unchanged"
    assert found[0].plan.sharding in ("zero1", "zero2", "zero3", "fsdp")
    assert "--gpus 4 " in found[0].command


def test_a_model_from_a_file_is_not_taken_for_one_of_the_catalog() -> None:
    """Its path is nobody's business and not kept; its name alone could mean another model."""
    plan = resolve("qwen3-1.7b", gpu="4090", method="sft", tuning="lora")
    mine = plan.change(model=replace(plan.model, id="llama-3.1-8b"))
    assert command(mine).startswith("fitcheck check path/to/llama-3.1-8b --gpu 4090 ")


def test_every_card_is_called_by_a_name_that_means_it() -> None:
    for row in catalog.gpu_rows():
        for size in card_sizes(row):
            card = catalog.find_gpu(f"{row['id']} {size:g}gb")
            assert catalog.find_gpu(card_name(card)) == card


CEILINGS = [1, 3, 5, 6, 8]


@pytest.mark.parametrize("at", CEILINGS)
def test_ceilings_are_exact(at: int) -> None:
    plan = plan_of(QUESTIONS[at] | {"gpu": "h100"})
    found = ceilings(plan)
    assert found
    for ceiling in found.values():
        assert ceiling.plan is not None, ceiling.field
        assert judged(ceiling.plan).verdict == "fits"
        assert getattr(ceiling.plan, ceiling.field) == ceiling.value
        if ceiling.field == "model":
            larger = [m for m in family_of(plan.model) if m.params > ceiling.value.params]
            refused = [verdict(plan, {"model": model}) for model in larger]
            assert "fits" not in refused
        else:
            one_more = level(plan, ceiling.field, ceiling.value + ceiling.step)
            expected = {"memory": ("tight", "does-not-fit"), "rules": ("refused",)}
            assert verdict(plan, one_more) in expected[ceiling.bound], ceiling


def verdict(plan: Plan, changes: dict[str, Any]) -> str:
    try:
        return judged(plan.change(**changes)).verdict
    except FitCheckError:
        return "refused"


def test_where_nothing_fits_there_is_no_ceiling() -> None:
    found = ceilings(plan_of(QUESTIONS[0] | {"gpu": "a100"}))
    assert found["response"].value is None and found["response"].bound == "memory"
    assert found["model"].value.params < found["model"].now.params


def test_the_share_of_an_engine_is_a_ceiling_too() -> None:
    """What the engine's share cannot hold is no plan at all: the formulas refuse it."""
    wishes = {"method": "grpo", "tuning": "lora", "loss": "chunked", "rollout": "vllm"}
    plan = resolve("qwen2.5-3b", gpu="4090", rollout_memory=0.245, **wishes)
    found = ceilings(plan)["response"]
    assert found.value > found.now
    with pytest.raises(FitCheckError, match="gives vllm"):
        judged(plan.change(response=found.value + 1))


def test_a_known_ceiling_is_found() -> None:
    """By hand: what 64 sequences and one more take, and the model's own length."""
    plan = resolve("gpt2", gpu="h100", method="inference", context=1024)
    found = ceilings(plan)["context"]
    assert (found.value, found.bound, found.now) == (1024, "rules", 1024)
    per_sequence = 2 * 12 * 768 * 1024 * 2  # K and V, 12 layers, bf16: 36 MiB
    most = ceilings(plan)["concurrency"]
    assert most.bound == "memory"
    spare = judged(plan.change(concurrency=most.value)).spare_bytes
    assert 0 <= spare < per_sequence + 2**21  # one more sequence of cache, and block sizes
