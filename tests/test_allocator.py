"""The allocator model against what PyTorch's own allocator did, and each rule by hand."""

from __future__ import annotations

import gzip
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitcheck.bench.allocator import MIB, Allocator, OutOfMemory
from fitcheck.bench.allocator_check import main
from fitcheck.bench.replay import Peak, Replay, replay

DATA = Path(__file__).parent / "data" / "allocator"

# Every recorded trace, its number of events, and the settings it was recorded with.
TRACES = {
    "default": (20_000, ""),
    "empty_cache": (20_000, ""),
    "limit_2000000000": (20_000, "--limit 2000000000"),
    "expandable": (20_000, "--expandable"),
    "exact_limit": (3_000, "--limit 2147483648"),
    "memory_fraction": (6_000, "--limit 4294967296 --memory-fraction 0.5 --max-split-size-mb 32"),
    "max_split_20": (6_000, "--limit 3000000000 --max-split-size-mb 20"),
    "max_split_64": (6_000, "--limit 4000000000 --max-split-size-mb 64"),
    "non_split_rounding": (
        6_000,
        "--limit 6000000000 --max-split-size-mb 128 --max-non-split-rounding-mb 200",
    ),
    "roundup_8": (6_000, "--limit 4000000000 --roundup-power2-divisions 8"),
    "roundup_by_size": (
        6_000,
        "--limit 6000000000 --roundup-power2-divisions [2:4,16:8,32:1,64:2,>:4]",
    ),
    "garbage_collection": (
        10_000,
        "--limit 5000000000 --garbage-collection-threshold 0.8 --memory-fraction 0.9",
    ),
    "large_segment_64": (6_000, "--limit 3000000000 --large-segment-size-mb 64"),
    "expandable_limit": (6_000, "--limit 2000000000 --expandable"),
    "expandable_tight": (6_000, "--limit 1073741824 --expandable"),
    "expandable_max_split": (6_000, "--limit 3000000000 --expandable --max-split-size-mb 40"),
    "expandable_large_segment_40": (
        6_000,
        "--limit 3000000000 --expandable --large-segment-size-mb 40",
    ),
    "all_options": (
        6_000,
        "--limit 4000000000 --max-split-size-mb 48 --garbage-collection-threshold 0.6 "
        "--roundup-power2-divisions [4:2,64:8,>:1] --memory-fraction 0.85",
    ),
}


def test_every_recorded_trace_is_replayed() -> None:
    assert {path.name.removesuffix(".csv.gz") for path in DATA.glob("*.csv.gz")} == set(TRACES)


@pytest.mark.parametrize("name", TRACES)
def test_agrees_with_pytorch_after_every_event(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    events, options = TRACES[name]
    code = main([str(DATA / f"{name}.csv.gz"), *options.split()])
    out, err = capsys.readouterr()
    assert (out, err, code) == (f"events {events} mismatches 0\n", "", 0)


# ---- the command line


def changed(tmp_path: Path, line: str, other: str) -> str:
    """A copy of the default trace with one of its lines replaced."""
    text = gzip.decompress((DATA / "default.csv.gz").read_bytes()).decode()
    assert text.count(line) == 1
    path = tmp_path / "changed.csv.gz"
    path.write_bytes(gzip.compress(text.replace(line, other).encode()))
    return str(path)


def test_one_wrong_number_is_one_mismatch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "a,3,6891,7680,23068672\n"
    path = changed(tmp_path, line, line.replace("7680", "8192"))
    assert main([path]) == 1
    out, err = capsys.readouterr()
    assert out == "events 20000 mismatches 1\n"
    assert err.startswith("line 4: a,3,6891,8192,23068672: ") and "model [7680, 23068672]" in err


def test_a_different_size_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "a,3,6891,7680,23068672\n"
    assert main([changed(tmp_path, line, line.replace("6891", "9000"))]) == 1
    assert int(capsys.readouterr().out.split()[-1]) > 1


def test_the_wrong_settings_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(DATA / "default.csv.gz"), "--expandable"]) == 1
    assert main([str(DATA / "limit_2000000000.csv.gz")]) == 1  # no out of memory without a limit
    assert "no out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a,1,2\n", "cannot read"),
        (gzip.compress(b"a,1,2\n"), "line 1 is no event"),
        (gzip.compress(b"a,1,-5,0,0\n"), "line 1 is no event"),
        (gzip.compress(b"a,1,512,512,2097152\n" * 99)[:-12], "cannot read"),
        (None, "cannot read"),
    ],
)
def test_what_is_no_trace_is_an_error(
    content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.csv.gz"
    if content is not None:
        path.write_bytes(content)
    assert main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and said in err


def test_runs_as_a_module_without_torch_or_numpy() -> None:
    trace = DATA / "exact_limit.csv.gz"
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['allocator', {str(trace)!r}, '--limit', '2147483648']\n"
        "try:\n    runpy.run_module('fitcheck.bench.allocator', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("events 3000 mismatches 0\n", "")


# ---- each rule, worked by hand (c10/cuda/CUDACachingAllocator.cpp)


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB - 511, MIB, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # the small pool serves up to 1 MiB
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB, 10 * MIB),  # it is the rounded size that counts
        (10 * MIB, 10 * MIB, 10 * MIB),  # from 10 MiB on a segment of its own, in steps of 2 MiB
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # a rest of 1 MiB + 512 is split off
        (11 * MIB, 12 * MIB, 12 * MIB),  # one of 1 MiB is not, and counts as allocated
        (20 * MIB - 512, 20 * MIB, 20 * MIB),
    ],
)
def test_rounding_and_segments(size: int, allocated: int, reserved: int) -> None:
    allocator = Allocator()
    allocator.malloc(size)
    assert (allocator.allocated, allocator.reserved) == (allocated, reserved)


