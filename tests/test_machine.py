"""detect() as a whole: it never fails, costs nothing without a GPU, and says what it found."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from machine_world import GIB, MIB, Card, FakeNvml, World, only

from fitcheck.gpu import UsableMemory
from fitcheck.machine import Machine, add_parser, as_json, best, describe, detect, doctor

ROOT = Path(__file__).parent.parent


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def busy(world: World) -> Machine:
    """A 4090 on which someone else runs a job."""
    world.with_nvidia_driver().write("/proc/77/comm", "python")
    card = Card(used=3 * GIB, compute=[(77, 2 * GIB)])
    return detect(world.system(nvml=FakeNvml(card)))


def test_an_unexpected_fault_becomes_a_note(world: World) -> None:
    """And leaves the other probes alone."""

    def broken() -> Any:
        raise KeyError("libamd_smi.so")  # what amdsmi raises at import without ROCm

    world.with_nvidia_driver().load("amd_mi50_generic")
    machine = detect(world.system(nvml=broken))
    assert only(machine).vendor == "amd"
    assert any("NVIDIA: unexpected KeyError: 'libamd_smi.so'" in note for note in machine.notes)


def test_a_damaged_catalog_does_not_lose_the_card(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fitcheck import catalog
    from fitcheck.errors import FitCheckError

    def damaged(*_: object) -> Any:
        raise FitCheckError("cannot be read")

    monkeypatch.setattr(catalog, "rows", damaged)
    card = only(detect(world.load("amd_mi50_generic").system()))
    assert card.gpu is None and card.total_bytes == 32752 * MIB


def test_two_vendors_are_never_pooled(world: World) -> None:
    world.with_nvidia_driver().load("amd_7900xtx_and_igpu")
    machine = detect(world.system(nvml=FakeNvml(Card())))
    assert [card.vendor for card in machine.accelerators] == ["nvidia", "amd", "amd"]
    judged = best(machine)
    assert judged is not None and judged.free_bytes == (24564 - 430) * MIB


def test_usable_explains_itself(busy: Machine) -> None:
    usable = only(busy).usable
    assert isinstance(usable, UsableMemory)
    for part in (usable.total_bytes, usable.reserve_bytes, usable.other_bytes):
        assert f"{part:,}".replace(",", " ") in usable.why


def test_describe(busy: Machine, world: World) -> None:
    text = describe(busy, world.system())
    for words in (
        "NVIDIA GeForce RTX 4090 (nvidia 0, compute capability 8.9, driver 580.95.05)",
        "total       23.99 GiB",
        "reserved     0.42 GiB",
        "others       3.00 GiB  python 2.00 GiB",
        "usable      20.57 GiB",
        "catalog   nvidia-geforce-rtx-4090",
        "RAM",
    ):
        assert words in text, text


def test_describe_says_which_card_is_judged(world: World) -> None:
    world.with_nvidia_driver()
    machine = detect(world.system(nvml=FakeNvml(Card(used=GIB), Card(uuid="GPU-bbbb"))))
    assert "Judged: NVIDIA GeForce RTX 4090 (nvidia 1)" in describe(machine, world.system())


def test_describe_without_a_gpu(world: World) -> None:
    text = describe(detect(world.system()), world.system())
    assert "No GPU was found" in text and "--gpu NAME" in text


def test_json_is_plain_and_names_no_process(busy: Machine) -> None:
    data = json.loads(json.dumps(as_json(busy)))
    (card,) = data["accelerators"]
    parts = card["total_bytes"] - card["reserve_bytes"] - card["other_bytes"]
    assert card["usable_bytes"] == parts == only(busy).free_bytes
    assert card["gpu"] == "nvidia-geforce-rtx-4090" and card["other_processes"] == 1
    assert data["judged"] == "nvidia 0" and data["ram"]["usable_bytes"] > 0
    assert "python" not in json.dumps(data) and "77" not in str(card.get("holders", ""))


def test_the_report_is_complete_and_anonymous(
    busy: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, host = "/home/adalovelace", "engine-no-1"
    monkeypatch.setattr(Path, "home", lambda: Path(home))
    monkeypatch.setattr(platform, "node", lambda: host)
    note = f"{home}/lib/libnvidia-ml.so.1 cannot be loaded on {host}"
    report = doctor(replace(busy, notes=(note,)))
    assert "~/lib/libnvidia-ml.so.1 cannot be loaded on (host)" in report
    assert home not in report and host not in report
    for question, _ in busy.raw:
        assert f"{question}: " in report
    assert "nvmlDeviceGetMemoryInfo: total=25757220864 reserved=450887680 " in report
    assert f"python {platform.python_version()}" in report and "nvidia-ml-py" in report
    assert "processes: 1" in report and "77" not in report.split("Conclusions")[1]


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The one test that looks at the machine it runs on."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    for arguments, start in (([], ""), (["--json"], "{"), (["--doctor"], "FitCheck ")):
        args = parser.parse_args(["machine", *arguments])
        assert args.run(args) == 0
        out = capsys.readouterr().out
        assert out.startswith(start) and "RAM" in out.upper()
    with pytest.raises(SystemExit):
        parser.parse_args(["machine", "--json", "--doctor"])


def test_a_machine_without_a_gpu_costs_nothing(world: World) -> None:
    """Less than 10 ms, and neither pynvml (80 ms) nor psutil (30 ms) nor a process is loaded."""
    code = f"""
import sys, time
from pathlib import Path
from fitcheck.machine import System, detect
def seconds():
    start = time.perf_counter()
    detect(System(platform="linux", root=Path({str(world.root)!r}), env={{}}))
    return time.perf_counter() - start
print(min(seconds() for _ in range(5)))
print(*sorted({{"pynvml", "psutil", "subprocess", "ctypes"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    seconds, loaded = done.stdout.split("\n")[:2]
    assert float(seconds) < 0.010
    assert loaded == ""
