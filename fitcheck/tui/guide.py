"""Help: every key of every view, and how to read the screen."""

from __future__ import annotations

from textual.binding import Binding
from textual.geometry import Size

from fitcheck.text import WORDS
from fitcheck.tui.draw import TONES
from fitcheck.tui.knobs import doc, fields_of
from fitcheck.tui.lines import Line, Span, cut, wrapped
from fitcheck.tui.page import Page

READING = (
    "The knobs show their price: GiB of the whole plan's peak, saved or added by one notch to "
    "either side. The bar is what is alive at the peak, ▲ where the card ends.",
    "Keys 1 to 5 apply what helps most, those first after which it fits; when it fits, they turn "
    "up what there is room for. u undoes, whatever it was.",
    "fits: the peak and what the answer may be off by are below what the card can give. tight: "
    "only if the allocator gives its cache back, or within that error.",
    "PRETEND: the card is an empty one of the catalog. g chooses another, w shows this machine's.",
)
NAMES = {
    "up": "↑", "down": "↓", "left": "←", "right": "→", "question_mark": "?", "slash": "/",
    "pageup": "page up", "pagedown": "page down", "escape": "esc", "ctrl+p": "ctrl+p",
    "plus": "+", "minus": "-", "equals_sign": "=",
}  # fmt: skip


def keys_of(bindings: list[Binding]) -> list[tuple[str, str]]:
    """(keys, what they do) of each action, in the order in which they are bound."""
    found: dict[str, tuple[list[str], str]] = {}
    for binding in bindings:
        what = binding.tooltip or binding.description
        keys, _ = found.setdefault(what, ([], what))
        keys += [NAMES.get(key, key) for key in binding.key.split(",")]
    return [(" ".join(dict.fromkeys(keys)), what) for keys, what in found.values()]


class Guide(Page):
    """Every key, and how to read the screen."""

    NAME = "help"

    def heading(self, room: int) -> list[Line]:
        return self.named("HELP", "what the keys do, and how to read the screen", room)

    def body(self, size: Size) -> list[Line]:
        room = size.width
        lines: list[Line] = []
        for title, bindings in self.fitcheck.all_bindings():
            lines.append([Span(f" {title.upper()}", "head")])
            for keys, what in keys_of(bindings):
                lines.append([Span(f"   {keys:<15} ", "key"), Span(cut(what, room - 20))])
            lines.append([])
        lines.append([Span(" HOW TO READ IT", "head")])
        for verdict, (glyph, words) in WORDS.items():
            lines.append([Span(f"   {glyph} {words.lower()}", TONES[verdict])])
        for words in READING:
            lines += [[Span("   "), *line] for line in wrapped(words, room - 6)]
        lines += [[], [Span(" THE FIELDS OF THIS PLAN", "head")]]
        for name in fields_of(self.fitcheck.view.plan):
            lines.append([Span(f"   {name:<18} ", "key"), Span(cut(doc(name), room - 24))])
        return lines
