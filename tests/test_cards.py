"""Which cards a plan fits on: none forgotten, the smallest size, ranked, the user's own prices."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cache

import pytest

from fitcheck import FitCheckError, Plan, catalog, fit, resolve
from fitcheck.cards import RANKINGS, Suitable, suitable
from fitcheck.cli import main
from fitcheck.cost import Data, Prices
from fitcheck.gpu import GPU
from fitcheck.names import card_sizes
from fitcheck.plan import KNOBS
from tests.test_advice import parsed

PLAN = {"method": "ppo", "tuning": "qlora", "reward_precision": "int8"}
MODEL = "llama-3.1-8b"


@cache
def found(by: str = "price") -> Suitable:
    return suitable(MODEL, [sizes for _, sizes in catalog.cards()], by=by, **PLAN)


def test_every_card_is_judged_and_the_smallest_size_that_fits_is_taken() -> None:
    chosen = {choice.report.plan.gpu.id: choice.report.plan for choice in found().choices}
    plan, left_out = resolve(MODEL, gpu="4090", **PLAN), 0
    for row, sizes in catalog.cards():
        alone = [gpu.id for gpu in sizes if fit(plan.change(gpu=gpu)).verdict != "does-not-fit"]
        taken = [chosen[gpu.id] for gpu in sizes if gpu.id in chosen]
        assert len(taken) <= 1, row["id"]
        if alone:
            assert (taken[0].gpu.id, taken[0].gpus) == (alone[0], 1)
        left_out += not taken
        for group in taken:
            assert group.gpus == 1 or not fits_with(plan, group.gpu, group.gpus // 2)
    assert found().too_small + len(found().refused) == left_out > 0


def fits_with(plan: Plan, gpu: GPU, number: int) -> bool:
    """Whether that many cards would do, however they share the work."""
    for way in KNOBS["sharding"]["choices"]:
        with suppress(FitCheckError):  # one card shares nothing, several must
            group = plan.change(gpu=gpu, gpus=number, sharding=way)
            if fit(group).verdict != "does-not-fit":
                return True
    return False


@pytest.mark.parametrize("by", RANKINGS)
def test_ranked_with_the_unknown_last(by: str) -> None:
    choices = found(by).choices
    known = [choice.rank(by)[1] for choice in choices if not choice.rank(by)[0]]
    assert 10 < len(known) < len(choices)
    assert known == sorted(known)
    assert [choice.rank(by)[0] for choice in choices[len(known) :]] == [True] * (
        len(choices) - len(known)
    )


def test_a_price_is_that_of_the_size_on_the_box() -> None:
    """A 4090 modded to 48 GB is not sold for what a 4090 is."""
    sizes = [catalog.find_gpu("4090"), catalog.find_gpu("4090 48gb")]
    small = suitable(MODEL, [sizes], **PLAN).choices[0]
    assert small.report.plan.gpu.memory_gib == 24 and small.card_usd == 1900  # new, 2026-05
    large = suitable(MODEL, [sizes], **PLAN | {"reward_precision": "bf16"}).choices[0]
    assert large.report.plan.gpu.memory_gib == 48 and large.card_usd is large.own is None


def test_the_users_prices_replace_the_catalogs() -> None:
    cards = [[catalog.find_gpu("4090")], [catalog.find_gpu("3090")]]
    data = Data(samples=1000)
    prices = {cards[0][0].id: Prices(kwh=1.0, hour=10.0, card=500.0)}
    first, second = suitable(MODEL, cards, data, prices, by="price", **PLAN).choices
    assert (first.report.plan.gpu, first.card_usd, first.card_said) == (
        *(cards[0][0], 500.0, "your price"),
    )
    assert first.hours and first.rent == pytest.approx(10 * first.hours)
    watts = first.report.plan.gpu.tdp_w
    assert first.cost and first.cost.electricity_usd == pytest.approx(first.hours * watts / 1000)
    assert second.card_said.startswith("used, 2026-06")


def test_more_data_costs_more_on_every_card() -> None:
    cards = [[catalog.find_gpu(name)] for name in ("4090", "a100", "h100", "mi300x")]
    small = {c.report.plan.gpu.id: c for c in suitable(MODEL, cards, Data(1000), **PLAN).choices}
    large = {c.report.plan.gpu.id: c for c in suitable(MODEL, cards, Data(8000), **PLAN).choices}
    assert len(small) == 4
    for name, choice in small.items():
        assert choice.hours and large[name].hours == pytest.approx(8 * choice.hours)


WORDS = ["--for", MODEL, "--tuning", "qlora", "--reward-precision", "int8"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpus", "geforce", "--memory", "20..48", *WORDS, "--card", "3090=700"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    head, first, *rows = shown.partition("\n\n")[0].splitlines()
    assert head.split() == ["GPU", "FITS", "HOURS", "RENT", "CLOUD", "OWN", "CARD", "PRICED"]
    assert first.startswith("RTX 3090 ") and first.endswith("700    your price")
    (found,) = [row for row in rows if row.startswith("RTX 4090 ") and "D" not in row]
    assert found.split()[2] == "yes" and "1,900  new 2026-05" in found
    assert "of 1,000 prompts" in shown and "as of the month that is told" in shown


def test_json_holds_a_command_for_each_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpus", "rtx", "--memory", "32..48", *WORDS, "--samples", "2k", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer) > 3
    for card in answer:
        assert card["verdict"] in ("fits", "tight")
        assert card["spare_bytes"] == card["usable_bytes"] - card["peak_bytes"]
        assert parsed(card["command"]).gpu.id == card["gpu"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tuning", "lora"], "--tuning is part of a plan"),
        (["--by", "cost"], "--by is part of a plan"),
        (["--for", MODEL, "--gpu", "4090"], "--gpu names one card"),
        (["--for", MODEL, "--card", "4090=cheap"], "--card cannot be 'cheap'"),
        (["--for", MODEL, "--price", "9999=2"], "no GPU in the catalog is called '9999'"),
        (["--for", "nosuchmodel"], "no model in the catalog"),
        (["--for", MODEL, "--lora-rank", "8"], "--lora-rank has no meaning"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpus", *words]) == 2
    assert message in capsys.readouterr().err


def test_where_it_fits_on_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpus", "3060", "--for", "llama-3.1-405b"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "fits on none of" in printed.err


def test_where_one_card_is_not_enough_the_fewest_are_taken_and_share_no_more_than_needed() -> None:
    cards = [[catalog.find_gpu("a100")]]
    (choice,) = suitable(MODEL, cards, method="sft", tuning="full").choices
    plan, ways = choice.report.plan, KNOBS["sharding"]["choices"]
    assert plan.gpus == 2  # 16 bytes a parameter, 8 billion of them: 120 GiB
    assert choice.price is None or choice.price == 2 * (choice.card_usd or 0)
    for way in ways[1 : ways.index(plan.sharding)]:
        assert fit(plan.change(sharding=way)).verdict == "does-not-fit"
    assert not fits_with(plan, plan.gpu, 1)


def test_sizes_are_those_of_the_catalog() -> None:
    for row, sizes in catalog.cards():
        assert [gpu.memory_gib for gpu in sizes] == card_sizes(row)
