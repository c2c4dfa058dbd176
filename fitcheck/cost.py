"""What a whole run takes: hours, energy, money at home and in each cloud; other methods beside it.

    run = run_cost(fit(plan), Data(samples=10_000))
    run.hours, run.kwh, run.electricity_usd, run.card_usd, [rent.usd for rent in run.clouds]

Seconds are the estimate's (speed.py). Prices are those of a date: the catalog's, or the user's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from fitcheck import catalog
from fitcheck.errors import FitCheckError
from fitcheck.fit import fit
from fitcheck.gpu import GPU, StreetPrice
from fitcheck.model import Model
from fitcheck.plan import EXAMPLES, ROLLOUT, Plan
from fitcheck.records import CloudPrice
from fitcheck.report import Report
from fitcheck.roles import roles
from fitcheck.speed import step_seconds, step_tokens, tokens_per_second
from fitcheck.work import forward, head_flops, training_passes

# US dollars for a kWh where the user names no price: about what US households pay (recalled).
KWH_USD = 0.17
CARD_HOURS = 3 * 365 * 24  # a card is paid off over three years of work (assumed)
METHODS = ("sft", "reward", "dpo", "grpo", "ppo")  # those that read the same data


class Data(NamedTuple):
    """How much there is: samples (prompts of PPO and GRPO, pairs of DPO and reward, examples of

    SFT) or tokens (of inference those it generates), read `passes` times.
    """

    samples: int | None = None
    tokens: int | None = None
    passes: float = 1.0


class Prices(NamedTuple):
    """What the user pays, in US dollars: for a kWh, an hour of a rented card, the card itself.

    card_hours: of work over which the card pays off. watts: its measured draw, else its TDP counts.
    """

    kwh: float = KWH_USD
    hour: float | None = None
    card: float | None = None
    card_hours: float = CARD_HOURS
    watts: float | None = None


class Rent(NamedTuple):
    """A run in one cloud: whole instances, cards that stay idle in them too."""

    price: CloudPrice
    instances: int
    usd: float


class Cost(NamedTuple):
    """A run. Money in US dollars; None: the card's draw or its price is unknown."""

    report: Report
    data: Data
    prices: Prices
    steps: int
    step_seconds: float
    hours: float
    flops: float
    kwh: float | None
    electricity_usd: float | None
    card_usd: float | None
    card_price: float | None
    card_price_said: str
    clouds: tuple[Rent, ...]


def run_cost(report: Report, data: Data, prices: Prices | None = None) -> Cost:
    """The cost of a plan over some data.

    FitCheckError where data are not told, the card's speed is unknown or a price makes no sense.
    """
    plan, prices = report.plan, prices or Prices()
    _check(data, prices)
    steps, seconds = _steps(plan, data), _step(plan, report)
    hours = steps * seconds / 3600
    watts = prices.watts if prices.watts is not None else plan.gpu.tdp_w
    kwh = hours * watts * plan.gpus / 1000 if watts else None
    price, said = card_price(plan.gpu, prices)
    return Cost(
        *(report, data, prices, steps, seconds, hours, steps * step_flops(plan)),
        kwh=kwh,
        electricity_usd=None if kwh is None else kwh * prices.kwh,
        card_usd=None if price is None else price * plan.gpus * hours / prices.card_hours,
        card_price=price,
        card_price_said=said,
        clouds=tuple(_rents(plan, hours, prices)),
    )


def _check(data: Data, prices: Prices) -> None:
    if (data.samples is None) == (data.tokens is None):
        raise FitCheckError(
            "how much data there is must be told once", "--samples 10000, or --tokens 2m"
        )
    for name, value in (("samples", data.samples), ("tokens", data.tokens)):
        if value is not None and not 0 < value <= 10**15:
            raise FitCheckError(f"--{name} cannot be {value}", "a number from 1 on, such as 10k")
    if not 0 < data.passes <= 10**6:
        raise FitCheckError(f"--passes cannot be {data.passes:g}", "a number such as 1 or 3")
    for name in ("kwh", "hour", "card", "card_hours", "watts"):
        value = getattr(prices, name)
        least = 0 if name in ("kwh", "hour", "card") else 1e-9
        if value is not None and not least <= value < 10**9:
            raise FitCheckError(
                f"{FLAGS[name]} cannot be {value:g}", "a positive number such as 1.5"
            )


FLAGS = {
    **{"kwh": "--kwh", "hour": "--price", "card": "--card", "card_hours": "--card-hours"},
    "watts": "--watts",
}


def _step(plan: Plan, report: Report) -> float:
    """Seconds of a step; of inference, of one token of every sequence."""
    if plan.method == "inference":
        rate = tokens_per_second(plan, report)
        seconds = plan.concurrency / rate if rate else None
    else:
        seconds = step_seconds(plan, report)
    if seconds is None:
        raise FitCheckError(
            f"the speed of {plan.gpu.name} is not known", "choose a card whose rates are known"
        )
    return seconds


def samples_a_step(plan: Plan) -> float:
    """Samples that one step reads: GRPO writes `group` completions of each prompt."""
    return plan.batch / (plan.group or 1)


