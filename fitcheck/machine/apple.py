"""Apple silicon: one GPU that may use a share of the RAM which macOS decides."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

from fitcheck.machine.accelerator import Accelerator
from fitcheck.machine.ask import Findings, System

MIB, GIB = 2**20, 2**30
# recommendedMaxWorkingSetSize is the limit, and grew with macOS (antirez/ds4 #893, #909): only
# Metal knows it. Asked in a process of its own, which may crash. CoreGraphics must be loaded for a
# program without windows to be given a device (Apple, MTLCreateSystemDefaultDevice [recalled]).
METAL_QUESTION = """
from ctypes import CDLL, c_char_p, c_uint64, c_void_p
frameworks = "/System/Library/Frameworks/"
CDLL(frameworks + "CoreGraphics.framework/CoreGraphics")
metal, objc = CDLL(frameworks + "Metal.framework/Metal"), CDLL("/usr/lib/libobjc.A.dylib")
metal.MTLCreateSystemDefaultDevice.restype = c_void_p
objc.sel_registerName.restype, objc.sel_registerName.argtypes = c_void_p, [c_char_p]
objc.objc_msgSend.restype, objc.objc_msgSend.argtypes = c_uint64, [c_void_p, c_void_p]
device = metal.MTLCreateSystemDefaultDevice()
names = b"recommendedMaxWorkingSetSize", b"maxBufferLength"
print(*(objc.objc_msgSend(device, objc.sel_registerName(name)) for name in names) if device else ())
"""


@cache
def _once(run: Callable[[Sequence[str]], str], command: tuple[str, ...]) -> str:
    """These tools take up to seconds and their answers do not change: ask once a process."""
    return run(command)


def probe(system: System, found: Findings) -> None:
    """Write down the GPU of an Apple silicon Mac."""
    system = replace(system, run=partial(_asked_once, system.run))
    chip = _sysctl(system, found, "machdep.cpu.brand_string") or ""
    memory = _sysctl(system, found, "hw.memsize") or ""
    if not chip.startswith("Apple") or not memory.isdigit():
        found.note(f"no Apple silicon here ({chip or 'unknown processor'}): its GPU is not judged")
        return
    total = int(memory)
    model, cores = _display(system, found)
    if model and not model.startswith("Apple M"):
        found.note(f"the GPU is {model}: inside a virtual machine it is not judged [recalled]")
        return
    limit, notes = _limit(system, found)
    found.accelerators.append(
        Accelerator(
            index=0,
            name=f"{model or chip} ({cores}-core GPU)" if cores else model or chip,
            vendor="apple",
            total_bytes=total,
            reserved_bytes=total - limit if limit and limit <= total else None,
            used_bytes=total - _available(system, total),
            unified=True,
            notes=tuple(notes),
        )
    )


def _asked_once(run: Callable[[Sequence[str]], str], command: Sequence[str]) -> str:
    return _once(run, tuple(command))


def _sysctl(system: System, found: Findings, name: str) -> str | None:
    answer = found.output(system, ("sysctl", "-n", name), f"sysctl {name}")
    return answer.strip() if answer else None


def _display(system: System, found: Findings) -> tuple[str, int | None]:
    """(model, GPU cores): M4 Max with 32 and with 40 cores are two rows of the catalog."""
    command = ("system_profiler", "SPDisplaysDataType", "-json")
    answer = found.output(system, command, "system_profiler SPDisplaysDataType", show=_gpu_words)
    for entry in _displays(answer or ""):
        cores = str(entry.get("sppci_cores", ""))
        return str(entry.get("sppci_model", "")), int(cores) if cores.isdigit() else None
    return "", None


def _displays(answer: str) -> list[dict[str, object]]:
    try:
        entries = json.loads(answer)["SPDisplaysDataType"]
    except (KeyError, TypeError, ValueError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]


def _gpu_words(answer: str) -> str:
    """Without the displays and their serial numbers."""
    keys = ("sppci_model", "sppci_cores")
    rows = ({key: entry.get(key) for key in keys} for entry in _displays(answer))
    return json.dumps(list(rows)) if _displays(answer) else "(not understood)"


def _limit(system: System, found: Findings) -> tuple[int | None, list[str]]:
    """(bytes that the GPU may use or None, notes)."""
    command = (sys.executable, "-I", "-S", "-c", METAL_QUESTION)
    numbers = (found.output(system, command, "Metal device limits") or "").split()
    if len(numbers) == 2 and all(number.isdigit() for number in numbers) and int(numbers[0]):
        limit, largest = (int(number) for number in numbers)
        note = f"Metal gives a single buffer at most {largest / GIB:.1f} GiB"
        return limit, [note] if 0 < largest < limit else []
    wired = _sysctl(system, found, "iogpu.wired_limit_mb") or ""
    if wired.isdigit() and int(wired):  # 0 is the default: macOS decides
        return int(wired) * MIB, ["limit set by iogpu.wired_limit_mb"]
    return None, ["macOS did not tell the GPU's limit: a rule of thumb stands in"]


def _available(system: System, total: int) -> int:
    try:
        return int(system.psutil().virtual_memory().available)
    except (ImportError, OSError, RuntimeError):
        return total  # ram() has noted it
