"""Explain: every term with its formula in numbers, where in the step it lives, and what it is."""

from __future__ import annotations

from typing import NamedTuple

from textual.geometry import Size

from fitcheck import catalog
from fitcheck.report import Report
from fitcheck.text import facts, gib
from fitcheck.tui import draw
from fitcheck.tui.lines import Line, Span, apart, cut, wrapped
from fitcheck.tui.page import Page


class Entry(NamedTuple):
    """One term of the step: its largest size, that size's formula, and the phases it is in."""

    name: str
    role: str
    bytes: int
    why: str
    at: str
    phases: list[str]


def entries(report: Report) -> list[Entry]:
    """Every term by role, the largest first. Several of one name in a phase are one entry."""
    sums: dict[tuple[str, str], dict[str, int]] = {}
    largest: dict[tuple[str, str], tuple[int, str]] = {}
    for phase in report.phases:
        for term in phase.terms:
            key = (term.name, term.role)
            held = sums.setdefault(key, {})
            held[phase.name] = held.get(phase.name, 0) + term.bytes
            if term.bytes > largest.get(key, (0, ""))[0]:
                largest[key] = (term.bytes, term.why)
    found = []
    for (name, role), held in sums.items():
        at = max(held, key=held.__getitem__)
        if held[at]:
            why = largest[name, role][1]
            phases = [phase for phase, size in held.items() if size]
            found.append(Entry(name, role, held[at], why, at, phases))
    return sorted(found, key=lambda entry: -entry.bytes)


def meaning(name: str) -> tuple[str, str]:
    """What a term is, and where that is written; empty where the glossary does not have it."""
    for row in catalog.rows("glossary.json", "terms"):
        if row["term"].lower() == name.lower():
            return row["meaning"], row["source"]
    return "", ""


class Explain(Page):
    """The whole answer, term by term."""

    NAME = "explain"

    def heading(self, room: int) -> list[Line]:
        return self.named("EXPLAIN", draw.asked(self.fitcheck.view.plan), room)

    def body(self, size: Size) -> list[Line]:
        report, room = self.fitcheck.view.report, size.width
        lines = draw.verdict(report, room)
        lines.append([])
        for label, words in facts(report):
            text = wrapped(words, room - 10)
            lines.append([Span(f" {label:<8} ", "head"), *text[0]])
            lines += [[Span(" " * 10), *line] for line in text[1:]]
        said: set[str] = set()
        for entry in entries(report):
            lines += [[], *self.term(entry, report, room)]
            if entry.name not in said:
                said.add(entry.name)
                words, source = meaning(entry.name)
                if words:
                    lines += _indented(f"{words} ({source})", room, "dim")
        return lines

    def term(self, entry: Entry, report: Report, room: int) -> list[Line]:
        """One term: whose, how much, how that was computed, and when."""
        name = [Span(f" {entry.name}", "bold"), Span(f"  {entry.role}", "key")]
        lines = [apart(name, [Span(f"{gib(entry.bytes)} GiB ", "bold")], room)]
        lines += _indented(f"= {entry.why}", room)
        if len(entry.phases) == len(report.phases):
            when = "in every phase"
        elif len(entry.phases) <= 3:
            when = f"in {', '.join(entry.phases)}"
        else:
            when = f"in {len(entry.phases)} of {len(report.phases)} phases"
        if len(entry.phases) > 1:
            when += f", largest in {entry.at}"
        lines.append([Span("   "), Span(cut(when, room - 4), "dim")])
        return lines


def _indented(words: str, room: int, style: str = "") -> list[Line]:
    return [[Span("   "), *line] for line in wrapped(words, room - 4, style)]
