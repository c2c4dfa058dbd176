"""GPU rows and the memory rule, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fitcheck.errors import FitCheckError
from fitcheck.gpu import GIB, GPU, MIB


def card(**changes: Any) -> GPU:
    row = {
        "id": "a-card",
        "name": "A card",
        "vendor": "nvidia",
        "arch": "Ada",
        "segment": "geforce",
        "memory_gib": 24,
        "sources": ["a log"],
        "checked": "2026-11-21",
    }
    return GPU.from_json(row | changes)


RTX_4090 = card(total_bytes=24_564 * MIB, total_verified=True)


def test_a_row_becomes_a_gpu() -> None:
    gpu = card(
        compute_capability="8.9",
        aliases=["4090"],
        memory_options_gib=[24, 48],
        street_price_usd=[{"low": 1, "high": 2, "date": "2026-05", "kind": "used", "source": "s"}],
        field_sources={"bandwidth": "a sheet"},
    )
    assert gpu.compute_capability == (8, 9)
    assert gpu.aliases == ("4090",)
    assert gpu.memory_options_gib == (24, 48)
    assert gpu.street_price_usd[0].high == 2
    assert dict(gpu.field_sources) == {"bandwidth": "a sheet"}
    assert gpu.bandwidth_gbs is None


@pytest.mark.parametrize(
    "wrong",
    [{"bandwith_gbs": 1}, {"compute_capability": "nine"}, {"street_price_usd": [{"low": 1}]}],
)
def test_a_malformed_row_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(FitCheckError, match="'a-card' is malformed"):
        card(**wrong)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(FitCheckError, match="vendor"):
        GPU.from_json({"id": "x", "name": "x"})


def test_an_rtx_4090_loses_256_mib_to_its_driver() -> None:
    memory = RTX_4090.usable_memory()
    assert memory.total_bytes == 25_757_220_864
    assert memory.reserve_bytes == 268_435_456  # 1 % would be 257 572 208
    assert memory.usable_bytes == 25_488_785_408  # 24 308 MiB
    assert memory.estimated  # the reserve is a rule of thumb
    assert memory.why == (
        "25 757 220 864 B reported by the driver"
        " - 268 435 456 B kept by the driver (estimated: 1 %, at least 256 MiB)"
    )


def test_an_80_gb_a100_loses_one_percent() -> None:
    memory = card(memory_gib=80, total_bytes=81_920 * MIB, total_verified=True).usable_memory()
    assert (memory.reserve_bytes, memory.usable_bytes) == (858_993_459, 85_040_352_461)


def test_a_card_without_a_known_total_counts_98_percent() -> None:
    memory = card(vendor="amd", memory_gib=16).usable_memory()
    assert memory.total_bytes == 16_836_271_800  # of 17 179 869 184
    assert memory.usable_bytes == 16_567_836_344
    assert memory.estimated
    assert "estimated: 0.98 of the nominal 16 GiB" in memory.why


def test_a_recalled_total_is_marked() -> None:
    assert "(recalled)" in card(total_bytes=24 * GIB).usable_memory().why
    assert "(recalled)" not in RTX_4090.usable_memory().why


def test_live_numbers_take_the_place_of_estimates() -> None:
    memory = RTX_4090.usable_memory(24_081 * MIB, 483 * MIB, 1_000 * MIB)
    assert memory.usable_bytes == (24_081 - 483 - 1_000) * MIB
    assert not memory.estimated
    assert memory.why.endswith("- 1 048 576 000 B held by other processes")
    assert RTX_4090.usable_memory(24_081 * MIB).estimated  # the reserve still is


def test_usable_memory_is_never_negative() -> None:
    assert RTX_4090.usable_memory(other_bytes=30 * GIB).usable_bytes == 0


@pytest.mark.parametrize(
    ("gib", "usable"),
    [
        (128, 103_079_215_104),  # 3/4
        (64, 51_539_607_552),
        (36, 28_991_029_248),
        (32, 22_906_492_245),  # 2/3 of 34 359 738 368, rounded down
        (16, 11_453_246_122),
    ],
)
def test_a_mac_gives_its_gpu_a_share_of_ram(gib: int, usable: int) -> None:
    mac = card(vendor="apple", segment="apple", memory_gib=gib, unified_memory=True)
    memory = mac.usable_memory()
    assert memory.total_bytes == gib * GIB
    assert memory.usable_bytes == usable
    assert memory.estimated


def test_a_mac_that_was_asked_is_not_estimated() -> None:
    mac = card(vendor="apple", segment="apple", memory_gib=128, unified_memory=True)
    limit = 115_448_725_504  # 107.52 GiB, recommendedMaxWorkingSetSize as seen on macOS 26
    memory = mac.usable_memory(128 * GIB, 128 * GIB - limit)
    assert memory.usable_bytes == limit
    assert not memory.estimated


@pytest.mark.parametrize(
    ("total_mib", "reserve"),
    [
        (124_518, 13_056_658_636),  # GB10: a tenth of 121.6 GiB
        (65_536, 10_737_418_240),  # 64 GiB: at least 10 GiB
        (8_192, 2_147_483_648),  # 8 GiB: a quarter, since 10 GiB are not there
    ],
)
def test_memory_shared_with_the_system_keeps_a_reserve(total_mib: int, reserve: int) -> None:
    shared = card(segment="unified", unified_memory=True, total_bytes=total_mib * MIB)
    memory = shared.usable_memory()
    assert memory.reserve_bytes == reserve
    assert memory.estimated


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({"total_bytes": 24 * GIB, "total_verified": True}, ""),
        ({}, "memory"),
        ({"unified_memory": True}, ""),  # RAM is what it is
        ({"total_bytes": 24 * GIB, "unverified": ["total_bytes"]}, "memory"),
        ({"unverified": ["bf16_dense_tflops", "fp16_dense_tflops"]}, "memory, speed"),
        ({"unverified": ["msrp_usd"]}, "memory"),  # a price decides no answer
    ],
)
def test_doubts_in_words(changes: dict[str, Any], doubt: str) -> None:
    assert card(**changes).doubt == doubt
