"""What leaves the screen: the command that asks the same, and the answer as a file.

In a terminal files go to the downloads folder; in a browser the browser downloads them.
"""

from __future__ import annotations

import json
import re
import time
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.geometry import Size

from fitcheck.advice import command
from fitcheck.markdown import markdown
from fitcheck.tui.lines import Line, Span, cut
from fitcheck.tui.page import Page
from fitcheck.tui.view import View

KINDS = {
    "json": ("application/json", "the whole answer, as `fitcheck check --json` prints it"),
    "md": ("text/markdown", "markdown, for an issue or a chat"),
    "svg": ("image/svg+xml", "a picture of the screen"),
}


def document(view: View, kind: str) -> str:
    """The answer as JSON or markdown."""
    if kind == "json":
        return json.dumps(view.report.to_json(), ensure_ascii=False, indent=1) + "\n"
    return f"{markdown(view.report)}\n    {command(view.plan)}\n"


def filename(view: View, kind: str) -> str:
    """A name that says what was asked, and when: nothing is written over."""
    asked = f"{view.plan.method}-{view.plan.model.id.rpartition('/')[2]}".lower()
    asked = re.sub(r"[^a-z0-9.]+", "-", asked)
    return f"fitcheck-{asked}-{time.strftime('%Y%m%d-%H%M%S')}.{kind}"


class Export(Page):
    """Asks in which form."""

    NAME = "export"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "deliver('json')", "JSON"),
        Binding("m", "deliver('md')", "markdown"),
        Binding("s", "deliver('svg')", "SVG"),
    ]

    def heading(self, room: int) -> list[Line]:
        return self.named("EXPORT", "this answer as a file", room)

    def body(self, size: Size) -> list[Line]:
        lines: list[Line] = [[]]
        for key, kind in zip("jms", KINDS, strict=True):
            click = f"screen.deliver('{kind}')"
            words = cut(KINDS[kind][1], size.width - 14)
            lines.append([Span(f"   {key}  ", "key", click), Span(f"{kind:<6}{words}", "", click)])
        said = command(self.fitcheck.view.plan)
        return [*lines, [], [Span(cut(f"   y copies the command: {said}", size.width), "dim")]]

    def action_deliver(self, kind: str) -> None:
        """Write the file; of the picture, of the screen below this one."""
        app = self.fitcheck
        if not self.is_current:  # a second key
            return
        self.dismiss()
        app.call_after_refresh(lambda: app.deliver(kind))
