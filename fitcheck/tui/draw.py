"""The answer as lines: title, verdict, the bar of what is alive at the peak, the rows of knobs.

Pure functions of a View and a width. Words and glyphs carry the meaning, colour only helps.
"""

from __future__ import annotations

from fitcheck.plan import Plan
from fitcheck.report import Report
from fitcheck.text import FILLS, REST, WORDS, by_how_much, drawn, gib
from fitcheck.tui.knobs import PICKED, card_name, doc, rows_of, shown
from fitcheck.tui.lines import Line, Span, apart, cut, cut_inside, padded, width
from fitcheck.tui.view import DETECTED, DETECTING, View

TONES = {"fits": "good", "tight": "warn", "does-not-fit": "bad"}
SOURCES = {"estimate": "estimate", "dry-run": "dry run", "measured": "measured"}
Price = tuple[int | None, int | None]


def asked(plan: Plan) -> str:
    """What was asked, in few words."""
    how = plan.quant if plan.method == "inference" else plan.tuning
    if how in ("lora", "qlora"):
        how = f"{'LoRA' if how == 'lora' else 'QLoRA'} r{plan.lora_rank}"
    parts = [plan.method.upper(), shown("model", plan.model), str(how)]
    return " · ".join([*parts, f"{plan.gpus} × {card_name(plan.gpu)}"])


def title(view: View, room: int) -> list[Line]:
    """The program, the question, and whether the card is real."""
    badge = {
        DETECTING: Span("detecting… ", "title dim"),
        DETECTED: Span("this machine's card ", "title good"),
    }.get(view.card, Span("PRETEND ", "title warn bold"))
    left = [Span(" FitCheck  ", "title bold"), Span(asked(view.plan), "title")]
    line = apart(left, [badge], room)
    if len(line) == len(left):  # a narrow terminal: the question is cut, the badge is not
        asked_room = room - width([left[0], badge]) - 1
        line = [left[0], Span(padded(left[1].text, asked_room) + " ", "title"), badge]
    return [[Span(s.text, s.style or "title", s.click) for s in line]]


def verdict(report: Report, room: int) -> list[Line]:
    """The answer in words, by how much, and where; what stands behind it as far as there is room"""
    glyph, words = WORDS[report.verdict]
    line = [Span(f" {glyph} {words}", f"{TONES[report.verdict]} bold")]
    line.append(Span(f"  {by_how_much(report)}", "bold"))
    needs = f"needs {gib(report.peak_bytes)} in {report.peak_phase.name}"
    for part in (needs, provenance(report)):
        if width(line) + len(part) + 3 <= room:
            line.append(Span(f" · {part}"))
    return [line]


def provenance(report: Report) -> str:
    """The rung that the answer stands on, and how far off it may be."""
    if report.error is None:
        return SOURCES[report.source]
    return f"{SOURCES[report.source]} ±{100 * report.error.relative:.1f} %"


def bar(report: Report, room: int) -> list[Line]:
    """The peak's components side by side, their names on them; below, the end of what is usable."""
    inner = max(8, room - 2)
    peak, usable = report.peak_bytes, report.usable_bytes
    whole = max(peak, usable, 1)
    line, sofar, at = [Span(" ")], 0, 0
    parts = [(name, size) for name, _, size in drawn(report.peak_phase.peak)]
    if rest := peak - sum(size for _, size in parts):
        parts.append(("", rest))
    for i, (name, size) in enumerate(parts):
        fill = FILLS[i] if name else REST
        sofar += size
        cells = round(sofar / whole * inner) - at
        at += cells
        label = f" {name} {gib(size)} "
        if name and len(label) + 1 < cells:
            line.append(Span(fill, f"c{i}"))
            line.append(Span(label, f"k{i}"))
            cells -= len(label) + 1
        line.append(Span(fill * cells, f"c{i}"))
    line.append(Span("·" * (inner - at), "dim"))
    return [line, _usable(usable / whole, gib(usable), inner)]


def _usable(share: float, size: str, inner: int) -> Line:
    end = min(inner - 1, round(share * inner))
    label = f"{size} GiB usable"
    if len(label) + 1 <= end:
        return [Span(" " * (end - len(label))), Span(f"{label} ▲", "mark")]
    return [Span(" " * (end + 1)), Span(f"▲ {label}", "mark")]


