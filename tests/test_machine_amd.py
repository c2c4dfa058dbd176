"""AMD cards and APUs: the kernel's own numbers, without ROCm."""

from __future__ import annotations

from pathlib import Path

import pytest
from machine_world import GIB, MIB, World, only

from fitcheck.machine import System, best, detect, doctor
from fitcheck.machine.amd import gfx_name


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_card_and_an_integrated_gpu_are_two(world: World) -> None:
    """Not a second 7900 XTX of 47.97 GB (llmfit #271); nor is more RAM to share the better GPU."""
    machine = detect(world.load("amd_7900xtx_and_igpu").system())
    card, integrated = machine.accelerators
    assert (card.name, card.gfx, card.pci_id) == ("AMD Radeon RX 7900 XTX", "gfx1100", "744c:c8")
    assert card.total_bytes == 24560 * MIB and not card.unified
    assert card.gpu is not None and card.gpu.id == "amd-radeon-rx-7900-xtx"
    assert card.free_bytes == (24560 - 812) * MIB, "used has the driver's share in it"
    assert (integrated.gfx, integrated.unified, integrated.gpu) == ("gfx1036", True, None)
    assert integrated.free_bytes > card.free_bytes
    judged = best(machine)
    assert judged is not None and judged.name == card.name


def test_a_small_discrete_card_is_no_apu(world: World) -> None:
    """Sizes alone would say so: 4 GiB beside a GTT of 62."""
    world.load("amd_7900xtx_and_igpu")
    world.write("/sys/class/drm/card1/device/mem_info_vram_total", str(4080 * MIB))
    assert detect(world.system()).accelerators[0].total_bytes == 4080 * MIB


def test_an_apu_with_a_small_carve_out_has_its_gtt(world: World) -> None:
    """The carve-out alone is 512 MiB (gpustack #4848); the sum overcounts (ROCm #6004)."""
    card = only(detect(world.load("amd_strix_halo").system()))
    assert card.unified and card.gfx == "gfx1151" and card.name == "AMD Radeon 8060S Graphics"
    assert card.total_bytes == 62 * GIB
    assert card.card.bandwidth_gbs == 256
    # 2 GiB are taken, and the system that shares the memory keeps some.
    assert 45 * GIB < card.free_bytes < 60 * GIB


def test_gtt_is_only_a_permission_to_take_ram(world: World) -> None:
    world.load("amd_strix_halo")
    world.write("/proc/meminfo", f"MemTotal: {124 * 2**20} kB\nMemAvailable: {30 * 2**20} kB")
    assert only(detect(world.system())).free_bytes < 30 * GIB


def test_an_apu_with_a_large_carve_out_has_that(world: World) -> None:
    """96 GiB, not the RAM that remains (llmfit #194)."""
    card = only(detect(world.load("amd_strix_halo_carved").system()))
    assert card.total_bytes == 96 * GIB and not card.unified
    assert card.free_bytes == 95 * GIB, "memory of its own: nothing to keep for the system"


def test_a_generic_name_hides_no_card(world: World) -> None:
    """A reflashed MI50 was dropped as an integrated GPU (llmfit #638)."""
    card = only(detect(world.load("amd_mi50_generic").system()))
    assert card.name == "AMD Radeon Graphics (gfx906)"
    assert card.total_bytes == 32752 * MIB and not card.unified
    assert card.gpu is not None and card.gpu.id == "amd-instinct-mi50-32gb"


@pytest.mark.parametrize(
    ("fixture", "unified"), [("amd_strix_halo", True), ("amd_mi50_generic", False)]
)
def test_without_the_compute_driver_sizes_decide(world: World, fixture: str, unified: bool) -> None:
    world.load(fixture)
    for node in (world.root / "sys/class/kfd/kfd/topology/nodes").iterdir():
        (node / "properties").unlink()
        node.rmdir()
    card = only(detect(world.system()))
    assert card.unified == unified and card.gfx is None


@pytest.mark.parametrize(
    ("version", "name"),
    [(110501, "gfx1151"), (90010, "gfx90a"), (90012, "gfx90c"), (90402, "gfx942")]
    + [(100306, "gfx1036"), (120001, "gfx1201"), (80003, "gfx803")],
)
def test_gfx_names(version: int, name: str) -> None:
    assert gfx_name(version) == name


@pytest.mark.parametrize(
    ("version", "note"), [(100301, "HSA_OVERRIDE_GFX_VERSION"), (80003, "Vulkan only")]
)
def test_what_rocm_does_not_support_is_said(world: World, version: int, note: str) -> None:
    world.load("amd_mi50_generic")
    node = "/sys/class/kfd/kfd/topology/nodes/1/properties"
    world.write(node, f"gfx_target_version {version}\nlocation_id {0xB00}\ndomain 0")
    assert any(note in text for text in only(detect(world.system())).notes)


class Closed(System):
    """Refuses some files as the kernel does; chmod would not stop root."""

    def read(self, path: str) -> str:
        if path.endswith("mem_info_vram_total") or path.endswith("1/properties"):
            raise PermissionError(13, "Permission denied", path)
        return System.read(self, path)


def closed(world: World) -> System:
    system = world.system()
    return Closed(**{name: getattr(system, name) for name in System.__dataclass_fields__})


def test_unreadable_sysfs_is_noted_and_the_catalog_stands_in(world: World) -> None:
    """The rest of the card, its PCI id above all, is still there."""
    world.load("amd_7900xtx_and_igpu")
    machine = detect(closed(world))
    card = next(card for card in machine.accelerators if card.pci_id == "744c:c8")
    assert card.total_estimated and card.usable.estimated
    assert card.total_bytes == 24560 * MIB, "the catalog's"
    assert any("mem_info_vram_total cannot be read: Permission" in note for note in machine.notes)
    assert any("1/properties cannot be read" in note for note in machine.notes)


def test_garbage_in_sysfs_is_noted(world: World) -> None:
    world.load("amd_7900xtx_and_igpu")
    world.write("/sys/class/drm/card1/device/mem_info_vram_used", "<unavailable>")
    world.write("/sys/class/kfd/kfd/topology/nodes/2/properties", "gfx_target_version eleven")
    machine = detect(world.system())
    assert machine.accelerators[0].free_bytes == 24560 * MIB - 256 * MIB
    assert any("holds no number: '<unavailable>'" in note for note in machine.notes)
    assert any("2/properties cannot be read: ValueError" in note for note in machine.notes)


def test_a_card_that_rocm_cannot_reach(world: World) -> None:
    """sysfs shows all the host's cards to a container that was given none."""
    world.load("amd_mi50_generic")
    assert not any("/dev/kfd" in note for note in detect(world.system()).notes)
    (world.root / "dev/kfd").unlink()
    assert any("--device /dev/kfd" in note for note in detect(world.system()).notes)


def test_the_cards_unique_number_stays_out_of_the_report(world: World) -> None:
    report = doctor(detect(world.load("amd_mi50_generic").system()))
    assert "gfx_target_version=90006" in report and "1234567890123456789" not in report
