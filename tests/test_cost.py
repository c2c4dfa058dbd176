"""Hours, energy and money of a run: by hand, from dated prices, and against other methods."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from fitcheck import catalog
from fitcheck.answer import resolve
from fitcheck.cli import main
from fitcheck.cost import Cost, Data, Prices, run_cost, same_data, step_flops
from fitcheck.errors import FitCheckError
from fitcheck.fit import fit
from fitcheck.speed import step_seconds
from fitcheck.work import forward, head_flops

MODEL = "qwen2.5-1.5b"


def cost(data: Data, prices: Prices | None = None, **wishes: Any) -> Cost:
    return run_cost(fit(resolve(MODEL, **({"gpu": "a100 80"} | wishes))), data, prices)


def test_a_run_by_hand() -> None:
    prices = Prices(kwh=0.5, card=10_000, card_hours=20_000, watts=300)
    run = cost(Data(samples=1000, passes=3), prices, method="sft", batch=16)
    assert run.steps == 188  # 3000 / 16, rounded up
    assert run.step_seconds == step_seconds(run.report.plan, run.report)
    assert run.hours == pytest.approx(188 * run.step_seconds / 3600)
    assert run.kwh == pytest.approx(0.3 * run.hours)
    assert run.electricity_usd == pytest.approx(0.15 * run.hours)
    assert run.card_usd == pytest.approx(0.5 * run.hours)


@pytest.mark.parametrize(
    ("wishes", "steps"),
    [
        ({"method": "ppo", "batch": 8}, 125),
        ({"method": "grpo", "batch": 16, "group": 8}, 500),  # two prompts a step
        ({"method": "dpo", "batch": 10}, 100),
    ],
)
def test_steps_of_a_thousand_samples(wishes: dict[str, Any], steps: int) -> None:
    assert cost(Data(samples=1000), **wishes).steps == steps


def test_tokens_are_samples_by_their_length() -> None:
    sft = cost(Data(tokens=2048 * 800), method="sft", sequence=2048)
    assert sft.steps == cost(Data(samples=800), method="sft", sequence=2048).steps == 100
    dpo = cost(Data(tokens=2 * 2048 * 80), method="dpo", sequence=2048)
    assert dpo.steps == 10
    generated = cost(Data(tokens=1000), method="inference", concurrency=10)
    assert generated.steps == 100


def test_energy_is_at_most_that_of_the_tdp() -> None:
    run = cost(Data(samples=1000), method="sft")
    assert run.kwh == pytest.approx(0.4 * run.hours)  # A100 SXM: 400 W


def test_each_cloud_shows_its_cheapest_offer_and_rents_whole_instances() -> None:
    run = cost(Data(samples=10_000), method="sft", gpu="h100")
    clouds = [rent.price.cloud for rent in run.clouds]
    assert len(clouds) == len(set(clouds)) > 5
    assert [rent.usd for rent in run.clouds] == sorted(rent.usd for rent in run.clouds)
    assert all(rent.price.kind not in ("spot", "reserved") for rent in run.clouds)
    aws = next(rent for rent in run.clouds if rent.price.cloud == "aws")
    assert aws.price.gpu_count == 8
    assert aws.usd == pytest.approx(aws.price.usd_per_hour * run.hours)  # eight cards, one used
    own = cost(Data(samples=10_000), Prices(hour=2.0), method="sft", gpu="h100")
    assert [rent.usd for rent in own.clouds] == [pytest.approx(2 * own.hours)]


def test_a_slice_of_a_card_is_no_offer() -> None:
    slices = {price.gpu_id for price in catalog.clouds() if price.gpu_count < 1}
    assert slices
    for gpu in slices:
        run = cost(Data(samples=10), method="sft", gpu=catalog.find_gpu(gpu))
        assert all(rent.price.gpu_count >= 1 for rent in run.clouds)


def test_flops_of_sft_and_ppo_by_hand() -> None:
    plan = resolve(MODEL, method="sft", gpu="a100 80", checkpointing=False, batch=4, micro_batch=4)
    work = forward(plan.model, 1, 2048)
    one = work.linear + work.attention + head_flops(plan.model, 2048)
    assert step_flops(plan) == pytest.approx(3 * 4 * one)
    ppo = plan.change(method="ppo", prompt=1024, response=1024)
    # Written, four models' scores, and four epochs of forward and backward of policy and critic.
    assert step_flops(ppo) == pytest.approx((1 + 4 + 2 * 4 * 3) * 4 * one)


def test_ppo_costs_more_than_dpo_and_dpo_more_than_sft() -> None:
    plan = resolve(MODEL, gpu="h100", method="ppo", tuning="lora")
    found = same_data(plan, Data(samples=1000))
    runs = {name: run for name, run in found.items() if isinstance(run, Cost)}
    assert runs.keys() == {"sft", "reward", "dpo", "grpo", "ppo"}
    assert runs["ppo"].hours > runs["dpo"].hours > runs["sft"].hours
    assert runs["dpo"].flops == pytest.approx(8 / 3 * runs["sft"].flops)  # two of each, scored too
    assert runs["ppo"].report.plan == plan
    assert runs["sft"].report.plan.sequence == plan.prompt + plan.response
    back = same_data(runs["sft"].report.plan, Data(samples=1000))
    assert isinstance(back["ppo"], Cost)
    assert back["ppo"].report.plan.tokens == plan.tokens


def test_what_cannot_run_is_told() -> None:
    plan = resolve(MODEL, gpu="h100", method="ppo", batch=4)
    found = same_data(plan, Data(samples=1000))
    assert found["grpo"] == "--group 8 does not divide --batch 4"
    assert isinstance(found["ppo"], Cost)


@pytest.mark.parametrize(
    ("data", "prices"),
    [
        (Data(), Prices()),
        (Data(samples=1, tokens=1), Prices()),
        (Data(samples=0), Prices()),
        (Data(samples=1, passes=0), Prices()),
        (Data(samples=1), Prices(kwh=-1)),
        (Data(samples=1), Prices(card_hours=0)),
        (Data(samples=1), Prices(watts=float("nan"))),
    ],
)
def test_mistakes(data: Data, prices: Prices) -> None:
    with pytest.raises(FitCheckError):
        cost(data, prices, method="sft")


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cost", MODEL, "--gpu", "h100", "--method", "ppo", "--samples", "10k"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "10,000 prompts: 1,250 steps" in shown
    assert "USD/kWh" in shown
    assert re.search(r"^aws .* 2026-\d\d-\d\d$", shown, re.MULTILINE)
    assert max(map(len, shown.splitlines())) <= 80
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 1250
    assert found["same_data"]["sft"]["hours"] < found["hours"]
    assert {"cloud", "usd", "as_of", "source"} <= found["clouds"][0].keys()


@pytest.mark.parametrize("verb", [["cost"], ["gpus", "--for"]])
def test_inference_is_counted_in_tokens(
    verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*verb, MODEL, "--method", "inference", "--samples", "5"]
    assert main(words if verb == ["gpus", "--for"] else [*words, "--gpu", "4090"]) == 2
    assert "hint: --tokens 2m" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--samples", "many"], ["--samples", "5", "--kwh", "x"]])
def test_a_mistake_on_the_command_line(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cost", MODEL, "--gpu", "h100", "--method", "sft", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "hint: " in printed.err