def knobs(
    view: View, at: str, room: int, prices: dict[str, Price] | None, stale: bool = False
) -> tuple[list[Line], int]:
    """A row for each field under its group, with the price of a notch where there are any.

    Returns the lines and which of them is the chosen field's. stale: prices of an earlier plan.
    """
    names = 18
    sides = 18 if prices is not None else 0
    lines: list[Line] = []
    chosen = 0
    for group, fields in rows_of(view.plan):
        heading: Line = [Span(group, "head")]
        if prices is not None and not lines:
            heading = apart(heading, [Span(f"{'one notch':>9} ◂▸{'':<8}", "dim")], room)
        lines.append(heading)
        for name in fields:
            here = name == at
            if here:
                chosen = len(lines)
            value, space = shown(name, getattr(view.plan, name)), room - names - 2 - sides
            shorter = cut_inside if name in PICKED else cut
            arrows = f"‹ {shorter(value, space - 5)} ›" if here else shorter(value, space - 1)
            style, click = ("cursor" if here else ""), f"screen.go('{name}')"
            line = [
                Span(f"{'▸ ' if here else '  '}{padded(name, names)}", style, click),
                Span(padded(arrows, space), f"{style} bold", click),
            ]
            if prices is not None:
                line += _sides(prices.get(name, (None, None)), style or "dim" * stale, name)
            lines.append(line)
    return lines, chosen


def _sides(price: Price, style: str, name: str) -> Line:
    """What one notch to the left and to the right does to the peak, in GiB."""
    left, right = (signed(size) if size is not None else "" for size in price)
    marks = ("◂" if left else " ", "▸" if right else " ")
    # Not on the cursor's ground, where red and green are hard to read.
    tones = [_tone(words) if not style else "bold" for words in (left, right)]
    lower, higher = f"screen.turn('{name}', -1)", f"screen.turn('{name}', 1)"
    return [
        Span(f"{left:>7} ", f"{style} {tones[0]}", lower),
        Span(marks[0], style, lower),
        Span(marks[1], style, higher),
        Span(f" {right:<7}", f"{style} {tones[1]}", higher),
    ]


def _tone(price: str) -> str:
    return {"−": "good", "+": "bad"}.get(price[:1], "")


def signed(size: int) -> str:
    """A change in GiB with its sign: −5.8, +11.5, 0.0."""
    words = gib(abs(size))
    return words if words == "0.0" else f"{'−' if size < 0 else '+'}{words}"


def hint(name: str, steps: tuple[str, str], room: int) -> list[Line]:
    """What the chosen field means, and what lies one notch to either side."""
    left, right = steps
    ends = "   ".join(part for part in (left and f"◂ {left}", right and f"{right} ▸") if part)
    words = doc(name)
    line = [Span(f" {name}: ", "key"), Span(cut(words, room - len(name) - len(ends) - 6), "dim")]
    return [apart(line, [Span(f"{ends} ")], room)]


def peak(report: Report, room: int, rows: int) -> list[Line]:
    """What is alive at the largest moment: the legend of the bar, with formulas where they fit."""
    moment = report.peak_phase.peak
    parts = [(name, size) for name, _, size in drawn(moment)]
    parts = parts[: max(1, rows - 2)]
    names = max([16, *(len(name) for name, _ in parts)]) if room >= 60 else 18
    why = {term.name: term for term in sorted(moment.terms, key=lambda term: term.bytes)}
    lines: list[Line] = []
    for i, (name, size) in enumerate(parts):
        share = 100 * size / max(1, moment.bytes)
        line = [Span(f"{FILLS[i]} ", f"c{i}"), Span(padded(name, names))]
        line.append(Span(f"{gib(size):>7}{share:4.0f} %"))
        if (left := room - width(line) - 2) > 20:
            line.append(Span("  " + cut(why[name].why, left), "dim"))
        lines.append(line)
    if rest := moment.bytes - sum(size for _, size in parts):
        share = 100 * rest / max(1, moment.bytes)
        line = [Span(f"{REST} ", f"c{min(len(parts), 6)}"), Span(padded("everything else", names))]
        lines.append([*line, Span(f"{gib(rest):>7}{share:4.0f} %")])
    return [[Span(f"AT THE PEAK, GiB ({moment.name})", "head")], *lines]


def colours(report: Report) -> dict[str, int]:
    """The colour of each component: its place in the bar; all others share the last."""
    return {name: i for i, (name, _, _) in enumerate(drawn(report.peak_phase.peak))}
