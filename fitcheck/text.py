"""A Report as text for a terminal. Words carry the meaning; colour only helps."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable

from fitcheck.errors import FitCheckError
from fitcheck.fit import fit
from fitcheck.pace import cell, pace
from fitcheck.plan import Plan
from fitcheck.report import Moment, Report, Term
from fitcheck.table import whole_words

GIB = 2**30
LEAST = GIB // 20  # what is smaller would print as 0.0 GiB
WORDS = {"fits": ("✓", "FITS"), "tight": ("≈", "TIGHT"), "does-not-fit": ("✗", "DOES NOT FIT")}
COLOURS = {"fits": "32", "tight": "33", "does-not-fit": "31"}
FILLS, REST = "█▓▒░▞▚", "▪"  # components of the bar, the largest first, and all others
ROLES = ("policy", "reference", "reward", "critic")
SOURCES = {"estimate": "estimate", "dry-run": "dry run", "measured": "measured"}
RULES = {"bf16": "2", "fp16": "2", "fp32": "4"}


def gib(size: int) -> str:
    """Bytes as GiB with one decimal, the unit of nvidia-smi."""
    return f"{size / GIB:.1f}"


def colourful() -> bool:
    """Whether standard output is a terminal that wants colour (no-color.org)."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and sys.stdout.isatty()


def report_text(
    report: Report, width: int = 80, colour: bool = False, explain: bool = False
) -> str:
    """One screen: verdict, bar, what is alive at the peak, phases by role, what stands behind."""
    parts = [
        textwrap.wrap(headline(report.plan), width),
        verdict_lines(report, width, colour),
        bar(report, min(width, 100)),
        at_peak(report, min(width, 80)),
        phase_table(report, width),
        advice_lines(report, width),
        footnotes(report, width),
    ]
    if explain:
        parts.append(explanation(report, width))
    return "\n\n".join("\n".join(part) for part in parts if part)


def headline(plan: Plan) -> str:
    """What was asked, in one line."""
    how = plan.quant if plan.method == "inference" else plan.tuning
    if how in ("lora", "qlora"):
        how = f"{'LoRA' if how == 'lora' else 'QLoRA'} rank {plan.lora_rank}"
    return f"{plan.method.upper()} of {plan.model.id} ({how}) on {plan.gpus} x {plan.gpu.name}"


def verdict_lines(report: Report, width: int = 80, colour: bool = False) -> list[str]:
    """The answer in words and by how much."""
    glyph, words = WORDS[report.verdict]
    phase = report.peak_phase
    lines = textwrap.wrap(f"{glyph} {words}: {by_how_much(report)}", width, subsequent_indent="  ")
    if colour:
        code, head = COLOURS[report.verdict], f"{glyph} {words}"
        lines[0] = lines[0].replace(head, f"\x1b[1;{code}m{head}\x1b[0m", 1)
    more = (
        f"needs {gib(report.peak_bytes)} GiB in {phase.name} ({phase.peak.name}); "
        f"{gib(report.usable_bytes)} GiB usable"
    )
    return lines + textwrap.wrap(more, width, initial_indent="  ", subsequent_indent="  ")


def by_how_much(report: Report) -> str:
    over, spare = report.needed_bytes - report.usable_bytes, report.spare_bytes
    if report.card_verdict == "does-not-fit":
        text = f"{gib(over)} GiB too much" if over > 0 else "no gap is left for its largest block"
    elif spare < 0:
        text = f"only if the allocator gives back {gib(-spare)} GiB of its cache"
    else:
        text = f"{gib(spare)} GiB to spare"
        if report.card_verdict == "tight":
            text += ", less than this answer may be off"
    ram = report.ram
    if ram.verdict == "does-not-fit" and ram.usable_bytes is not None:
        short = gib(ram.peak_bytes - ram.usable_bytes)
        return f"the host lacks {short} GiB of RAM; on the card {text}"
    return text


def components(moment: Moment) -> list[tuple[str, list[str], int]]:
    """(name, roles, bytes) of a moment's terms by name, the largest first."""
    sums: dict[str, tuple[list[str], int]] = {}
    for term in moment.terms:
        if term.bytes:
            roles, size = sums.get(term.name, ([], 0))
            roles = roles if term.role in roles else [*roles, term.role]
            sums[term.name] = (roles, size + term.bytes)
    found = [(name, roles, size) for name, (roles, size) in sums.items()]
    return sorted(found, key=lambda item: -item[2])