def test_a_size_of_zero_is_no_allocation() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Allocator().malloc(0)


def test_a_block_is_freed_once() -> None:
    allocator = Allocator()
    block = allocator.malloc(1)
    allocator.free(block)
    with pytest.raises(KeyError):
        allocator.free(block)


def test_the_small_pool_splits_down_to_512_bytes_and_shares_nothing_with_the_large() -> None:
    allocator = Allocator()
    for _ in range(2 * MIB // 512):
        allocator.malloc(1)
    assert (allocator.allocated, allocator.reserved) == (2 * MIB, 2 * MIB)
    large = allocator.malloc(5 * MIB)
    allocator.free(large)
    allocator.malloc(1)  # 20 MiB are free, but not for it
    assert allocator.reserved == (2 + 20 + 2) * MIB


def test_best_fit_then_the_oldest_segment_then_the_lowest_address() -> None:
    allocator = Allocator()
    first, second, large = (allocator.malloc(size * MIB) for size in (12, 12, 14))
    for block in (large, second, first):
        allocator.free(block)
    assert [allocator.malloc(12 * MIB) for _ in range(3)] == [first, second, large]

    allocator = Allocator()
    pieces = [allocator.malloc(4 * MIB) for _ in range(5)]  # one segment of 20 MiB
    allocator.free(pieces[3])
    allocator.free(pieces[1])
    assert allocator.malloc(4 * MIB) == pieces[1]


def test_freed_neighbours_merge_into_one_block() -> None:
    allocator = Allocator()
    pieces = [allocator.malloc(4 * MIB) for _ in range(5)]
    for i in (0, 2, 4, 1, 3):
        allocator.free(pieces[i])
    assert list(allocator.blocks()) == [(pieces[0], 20 * MIB, False)]
    allocator.malloc(20 * MIB)
    assert allocator.reserved == 20 * MIB


def test_empty_cache_returns_whole_segments_only() -> None:
    allocator = Allocator()
    kept, other = allocator.malloc(5 * MIB), allocator.malloc(6 * MIB)
    whole = allocator.malloc(30 * MIB)
    allocator.free(other)
    allocator.free(whole)
    allocator.empty_cache()
    assert allocator.reserved == 20 * MIB  # one live piece keeps its segment
    allocator.free(kept)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (0, 0)


def test_the_cache_is_flushed_before_memory_runs_out() -> None:
    allocator = Allocator(limit_bytes=41 * MIB)
    allocator.free(allocator.malloc(30 * MIB))
    small = allocator.malloc(100)
    allocator.malloc(32 * MIB)  # 30 MiB cached, too small: returned to the driver
    assert (allocator.reserved, allocator.retries, allocator.ooms) == (34 * MIB, 1, 0)
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(8 * MIB + 1)
    assert (caught.value.requested, caught.value.free) == (8 * MIB + 1, 7 * MIB)
    assert (caught.value.allocated, caught.value.reserved) == (32 * MIB + 512, 34 * MIB)
    assert (allocator.retries, allocator.ooms) == (2, 1)
    allocator.free(small)
    assert allocator.malloc(600) == small  # and it goes on


def test_expandable_segments_grow_and_shrink_by_pages() -> None:
    allocator = Allocator(limit_bytes=1000 * MIB, expandable_segments=True)
    allocator.malloc(1)
    assert allocator.reserved == 2 * MIB
    first = allocator.malloc(3 * MIB)
    assert allocator.reserved == (2 + 20) * MIB
    second = allocator.malloc(30 * MIB)  # 17 MiB are free at the end: one page more
    assert (second, allocator.reserved) == (first + 3 * MIB, (2 + 40) * MIB)
    assert allocator.allocated == 33 * MIB + 512  # split to the last 512 bytes
    allocator.free(first)
    allocator.empty_cache()  # no whole page is free
    assert allocator.reserved == (2 + 40) * MIB
    allocator.free(second)
    allocator.empty_cache()
    assert allocator.reserved == 2 * MIB


def test_expandable_segments_fill_holes_before_they_grow() -> None:
    allocator = Allocator(limit_bytes=1000 * MIB, expandable_segments=True)
    blocks = [allocator.malloc(40 * MIB) for _ in range(3)]
    allocator.free(blocks[1])
    allocator.empty_cache()
    assert allocator.reserved == 80 * MIB
    assert allocator.malloc(15 * MIB) == blocks[1]
    assert allocator.reserved == 100 * MIB


def test_pages_mapped_before_memory_ran_out_are_not_undone() -> None:
    allocator = Allocator(limit_bytes=100 * MIB, expandable_segments=True)
    blocks = [allocator.malloc(20 * MIB) for _ in range(3)]
    allocator.free(blocks[1])
    allocator.empty_cache()
    allocator.free(blocks[2])
    allocator.reset_peaks()
    assert allocator.reserved == 40 * MIB  # a block, a hole, a free block, nothing
    with pytest.raises(OutOfMemory):
        allocator.malloc(100 * MIB)
    # The first attempt filled the hole and failed behind the free block; then came the flush.
    assert (allocator.peak_reserved, allocator.reserved) == (60 * MIB, 20 * MIB)


@pytest.mark.parametrize(
    ("divisions", "size", "allocated"),
    [
        (4, 1200, 1536),  # no more than 512 bytes x 4: a multiple of 512 still
        (4, 2048, 2048),
        (4, 2049, 2560),  # between 2048 and 4096: steps of 512
        (4, 5000, 5120),  # between 4096 and 8192: steps of 1024
        (4, 9000, 10240),
        (2, 9 * MIB, 12 * MIB),
        (1, 5000, 5120),  # one division is none
        ({1: 2, 4: 8, ">": 4}, 600_000, 786_432),  # below the first key: its value
        ({1: 2, 4: 8, ">": 4}, 2 * MIB + 1, 2 * MIB + 512),  # between keys: none
        ({1: 2, 4: 8, ">": 4}, 4 * MIB + 1, 4 * MIB + MIB // 2),
        ({1: 2, 4: 8, ">": 4}, 33 * MIB, 40 * MIB),
        ({32768: 2}, 600_000, 786_432),
    ],
)
def test_roundup_power2_divisions(
    divisions: int | dict[int | str, int], size: int, allocated: int
) -> None:
    assert Allocator(roundup_power2_divisions=divisions).rounded(size) == allocated


def test_blocks_above_max_split_size_stay_whole() -> None:
    allocator = Allocator(max_split_size=32 * MIB)
    large = allocator.malloc(40 * MIB)
    allocator.free(large)
    allocator.malloc(10 * MIB)  # must not break the large block
    assert allocator.reserved == 50 * MIB
    assert allocator.malloc(32 * MIB) == large  # up to 20 MiB too large is fine, unsplit
    assert (allocator.allocated, allocator.reserved) == (50 * MIB, 50 * MIB)
    allocator.free(large)
    larger = allocator.malloc(60 * MIB)
    allocator.free(larger)
    assert allocator.malloc(40 * MIB) == large
    allocator.malloc(40 * MIB)  # 60 MiB would be 20 too large
    assert allocator.reserved == (50 + 60 + 40) * MIB


def test_with_max_split_size_one_large_block_goes_before_the_whole_cache() -> None:
    allocator = Allocator(limit_bytes=200 * MIB, max_split_size=32 * MIB)
    blocks = [allocator.malloc(size * MIB) for size in (12, 40, 60, 80)]
    for block in blocks:
        allocator.free(block)
    allocator.malloc(34 * MIB + 512)  # 40 MiB: taken as it is
    allocator.malloc(16 * MIB)  # nothing fits: the smallest block of 32 MiB or more goes
    assert (allocator.reserved, allocator.retries) == ((12 + 40 + 80 + 16) * MIB, 0)


def gigabytes_freed(fraction: float, threshold: float = 0.3) -> Allocator:
    """2 GB of card, six segments of 100 MiB cached. The numbers were read off PyTorch 2.13.0."""
    allocator = Allocator(
        limit_bytes=2_000_000_000,
        garbage_collection_threshold=threshold,
        per_process_memory_fraction=fraction,
    )
    for block in [allocator.malloc(100 * MIB) for _ in range(6)]:
        allocator.free(block)
    return allocator


def test_garbage_is_collected_above_the_threshold() -> None:
    allocator = gigabytes_freed(fraction=0.9)
    reserved = []
    for size in (110, 114, 118, 122):
        allocator.malloc(size * MIB)
        reserved.append(allocator.reserved // MIB)
    assert reserved == [110, 224, 342, 464]


def test_garbage_is_not_collected_without_a_memory_fraction() -> None:
    allocator = gigabytes_freed(fraction=1.0)
    allocator.malloc(110 * MIB)
    assert allocator.reserved == 710 * MIB


def test_the_segments_unused_for_longest_are_collected_first() -> None:
    allocator = Allocator(
        limit_bytes=1000 * MIB,
        garbage_collection_threshold=0.5,  # of the 500 MiB allowed
        per_process_memory_fraction=0.5,
    )
    blocks = [allocator.malloc(50 * MIB) for _ in range(4)]
    allocator.free(blocks[0])
    allocator.malloc(60 * MIB)  # the clock of the pool moves on; 260 MiB reserved
    allocator.free(blocks[1])
    allocator.free(blocks[2])
    allocator.malloc(70 * MIB)  # 10 MiB above the threshold: the first block is older than average
    assert allocator.reserved == (260 - 50 + 70) * MIB


def test_the_memory_fraction_is_of_the_whole_card() -> None:
    allocator = Allocator(
        limit_bytes=90 * MIB, total_bytes=100 * MIB, per_process_memory_fraction=0.5
    )
    allocator.malloc(50 * MIB)
    with pytest.raises(OutOfMemory):
        allocator.malloc(1)


# ---- what holds whatever is asked

SETTINGS = st.sampled_from(
    [
        {},
        {"expandable_segments": True},
        {"max_split_size": 24 * MIB},
        {"roundup_power2_divisions": 4},
        {"garbage_collection_threshold": 0.5, "per_process_memory_fraction": 0.9},
        {"expandable_segments": True, "max_split_size": 24 * MIB},
    ]
)
SIZES = st.one_of(
    st.integers(1, 4 * MIB),
    st.integers(MIB, 60 * MIB),
    st.sampled_from([512, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 11 * MIB, 20 * MIB, 30 * MIB]),
)
# > 0 allocates that much, 0 empties the cache, < 0 frees one of the live blocks
STEPS = st.lists(st.one_of(SIZES, st.integers(-50, 0)), max_size=120)


def check(allocator: Allocator, live: list[int]) -> None:
    blocks = list(allocator.blocks())
    assert sum(size for _, size, _ in blocks) == allocator.reserved
    assert sum(size for _, size, is_live in blocks if is_live) == allocator.allocated
    assert {address for address, _, is_live in blocks if is_live} == set(live)
    for (start, size, is_live), (after, _, next_is_live) in pairwise(blocks):
        assert start + size <= after
        if start + size == after:
            assert is_live or next_is_live  # free neighbours have merged
    assert allocator.allocated <= allocator.reserved <= 400 * MIB
    assert allocator.allocated <= allocator.peak_allocated
    assert allocator.reserved <= allocator.peak_reserved


@given(SETTINGS, STEPS)
@settings(max_examples=150, deadline=None)
def test_blocks_add_up_and_everything_can_be_returned(
    options: dict[str, object], steps: list[int]
) -> None:
    allocator = Allocator(400 * MIB, **options)  # type: ignore[arg-type]
    live: list[int] = []
    for step in steps:
        if step > 0:
            try:
                live.append(allocator.malloc(step))
            except OutOfMemory:
                assert allocator.reserved + allocator.rounded(step) + 20 * MIB > 0.9 * 400 * MIB
        elif step < 0 and live:
            allocator.free(live.pop(step % len(live)))
        elif step == 0:
            allocator.empty_cache()
        check(allocator, live)
    for block in live:
        allocator.free(block)
    check(allocator, [])
    if not options.get("expandable_segments"):  # one block per segment
        reported: list[str] = []
        allocator.on_segment(lambda action, start, size: reported.append(action))
        blocks = len(list(allocator.blocks()))
        allocator.empty_cache()
        assert reported == ["segment_free"] * blocks
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (0, 0)
    assert list(allocator.blocks()) == []


# ---- replay


def test_replay_reports_peaks_retries_and_phases() -> None:
    events = [
        (12 * MIB, 0),
        (30 * MIB, 1),  # "rollout" begins with 12 MiB held
        (0, 1),
        (14 * MIB, 2),  # "score": a piece of the 30 MiB
        (0, 2),
        (-1, 0),
        (2000, 3),  # "update"
        (0, 0),
        (0, 3),
    ]
    marks = [(1, "rollout"), (3, "score"), (6, "update")]
    assert replay(iter(events), Allocator(), marks) == Replay(
        peak_allocated=42 * MIB,
        peak_reserved=42 * MIB,
        retries=0,
        oom=None,
        marks=(
            Peak("rollout", 42 * MIB, 42 * MIB),
            Peak("score", 26 * MIB, 42 * MIB),
            Peak("update", 12 * MIB + 2048, 14 * MIB),
        ),
    )


def test_replay_stops_where_memory_runs_out() -> None:
    events = [(30 * MIB, 0), (0, 0), (36 * MIB, 1), (20 * MIB, 2), (0, 1)]
    allocator = Allocator(limit_bytes=40 * MIB)
    result = replay(events, allocator, [(0, "first"), (3, "second"), (4, "never")])
    assert (result.oom, result.retries) == (3, 2)
    assert [peak.name for peak in result.marks] == ["first", "second"]
    assert (result.peak_allocated, result.peak_reserved) == (36 * MIB, 36 * MIB)
    assert (allocator.peak_allocated, allocator.ooms) == (36 * MIB, 1)


def test_a_second_replay_starts_from_what_the_first_one_left() -> None:
    allocator = Allocator()
    replay([(50 * MIB, 0), (10 * MIB, 1), (0, 0)], allocator)
    second = replay([(20 * MIB, 0)], allocator)
    assert (second.peak_allocated, second.peak_reserved) == (30 * MIB, 60 * MIB)
    assert (allocator.peak_allocated, allocator.peak_reserved) == (60 * MIB, 60 * MIB)


def test_a_growing_cache_fragments_ordinary_segments_more_than_expandable_ones() -> None:
    """Concatenating a KV cache: allocate it a little larger, free the old one, layer by layer."""
    events = [(8 * MIB, layer) for layer in range(16)]
    for step in range(1, 200):
        for layer in range(16):
            events.append((8 * MIB + step * 16 * 1024, 1000 * step + layer))
            events.append((0, 1000 * (step - 1) + layer if step > 1 else layer))
    ordinary = replay(events, Allocator())
    expandable = replay(events, Allocator(expandable_segments=True))
    assert ordinary.peak_reserved > 1.2 * ordinary.peak_allocated
    assert expandable.peak_reserved < 1.2 * expandable.peak_allocated
