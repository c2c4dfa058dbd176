"""A Report as markdown, for an issue or a chat."""

from __future__ import annotations

from fitcheck.pace import cell
from fitcheck.report import OUTSIDE, Phase, Report
from fitcheck.text import (
    LEAST,
    WORDS,
    advice_title,
    by_how_much,
    components,
    facts,
    gib,
    headline,
)


def markdown(report: Report) -> str:
    """What the screen says, in tables."""
    glyph, words = WORDS[report.verdict]
    moment = report.peak_phase.peak
    parts = [part for part in components(moment) if part[2] >= LEAST]
    if rest := moment.bytes - sum(size for _, _, size in parts):
        parts.append(("everything else", [], rest))
    rows = "\n".join(f"| {name} | {', '.join(who)} | {gib(size)} |" for name, who, size in parts)
    phases = "\n".join(_phase_row(phase) for phase in report.phases)
    notes = "\n".join(f"- {label}: {text}" for label, text in facts(report))
    advice = ""
    if report.advice:
        fixes = "\n".join(f"| `{f.flags}` | -{gib(f.saves)} | {f.rank} |" for f in report.advice)
        advice = f"| {advice_title(report)} | GiB | cost |\n|---|---:|---|\n{fixes}\n\n"
    return (
        f"**{headline(report.plan)}**\n\n{glyph} **{words}**: {by_how_much(report)}; "
        f"needs {gib(report.peak_bytes)} GiB in {report.peak_phase.name} ({moment.name}), "
        f"{gib(report.usable_bytes)} GiB usable\n\n"
        f"| at the peak | role | GiB |\n|---|---|---:|\n{rows}\n\n"
        f"| phase | GiB | seconds |\n|---|---:|---:|\n{phases}\n\n{advice}{notes}\n"
    )


def _phase_row(phase: Phase) -> str:
    size, outside = gib(phase.peak.bytes), gib(phase.peak.part(OUTSIDE))
    return f"| {phase.name} | {size} ({outside} outside the allocator) | {cell(phase.seconds)} |"
