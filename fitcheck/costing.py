"""`fitcheck cost MODEL --samples N`: hours, energy, money; other methods on the same data."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from fitcheck.answer import DEFAULT_MODEL, check
from fitcheck.cost import (
    CARD_HOURS,
    FLAGS,
    KWH_USD,
    Cost,
    Data,
    Prices,
    Rent,
    counted_in_tokens,
    run_cost,
    same_data,
)
from fitcheck.errors import FitCheckError
from fitcheck.flags import add_plan_flags, plan_fields
from fitcheck.pace import duration, error_words
from fitcheck.plan import Plan
from fitcheck.speed import step_tokens
from fitcheck.table import columns, print_table
from fitcheck.text import WORDS, headline

MONEY = {
    "kwh": f"US dollars for a kWh ({KWH_USD})",
    "price": "US dollars for a card and hour, instead of the clouds' prices",
    "card": "US dollars for the card, instead of its street price",
    "card-hours": f"hours of work over which the card pays off ({CARD_HOURS:,}: three years)",
    "watts": "measured draw of the card, instead of its TDP",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The verb; it sets `run`, a function of the parsed arguments that returns the exit code."""
    summary = "hours, energy and money of a whole run"
    parser = subparsers.add_parser("cost", help=summary, description=summary)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="a name, loosely")
    amount = parser.add_argument_group("how much")
    amount.add_argument("--samples", metavar="N", help="prompts, pairs or examples, such as 10k")
    amount.add_argument("--tokens", metavar="N", help="tokens instead, such as 2m")
    amount.add_argument("--passes", metavar="N", help="how often the data are read (1)")
    money = parser.add_argument_group("prices")
    for name, text in MONEY.items():
        money.add_argument(f"--{name}", metavar="USD" if "dollars" in text else "N", help=text)
    add_plan_flags(parser.add_argument_group("the plan"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the cost; 0 whether the plan fits or not, which is said."""
    report = check(args.model, **plan_fields(args))
    data, prices = data_of(args), prices_of(args)
    cost = run_cost(report, data, prices)
    others = {} if report.plan.method == "inference" else same_data(report.plan, data, prices)
    if args.json:
        print(json.dumps(to_json(cost, others), ensure_ascii=False, indent=1))
    else:
        show(cost, others)
    return 0


def data_of(args: argparse.Namespace) -> Data:
    """--samples, --tokens and --passes as numbers."""
    if args.samples and args.method == "inference":
        raise counted_in_tokens()
    counts = {
        name: None if text is None else _count(name, text)
        for name, text in (("samples", args.samples), ("tokens", args.tokens))
    }
    passes = 1.0 if args.passes is None else number("--passes", args.passes)
    return Data(**counts, passes=passes)


def _count(name: str, text: str) -> int:
    """10k is 10,000 here: samples are no powers of two."""
    units = {"k": 10**3, "m": 10**6, "b": 10**9}
    unit = units.get(text[-1:].lower(), 1)
    return round(number(f"--{name}", text[:-1] if unit > 1 else text) * unit)


def number(flag: str, text: str) -> float:
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        value = float("nan")
    if not abs(value) < 1e15:  # nan too
        raise FitCheckError(f"{flag} cannot be {text!r}", "a number such as 1.5")
    return value


def prices_of(args: argparse.Namespace) -> Prices:
    given = {
        name: number(flag, getattr(args, flag[2:].replace("-", "_")))
        for name, flag in FLAGS.items()
        if getattr(args, flag[2:].replace("-", "_")) is not None
    }
    return Prices(**given)


def show(cost: Cost, others: dict[str, Cost | str]) -> None:
    """A screen: what is run, how long, energy, money at home, clouds, the other methods."""
    plan = cost.report.plan
    width = min(columns(80), 120)
    print(textwrap.fill(headline(plan), width))
    print(f"\n{told(cost)}\n")
    for label, text in facts(cost):
        print(textwrap.fill(text, width, initial_indent=f"{label:<9}", subsequent_indent=" " * 9))
    if cost.clouds:
        print()
        print_table("offer", CLOUD, map(_offer, cost.clouds), "USD/h")
    if others:
        print()
        print_table("method", METHOD, [_method(*item, others) for item in others.items()], "STEPS")


CLOUD = ("CLOUD", "INSTANCE", "USD/h", "USD", "PRICE OF")
METHOD = ("METHOD", "STEPS", "STEP s", "HOURS", "USD", "x SFT", "FLOPs x SFT", "VERDICT")


def _offer(rent: Rent) -> tuple[str, ...]:
    price = rent.price
    name = f"{rent.instances} x {price.instance}" if rent.instances > 1 else price.instance
    if price.gpu_count > 1:
        name += f" ({price.gpu_count:g} GPUs)"
    if price.kind != "on-demand":
        name += f", {price.kind.removesuffix(' on-demand')}"
    hour = rent.instances * price.usd_per_hour
    return price.cloud, name, f"{hour:.2f}", f"{rent.usd:.2f}", price.as_of


def _method(name: str, found: Cost | str, others: dict[str, Cost | str]) -> tuple[str, ...]:
    if isinstance(found, str):
        return name, "-", "-", "-", "-", "-", "-", found
    sft = others.get("sft")
    times = flops = "-"
    if isinstance(sft, Cost):
        times, flops = f"{found.hours / sft.hours:.1f}", f"{found.flops / sft.flops:.1f}"
    sizes = f"{found.steps:,}", f"{found.step_seconds:.3g}", f"{found.hours:.3g}"
    return name, *sizes, _least_usd(found), times, flops, found.report.verdict


def _least_usd(cost: Cost) -> str:
    """In the cheapest cloud; without one, of electricity and card; a dash where that is unknown."""
    if cost.clouds:
        return f"{cost.clouds[0].usd:.2f}"
    if cost.electricity_usd is None or cost.card_usd is None:
        return "-"
    return f"{cost.electricity_usd + cost.card_usd:.2f}"


def told(cost: Cost) -> str:
    """How much data, how many steps, how long."""
    plan, data = cost.report.plan, cost.data
    if data.samples is not None:
        amount = f"{data.samples:,} {NOUNS[plan.method]}"
    else:
        amount = f"{data.tokens:,} tokens"
    if data.passes != 1:
        amount += f" x {data.passes:g} passes"
    if plan.method == "inference":
        return f"{amount}: {hours(cost.hours)}"
    return f"{amount}: {cost.steps:,} steps of {duration(cost.step_seconds)} = {hours(cost.hours)}"


NOUNS = {"ppo": "prompts", "grpo": "prompts", "dpo": "pairs", "reward": "pairs"}
NOUNS |= {"sft": "examples"}


def hours(value: float) -> str:
    """Hours as people say them."""
    if value < 1:
        return f"{60 * value:.1f} minutes"
    return f"{value:.1f} hours" if value < 48 else f"{value / 24:.1f} days"


def facts(cost: Cost) -> list[tuple[str, str]]:
    """Verdict, error, energy, money at home: a label and a text each."""
    plan, prices = cost.report.plan, cost.prices
    fits = WORDS[cost.report.verdict][1].lower()
    lines = [("Memory", fits), ("Speed", f"{_speed(plan, cost)}; {_error(cost)}")]
    if cost.kwh is None:
        lines.append(("Energy", "the card's draw is unknown: --watts"))
    else:
        watts = prices.watts if prices.watts is not None else plan.gpu.tdp_w
        whose = "as measured" if prices.watts is not None else "its TDP, at most"
        lines.append(("Energy", f"{cost.kwh:.3g} kWh at {watts:g} W ({whose}), the card alone"))
        power = f"electricity {cost.electricity_usd:.2f} USD at {prices.kwh:g} USD/kWh"
        lines.append(("At home", power))
    if cost.card_usd is None:
        lines.append(("", "the card's price is unknown: --card"))
    else:
        over = (
            f"{cost.card_price:,.0f} USD ({cost.card_price_said}) over {prices.card_hours:,.0f} h"
        )
        lines.append(("", f"card {cost.card_usd:.2f} USD: {over}"))
    if not cost.clouds:
        lines.append(("Clouds", f"no price of {plan.gpu.name} is recorded: --price"))
    return lines


def _speed(plan: Plan, cost: Cost) -> str:
    rate = step_tokens(plan) / cost.step_seconds
    what = "generated" if plan.method in ("ppo", "grpo", "inference") else "trained on"
    return f"{rate:,.0f} tokens/s {what} (estimate)"


def _error(cost: Cost) -> str:
    speed = cost.report.speed
    assert speed is not None  # a cost has seconds
    return error_words(speed)


def to_json(cost: Cost, others: dict[str, Cost | str]) -> dict[str, Any]:
    """Numbers of a run; `report` as `fitcheck check --json` prints it."""
    return {
        "report": cost.report.to_json(),
        "data": cost.data._asdict(),
        "prices": cost.prices._asdict(),
        **_numbers(cost),
        "card_price_usd": cost.card_price,
        "card_price_source": cost.card_price_said,
        "clouds": [rent_json(rent) for rent in cost.clouds],
        "same_data": {
            name: {"error": found} if isinstance(found, str) else _numbers(found)
            for name, found in others.items()
        },
    }


def _numbers(cost: Cost) -> dict[str, Any]:
    names = ("steps", "step_seconds", "hours", "flops", "kwh", "electricity_usd", "card_usd")
    return {name: getattr(cost, name) for name in names} | {"verdict": cost.report.verdict}


def rent_json(rent: Rent) -> dict[str, Any]:
    """One cloud's offer."""
    price = rent.price
    return {
        **{"cloud": price.cloud, "instance": price.instance, "instances": rent.instances},
        **{"usd_per_hour": price.usd_per_hour, "usd": rent.usd, "kind": price.kind},
        **{"as_of": price.as_of, "date_is_exact": price.date_is_exact, "source": price.source},
    }