def drawn(moment: Moment) -> list[tuple[str, list[str], int]]:
    """The components that bar and legend tell apart: six at most, none that prints as 0.0."""
    parts = components(moment)[: len(FILLS)]
    return [part for part in parts if part[2] >= LEAST] or parts[:1]


def bar(report: Report, width: int) -> list[str]:
    """The peak's components side by side, with the end of the usable memory marked."""
    room = width - 4
    peak, usable = report.peak_bytes, report.usable_bytes
    whole = max(peak, usable, 1)
    cells, sofar = "", 0
    for fill, (_, _, size) in zip(FILLS, drawn(report.peak_phase.peak), strict=False):
        sofar += size
        cells += fill * (round(sofar / whole * room) - len(cells))
    cells += REST * (round(peak / whole * room) - len(cells))
    end = min(room - 1, round(usable / whole * room))
    label = f"{gib(usable)} GiB usable"
    mark = f"{label} ▲" if len(label) + 2 <= end + 1 else "▲ " + label
    mark = mark.rjust(end + 1) if mark.endswith("▲") else " " * end + mark
    return ["  " + cells.ljust(room, "·"), "  " + mark]


def at_peak(report: Report, width: int) -> list[str]:
    """Legend of the bar: component, whose, GiB, share."""
    moment = report.peak_phase.peak
    parts = [
        (fill, name, ", ".join(roles), size)
        for fill, (name, roles, size) in zip(FILLS, drawn(moment), strict=False)
    ]
    if rest := moment.bytes - sum(size for *_, size in parts):
        parts.append((REST, "everything else", "", rest))
    names = max(len(name) for _, name, _, _ in parts)
    sizes = max(len(gib(size)) for *_, size in parts)
    roles, room = max(len(whose) for _, _, whose, _ in parts), width - sizes - 15
    roles = max(3, min(roles, room - names))
    names = min(names, room - roles)
    lines = [f"At the peak{'GiB':>{names + roles + sizes - 3}}"]
    for fill, name, whose, size in parts:
        share = f"{100 * size / max(1, moment.bytes):4.0f} %"
        what, whose = _cut(name, names).ljust(names), _cut(whose, roles).ljust(roles)
        lines.append(f"  {fill} {what}  {whose}  {gib(size):>{sizes}} {share}")
    return lines


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"


def phase_table(report: Report, width: int) -> list[str]:
    """GiB by phase and role, at each phase's largest moment, and its seconds in a step."""
    terms = [term for phase in report.phases for term in phase.terms if term.bytes]
    present = [role for role in ROLES if any(term.role == role for term in terms)]
    titles = [*present, "other", "all", "s"]
    rows = []
    for phase in report.phases:
        cells = [_sum(t for t in phase.terms if t.role == role) for role in present]
        cells += [_sum(t for t in phase.terms if t.role not in present), phase.peak.bytes]
        rows.append([gib(size) for size in cells] + [cell(phase.seconds)])
    title = "Phase, GiB"
    names = max(len(title), *(len(phase.name) for phase in report.phases))
    rooms = [max(map(len, cells)) + 2 for cells in zip(titles, *rows, strict=True)]
    for part in (slice(-2, None), slice(-2, -1)):  # narrow: all roles together, and no seconds
        if names + sum(rooms) + 2 > width:
            titles, rooms, rows = titles[part], rooms[part], [row[part] for row in rows]

    def line(name: str, cells: list[str]) -> str:
        return f"{name:<{names}}" + "".join(map(str.rjust, cells, rooms))

    lines, peak = [line(title, titles)], report.peak_phase
    for phase, row in zip(report.phases, rows, strict=True):
        lines.append(line(phase.name, row) + (" ◀" if phase is peak else ""))
    return lines


def _sum(terms: Iterable[Term]) -> int:
    return sum(term.bytes for term in terms)


def advice_lines(report: Report, width: int) -> list[str]:
    """What makes it fit, a way each: GiB saved, times as long, what it costs, the flags to add."""
    if not report.advice:
        return []
    lines = textwrap.wrap(advice_title(report), width)
    sizes = max(len(gib(fix.saves)) for fix in report.advice)
    ranks = max(len(fix.rank) for fix in report.advice)
    for fix in report.advice:
        saved = ("-" + gib(fix.saves)).rjust(sizes + 1)
        head = f"  {saved} GiB  {times(fix.time):>6}  {fix.rank:<{ranks}}  "
        text = fix.flags + (" (tight)" if fix.verdict == "tight" else "")
        if len(head) + max(map(len, text.split())) > width:  # narrow: the flags below
            lines.append(head.rstrip())
            head = " " * 4
        lines += whole_words(text, width, head)
    return lines


