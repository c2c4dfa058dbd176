"""System RAM and processors, bounded by this process's own cgroup and all that contain it.

psutil and /proc/meminfo show the host inside a container (psutil #2100; ComfyUI #14938: 754 GiB
shown, 90 GiB allowed, killed), so every limit on the way up is read (the pattern of ComfyUI 15788).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from fitcheck.machine.accelerator import Accelerator, Ram
from fitcheck.machine.ask import Findings, System

# cgroup v1 says "no limit" with LONG_MAX rounded down to a page, 9223372036854771712 with pages of
# 4 KiB and less with larger ones; no machine has the 4 EiB that this asks for.
UNLIMITED_BYTES = 1 << 62
# gVisor's constant kernel version (pkg/sentry/syscalls/linux/linux64.go).
GVISOR_KERNEL = "Sun Jan 10 15:06:54 PST 2016"


def meminfo(system: System) -> dict[str, int]:
    """/proc/meminfo in bytes; empty where there is none."""
    try:
        lines = system.read("/proc/meminfo").splitlines()
    except OSError:
        return {}
    rows = (line.replace(":", " ").split() for line in lines)
    return {row[0]: int(row[1]) * 1024 for row in rows if len(row) == 3 and row[1].isdigit()}


def available_bytes(info: dict[str, int]) -> int:
    """MemAvailable of a `meminfo`; kernels before 3.14 lack it."""
    return info.get("MemAvailable", info.get("MemFree", 0) + info.get("Cached", 0))


def with_shared_memory(card: Accelerator, system: System) -> Accelerator:
    """A GPU whose memory is the system's (GB10, Jetson, integrated): only the system tells it.

    cgroups do not bind what a GPU takes (vllm #54200), so RAM's own limits do not apply.
    """
    info = meminfo(system)
    if "MemTotal" not in info:
        return replace(card, unified=True)
    note = (
        "memory shared with the system; CUDA itself calls only MemFree free "
        f"({info.get('MemFree', 0) / 2**30:.1f} GiB now), not the file cache: drop that if a job "
        "will not start"
    )
    return replace(
        card,
        unified=True,
        total_bytes=info["MemTotal"],
        total_estimated=False,
        used_bytes=info["MemTotal"] - available_bytes(info),
        notes=(*card.notes, note) if card.vendor == "nvidia" else card.notes,
    )


def ram(system: System, found: Findings) -> Ram | None:
    """RAM and its limits; None, with a note, where nothing tells it."""
    info = meminfo(system)
    if "MemTotal" not in info:
        return _ram_by_psutil(system, found)
    for key in ("MemTotal", "MemFree", "MemAvailable"):
        found.raw.append((f"/proc/meminfo {key}", str(info.get(key, "(not there)"))))
    _note_surroundings(system, found)
    limits = list(_memory_limits(system, found))
    return Ram(
        total_bytes=info["MemTotal"],
        available_bytes=available_bytes(info),
        limit_bytes=min((limit for limit, _ in limits), default=None),
        limit_free_bytes=min((max(0, limit - used) for limit, used in limits), default=None),
    )


def _ram_by_psutil(system: System, found: Findings) -> Ram | None:
    """macOS, Windows, the BSDs."""
    try:
        memory = system.psutil().virtual_memory()
    except (ImportError, OSError, RuntimeError) as error:
        found.note(f"RAM cannot be read: {type(error).__name__}: {error}")
        return None
    answer = f"total={memory.total} available={memory.available}"
    found.raw.append(("psutil.virtual_memory()", answer))
    return Ram(total_bytes=memory.total, available_bytes=memory.available)


def _note_surroundings(system: System, found: Findings) -> None:
    """Where MemTotal is not what it seems."""
    if " fuse.lxcfs " in _read(system, "/proc/self/mountinfo"):
        found.note("RAM is what lxcfs shows: this container's share of the host's")
    if GVISOR_KERNEL in _read(system, "/proc/version"):
        found.note("gVisor: RAM shown may be the whole node's, or a default of 2 GB")
    if system.wsl:
        found.note("WSL: RAM is what Windows gives to WSL (memory= in .wslconfig) [recalled]")


def cpus(system: System, found: Findings) -> int:
    """Processors this process may use: its affinity, and its cgroups' quota rounded up."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    for version, folder in _groups(system, "cpu"):
        if version == 2:
            quota, _, period = _read(system, f"{folder}/cpu.max").partition(" ")
        else:
            quota = _read(system, f"{folder}/cpu.cfs_quota_us")
            period = _read(system, f"{folder}/cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # "max" and -1 are no quota
            count = min(count, max(1, -(-int(quota) // int(period))))
    found.raw.append(("processors", str(count)))
    return count


def _memory_limits(system: System, found: Findings) -> Iterator[tuple[int, int]]:
    """(limit, used) of each group that has a limit, in bytes.

    Used leaves out file cache that the kernel drops under pressure, as kubelet's working set does.
    """
    for version, folder in _groups(system, "memory"):
        names = ("memory.max", "memory.current", "inactive_file")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, used = (_read(system, f"{folder}/{name}") for name in names[:2])
        # The folder's name stays out of the report: it may name a user or a container.
        if limit:
            found.raw.append((f"cgroup v{version} {names[0]}", limit))
        if not limit.isdigit() or int(limit) >= UNLIMITED_BYTES:
            continue
        rows = (line.split() for line in _read(system, f"{folder}/memory.stat").splitlines())
        cache = next((int(row[1]) for row in rows if row[0] == names[2] and row[1].isdigit()), 0)
        current = int(used) if used.isdigit() else 0
        found.raw.append((f"cgroup v{version} {names[1]}", used or "(cannot be read)"))
        yield int(limit), max(0, current - cache)


def _groups(system: System, controller: str) -> Iterator[tuple[int, str]]:
    """(cgroup version, folder) of this process's own group for a controller and its ancestors."""
    mounts = _mounts(system)
    for line in _read(system, "/proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        unified = hierarchy == "0" and not controllers
        if not unified and controller not in controllers.split(","):
            continue
        default = ("/", "/sys/fs/cgroup" if unified else f"/sys/fs/cgroup/{controller}")
        root, mount = mounts.get("" if unified else controller, default)
        folder = PurePosixPath(mount) / _below(path, root)
        version = 2 if unified else 1
        while True:
            yield version, str(folder)
            if str(folder) == mount or folder == folder.parent:
                break
            folder = folder.parent


def _below(path: str, root: str) -> str:
    """A cgroup's path below the mount, whose own root is `root`.

    A container without a cgroup namespace sees the host's path but only its own part mounted.
    """
    if ".." in path:  # outside the namespace: only the mount itself can be seen
        return ""
    if root != "/":
        path = path.removeprefix(root) if path.startswith(root) else ""
    return path.lstrip("/")


def _mounts(system: System) -> dict[str, tuple[str, str]]:
    """Controller ("" for v2) -> (root within the hierarchy, mount point)."""
    mounts: dict[str, tuple[str, str]] = {}
    for line in _read(system, "/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        place, kind = before.split(), after.split()
        if len(place) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2":
            mounts.setdefault("", (place[3], place[4]))
        elif kind[0] == "cgroup":
            for controller in kind[2].split(","):
                mounts.setdefault(controller, (place[3], place[4]))
    return mounts


def _read(system: System, path: str) -> str:
    """A file's text, empty where it is not there or may not be read."""
    try:
        return system.read(path)
    except OSError:
        return ""
