"""RAM and processors: the host's numbers, bounded by every cgroup this process lives in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from machine_world import GIB, Psutil, World

from fitcheck.machine import Machine, Ram, detect

TOTAL, AVAILABLE = 65536000 * 1024, 50000000 * 1024  # machine_world.MEMINFO
V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def ram(machine: Machine) -> Ram:
    assert machine.ram is not None
    return machine.ram


def group(world: World, place: str, **files: str) -> None:
    """The files of one cgroup; `_` stands for the dot in their names."""
    for name, text in files.items():
        world.write(f"/sys/fs/cgroup{place}/{name.replace('_', '.', 1)}", text)


def lives_in(world: World, line: str, *mounts: str) -> None:
    world.write("/proc/self/cgroup", line)
    world.write("/proc/self/mountinfo", "\n".join(mounts))


def test_without_limits_it_is_what_is_available(world: World) -> None:
    found = ram(detect(world.system()))
    assert found == Ram(total_bytes=TOTAL, available_bytes=AVAILABLE)
    assert found.usable_bytes == AVAILABLE


def test_a_kernel_without_memavailable(world: World) -> None:
    world.write("/proc/meminfo", "MemTotal: 8000 kB\nMemFree: 1000 kB\nCached: 2000 kB")
    assert ram(detect(world.system())).usable_bytes == 3000 * 1024


def test_v2_limit_of_an_ancestor(world: World) -> None:
    """754 GiB shown, 90 allowed, killed (ComfyUI #14938)."""
    lives_in(world, "0::/slurm/job_7/step_0", V2)
    group(world, "/slurm/job_7/step_0", memory_max="max", memory_current=str(GIB))
    group(world, "/slurm/job_7", memory_max=str(20 * GIB), memory_current=str(8 * GIB))
    group(world, "/slurm", memory_max=str(40 * GIB), memory_current=str(35 * GIB))
    found = ram(detect(world.system()))
    assert found.total_bytes == TOTAL and found.limit_bytes == 20 * GIB
    assert found.usable_bytes == 5 * GIB, "the wider limit has less left: a neighbour uses it"


def test_file_cache_is_not_held(world: World) -> None:
    lives_in(world, "0::/", V2)
    stat = f"anon {GIB}\ninactive_file {6 * GIB}\nactive_file 5"
    group(world, "", memory_max=str(10 * GIB), memory_current=str(8 * GIB), memory_stat=stat)
    assert ram(detect(world.system())).usable_bytes == 8 * GIB


def test_v1_limit(world: World) -> None:
    lives_in(world, "4:memory:/docker/abc\n0::/", V1)
    files = {"memory_limit_in_bytes": str(12 * GIB), "memory_usage_in_bytes": str(5 * GIB)}
    group(world, "/memory/docker/abc", **files, memory_stat=f"total_inactive_file {GIB}")
    unlimited = {"memory_limit_in_bytes": "9223372036854771712", "memory_usage_in_bytes": "7"}
    group(world, "/memory", **unlimited)
    found = ram(detect(world.system()))
    assert found.limit_bytes == 12 * GIB and found.usable_bytes == 8 * GIB


@pytest.mark.parametrize("sentinel", ["9223372036854771712", "9223372036854710272", "-1"])
def test_v1_sentinels_are_no_limit(world: World, sentinel: str) -> None:
    """LONG_MAX rounded down to a page: of 4 KiB, and of 64 KiB."""
    lives_in(world, "4:memory:/", V1)
    group(world, "/memory", memory_limit_in_bytes=sentinel, memory_usage_in_bytes="1")
    assert ram(detect(world.system())).limit_bytes is None


def test_a_container_without_a_cgroup_namespace(world: World) -> None:
    """It reads the host's path, but only its own part is mounted."""
    mount = V1.replace(" / ", " /docker/abc ", 1)
    lives_in(world, "4:memory:/docker/abc/child", mount)
    group(world, "/memory/child", memory_limit_in_bytes=str(3 * GIB), memory_usage_in_bytes="0")
    group(world, "/memory", memory_limit_in_bytes=str(9 * GIB), memory_usage_in_bytes="0")
    assert ram(detect(world.system())).usable_bytes == 3 * GIB


@pytest.mark.parametrize("line", ["0::/../other", "0::/gone/away"])
def test_a_group_that_cannot_be_seen_leaves_the_mount(world: World, line: str) -> None:
    lives_in(world, line, V2)
    group(world, "", memory_max=str(2 * GIB), memory_current="0")
    assert ram(detect(world.system())).usable_bytes == 2 * GIB


def test_without_mountinfo_the_usual_places(world: World) -> None:
    world.write("/proc/self/cgroup", "0::/a")
    group(world, "/a", memory_max=str(4 * GIB), memory_current=str(GIB))
    assert ram(detect(world.system())).usable_bytes == 3 * GIB


def test_more_used_than_allowed_leaves_nothing(world: World) -> None:
    lives_in(world, "0::/", V2)
    group(world, "", memory_max=str(GIB), memory_current=str(2 * GIB))
    assert ram(detect(world.system())).usable_bytes == 0


@pytest.mark.parametrize(
    ("path", "text", "note"),
    [
        ("/dev/dxg", "", ".wslconfig"),
        ("/proc/version", "Linux 4.4.0 #1 SMP Sun Jan 10 15:06:54 PST 2016", "gVisor"),
        (
            "/proc/self/mountinfo",
            "9 1 0:5 /proc/meminfo /proc/meminfo rw - fuse.lxcfs lxcfs rw",
            "lxcfs",
        ),
    ],
    ids=["wsl", "gvisor", "lxcfs"],
)
def test_surroundings_in_which_ram_is_not_what_it_seems(
    world: World, path: str, text: str, note: str
) -> None:
    assert not any(note in line for line in detect(world.system()).notes)
    assert any(note in line for line in detect(world.write(path, text).system()).notes)


def test_elsewhere_psutil_knows(tmp_path: Path) -> None:
    world = World(tmp_path, linux=False)
    system = world.system(platform="freebsd14", psutil=lambda: Psutil(64 * GIB, 40 * GIB))
    assert ram(detect(system)) == Ram(total_bytes=64 * GIB, available_bytes=40 * GIB)


def test_unknown_ram_is_a_note_and_not_zero(tmp_path: Path) -> None:
    def no_psutil() -> None:
        raise ImportError("No module named 'psutil'")

    machine = detect(World(tmp_path, linux=False).system(platform="freebsd14", psutil=no_psutil))
    assert machine.ram is None
    assert any("RAM cannot be read" in note for note in machine.notes)


@pytest.mark.parametrize(
    ("cgroup", "files", "cpus"),
    [
        ("0::/a", {"/sys/fs/cgroup/a/cpu.max": "150000 100000"}, 2),
        ("0::/a", {"/sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ("0::/a", {"/sys/fs/cgroup/a/cpu.max": "max 100000"}, None),
        (
            "1:cpu,cpuacct:/a",
            {
                "/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "100000",
                "/sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        (
            "1:cpu:/",
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_processors_under_a_quota(
    world: World, cgroup: str, files: dict[str, str], cpus: int | None
) -> None:
    unbound = detect(world.system()).cpus
    if hasattr(os, "sched_getaffinity"):
        assert unbound == len(os.sched_getaffinity(0))
    world.write("/proc/self/cgroup", cgroup)
    for path, text in files.items():
        world.write(path, text)
    assert detect(world.system()).cpus == min(unbound, cpus or unbound)


def test_the_report_does_not_name_the_group(world: World) -> None:
    from fitcheck.machine import doctor

    lives_in(world, "0::/user.slice/user-1000.slice/secret-job", V2)
    folder = "/user.slice/user-1000.slice/secret-job"
    group(world, folder, memory_max=str(GIB), memory_current="0")
    report = doctor(detect(world.system()))
    assert f"cgroup v2 memory.max: {GIB}" in report
    assert "secret-job" not in report and "user-1000" not in report