def times(factor: float | None) -> str:
    """How many times as long: 1.02x, 128x; empty when it is not known."""
    if factor is None:
        return ""
    return f"{factor:.2f}x" if factor < 10 else f"{factor:.0f}x"


def advice_title(report: Report) -> str:
    """Whether the advice is enough."""
    if report.advice[0].verdict == "does-not-fit":
        return "Nothing tried makes it fit; what saves most: GiB, time, cost to the result"
    return "Each makes it fit: GiB, time, cost to the result (`fitcheck advise` tells more)"


def footnotes(report: Report, width: int) -> list[str]:
    """What stands behind the answer, a label and its text each."""
    found = []
    for label, text in facts(report):
        found += textwrap.wrap(text, width, initial_indent=f"{label:<8}", subsequent_indent=" " * 8)
    return found


def facts(report: Report) -> list[tuple[str, str]]:
    """Regime, memory of card and host, rung and error, and what is not modelled."""
    plan, ram = report.plan, report.ram
    need = f"needs {gib(ram.peak_bytes)} GiB ({ram.phase})"
    if ram.usable_bytes is None:
        host = f"{need}; the pretended card's host is unknown (--ram)"
    else:
        words = "fits" if ram.verdict == "fits" else "does not fit"
        host = f"{need} of {gib(ram.usable_bytes)} GiB: {words}"
    lines = [
        ("Regime", regime(plan) + in_plain_bf16(plan)),
        ("Card", plan.memory.why),
        ("RAM", host),
    ]
    lines += [("Time", pace(report)), ("Source", rung(report))]
    return lines + [("Note", note) for note in report.notes]


def regime(plan: Plan) -> str:
    """The precision regime in words: peers' answers differ by 3x because they leave it unsaid."""
    if plan.method == "inference":
        return f"{plan.quant} weights, {plan.kv_cache} KV cache, {plan.compute_dtype} compute"
    weights, compute = plan.weight_dtype, plan.compute_dtype
    text = f"{plan.precision}: "
    if plan.tuning == "full":
        text += f"{weights} weights and gradients"
        if plan.precision == "bf16-master":
            text += ", fp32 master weights"
    else:
        base = "nf4" if plan.tuning == "qlora" else weights
        text += f"frozen {base} base, {plan.adapter_precision} adapters"
    text += f", {plan.optimizer}"
    if plan.autocast:
        text += f", {compute} autocast"
    return text + ("; checkpointing on" if plan.checkpointing else "; checkpointing off")


def in_plain_bf16(plan: Plan) -> str:
    """What the same run takes with everything in 16 bits, the figure that peers often mean."""
    if plan.method == "inference" or plan.precision == "bf16":
        return ""
    try:
        plain = fit(plan.change(precision="bf16"))
    except FitCheckError:  # a dry run of what the estimate does not cover
        return ""
    return f"; plain bf16 would take {gib(plain.peak_bytes)} GiB"


def rung(report: Report) -> str:
    """Which rung the answer stands on and how far off it may be."""
    text = SOURCES[report.source]
    if report.error is None:
        return f"{text}; no measurement of {report.plan.method} is recorded yet to say how far off"
    e = report.error
    return f"{text}; {e.percentile} % of checks were within {100 * e.relative:.1f} % ({e.basis})"


def explanation(report: Report, width: int) -> list[str]:
    """Every term of every phase's largest moment, with its formula."""
    title = "How it was computed: the terms of each phase's largest moment, each said once"
    lines = textwrap.wrap(title, width)
    seen: set[tuple[str, str, int]] = set()
    for phase in report.phases:
        lines.append(f"{phase.name}: {phase.peak.name}")
        for term in phase.terms:
            key = (term.name, term.role, term.bytes)
            if term.bytes and key not in seen:
                seen.add(key)
                head = f"  {term.role} {term.name} = {term.bytes:,} B: "
                lines += textwrap.wrap(head + term.why, width, subsequent_indent=" " * 6)
    return lines
