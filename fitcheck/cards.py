"""Which cards a plan fits on: `fitcheck gpus --for MODEL`, the reverse of `models --fits`.

    found = suitable("llama-3.1-8b", catalog.cards(), method="ppo", tuning="qlora")
    [(c.report.plan.gpu.name, c.report.verdict, c.card_usd) for c in found.choices]

Of each card the smallest size and the smallest number that fit are a choice; what does not fit and
what cannot be asked is counted, never dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from fitcheck import catalog
from fitcheck.answer import find_model, resolve_fields
from fitcheck.cost import Cost, Data, Prices, card_price, run_cost
from fitcheck.errors import FitCheckError
from fitcheck.fit import fit
from fitcheck.gpu import GPU
from fitcheck.model import Model
from fitcheck.plan import KNOBS, Plan
from fitcheck.report import Report

COUNTS = (2, 4, 8)  # cards in one machine, where one is not enough
RANKINGS = ("price", "time", "cost")


class Choice(NamedTuple):
    """A card on which the plan fits; cost: of a run over some data, None where speed is unknown."""

    report: Report
    cost: Cost | None
    card_usd: float | None  # of one card
    card_said: str  # whose price that is, and of when

    @property
    def price(self) -> float | None:
        """US dollars to buy all the cards."""
        return None if self.card_usd is None else self.card_usd * self.report.plan.gpus

    @property
    def hours(self) -> float | None:
        return self.cost.hours if self.cost else None

    @property
    def rent(self) -> float | None:
        """US dollars of a run in the cheapest cloud."""
        return self.cost.clouds[0].usd if self.cost and self.cost.clouds else None

    @property
    def own(self) -> float | None:
        """US dollars of a run at home: electricity, and the card's share of its working life."""
        cost = self.cost
        if self.card_usd is None or cost is None:
            return None
        if cost.card_usd is None or cost.electricity_usd is None:
            return None
        return cost.card_usd + cost.electricity_usd

    def rank(self, by: str) -> tuple[bool, float, bool]:
        """A key to sort by: what is known first, then the least; of equals what fits well."""
        cheapest = min((usd for usd in (self.rent, self.own) if usd is not None), default=None)
        value = {"price": self.price, "time": self.hours, "cost": cheapest}[by]
        return value is None, value or 0.0, self.report.verdict != "fits"


class Suitable(NamedTuple):
    """What became of each card that was asked about."""

    choices: tuple[Choice, ...]
    too_small: int
    refused: tuple[FitCheckError, ...]  # the plan makes no sense on them


def suitable(
    model: str | Model,
    cards: Iterable[list[GPU]],
    data: Data | None = None,
    prices: Mapping[str, Prices] | None = None,
    by: str = "price",
    **wishes: Any,
) -> Suitable:
    """The cards on which the plan fits, ranked. wishes: as for `fitcheck.check`, without `gpu`.

    cards: each in its sizes, the smallest first. data: of the run that `cost` prices; by default
    1,000 samples. prices: the user's own, by the card's id; under "" those of all other cards.
    """
    found = find_model(model) if isinstance(model, str) else model
    prices = prices or {}
    choices: list[Choice] = []
    refused: list[FitCheckError] = []
    too_small = 0
    for sizes in cards:
        fields, _ = resolve_fields({**wishes, "gpu": sizes[0]})
        try:
            report = _smallest(found, sizes, fields)
        except FitCheckError as fault:
            refused.append(fault)
            continue
        if report is None:
            too_small += 1
        else:
            mine = prices.get(report.plan.gpu.id, prices.get("", Prices()))
            choices.append(_choice(report, sizes, data or Data(samples=1000), mine))
    if refused and not (choices or too_small):
        raise refused[0]
    choices.sort(key=lambda choice: choice.rank(by))
    return Suitable(tuple(choices), too_small, tuple(refused))


def _smallest(model: Model, sizes: list[GPU], fields: Mapping[str, Any]) -> Report | None:
    """The first number and size of the card on which the plan fits; None when there is none."""
    answered, fault = False, None
    for number, ways in _groups(sizes[0], fields):
        for gpu in sizes:
            try:
                report = _first(model, {**fields, "gpu": gpu, "gpus": number}, ways)
            except FitCheckError as refusal:
                fault = fault or refusal
                continue
            answered = True
            if report is not None:
                return report
    if fault and not answered:
        raise fault
    return None


def _groups(gpu: GPU, fields: Mapping[str, Any]) -> Iterator[tuple[int, tuple[str | None, ...]]]:
    """(cards, ways to share the work) to try, the fewest first; None is the default way.

    A plan that has its own number or sharding is taken at its word. What is part of its machine is
    there once.
    """
    several = KNOBS["sharding"]["choices"][1:]  # the first is none, of one card
    if "sharding" in fields:
        several = (fields["sharding"],)
    if "gpus" in fields or "sharding" not in fields:
        yield fields.get("gpus", 1), (fields.get("sharding"),)
    if "gpus" not in fields and several and not (gpu.unified_memory or gpu.laptop):
        yield from ((number, several) for number in COUNTS)


def _first(model: Model, group: Mapping[str, Any], ways: tuple[str | None, ...]) -> Report | None:
    """The way that shares least of those that fit; None where even the last one does not.

    FitCheckError where the rules refuse them all.
    """
    best, judged, fault = None, False, None
    for way in reversed(ways):  # ordered by what they share: from here on each takes more
        try:
            plan = Plan(model=model, **{**group, "sharding": way})
            report = fit(plan, catalog.stated_error(plan.method, "estimate"))
        except FitCheckError as refusal:
            fault = fault or refusal
            continue
        judged = True
        if report.verdict == "does-not-fit":
            break
        best = report
    if fault and not judged:
        raise fault
    return best


def _choice(report: Report, sizes: list[GPU], data: Data, prices: Prices) -> Choice:
    gpu = report.plan.gpu
    usd, said = card_price(gpu, prices)
    own = min((size.id for size in sizes), key=len)  # as it is on the box, not modded
    if prices.card is None and (gpu.id != own or (gpu.unified_memory and len(sizes) > 1)):
        usd, said = None, ""  # the catalog's price is that of another size, or of one unknown
    try:
        cost = run_cost(report, data, prices)
    except FitCheckError:  # no rates of this card are recorded: memory and price are still known
        cost = None
    return Choice(report, cost, usd, said)
