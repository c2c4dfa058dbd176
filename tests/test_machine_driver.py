"""Is an NVIDIA driver there, which library speaks for it, and nvidia-smi where none does."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from machine_world import (
    FIXTURES,
    GB10_BYTES,
    GB10_MEMINFO,
    GIB,
    MIB,
    Card,
    FakeNvml,
    Psutil,
    World,
    only,
)

from fitcheck.machine import as_json, detect, doctor


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path).with_nvidia_driver()


# --- is there a driver, and which library -------------------------------------------------------


def test_without_a_driver_nvml_is_not_imported(tmp_path: Path) -> None:
    assert detect(World(tmp_path).system()).accelerators == ()  # `refuse` would leave a note
    assert detect(World(tmp_path).system()).notes == ()


@pytest.mark.parametrize(
    "sign",
    [
        *("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvidia0", "/dev/nvgpu/igpu0"),
        *("/usr/lib64/libnvidia-ml.so.1", "/opt/cuda/lib/libnvidia-ml.so.1"),
    ],
)
def test_any_sign_of_a_driver_is_followed(tmp_path: Path, sign: str) -> None:
    system = (
        World(tmp_path)
        .write(sign)
        .system(nvml=FakeNvml(Card()), env={"LD_LIBRARY_PATH": "/nowhere::/opt/cuda/lib"})
    )
    assert len(detect(system).accelerators) == 1


def test_a_card_without_its_driver_is_a_note(tmp_path: Path) -> None:
    world, bus = World(tmp_path), "/sys/bus/pci/devices"
    for slot, kind, device in (("0000:01:00.0", "0x030000", "2684"), ("0000:01:00.1", "0x04", "1")):
        for name, text in (("class", kind), ("vendor", "0x10de"), ("device", f"0x{device}")):
            world.write(f"{bus}/{slot}/{name}", text)
    assert [n for n in detect(world.system()).notes if "no NVIDIA driver" in n] == [
        "an NVIDIA card (PCI 0000:01:00.0, device 0x2684) has no NVIDIA driver"
    ]


@pytest.mark.parametrize("folder", ["/usr/lib/wsl/lib", "/usr/lib/wsl/drivers/nv_dispi.inf_amd64"])
def test_wsl_takes_windows_library(tmp_path: Path, folder: str) -> None:
    """A distribution's own copy answers DriverNotLoaded (ollama #1888)."""
    world = World(tmp_path).write("/dev/dxg").write(f"{folder}/libnvidia-ml.so.1")
    world.write("/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1")
    loaded: list[str] = []
    nvml = FakeNvml(Card(used=GIB))
    machine = detect(world.system(nvml=nvml, load_library=loaded.append))
    assert loaded == [f"{folder}/libnvidia-ml.so.1"], "before nvmlInit asks for it by name"
    assert "(WSL)" in machine.system
    assert any("Windows keeps" in note for note in only(machine).notes)
    assert any(".wslconfig" in note for note in machine.notes)


def test_wsl_without_an_nvidia_library(tmp_path: Path) -> None:
    machine = detect(World(tmp_path).write("/dev/dxg").system())
    assert any("no NVIDIA library under /usr/lib/wsl" in note for note in machine.notes)


@pytest.mark.parametrize(("model", "noted"), [(0, True), (1, False)], ids=["WDDM", "TCC"])
def test_windows(tmp_path: Path, model: int, noted: bool) -> None:
    world = World(tmp_path, linux=False).write("/Windows/System32/nvml.dll")
    machine = detect(
        world.system(
            platform="win32",
            env={"WINDIR": "/Windows"},
            nvml=FakeNvml(Card(driver_model=model, compute=[(5, None)])),
            psutil=lambda: Psutil(total=64 * GIB, available=40 * GIB),
            display_registry=list,
        )
    )
    card = only(machine)
    assert card.free_bytes == (24564 - 430) * MIB
    assert any("Windows keeps" in note for note in card.notes) == noted
    assert [h.bytes for h in card.holders] == [None], "WDDM does not tell"
    assert machine.ram is not None and machine.ram.usable_bytes == 40 * GIB


