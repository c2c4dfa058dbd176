"""Seconds of each phase, and tokens a second: work over the rates that cards reach in practice.

    report = fit(plan)                                # its phases carry seconds
    step_seconds(plan, report), tokens_per_second(plan, report)

A phase's seconds are those of one whole step: all its micro-batches and epochs. `load` has none; of
inference, `prefill` is one prompt of the whole context and `decode` one token of every sequence.
Bytes and FLOPs are counted (clock.py), the constants are fitted on measurements (rates.py).
"""

from __future__ import annotations

from fitcheck.clock import Clock, inference_engine
from fitcheck.plan import ROLLOUT, Plan
from fitcheck.rates import bandwidth, is_measured, peak_flops, stated_error
from fitcheck.report import Error, Phase, Report, Speed


def timed(plan: Plan, phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """The phases with their seconds; None where the card's rates are unknown."""
    if not bandwidth(plan.gpu) or not peak_flops(plan.gpu, plan.compute_dtype):
        return phases
    clock = Clock(plan)
    return tuple([p._replace(seconds=clock.seconds(p.name)) for p in phases])


def step_speed(plan: Plan, phases: tuple[Phase, ...]) -> Speed | None:
    """Step time and tokens a second of timed phases; None where they have no seconds."""
    seconds = {phase.name: phase.seconds for phase in phases if phase.name != "load"}
    known = [value for value in seconds.values() if value is not None]
    if len(known) < len(seconds) or not known:
        return None
    decoding = seconds["decode"] if plan.method == "inference" else sum(known)
    errors = tuple((name, error_on(plan, name)) for name in stands_on(plan))
    return Speed(sum(known), step_tokens(plan) / (decoding or 1e-9), errors=errors)


def measured_speed(plan: Plan, phases: tuple[Phase, ...], basis: str = "") -> Speed | None:
    """The same of phases whose seconds were measured: nothing is left to be off."""
    speed = step_speed(plan, phases)
    return speed and speed._replace(source="measured", errors=(), basis=basis)


def step_seconds(plan: Plan, report: Report) -> float | None:
    """Seconds of one optimizer step of SFT, reward and DPO; of one rollout and its updates of PPO

    and GRPO; of inference, of a prompt of the whole context and one token. None: unknown.
    """
    return report.speed.step_seconds if report.speed else None


def tokens_per_second(plan: Plan, report: Report) -> float | None:
    """Tokens a second: of inference while it decodes, of PPO and GRPO responses over whole steps,

    else tokens trained on. None: unknown.
    """
    return report.speed.tokens_per_second if report.speed else None


def step_tokens(plan: Plan) -> int:
    """Tokens that tokens_per_second counts in a step: generated, or trained on."""
    if plan.method == "inference":
        return plan.concurrency
    if plan.method in ROLLOUT:
        return plan.batch * plan.response
    return plan.batch * plan.sequence * (1 if plan.method == "sft" else 2)


def error_on(plan: Plan, what: str) -> Error:
    """The stated error of an engine or of training, and whether it was ever seen on such a card."""
    error = stated_error(what)
    if is_measured(plan.gpu, what):
        return error
    return error._replace(basis=f"{error.basis}, none on a card of this kind")


def stands_on(plan: Plan) -> tuple[str, ...]:
    """What a plan's seconds stand on: an engine, training, or both."""
    if plan.method == "inference":
        return (inference_engine(plan),)
    if plan.rollout is None:
        return ("training",)
    return ("eager" if plan.rollout == "transformers" else "graphs", "training")
