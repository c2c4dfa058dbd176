"""NVIDIA cards: is a driver there, which library speaks for it, and what to ask when it will not.

NVML first (the driver's library, through nvidia-ml-py), then the nvidia-smi command.
"""

from __future__ import annotations

import contextlib

from fitcheck.machine.ask import Findings, System

# Any of these means that a driver is there, or was: that too is worth a note.
DRIVER_SIGNS = (
    *("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvidia0", "/dev/nvgpu"),
    *("/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1", "/usr/lib64/libnvidia-ml.so.1"),
    *("/usr/lib/aarch64-linux-gnu/libnvidia-ml.so.1", "/usr/lib/libnvidia-ml.so.1"),
)
# Where the loader would miss the library, or take a wrong one in its place: under WSL a
# distribution's own copy answers DriverNotLoaded (ollama #1888, WSL #11755, nvml-wrapper #51).
LIBRARY_FOLDERS = (
    *("/usr/lib/wsl/lib", "/usr/lib/wsl/drivers/*"),
    *("/usr/local/nvidia/lib64", "/usr/local/nvidia/lib", "/run/opengl-driver/lib"),
    "/usr/lib/aarch64-linux-gnu/nvidia",
)
WINDOWS_FOLDERS = (("WINDIR", "System32"), ("ProgramFiles", "NVIDIA Corporation/NVSMI"))


def probe(system: System, found: Findings) -> None:
    """Write down every NVIDIA card that this process may use."""
    if not _driver_may_exist(system):
        _note_missing_driver(system, found)
    elif reason := _through_nvml(system, found):
        from fitcheck.machine import nvidia_smi

        found.note(f"NVIDIA: {reason}")
        nvidia_smi.probe(system, found)


def _driver_may_exist(system: System) -> bool:
    """A few stat calls instead of the 80 ms that importing the library takes."""
    if system.windows:
        folders = [
            f"{system.env[key]}/{rest}" for key, rest in WINDOWS_FOLDERS if key in system.env
        ]
        return any(system.exists(f"{folder}/nvml.dll") for folder in folders)
    folders = [folder for folder in system.env.get("LD_LIBRARY_PATH", "").split(":") if folder]
    signs = (*DRIVER_SIGNS, *(f"{folder}/libnvidia-ml.so.1" for folder in folders))
    return any(map(system.exists, signs)) or _library(system) is not None


def _library(system: System) -> str | None:
    """Path of a library that the loader would not take by itself, or None."""
    for folder in LIBRARY_FOLDERS:
        folders = [folder]
        if folder.endswith("/*"):
            folders = [folder[:-1] + name for name in system.names(folder[:-2])]
        for place in folders:
            if system.exists(f"{place}/libnvidia-ml.so.1"):
                return f"{place}/libnvidia-ml.so.1"
    return None


def _note_missing_driver(system: System, found: Findings) -> None:
    """Say that a card is there which no NVIDIA driver serves."""
    if system.wsl:
        found.note(
            "WSL: a graphics device is there (/dev/dxg), but no NVIDIA library under /usr/lib/wsl; "
            "AMD and Intel cards cannot be read from here"
        )
    bus = "/sys/bus/pci/devices"
    for slot in system.names(bus):
        with contextlib.suppress(OSError):
            display = system.read(f"{bus}/{slot}/class").startswith("0x03")
            if display and system.read(f"{bus}/{slot}/vendor") == "0x10de":
                device = system.read(f"{bus}/{slot}/device")
                found.raw.append((f"PCI {slot}", f"NVIDIA display device {device}"))
                found.note(f"an NVIDIA card (PCI {slot}, device {device}) has no NVIDIA driver")


def _through_nvml(system: System, found: Findings) -> str:
    """Ask NVML; returns why it cannot be asked, empty when it answered."""
    from fitcheck.machine.nvml import Session, refusal

    try:
        nvml = system.nvml()
    except ImportError as error:
        return f"NVML cannot be asked ({error}); pip install nvidia-ml-py"
    if system.linux and (library := _library(system)):
        # Once loaded, the loader finds it by its name, which is how nvidia-ml-py asks for it.
        try:
            system.load_library(library)
        except OSError as error:
            found.note(f"{library} cannot be loaded: {error}")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        found.raw.append(("nvmlInit", f"({refusal(error.value)})"))
        return refusal(error.value)
    try:
        Session(nvml, system, found).write_down_cards()
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()
    return ""
