"""`fitcheck gpus --for MODEL`: the cards a plan fits on, ranked by price, time or cost of a run.

fitcheck gpus --for llama-3.1-8b --method ppo --tuning qlora --by cost --samples 20k
fitcheck gpus 5090 --for qwen3-8b --method sft --card 5090=1999 --price h100=2.1
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from fitcheck import catalog
from fitcheck.advice import command
from fitcheck.cards import RANKINGS, Choice, Suitable, suitable
from fitcheck.cost import Data, Prices
from fitcheck.costing import NOUNS, data_of, number, rent_json
from fitcheck.errors import FitCheckError
from fitcheck.flags import plan_fields
from fitcheck.plan import Plan
from fitcheck.table import columns, print_table
from fitcheck.text import gib, headline


def list_suitable(args: argparse.Namespace, rows: Iterable[catalog.Row]) -> int:
    """Print the cards of these rows on which the plan fits; 1 when there is none."""
    wishes = plan_fields(args)
    if "gpu" in wishes:
        raise FitCheckError("--gpu names one card, and this looks for cards", "leave it out")
    ids = {row["id"] for row in rows}
    cards = [sizes for row, sizes in catalog.cards() if row["id"] in ids]
    data = data_of(args) if args.samples or args.tokens else _default(wishes)
    found = suitable(args.model, cards, data, _prices(args), args.by or RANKINGS[0], **wishes)
    if args.json:
        print(json.dumps([_json(choice) for choice in found.choices], ensure_ascii=False, indent=1))
        return 0 if found.choices else 1
    return _print(found, data)


def _default(wishes: dict[str, Any]) -> Data:
    """What a cost is of where nobody says: a thousand samples, a million tokens to serve."""
    return Data(tokens=10**6) if wishes.get("method") == "inference" else Data(samples=1000)


def _prices(args: argparse.Namespace) -> dict[str, Prices]:
    """The user's prices by the card's id, those without a card under ""."""
    usd: dict[str, dict[str, float]] = {"": {}}
    if args.kwh is not None:
        usd[""]["kwh"] = number("--kwh", args.kwh)
    for flag, field in (("price", "hour"), ("card", "card")):
        for text in getattr(args, flag) or ():
            name, _, value = text.rpartition("=")
            card = catalog.find_gpu(name).id if name else ""
            usd.setdefault(card, {})[field] = number(f"--{flag}", value)
    return {card: Prices(**(usd[""] | own)) for card, own in usd.items()}


TITLES = ("GPU", "FITS", "SPARE", "HOURS", "RENT", "CLOUD", "OWN", "CARD", "PRICED")


def _print(found: Suitable, data: Data) -> int:
    """The table, and in words what it is about and what it leaves out."""
    told = textwrap.fill("; ".join(_told(found)), columns(200))
    if not found.choices:
        print(told if found.too_small else "no GPU of the catalog matches", file=sys.stderr)
        return 1
    print_table("GPU", TITLES, map(_cells, found.choices), "SPARE")
    print(f"\n{textwrap.fill(_legend(found, data), columns(200))}\n{told}")
    return 0


def _cells(choice: Choice) -> tuple[str, ...]:
    report, plan = choice.report, choice.report.plan
    cloud = ""
    if choice.cost and choice.cost.clouds:
        price = choice.cost.clouds[0].price
        cloud = price.cloud
        if cloud != "your price":
            cloud += f" {_month(price.as_of)}"
    return (
        _cards(plan),
        "yes" if report.verdict == "fits" else report.verdict,
        gib(report.spare_bytes),
        _amount(choice.hours),
        _amount(choice.rent),
        cloud,
        _amount(choice.own),
        "-" if choice.price is None else f"{choice.price:,.0f}",
        _month(choice.card_said),
    )


def _cards(plan: Plan) -> str:
    """The card, or how many of them and how they share the work."""
    name = plan.gpu.short_name
    return name if plan.gpus == 1 else f"{plan.gpus} x {name}, {plan.sharding}"


def _amount(value: float | None) -> str:
    """Hours or dollars, in three digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _month(said: str) -> str:
    """When a price was seen, and what kind it is: `new 2026-05`, `list`, `undated`."""
    if said.startswith("undated"):
        return "undated"
    kind, comma, rest = said.partition(", ")
    date = _DATE.search(rest or kind)
    kind = kind.removesuffix(" price") if comma else "" if date else kind
    return f"{kind} {date[0] if date else ''}".strip()


_DATE = re.compile(r"20\d\d(?:-(?:0\d|1[0-2]))?(?!\d)")


def _legend(found: Suitable, data: Data) -> str:
    plan = found.choices[0].report.plan
    amount = f"{data.samples:,} {NOUNS[plan.method]}" if data.samples else f"{data.tokens:,} tokens"
    asked = headline(plan).rpartition(" on ")[0]
    return (
        f"{asked}. SPARE in GiB; HOURS, RENT and OWN (electricity and the card's share of its "
        f"working life) of {amount}, in US dollars; prices as of the month that is told"
    )


def _told(found: Suitable) -> Iterator[str]:
    fit, judged = len(found.choices), len(found.choices) + found.too_small
    if fit:
        yield f"it fits on {fit} of {judged} cards"
    else:
        yield f"it fits on none of {judged} cards: `fitcheck advise` says what would make it fit"
    if found.refused:
        yield f"{len(found.refused)} cannot run this plan ({found.refused[0].message})"


def _json(choice: Choice) -> dict[str, Any]:
    report, plan = choice.report, choice.report.plan
    rents = choice.cost.clouds if choice.cost else ()
    return {
        "gpu": plan.gpu.id,
        "name": plan.gpu.name,
        "gpus": plan.gpus,
        "sharding": plan.sharding,
        "verdict": report.verdict,
        "peak_bytes": report.peak_bytes,
        "usable_bytes": report.usable_bytes,
        "spare_bytes": report.spare_bytes,
        "hours": choice.hours,
        "own_usd": choice.own,
        "card_usd": choice.price,
        "card_price_source": choice.card_said,
        "clouds": [rent_json(rent) for rent in rents],
        "command": command(plan),
    }
