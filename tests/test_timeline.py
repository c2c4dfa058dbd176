"""The memory timeline: the true peak survives, text is escaped, nothing comes from outside."""

from __future__ import annotations

import random
import re
from xml.etree import ElementTree

import pytest

from fitcheck.bench.allocator import MIB, Allocator
from fitcheck.bench.chart import BOTTOM, HEIGHT, TOP
from fitcheck.bench.replay import replay
from fitcheck.bench.samples import COLUMNS, Sample, samples
from fitcheck.bench.timeline import timeline_html, timeline_svg

SVG = "{http://www.w3.org/2000/svg}"
Events = list[tuple[int, int]]
Marks = list[tuple[int, str]]


def training() -> tuple[Events, dict[int, str], Marks]:
    """Weights, a long rollout, a short update with one needle of a peak in it."""
    events: Events = [(40 * MIB, layer) for layer in range(10)]
    roles = dict.fromkeys(range(10), "policy weights")
    marks: Marks = [(len(events), "rollout")]
    draw = random.Random(1)
    for step in range(10_000):
        name = 100 + step
        roles[name] = "kv cache" if step % 2 else "activations"
        events += [(draw.randint(1, 3 * MIB), name), (0, name)]
    marks.append((len(events), "update <1> & more"))
    events += [(300 * MIB, 50), (0, 50), (5 * MIB, 51), (0, 51)]
    roles |= {50: "logits", 51: "activations"}
    return events, roles, marks


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in parsed(svg).iter(f"{SVG}text")]


def test_samples_keep_every_phase_peak_and_are_few() -> None:
    events, roles, marks = training()
    drawn = samples(events, roles, Allocator(), marks)
    result = replay(events, Allocator(), marks)
    assert len(drawn) < 1.2 * COLUMNS
    assert max(sample.total for sample in drawn) == result.peak_allocated
    assert max(sample.reserved for sample in drawn) == result.peak_reserved
    for peak, begin, end in zip(result.marks, (10, 20_010), (20_010, 20_014), strict=True):
        inside = [sample for sample in drawn if begin <= sample.event < end]
        assert max(sample.total for sample in inside) == peak.allocated
        assert max(sample.reserved for sample in inside) == peak.reserved


def test_samples_are_by_role_and_end_where_memory_runs_out() -> None:
    events = [(MIB, 0), (MIB, 1), (MIB, 2), (0, 0), (90 * MIB, 3), (MIB, 4)]
    drawn = samples(events, {0: "policy", 1: "policy", 3: "critic"}, Allocator(60 * MIB))
    assert [sample.event for sample in drawn] == [0, 1, 2, 3]
    assert drawn[2].roles == {"policy": 2 * MIB, "other": MIB}
    assert drawn[3].roles == {"policy": MIB, "other": MIB}


def test_the_drawn_peak_is_the_true_one() -> None:
    events, roles, marks = training()
    result = replay(events, Allocator(), marks)
    limit = 2000 * MIB
    drawn = samples(events, roles, Allocator(limit), marks)
    root = parsed(timeline_svg(drawn, limit_bytes=limit, marks=marks, length=len(events)))
    (circle,) = root.iter(f"{SVG}circle")
    scale = HEIGHT / (1.06 * limit)
    height = BOTTOM - float(circle.attrib["cy"])
    assert height == pytest.approx(result.peak_allocated * scale, abs=0.06)  # px, one decimal
    areas = [path for path in root.iter(f"{SVG}path") if path.find(f"{SVG}title") is not None]
    assert len(areas) == 4
    tops = [float(y) for path in areas for y in re.findall(r"V([\d.]+)", path.attrib["d"])]
    assert min(tops) == float(circle.attrib["cy"])


def test_plain_samples_of_any_density_keep_their_peak() -> None:
    dense = [(i, {"weights": 100 * MIB, "cache": (i % 997) * 1000}) for i in range(50_000)]
    dense[31_234] = (31_234, {"weights": 100 * MIB, "cache": 77 * MIB})
    svg = timeline_svg(dense)
    assert "peak 177.0 MiB" in texts(svg)
    assert len(svg) < 60_000
    assert "peak 3.0 MiB" in texts(timeline_svg([(0, {"a": MIB}), (7, {"a": 3 * MIB})]))
    assert "peak 0" in texts(timeline_svg([]))


def test_limit_phases_roles_and_the_end_are_labelled() -> None:
    events, roles, marks = training()
    drawn = samples(events, roles, Allocator(), marks)
    svg = timeline_svg(drawn, limit_bytes=1000 * MIB, marks=marks, title="PPO", oom=20_012)
    said = texts(svg)
    assert {"PPO", "limit", "1000.0 MiB", "rollout", "update <1> & more"} <= set(said)
    assert "out of memory" in said
    assert "policy weights 400.0 MiB" in said and "logits 300.0 MiB" in said
    assert any(text.startswith("reserved, at most") for text in said)


def test_the_limit_line_is_at_its_height_or_told() -> None:
    low = timeline_svg([(0, {"a": 80 * MIB})], limit_bytes=100 * MIB)
    (line,) = re.findall(r'd="M\d+ ([\d.]+)H\d+" stroke="#c2261b"', low)
    assert BOTTOM - float(line) == pytest.approx(HEIGHT / 1.06, abs=0.06)
    high = timeline_svg([(0, {"a": 80 * MIB})], limit_bytes=80 * 1024 * MIB)
    assert "limit 80.00 GiB, off the scale" in texts(high)
    (circle,) = parsed(high).iter(f"{SVG}circle")
    assert TOP < float(circle.attrib["cy"]) < TOP + 30  # the picture is not flattened


def test_all_text_is_escaped() -> None:
    evil = "<script>alert(1)</script> & \"'"
    drawn = [Sample(0, {evil: MIB}, 2 * MIB), Sample(9, {evil: 2 * MIB}, 2 * MIB)]
    svg = timeline_svg(drawn, marks=[(3, evil)], title=evil, limit_bytes=4 * MIB, tooltips=True)
    page = timeline_html(drawn, marks=[(3, evil)], title=evil, limit_bytes=4 * MIB)
    assert any(evil in text for text in texts(svg))
    assert "<script" not in svg and "<script" not in page


def test_nothing_is_loaded_from_outside() -> None:
    events, roles, marks = training()
    drawn = samples(events, roles, Allocator(), marks)
    page = timeline_html(drawn, marks=marks, title="PPO", limit_bytes=1000 * MIB)
    assert page.replace("http://www.w3.org/2000/svg", "").count("http") == 0
    assert not re.search(r"<(link|img|image|use|iframe|script)|@import|url\(", page)


def test_the_page_tells_each_phase_peak() -> None:
    events, roles, marks = training()
    drawn = samples(events, roles, Allocator(), marks)
    page = timeline_html(drawn, marks=marks, length=len(events))
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td>", page)
    assert rows[1] == ("update &lt;1&gt; &amp; more", "700.0 MiB")
    assert "logits: 300.0 MiB" in page  # the tooltip at the peak


def test_phases_without_events_are_left_out() -> None:
    drawn = [(0, {"a": MIB}), (5, {"a": 2 * MIB})]
    marks = [(0, "first"), (2, "-"), (2, "none"), (2, "second"), (4, "-"), (99, "never")]
    page = timeline_html(drawn, marks=marks)
    assert re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td>", page) == [
        ("first", "1.0 MiB"),
        ("second", "1.0 MiB"),
    ]
    assert not {"-", "none", "never"} & set(texts(timeline_svg(drawn, marks=marks)))
