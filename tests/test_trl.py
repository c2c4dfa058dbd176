"""The recipe `trl` against TRL's own trainers, unmodified, on random weights.

tests/data/trl_1.12.json (PPO) and trl_1.16.json (SFT, DPO, reward, GRPO) hold peaks of allocated
memory, recorded by record_trl.py from the CUDA build of PyTorch, run on a host without a card.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from trl_plans import PLANS, plan_of

from fitcheck import FitCheckError, fit
from fitcheck.answer import plan_from
from fitcheck.plan import Plan
from fitcheck.recipes import defaults, habits

FOLDER = Path(__file__).parent / "data"
DATA = [json.loads((FOLDER / f"trl_{release}.json").read_text()) for release in ("1.12", "1.16")]
RUNS: list[dict[str, Any]] = [run for data in DATA for run in data["runs"]]
ESTIMATE, DRY_RUN, TYPICAL = 0.03, 0.005, 0.0005  # of one peak; the dry run's median


def name(run: dict[str, Any]) -> str:
    return " ".join(str(value) for value in run["plan"].values())


def measured(run: dict[str, Any]) -> int:
    return max(run["bytes"].values())


@pytest.mark.parametrize("run", RUNS, ids=name)
def test_estimate(run: dict[str, Any]) -> None:
    assert fit(plan_of(run["plan"])).allocated_bytes == pytest.approx(measured(run), rel=ESTIMATE)


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """How far off each dry run was, as they come."""
    return {}


@pytest.mark.oracle
@pytest.mark.parametrize("run", RUNS, ids=name)
def test_dry_run(run: dict[str, Any], errors: dict[str, float]) -> None:
    pytest.importorskip("transformers")
    from fitcheck.bench.dryrun import dry_run

    report, _ = dry_run(plan_of(run["plan"]))
    errors[name(run)] = report.allocated_bytes / measured(run) - 1
    assert report.allocated_bytes == pytest.approx(measured(run), rel=DRY_RUN)


@pytest.mark.oracle
def test_the_dry_run_is_usually_exact(errors: dict[str, float]) -> None:
    if len(errors) < len(RUNS):
        pytest.skip("not all dry runs were asked for")
    assert median(map(abs, errors.values())) < TYPICAL


def test_what_was_recorded() -> None:
    assert [run["plan"] for run in RUNS] == PLANS
    assert sum(run["plan"]["method"] == "ppo" for run in RUNS) >= 10
    assert {plan_of(run["plan"]).model.params // 10**9 for run in RUNS} >= {0, 1, 3, 7, 8}
    for data, release in zip(DATA, ("1.12.0", "1.16.0"), strict=True):
        assert data["versions"]["trl"] == release
        assert data["source"] and data["checked"]


# What TRL's PPO takes and does not obey


def ppo(**knobs: Any) -> Plan:
    return plan_of({"model": "meta-llama/Llama-3.2-1B", "method": "ppo", **knobs})


def test_what_is_ignored_changes_nothing() -> None:
    asked = ppo(precision="bf16-autocast", checkpointing=True, tuning="lora", critic_tuning="lora")
    plain = ppo(precision="bf16", tuning="lora")
    assert (asked.precision, asked.checkpointing, asked.critic_tuning) == ("bf16", False, "full")
    assert fit(asked).allocated_bytes == fit(plain).allocated_bytes
    assert ppo(precision="bf16-mixed").precision == "fp32"


def test_the_traps_are_told_with_what_they_cost() -> None:
    notes = " ".join(fit(ppo(tuning="lora")).notes)
    for trap in ("bf16=True", "gradient_checkpointing=True", "the whole critic"):
        assert f"{trap}" in notes
    assert notes.count("GiB") == 4
    assert "critic" not in " ".join(fit(ppo()).notes)
    assert not fit(plan_of({"model": "qwen3-0.6b", "method": "sft"})).notes


def test_a_critic_that_trains_whole_costs_its_states_and_gradients() -> None:
    """fp32: 12 bytes a parameter of Llama 3.2 1B's backbone, less the adapter's."""
    notes = " ".join(fit(ppo(tuning="lora", prompt=32, micro_batch=1, batch=2)).notes)
    told = float(notes.rsplit("which costs ", 1)[1].split()[0])
    assert told == pytest.approx(12 * 1.236e9 / 2**30, rel=0.1)


def test_the_scores_of_a_rollout_stay() -> None:
    """Response x vocabulary x 4 bytes a sequence: once in an update, three times in a rollout."""
    plan = ppo(batch=16, micro_batch=2, response=100)
    scores = 16 * 100 * 128_256 * 4
    report = fit(plan)
    for phase in report.phases[1:]:
        held = [term.bytes for term in phase.terms if "until" in str(term.why)]
        assert held == [scores]
    pad = next(p for p in report.phases if p.name == "rollout.scores").moments[-1]
    assert sum(term.bytes for term in pad.terms if "scores" in term.name) == 3 * scores


@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("ppo", {"critic": "shared"}),
        ("ppo", {"reward_model": "rule"}),
        ("ppo", {"offload": ("optimizer",)}),
        ("ppo", {"precision": "bf16-master"}),
        ("ppo", {"empty_cache": False}),
        ("sft", {"loss": "full"}),
        ("grpo", {"reward_model": "policy"}),
        ("dpo", {"score_batch": 1, "micro_batch": 2}),
        ("inference", {}),
    ],
)
def test_what_trl_cannot_do_is_an_error(method: str, knobs: dict[str, Any]) -> None:
    with pytest.raises(FitCheckError) as raised:
        plan_of({"model": "qwen3-0.6b", "method": method, **knobs})
    assert raised.value.hint


@pytest.mark.parametrize("method", ["ppo", "sft", "dpo", "reward", "grpo"])
@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_a_plan_reads_itself_back(method: str, tuning: str) -> None:
    plan = plan_of({"model": "qwen3-0.6b", "method": method, "tuning": tuning})
    assert plan_from(plan.to_json()).to_json() == plan.to_json()


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({}, (8, 8)),
        ({"batch": 4}, (4, 4)),
        ({"batch": 12}, (6, 12)),
        ({"micro_batch": 2}, (2, 2)),
        ({"micro_batch": 2, "batch": 64}, (2, 64)),
    ],
)
def test_a_batch_is_one_micro_batch_unless_it_is_given(
    given: dict[str, int], sizes: tuple[int, int]
) -> None:
    plan = ppo(**given)
    assert (plan.micro_batch, plan.batch) == sizes
    assert plan.score_batch == min(64, plan.batch)


def test_every_default_has_its_source() -> None:
    for method in ("ppo", "sft", "dpo", "reward", "grpo"):
        found = habits("trl", method)
        rows = [*found["defaults"].values(), *found.get("runs_as", {}).values()]
        assert all(row["source"] for row in rows)
        assert found["residency"]["policy"]


@pytest.mark.oracle
def test_defaults_are_those_of_trl() -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    if not trl.__version__.startswith("1.16"):
        pytest.skip(f"trl {trl.__version__} is not the release that the recipe follows")
    config = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "reward": trl.RewardConfig}
    config["grpo"] = trl.GRPOConfig
    for method, kind in config.items():
        fields = {name: field.default for name, field in kind.__dataclass_fields__.items()}
        ours = defaults("trl", method, {})
        assert fields["per_device_train_batch_size"] == ours["micro_batch"]
        assert fields["gradient_checkpointing"] is True
        assert fields.get("max_length", fields.get("max_completion_length")) == (
            ours.get("sequence") or ours["response"]
        )
    assert trl.GRPOConfig.__dataclass_fields__["beta"].default == 0.0
    assert trl.GRPOConfig.__dataclass_fields__["num_generations"].default == 8
