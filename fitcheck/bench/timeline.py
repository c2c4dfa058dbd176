"""A picture of a trace: memory over its events, stacked by role, under the card's limit.

    drawn = samples(events, roles, Allocator(limit_bytes), marks)
    svg = timeline_svg(drawn, limit_bytes=limit_bytes, marks=marks, title="PPO, Llama-3.2-1B")

Both forms, an SVG and a page around it, are self-contained: no script, font or style from outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from fitcheck.bench.chart import GRID, INK, LEFT, WIDTH, Chart, readable, text
from fitcheck.bench.samples import Sample


def timeline_svg(
    samples: Sequence[tuple[int, Mapping[str, int]] | Sample],
    *,
    limit_bytes: int | None = None,
    marks: Sequence[tuple[int, str]] = (),
    title: str = "",
    length: int | None = None,
    oom: int | None = None,
    tooltips: bool = False,
) -> str:
    """The timeline as one SVG element.

    `samples` are (event index, bytes by role) or `Sample`s, in the order of their index, any
    number; `marks` are (event index, phase name), "-" for what lies between phases; `length` is
    the number of events, where the last sample does not tell; `oom` is the event at which memory
    ran out.
    """
    chart = Chart(samples, marks, length, limit_bytes)
    parts = [
        text(LEFT, 24, title, 'font-size="16" font-weight="600"'),
        *chart.grid(),
        *chart.areas(),
        *chart.reserved_line(),
        *chart.phases(),
        *chart.limit_line(),
        *chart.peak_label(),
        *chart.oom_line(oom),
        *chart.legend(),
        *(chart.tooltips() if tooltips else ()),
    ]
    height = chart.legend_bottom
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-label="{escape(title)}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="11" fill="{INK}">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def timeline_html(
    samples: Sequence[tuple[int, Mapping[str, int]] | Sample],
    *,
    limit_bytes: int | None = None,
    marks: Sequence[tuple[int, str]] = (),
    title: str = "",
    length: int | None = None,
    oom: int | None = None,
) -> str:
    """The timeline as a page of its own: details under the pointer, and the peak of each phase."""
    svg = timeline_svg(
        samples,
        limit_bytes=limit_bytes,
        marks=marks,
        title=title,
        length=length,
        oom=oom,
        tooltips=True,
    )
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{readable(held)}</td><td>{readable(reserved)}</td></tr>\n"
        for name, held, reserved in Chart(samples, marks, length, limit_bytes).phase_peaks()
    )
    style = (
        f"body{{font:15px Helvetica,Arial,sans-serif;color:{INK};background:#fff;"
        f"max-width:{WIDTH}px;margin:24px auto}}svg{{max-width:100%;height:auto}}"
        f"table{{border-collapse:collapse;margin:8px {LEFT}px}}"
        f"td,th{{padding:4px 24px 4px 0;text-align:right;border-bottom:1px solid {GRID}}}"
        "td:first-child,th:first-child{text-align:left}rect.hover:hover{fill-opacity:.08}"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title or 'Memory timeline')}</title><style>{style}</style></head>\n"
        f"<body>\n{svg}"
        "<table><tr><th>phase</th><th>peak allocated</th><th>peak reserved</th></tr>\n"
        f"{rows}</table>\n</body></html>\n"
    )
