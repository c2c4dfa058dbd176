"""Tables as wide as the terminal: columns of text, left-aligned, the least telling cut first."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

_LEAST = 18  # columns that a text keeps while names can still be cut


def columns(otherwise: int) -> int:
    """Columns of the terminal, `otherwise` when there is none; $COLUMNS comes first.

    What shutil.get_terminal_size does, whose import is a twentieth of an answer's time.
    """
    try:
        width = int(os.environ["COLUMNS"])
    except (KeyError, ValueError):
        width = 0
    if width <= 0:
        try:
            width = os.get_terminal_size(1).columns
        except OSError:
            width = 0
    return width if width > 0 else otherwise


def print_table(
    noun: str, titles: Sequence[str], found: Iterable[tuple[str, ...]], spare: str
) -> int:
    """Left-aligned columns as wide as the terminal allows; 1 and a word to stderr when empty.

    Columns that say nothing are left out. Too wide a table loses its `spare` column, then the
    ends of its texts, and only then the middle of its names.
    """
    lines = [tuple(titles), *found]
    if len(lines) == 1:
        print(f"no {noun} of the catalog matches", file=sys.stderr)
        return 1
    shown = [column for column in zip(*lines, strict=True) if set(column[1:]) - {"", "-"}]
    if _excess(shown) > 0:
        shown = [column for column in shown if column[0] != spare]
    widths = [max(map(len, column)) for column in shown]
    for _ in range(_excess(shown)):
        texts = max(widths[1:], default=0)
        at = widths.index(texts, 1) if texts > _LEAST else widths.index(max(widths))
        widths[at] = max(1, widths[at] - 1)
    for line in zip(*shown, strict=True):
        cells = [_cut_inside(line[0], widths[0]), *map(_cut, line[1:], widths[1:])]
        print("  ".join(map(str.ljust, cells, widths)).rstrip())
    return 0


def whole_words(text: str, width: int, head: str = "", indent: int = 0) -> list[str]:
    """The text wrapped between words alone, so that flags can be copied; `head` leads it."""
    import textwrap

    return textwrap.wrap(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * (indent or len(head)),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _excess(shown: Sequence[tuple[str, ...]]) -> int:
    """How much wider than the terminal these columns are, two spaces between them.

    Without a terminal there is plenty of room, for grep.
    """
    return sum(max(map(len, column)) + 2 for column in shown) - 2 - columns(200)


def _cut_inside(name: str, width: int) -> str:
    """The start and the end of a name too long: names end in what tells them apart."""
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
