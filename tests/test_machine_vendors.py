"""Intel, Apple and Windows: the kernel's, the system's and the registry's own numbers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from machine_world import FIXTURES, GIB, MIB, Psutil, World, only

from fitcheck.machine import System, detect, doctor


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- Intel --------------------------------------------------------------------------------------


def test_xe_tells_each_tile(world: World) -> None:
    """Every Arc showed 0.0 GB before these files were read (llmfit #609)."""
    machine = detect(world.load("intel_xe_b60").system())
    card = only(machine)
    assert (card.name, card.driver) == ("Intel Arc Pro B60", "xe")
    assert card.total_bytes == 24 * GIB and not card.total_estimated
    assert card.gpu is not None and card.gpu.id == "intel-arc-pro-b60-24gb"
    assert any("integrated Intel GPU (4680)" in note for note in machine.notes)
    assert any("debugfs" in note for note in card.notes)


def test_tiles_are_one_card(world: World) -> None:
    card = only(detect(world.load("intel_xe_max1550").system()))
    assert card.total_bytes == 128 * GIB
    assert card.gpu is not None and card.gpu.id == "intel-data-center-gpu-max-1550"


def test_i915_tells_local_memory(world: World) -> None:
    card = only(detect(world.load("intel_i915_a770").system()))
    assert card.total_bytes == 16225243136 and not card.total_estimated
    assert card.gpu is not None and card.gpu.id == "intel-arc-a770-16gb"


def test_the_kernels_own_i915_tells_nothing(world: World) -> None:
    world.load("intel_i915_a770")
    (world.root / "sys/class/drm/card1/lmem_total_bytes").unlink()
    card = only(detect(world.system()))
    assert card.total_estimated and card.usable.estimated
    assert card.total_bytes == int(16 * GIB * 0.98)


def test_an_integrated_gpu_of_the_catalog(world: World) -> None:
    card = only(detect(world.load("intel_lunar_lake").system()))
    assert card.unified and card.total_bytes == 31 * GIB
    assert card.gpu is not None and "140v" in card.gpu.id
    assert card.free_bytes < 24 * GIB


# --- Apple --------------------------------------------------------------------------------------


class Mac:
    """Answers commands as a Mac does, and counts them. `metal` None: that process crashed."""

    def __init__(self, display: str, memory: int, metal: str | None, wired: int = 0) -> None:
        chip = json.loads((FIXTURES / "apple.json").read_text())[display]
        self.calls: list[str] = []
        model = chip["SPDisplaysDataType"][0]["sppci_model"]
        self.answers = {
            "machdep.cpu.brand_string": model if model.startswith("Apple M") else "Apple processor",
            "hw.memsize": str(memory),
            "iogpu.wired_limit_mb": str(wired),
            "-json": json.dumps(chip),
            "metal": metal,
        }

    def __call__(self, command: Sequence[str]) -> str:
        self.calls.append(command[0])
        answer = self.answers["metal" if "-c" in command else command[-1]]
        if answer is None:
            raise subprocess.CalledProcessError(-11, command)
        return answer

    def system(self, world: World, available: int) -> System:
        memory = Psutil(int(self.answers["hw.memsize"] or 0), available)
        return world.system(platform="darwin", run=self, psutil=lambda: memory)


@pytest.fixture
def mac(tmp_path: Path) -> World:
    return World(tmp_path, linux=False)


def test_a_mac_gives_its_gpu_what_metal_says(mac: World) -> None:
    """107.52 of 128 GiB on macOS 26 (antirez/ds4 #893), not two thirds."""
    limit = int(107.52 * GIB)
    run = Mac("m4_max_40", 128 * GIB, f"{limit} {48 * GIB}\n")
    card = only(detect(run.system(mac, available=120 * GIB)))
    assert card.name == "Apple M4 Max (40-core GPU)" and card.unified
    assert card.card.bandwidth_gbs == 546, "the 32-core one has 410"
    assert card.free_bytes == limit and not card.usable.estimated
    assert any("single buffer" in note and "48.0 GiB" in note for note in card.notes)


def test_what_programs_hold_on_a_mac(mac: World) -> None:
    """They live first in what the GPU may not have, then in its share."""
    run = Mac("m4_max_32", 36 * GIB, f"{27 * GIB} {20 * GIB}")
    assert only(detect(run.system(mac, available=30 * GIB))).free_bytes == 27 * GIB
    assert only(detect(run.system(mac, available=10 * GIB))).free_bytes == 10 * GIB


def test_a_limit_set_by_hand(mac: World) -> None:
    """With iogpu.wired_limit_mb=114688 Metal says 112.00 GiB (antirez/ds4 #909)."""
    run = Mac("m4_max_40", 128 * GIB, metal=None, wired=114688)
    card = only(detect(run.system(mac, available=125 * GIB)))
    assert card.free_bytes == 112 * GIB and not card.usable.estimated


def test_a_mac_without_an_answer_is_estimated(mac: World) -> None:
    run = Mac("m1", 32 * GIB, metal=None)
    machine = detect(run.system(mac, available=30 * GIB))
    card = only(machine)
    assert card.usable.estimated and card.free_bytes == 32 * GIB * 2 // 3
    assert any("rule of thumb" in note for note in card.notes)
    assert any("exit status -11" in note for note in machine.notes)


def test_slow_tools_are_asked_once(mac: World) -> None:
    run = Mac("m4_max_40", 128 * GIB, f"{96 * GIB} {72 * GIB}")
    system = run.system(mac, available=100 * GIB)
    assert detect(system).accelerators == detect(system).accelerators
    assert run.calls.count("system_profiler") == 1


def test_no_gpu_in_a_virtual_mac(mac: World) -> None:
    machine = detect(Mac("virtual", 16 * GIB, None).system(mac, available=10 * GIB))
    assert machine.accelerators == ()
    assert any("virtual machine" in note for note in machine.notes)


def test_a_macs_report_has_no_serial_number(mac: World) -> None:
    run = Mac("m4_max_40", 128 * GIB, f"{96 * GIB} {72 * GIB}")
    report = doctor(detect(run.system(mac, available=100 * GIB)))
    assert "sppci_cores" in report and "SECRET-SERIAL" not in report


# --- Windows ------------------------------------------------------------------------------------


def windows(world: World, registry: Any) -> System:
    memory = Psutil(64 * GIB, 40 * GIB)
    return world.system(
        platform="win32",
        env={"WINDIR": "/Windows"},
        psutil=lambda: memory,
        display_registry=registry,
    )


def test_the_registrys_64_bit_sizes(mac: World) -> None:
    """32 bits make 4 GB of an R9700 (llmfit #830) and 2 of an A770 (oshi #2907)."""
    adapters = json.loads((FIXTURES / "windows.json").read_text())["adapters"]
    machine = detect(windows(mac, lambda: adapters))
    amd, intel = machine.accelerators
    assert (amd.vendor, amd.total_bytes) == ("amd", 34208743424)
    assert amd.gpu is not None and amd.gpu.id == "amd-radeon-ai-pro-r9700"
    assert (intel.vendor, intel.total_bytes) == ("intel", 17079205888)
    assert intel.gpu is not None and intel.gpu.id == "intel-arc-a770-16gb"
    assert any("UHD Graphics 770" in note for note in machine.notes)
    assert machine.ram is not None and machine.ram.usable_bytes == 40 * GIB


def test_a_size_in_binary(mac: World) -> None:
    row = {
        "DriverDesc": "AMD Radeon RX 9070 XT",
        "MatchingDeviceId": r"PCI\VEN_1002&DEV_7550&REV_C0",
        "HardwareInformation.qwMemorySize": (16368 * MIB).to_bytes(8, "little"),
    }
    card = only(detect(windows(mac, lambda: [row])))
    assert card.total_bytes == 16368 * MIB and card.pci_id == "7550:c0"


def test_a_closed_registry_is_a_note(mac: World) -> None:
    def registry() -> list[dict[str, Any]]:
        raise PermissionError(13, "Access is denied")

    machine = detect(windows(mac, registry))
    assert machine.accelerators == ()
    assert any("Access is denied" in note for note in machine.notes)