# --- nvidia-smi ---------------------------------------------------------------------------------


def no_module() -> Any:
    raise ImportError("No module named 'pynvml'")


def smi(name: str) -> Any:
    """A command that prints a fixture."""
    text = (FIXTURES / f"nvidia_smi_{name}.txt").read_text()

    def run(command: Sequence[str]) -> str:
        assert command[0] == "nvidia-smi"
        if text.startswith(("Failed", "Field")) and "compute_cap" in command[1]:
            raise subprocess.CalledProcessError(9, command, output=text)
        return text

    return run


def test_nvidia_smi_where_nvml_cannot_be_asked(world: World) -> None:
    machine = detect(world.system(nvml=no_module, run=smi("two_cards")))
    first, second = machine.accelerators
    assert (first.name, first.index) == ("NVIDIA GeForce RTX 4090", 0)
    assert first.total_bytes == 24564 * MIB and first.used_bytes == 1234 * MIB
    assert first.reserved_bytes == (24564 - 1234 - 22900) * MIB, "total - used - free"
    assert first.free_bytes == 22900 * MIB and first.compute_capability == (8, 9)
    assert second.gpu is not None and second.gpu.id == "nvidia-rtx-a6000"
    assert any("nvidia-ml-py" in note for note in machine.notes)


def test_nvidia_smi_without_numbers(world: World) -> None:
    world.write("/proc/meminfo", GB10_MEMINFO)
    card = only(detect(world.system(nvml=no_module, run=smi("gb10"))))
    assert card.unified and card.total_bytes == GB10_BYTES
    assert card.compute_capability == (12, 1)


def test_nvidia_smi_of_a_divided_card(world: World) -> None:
    machine = detect(world.system(nvml=no_module, run=smi("mig")))
    assert machine.accelerators == ()
    assert any("Insufficient Permissions" in note for note in machine.notes)


def test_nvidia_smi_version_mismatch(world: World) -> None:
    system = world.system(nvml=FakeNvml(init=18), run=smi("mismatch"))
    machine = detect(system)
    assert machine.accelerators == ()
    assert any("LibRmVersionMismatch" in note and "reboot" in note for note in machine.notes)
    assert any("Driver/library version mismatch" in note for note in machine.notes)


def test_nvidia_smi_too_old_for_compute_capability(world: World) -> None:
    text = (FIXTURES / "nvidia_smi_two_cards.txt").read_text()

    def run(command: Sequence[str]) -> str:
        if "compute_cap" in command[1]:
            complaint = 'Field "compute_cap" is not a valid field to query.'
            raise subprocess.CalledProcessError(2, command, output=complaint)
        return "\n".join(line.rpartition(",")[0] for line in text.splitlines())

    machine = detect(world.system(nvml=no_module, run=run))
    assert [card.total_bytes // MIB for card in machine.accelerators] == [24564, 49140]
    assert machine.accelerators[0].compute_capability is None


def test_nvidia_smi_that_hangs(world: World) -> None:
    def run(command: Sequence[str]) -> str:
        raise subprocess.TimeoutExpired(command, 2.0)

    machine = detect(world.system(nvml=FakeNvml(init=999), run=run))
    assert any("no answer within 2 s" in note for note in machine.notes)


# --- the report ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nvml", [no_module, FakeNvml(Card(compute=[(77123, GIB)]))])
def test_the_report_names_no_card_and_no_process(world: World, nvml: Any) -> None:
    world.write("/proc/77123/comm", "secret-job")
    machine = detect(world.system(nvml=nvml, run=smi("two_cards")))
    report = doctor(machine)
    assert "GPU-aaaaaaaa" in report and "GPU-aaaaaaaa-" not in report
    assert "77123" not in report and "secret-job" not in report
    assert as_json(machine)["accelerators"][0]["name"] == "NVIDIA GeForce RTX 4090"
