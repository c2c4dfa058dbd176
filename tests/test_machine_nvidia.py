"""NVIDIA cards: every answer and every refusal that NVML and nvidia-smi are known to give."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from machine_world import GB10_BYTES, GB10_MEMINFO, GIB, MIB, Card, FakeNvml, World, only

from fitcheck.machine import Machine, best, detect, holders


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path).with_nvidia_driver()


def look(world: World, *cards: Card, **changes: Any) -> Machine:
    nvml = FakeNvml(*cards)
    machine = detect(world.system(nvml=nvml, **changes))
    assert nvml.open == 0, "every nvmlInit needs its nvmlShutdown"
    return machine


def test_memory_v2_is_total_less_reserved_less_others(world: World) -> None:
    card = only(look(world, Card(used=2000 * MIB)))
    assert (card.name, card.index, card.driver) == ("NVIDIA GeForce RTX 4090", 0, "580.95.05")
    assert card.compute_capability == (8, 9) and card.vendor == "nvidia" and not card.unified
    usable = card.usable
    assert usable.total_bytes == 24564 * MIB
    assert usable.reserve_bytes == 430 * MIB
    assert usable.other_bytes == 2000 * MIB
    assert usable.usable_bytes == card.free_bytes == (24564 - 430 - 2000) * MIB
    assert not usable.estimated
    assert card.gpu is not None and card.gpu.id == "nvidia-geforce-rtx-4090"
    assert card.card.total_bytes == 24564 * MIB and card.card.bandwidth_gbs == 1008.1


@pytest.mark.parametrize("code", [3, 13, 999], ids=["not-supported", "before-R510", "early-WSL"])
def test_memory_v1_counts_the_driver_once(world: World, code: int) -> None:
    """v1's `used` has the driver's share in it: 912 MiB on an idle A100 (nvml-wrapper #57)."""
    idle = Card(
        "NVIDIA A100-SXM4-80GB",
        *(81920 * MIB, 912 * MIB),
        refusals={"nvmlDeviceGetMemoryInfo_v2": code},
    )
    card = only(look(world, idle))
    assert card.reserved_bytes is None and card.usable.estimated
    assert card.free_bytes == (81920 - 912) * MIB, "all of used is subtracted, and only once"
    idle.reserved = 8 * MIB  # a driver that leaves its own share out: then the rule holds
    assert only(look(world, idle)).free_bytes == 81920 * MIB - int(81920 * MIB * 0.01)


def test_a_garbled_v2_answer_is_not_believed(world: World) -> None:
    """Driver 535 changed a struct under old clients (pynvml PR 48)."""

    class Garbled(FakeNvml):
        def _nvmlDeviceGetMemoryInfo(self, card: Card, version: int | None = None) -> Any:
            memory = FakeNvml._nvmlDeviceGetMemoryInfo(self, card, version)
            if version is not None:
                memory.reserved, memory.used = memory.used, 17 * GIB
            return memory

        def __getattr__(self, call: str) -> Any:
            if call == "nvmlDeviceGetMemoryInfo":
                return self._nvmlDeviceGetMemoryInfo
            return super().__getattr__(call)

    card = only(detect(world.system(nvml=Garbled(Card(used=1000 * MIB)))))
    assert card.free_bytes == (24564 - 1000 - 430) * MIB
    assert card.reserved_bytes is None


def test_this_process_is_not_among_the_others(world: World) -> None:
    card = Card(used=3 * GIB, compute=[(os.getpid(), GIB), (77, 2 * GIB)])
    mine = only(look(world, card))
    assert mine.used_bytes == 2 * GIB and [h.pid for h in mine.holders] == [77]
    # In a container NVML's numbers are the host's: whoever has ours there is somebody else.
    (world.root / "proc/self/ns/pid").unlink()
    contained = only(look(world, card))
    assert contained.used_bytes == 3 * GIB and len(contained.holders) == 2


def test_holders_are_told_once_and_by_name(world: World) -> None:
    world.write("/proc/77/comm", "python").write("/proc/78/comm", "Xorg")
    card = only(
        look(
            world,
            Card(
                compute=[(77, GIB), (79, 2**63)],  # 2**63: garbled (pynvml PR 48)
                graphics=[(78, 2 * GIB), (77, GIB)],
            ),
        )
    )
    named = [(h.name, h.bytes) for h in holders(card, world.system())]
    assert named == [("Xorg", 2 * GIB), ("python", GIB), (None, None)]


def test_an_old_driver_lists_processes_by_the_older_call(world: World) -> None:
    refusals = {"nvmlDeviceGetComputeRunningProcesses": -1}  # NVMLLibraryMismatchError
    card = only(look(world, Card(compute=[(77, GIB)], refusals=refusals)))
    assert [h.bytes for h in card.holders] == [GIB]


OPTIONAL = [
    "nvmlSystemGetDriverVersion",
    "nvmlDeviceGetUUID",
    "nvmlDeviceGetPciInfo",
    "nvmlDeviceGetCudaComputeCapability",
    "nvmlDeviceGetMigMode",
    "nvmlDeviceGetAddressingMode",
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetGraphicsRunningProcesses",
    "nvmlDeviceGetMemoryBusWidth",
    "nvmlDeviceGetMaxClockInfo",
]


@pytest.mark.parametrize("call", OPTIONAL)
def test_each_call_may_be_refused_or_absent(world: World, call: str) -> None:
    refused = only(look(world, Card(used=GIB, refusals={call: 3})))
    absent = only(detect(world.system(nvml=FakeNvml(Card(used=GIB), absent=[call]))))
    assert refused.free_bytes == absent.free_bytes == (24564 - 430) * MIB - GIB


INIT_FAILURES = {
    4: "NoPermission",
    9: "DriverNotLoaded",
    12: "LibraryNotFound",
    13: "FunctionNotFound",
    18: "LibRmVersionMismatch",
    999: "Unknown",
    20: "NVML error 20",
}


@pytest.mark.parametrize(("code", "word"), INIT_FAILURES.items(), ids=INIT_FAILURES.values())
def test_a_driver_that_will_not_start_is_named(world: World, code: int, word: str) -> None:
    machine = detect(world.system(nvml=FakeNvml(Card(), init=code)))
    assert machine.accelerators == () and best(machine) is None
    assert any(word in note for note in machine.notes)
    assert any(word in answer for _, answer in machine.raw), "the doctor must show it"


def test_a_lost_gpu_does_not_hide_the_other(world: World) -> None:
    lost = Card(refusals={"nvmlDeviceGetHandleByIndex": 15})
    machine = look(world, lost, Card())
    assert only(machine).index == 1
    assert any("card 0" in note and "GpuIsLost" in note for note in machine.notes)


# --- memory shared with the system --------------------------------------------------------------

REFUSED = {"nvmlDeviceGetMemoryInfo": 3, "nvmlDeviceGetMemoryInfo_v2": 3}


@pytest.mark.parametrize(
    "signs",
    [
        {"name": "NVIDIA GB10", "pci": 0},
        {"name": "NVIDIA Graphics Device", "pci": 0x2E1210DE},
        {"name": "NVIDIA Graphics Device", "pci": 0, "addressing": 2},
    ],
    ids=["name", "pci", "ats"],
)
def test_gb10_has_the_systems_memory(world: World, signs: dict[str, Any]) -> None:
    world.write("/proc/meminfo", GB10_MEMINFO)
    card = only(look(world, Card(refusals=REFUSED, **signs)))
    assert card.unified and not card.total_estimated
    assert card.total_bytes == GB10_BYTES
    # MemAvailable was seen too optimistic by 22 GiB (vllm #56824): keep 10 to 15 GiB of it.
    assert 10 * GIB <= 52 * GIB - card.free_bytes <= 15 * GIB
    assert any("2.8 GiB" in note for note in card.notes), "what CUDA itself would call free"


def test_refused_memory_without_such_signs_is_the_catalogs(world: World) -> None:
    card = only(look(world, Card("Tesla T4", pci=0x1EB810DE, refusals=REFUSED)))
    assert card.total_estimated and not card.unified
    assert card.total_bytes == 15360 * MIB
    assert any("not read" in note for note in card.notes)


def test_refused_memory_of_an_unknown_card_is_not_zero(world: World) -> None:
    machine = look(world, Card("NVIDIA Mystery", pci=0, refusals=REFUSED))
    assert machine.accelerators == ()
    assert any("Mystery" in note for note in machine.notes)


def test_jetson_has_the_systems_memory_whatever_nvml_says(world: World) -> None:
    card = only(look(world, Card("Orin (nvgpu)", total=8 * GIB, pci=0)))
    assert card.unified and card.total_bytes == 65536000 * 1024


def test_gh200_counts_its_own_memory_only(world: World) -> None:
    card = only(look(world, Card("NVIDIA GH200 480GB", total=97871 * MIB, addressing=2)))
    assert not card.unified and card.total_bytes == 97871 * MIB
    assert any("ATS" in note for note in card.notes)


def test_an_unknown_card_has_its_live_numbers(world: World) -> None:
    """384 bit x 2 x 9751 MHz / 8 = 936 GB/s (NVIDIA forum 198730)."""
    card = only(look(world, Card("NVIDIA RTX 9999", pci=0, bus_bits=384, memory_mhz=9751)))
    assert card.gpu is None
    assert card.card.bandwidth_gbs == pytest.approx(936.1, abs=0.05)
    assert card.card.total_bytes == 24564 * MIB and card.card.compute_capability == (8, 9)
    assert card.free_bytes == (24564 - 430) * MIB and not card.usable.estimated


def test_one_name_two_cards(world: World) -> None:
    """RTX 3060: 12 GB at 360 GB/s, 8 GB at 240."""
    for mib, rate in ((12288, 360), (8192, 240)):
        card = only(look(world, Card("NVIDIA GeForce RTX 3060", total=mib * MIB, pci=0)))
        assert card.card.bandwidth_gbs == rate


# --- MIG ----------------------------------------------------------------------------------------


def h200(**changes: Any) -> Card:
    """Divided; 1g.35gb has 32.5 GiB."""
    parts = [
        Card("NVIDIA H200 MIG 1g.35gb", 33280 * MIB, 100 * MIB, GIB, f"MIG-{n}{n}{n}{n}-5555")
        for n in "bc"
    ]
    return Card(
        "NVIDIA H200",
        total=143771 * MIB,
        pci=0x233510DE,
        capability=(9, 0),
        slices=[parts[0], None, parts[1], None],
        **changes,
    )


def test_a_divided_card_is_its_instances(world: World) -> None:
    machine = look(world, h200(refusals={"nvmlDeviceGetMemoryInfo_v2": 4}))
    assert len(machine.accelerators) == 2
    part = machine.accelerators[0]
    assert part.mig and part.index == 0 and part.free_bytes == (33280 - 100 - 1024) * MIB
    assert part.gpu is not None and part.gpu.id == "nvidia-h200-sxm-141gb"
    assert part.card.total_bytes == 33280 * MIB
    assert part.card.bandwidth_gbs is None, "a slice has not its card's rates"


def test_a_container_opens_the_instance_it_was_given(world: World) -> None:
    """The parent answers NoPermission to everything (nvidia-container-toolkit #842)."""
    calls = ("MigMode", "MemoryInfo", "MemoryInfo_v2", "PciInfo", "Name")
    closed = h200(refusals={f"nvmlDeviceGet{call}": 4 for call in calls})
    for key in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        machine = look(world, closed, env={key: "MIG-cccc-5555"})
        parts = [card for card in machine.accelerators if card.mig]
        assert [card.total_bytes for card in parts] == [33280 * MIB]
        assert all(card.mig for card in machine.accelerators), "no parent with 0 bytes"


def test_a_divided_card_kept_from_us_is_a_note(world: World) -> None:
    refusals = {"nvmlDeviceGetMigMode": 4} | {key: 4 for key in REFUSED}
    machine = look(world, Card("NVIDIA A100-SXM4-80GB", refusals=refusals))
    assert machine.accelerators == ()
    assert any("A100" in note and "NoPermission" in note for note in machine.notes)


def test_an_instance_that_is_gone_is_a_note(world: World) -> None:
    machine = look(world, env={"CUDA_VISIBLE_DEVICES": "MIG-dddddddd-5555"})
    assert any("MIG-dddddddd: NotFound" in note for note in machine.notes)
