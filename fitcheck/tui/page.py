"""What all screens share: a title, a body, and the keys that work here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from textual.app import ComposeResult
from textual.await_complete import AwaitComplete
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.screen import Screen

from fitcheck.tui.lines import Line, Lines, Span, padded, width

if TYPE_CHECKING:
    from fitcheck.tui.app import FitCheckApp

LAST = ("show_help", "quit")  # the keys that every screen shows, however narrow


def key_line(bindings: list[Binding], room: int) -> list[Line]:
    """The keys that work here, as many as there is room for; help and quit always."""
    parts = {b.action: _key(b) for b in bindings}
    last = [part for action, part in parts.items() if action in LAST]
    free = room - sum(width(part) for part in last) - 1
    line: Line = [Span(" ", "chip")]
    for action, part in parts.items():
        if action not in LAST and width(part) <= free:
            line += part
            free -= width(part)
    for part in last:
        line += part
    return [[*line, Span(" " * max(0, room - width(line)), "chip")]]


def _key(binding: Binding) -> Line:
    key = binding.key_display or binding.key.split(",")[0]
    action = binding.action if "." in binding.action else f"screen.{binding.action}"
    if binding.action in LAST:
        action = f"app.{binding.action}"
    return [
        Span(key, "chip key", action),
        Span(f" {binding.description}", "chip", action),
        Span("  ", "chip"),
    ]


class Page(Screen[Any]):
    """A screen of FitCheck. Its subclasses say what the title and the lines below it are."""

    AUTO_FOCUS = ""
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (80, "-normal"), (120, "-wide")]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "back", key_display="esc"),
        Binding("up,k", "scroll(-1)", "up", show=False),
        Binding("down,j", "scroll(1)", "down", show=False),
        Binding("pageup", "scroll(-10)", "page up", show=False),
        Binding("pagedown,space", "scroll(10)", "page down", show=False),
    ]
    NAME = ""
    leaving = False

    @property
    def fitcheck(self) -> FitCheckApp:
        """The app, which holds the view."""
        from fitcheck.tui.app import FitCheckApp

        assert isinstance(self.app, FitCheckApp)
        return self.app

    def compose(self) -> ComposeResult:
        yield Lines(lambda size: self.heading(size.width), classes="one title")
        yield Lines(self.body, id="page")
        yield self.keys()

    def keys(self) -> Lines:
        """The last row."""
        return Lines(lambda size: key_line(self.shown_bindings(), size.width), classes="keys")

    def shown_bindings(self) -> list[Binding]:
        """The keys of this screen and of the app that the last row shows, an action once."""
        own, everywhere = self._bindings.key_to_bindings, self.app._bindings.key_to_bindings
        merged = own | {key: several for key, several in everywhere.items() if key not in own}
        shown = [b for several in merged.values() for b in several if b.show]
        return list({b.action: b for b in reversed(shown)}.values())[::-1]

    def heading(self, room: int) -> list[Line]:
        """The title's line."""
        raise NotImplementedError

    def named(self, name: str, words: str, room: int) -> list[Line]:
        """A title: the view's name, and what it is of."""
        left = f" {name}  "
        return [[Span(left, "title bold"), Span(padded(words, room - len(left)), "title")]]

    def body(self, size: Size) -> list[Line]:
        """What the page shows."""
        raise NotImplementedError

    async def action_dismiss(self, result: Any = None) -> None:
        """Back."""
        if self.is_current:
            await super().action_dismiss(result)

    def dismiss(self, result: Any = None) -> AwaitComplete:
        """Leave, once: a second key may come before the first was heeded."""
        if self.leaving:
            return AwaitComplete.nothing()  # type: ignore[no-any-return,no-untyped-call]
        self.leaving = True
        return super().dismiss(result)

    def action_scroll(self, lines: int) -> None:
        page = self.query_one("#page", Lines)
        page.scroll_relative(y=lines, animate=False)

    def redraw(self) -> None:
        """Draw everything anew, after a change of the view."""
        for lines in self.query(Lines):
            lines.redraw()