def tokens_of_a_sample(plan: Plan) -> int:
    """Tokens of one sample: both answers of a pair count."""
    if plan.method in ROLLOUT:
        return plan.prompt + plan.response
    return plan.sequence * (1 if plan.method == "sft" else 2)


def _steps(plan: Plan, data: Data) -> int:
    if plan.method == "inference":
        if data.tokens is None:
            raise counted_in_tokens()
        return math.ceil(data.passes * data.tokens / step_tokens(plan))
    samples = data.samples
    if samples is None:
        samples = math.ceil((data.tokens or 0) / tokens_of_a_sample(plan))
    return math.ceil(data.passes * samples / samples_a_step(plan))


def step_flops(plan: Plan) -> float:
    """FLOPs of one step: of every model's forwards, scores and updates, the written tokens too."""
    held, tokens = roles(plan), plan.tokens
    if plan.method == "inference":
        return plan.concurrency * _forward(plan.model, 1, plan.context)
    rows = plan.batch * (2 if plan.method in ("dpo", "reward") else 1)
    total = 0.0
    if plan.method in ROLLOUT:
        total += rows * (_forward(plan.model, tokens) + _forward(plan.model, tokens))  # and scored
        if "reward" in held:
            total += rows * _forward(held["reward"].model, tokens)
        if "critic" in held:
            total += rows * _forward(held["critic"].model, tokens)
    if plan.reference in ("copy", "adapter"):
        total += rows * _forward(plan.model, tokens)
    for role in held.values():
        if role.tuning:
            passes = training_passes(role.tuning == "full", bool(plan.checkpointing))
            trained = rows
            if plan.ptx_batch and role.name == "policy":
                trained += plan.ptx_batch * plan.batch // plan.minibatch
            total += (plan.epochs or 1) * trained * passes * _forward(role.model, tokens)
    return total


def _forward(model: Model, tokens: int, past: int = 0) -> float:
    """FLOPs of a forward of one sequence, its logits included."""
    work = forward(model, 1, tokens, past)
    return work.linear + work.attention + head_flops(model, tokens)


def counted_in_tokens() -> FitCheckError:
    return FitCheckError("inference is counted in tokens", "--tokens 2m: those it generates")


def card_price(gpu: GPU, prices: Prices) -> tuple[float | None, str]:
    """What the card costs and where that is from: the user, the newest street price, the list."""
    if prices.card is not None:
        return prices.card, "your price"
    if gpu.street_price_usd:
        new = [price for price in gpu.street_price_usd if price.kind == "new"]
        found: StreetPrice = max(new or gpu.street_price_usd, key=lambda price: price.date)
        return (found.low + found.high) / 2, f"{found.kind}, {found.date}, {found.source}"
    if gpu.msrp_usd:
        return gpu.msrp_usd, f"list price, {gpu.msrp_source or 'source unknown'}"
    return None, ""


def _rents(plan: Plan, hours: float, prices: Prices) -> Iterator[Rent]:
    """The cheapest offer of each cloud, the cheapest first; the user's own price replaces them."""
    if prices.hour is not None:
        own = CloudPrice(
            cloud="your price",
            instance=f"1x {plan.gpu.name}",
            gpu=plan.gpu.name,
            gpu_id=plan.gpu.id,
            gpu_count=1,
            usd_per_hour=prices.hour,
            usd_per_gpu_hour=prices.hour,
            kind="on-demand",
            as_of="given",
            date_is_exact=True,
            source="--price",
            checked="",
        )
        yield Rent(own, plan.gpus, hours * prices.hour * plan.gpus)
        return
    best: dict[str, Rent] = {}
    for price in catalog.clouds():
        whole = price.gpu_id == plan.gpu.id and price.gpu_count >= 1  # below 1: a slice of a card
        if not whole or price.kind in ("spot", "reserved"):
            continue
        number = math.ceil(plan.gpus / price.gpu_count)
        rent = Rent(price, number, number * price.usd_per_hour * hours)
        if price.cloud not in best or rent.usd < best[price.cloud].usd:
            best[price.cloud] = rent
    yield from sorted(best.values(), key=lambda rent: rent.usd)


def same_data(plan: Plan, data: Data, prices: Prices | None = None) -> dict[str, Cost | str]:
    """Each method on the same model, card and number of samples, or why it cannot run so.

    An example, a pair's answer and a prompt with its response are all as long. Samples are the
    same; passes are those of `data`, so that DPO reads two sequences where SFT reads one.
    """
    tokens = plan.tokens
    samples = data.samples
    if samples is None:
        samples = math.ceil((data.tokens or 0) / tokens_of_a_sample(plan))
    found: dict[str, Cost | str] = {}
    for method in METHODS:
        try:
            changed = _as(plan, method, tokens)
            found[method] = run_cost(
                fit(changed), data._replace(samples=samples, tokens=None), prices
            )
        except FitCheckError as fault:
            found[method] = fault.message
    return found


def _as(plan: Plan, method: str, tokens: int) -> Plan:
    if method == plan.method:
        return plan
    sizes = {"sequence": tokens} if method in EXAMPLES else {}
    if method in ROLLOUT and plan.method not in ROLLOUT:
        sizes = {"prompt": tokens // 2, "response": tokens - tokens // 2}
    return plan.change(method=method, **sizes)
