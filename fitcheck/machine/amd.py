"""AMD cards through sysfs, which needs no ROCm (Linux 5.1 and newer).

amdsmi prints to standard output and dies of a KeyError where ROCm is missing, rocm-smi changes its
tables and classifies by name; the kernel's files say what both of them read.
"""

from __future__ import annotations

import os
from dataclasses import replace

from fitcheck.machine.accelerator import Accelerator
from fitcheck.machine.ask import Findings, System
from fitcheck.machine.ram import available_bytes, meminfo
from fitcheck.machine.sysfs import DrmCard, drm_cards

VENDOR = "0x1002"
KFD = "/sys/class/kfd/kfd/topology/nodes"
# Targets that are APUs in LLVM's AMDGPU processor table (llvm/docs/AMDGPUUsage.rst).
APU_TARGETS = frozenset(
    ("gfx902", "gfx909", "gfx90c", "gfx1013", "gfx1033", "gfx1035", "gfx1036")
    + ("gfx1103", "gfx1150", "gfx1151", "gfx1152", "gfx1153")
)
APU_DEVICES = frozenset(("74a0",))  # MI300A shares its target, gfx942, with the MI300X card
# Product names by device and revision; comes with libdrm.
IDS_FILES = ("/usr/share/libdrm/amdgpu.ids", "/opt/amdgpu/share/libdrm/amdgpu.ids")
SUPPORT_NOTES = {
    "gfx1031": "ROCm needs HSA_OVERRIDE_GFX_VERSION=10.3.0 for it [recalled]",
    "gfx1032": "ROCm needs HSA_OVERRIDE_GFX_VERSION=10.3.0 for it [recalled]",
    "gfx803": "ROCm no longer supports it: Vulkan only",
}
VISIBLE_KEYS = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
GIB = 2**30


def probe(system: System, found: Findings) -> None:
    """Write down every AMD card and APU."""
    targets: dict[str, str] | None = None
    for index, card in enumerate(drm_cards(system, found, VENDOR)):
        if targets is None:
            targets = _targets(system, found)
            _note_access(system, found)
        gfx = targets.get(card.slot)
        found.accelerators.append(_accelerator(system, found, index, card, gfx))


def _note_access(system: System, found: Findings) -> None:
    """sysfs shows cards to containers and users that may not open them."""
    for key in VISIBLE_KEYS:
        if key in system.env:
            found.note(f"{key}={system.env[key]} is not applied to this list")
    if not system.exists("/dev/kfd"):
        found.note(
            "/dev/kfd is not there, so ROCm cannot reach the AMD card; in a container pass "
            "--device /dev/kfd --device /dev/dri"
        )
    elif not os.access(system.path("/dev/kfd"), os.R_OK | os.W_OK):
        found.note("/dev/kfd may not be opened; join the groups render and video")


def _targets(system: System, found: Findings) -> dict[str, str]:
    """PCI slot -> gfx target, from the compute driver's topology."""
    targets: dict[str, str] = {}
    for node in system.names(KFD):
        path = f"{KFD}/{node}/properties"
        try:
            rows = (line.split() for line in system.read(path).splitlines())
            values = {row[0]: int(row[1]) for row in rows if len(row) == 2}
        except (OSError, ValueError) as error:  # EPERM: a GPU that this cgroup may not use
            found.note(f"{path} cannot be read: {type(error).__name__}")
            continue
        version, place = values.get("gfx_target_version", 0), values.get("location_id", 0)
        # The whole file would also tell the card's unique number.
        found.raw.append((path, f"gfx_target_version={version} location_id={place}"))
        if version:
            domain, bus = values.get("domain", 0), place >> 8
            slot = f"{domain:04x}:{bus:02x}:{place >> 3 & 31:02x}.{place & 7}"
            targets[slot] = gfx_name(version)
    return targets


def gfx_name(version: int) -> str:
    """110501 -> gfx1151, 90010 -> gfx90a: two decimal digits a part, written in hexadecimal."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _accelerator(
    system: System, found: Findings, index: int, card: DrmCard, gfx: str | None
) -> Accelerator:
    keys = ("vram_total", "vram_used", "gtt_total", "gtt_used")
    sizes = {key: found.number(system, f"{card.path}/mem_info_{key}") for key in keys}
    revision = (found.text(system, f"{card.path}/revision") or "").removeprefix("0x").lower()
    vram, gtt = sizes["vram_total"], sizes["gtt_total"]
    accelerator = Accelerator(
        index=index,
        name=_name(system, found, card, revision, gfx),
        vendor="amd",
        total_bytes=vram or 0,
        total_estimated=not vram,
        used_bytes=sizes["vram_used"] or 0,
        driver=card.driver or None,
        pci_id=f"{card.device}:{revision}" if revision else card.device,
        gfx=gfx,
        notes=(SUPPORT_NOTES[gfx],) if gfx in SUPPORT_NOTES else (),
    )
    if not _is_apu(card, gfx, vram, gtt or 0):
        return accelerator
    return _apu(system, accelerator, vram or 0, gtt or 0, sizes["gtt_used"] or 0)


def _is_apu(card: DrmCard, gfx: str | None, vram: int | None, gtt: int) -> bool:
    """By target, never by name: a reflashed MI50 calls itself AMD Radeon Graphics (llmfit #638)."""
    if gfx is not None:
        return gfx in APU_TARGETS or card.device in APU_DEVICES
    # Without the compute driver: a small carve-out beside a large share of RAM (ComfyUI monitor).
    return vram is not None and vram < 8 * GIB and gtt >= 4 * vram > 0


def _apu(system: System, card: Accelerator, vram: int, gtt: int, gtt_used: int) -> Accelerator:
    """An APU's pool is the larger of its BIOS carve-out and GTT, as in the kernel's compute driver
    (rocm-systems PR 1967); their sum can exceed the RAM (ROCm #6004)."""
    pools = f"carve-out (VRAM) {vram / GIB:.1f} GiB, shared (GTT) {gtt / GIB:.1f} GiB"
    if vram >= gtt:
        note = f"APU: {pools}; the carve-out is its pool, set in the BIOS"
        return replace(card, notes=(*card.notes, note))
    note = f"APU: {pools}; GTT is its pool, and grows with ttm.pages_limit up to the RAM"
    info = meminfo(system)
    # GTT is only a permission to take RAM: what is not available there cannot be had here.
    used = max(gtt_used, gtt - available_bytes(info)) if info else gtt_used
    return replace(
        card,
        total_bytes=gtt,
        total_estimated=False,
        used_bytes=used,
        unified=True,
        notes=(*card.notes, note),
    )


def _name(system: System, found: Findings, card: DrmCard, revision: str, gfx: str | None) -> str:
    """From the card itself (servers), libdrm's list, or the target."""
    if name := found.text(system, f"{card.path}/product_name"):
        return name
    for path in IDS_FILES:
        try:
            lines = system.read(path).splitlines()
        except OSError:
            continue
        for line in lines:
            parts = [part.strip() for part in line.split(",", 2)]
            if len(parts) == 3 and (parts[0].lower(), parts[1].lower()) == (card.device, revision):
                return parts[2]
    return f"AMD Radeon Graphics ({gfx or card.device})"
