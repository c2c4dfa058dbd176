"""The speed of a Report in words: how long its step takes, and how far off that may be."""

from __future__ import annotations

from fitcheck.plan import ROLLOUT
from fitcheck.report import Report, Speed


def duration(seconds: float) -> str:
    """Three digits, and the unit that suits them."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:,.0f} minutes" if minutes < 600 else f"{minutes / 60:,.0f} hours"


def cell(seconds: float | None) -> str:
    """Seconds in a table: three digits at most, a dash where there are none."""
    if seconds is None:
        return "-"
    places = 2 if seconds < 10 else 1 if seconds < 100 else 0
    return f"{seconds:,.{places}f}"


def pace(report: Report) -> str:
    """Step time and tokens a second of any rung; how far off, of an estimate."""
    plan, speed = report.plan, report.speed
    if speed is None and report.source == "measured":
        return "not measured: no card ran a whole step"
    if speed is None:
        return f"unknown: no rates of {plan.gpu.name} are recorded"
    rate = speed.tokens_per_second
    told = f"{rate:,.0f} tokens/s" if rate >= 10 else f"{rate:.2g} tokens/s"
    if plan.method == "inference":
        first = next(p.seconds for p in report.phases if p.name == "prefill")
        told += f" generated, the first after {duration(first or 0.0)}"
    else:
        what = "generated" if plan.method in ROLLOUT else "trained on"
        told = f"{duration(speed.step_seconds)} a step, {told} {what}"
    told = f"{told}; {error_words(speed)}"
    if plan.method in ROLLOUT and speed.source == "estimate":
        told += f"; no whole {plan.method.upper()} step is among them"
    return told


def error_words(speed: Speed) -> str:
    """How far off the seconds may be, each part with the checks that say so."""
    if speed.source == "measured":
        return f"measured ({speed.basis})" if speed.basis else "measured"
    shares = [
        f"{100 * error.relative:.0f} % ({error.n}: {error.basis})" for _, error in speed.errors
    ]
    return f"{speed.errors[0][1].percentile} % of checks within {' and '.join(shares)}"
