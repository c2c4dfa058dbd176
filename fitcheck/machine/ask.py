"""How probes ask: the world they may look at, and the sheet on which they write what they saw."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fitcheck.machine.accelerator import Accelerator

TIMEOUT_SECONDS = 2.0  # a driver in trouble makes its tools hang


def run(command: Sequence[str]) -> str:
    """Standard output of a command, without a shell.

    Raises OSError (not there) and subprocess.SubprocessError (too slow, or failed).
    """
    import subprocess

    done = subprocess.run(
        command,
        capture_output=True,
        check=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL,
        timeout=TIMEOUT_SECONDS,
    )
    return done.stdout


def import_nvml() -> Any:
    import pynvml  # 80 ms, of use only where there is a driver

    return pynvml


def import_psutil() -> Any:
    import psutil  # 30 ms

    return psutil


def load_library(path: str) -> object:
    import ctypes

    return ctypes.CDLL(path)


def display_registry() -> list[dict[str, Any]]:
    """The values of each display adapter's key in the Windows registry; OSError if refused."""
    if sys.platform != "win32":
        return []
    import winreg

    group = r"SYSTEM\CurrentControlSet\Control\Class\{4d36e968-e325-11ce-bfc1-08002be10318}"
    adapters = []
    with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, group) as folder:
        names = [winreg.EnumKey(folder, n) for n in range(winreg.QueryInfoKey(folder)[0])]
        for name in (name for name in names if name.isdigit()):  # beside them: Properties
            with winreg.OpenKey(folder, name) as key:
                values = (winreg.EnumValue(key, n) for n in range(winreg.QueryInfoKey(key)[1]))
                adapters.append({label: value for label, value, _ in values})
    return adapters


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """The world as a probe sees it; tests put recorded answers in its place."""

    platform: str = sys.platform
    root: Path = Path("/")
    env: Mapping[str, str] = field(default_factory=lambda: os.environ)
    run: Callable[[Sequence[str]], str] = run
    nvml: Callable[[], Any] = import_nvml
    psutil: Callable[[], Any] = import_psutil
    load_library: Callable[[str], object] = load_library
    display_registry: Callable[[], list[dict[str, Any]]] = display_registry

    @property
    def linux(self) -> bool:
        return self.platform.startswith("linux")

    @property
    def windows(self) -> bool:
        return self.platform.startswith("win")

    @property
    def wsl(self) -> bool:
        """Linux inside Windows: its graphics device is /dev/dxg."""
        return self.linux and self.exists("/dev/dxg")

    @property
    def host_pids(self) -> bool:
        """Process numbers mean the same here as to a driver; in a container they do not."""
        if not self.linux:
            return True
        try:
            namespace = self.path("/proc/self/ns/pid").readlink()
        except OSError:
            return False
        return str(namespace) == "pid:[4026531836]"  # PROC_PID_INIT_INO: the host's own namespace

    def path(self, path: str) -> Path:
        """Where a path of that world lies. (On Windows C:/... is absolute and stays itself.)"""
        return self.root / path.lstrip("/")

    def exists(self, path: str) -> bool:
        try:
            return self.path(path).exists()
        except OSError:  # a folder on the way that may not be entered
            return False

    def names(self, folder: str) -> list[str]:
        """What a folder holds, sorted; nothing where it is not there or may not be entered."""
        try:
            return sorted(entry.name for entry in self.path(folder).iterdir())
        except OSError:
            return []

    def read(self, path: str) -> str:
        """A file's text; raises OSError."""
        return self.path(path).read_text(encoding="utf-8", errors="replace").strip()


@dataclass(slots=True)
class Findings:
    """What the probes write down. What was found before a fault stays found."""

    accelerators: list[Accelerator] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    raw: list[tuple[str, str]] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def text(self, system: System, path: str) -> str | None:
        """A file's text; None where it is not there and, with a note, where it cannot be read."""
        try:
            answer = system.read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            reason = error.strerror or type(error).__name__
            self.raw.append((path, f"({reason})"))
            self.note(f"{path} cannot be read: {reason}")
            return None
        self.raw.append((path, answer))
        return answer

    def number(self, system: System, path: str) -> int | None:
        """A file's whole number, decimal or 0x...; None as for `text` and, noted, for garbage."""
        answer = self.text(system, path)
        if answer is None:
            return None
        try:
            return int(answer, 0)
        except ValueError:
            self.note(f"{path} holds no number: {answer[:40]!r}")
            return None

    def output(
        self,
        system: System,
        command: Sequence[str],
        label: str,
        show: Callable[[str], str] = str.strip,
    ) -> str | None:
        """What a command prints; None, with its complaint noted, where it fails.

        `label` and `show` word question and answer for the report.
        """
        import subprocess

        try:
            answer = system.run(command)
        except FileNotFoundError:
            self.raw.append((label, "(no such command)"))
            return None
        except subprocess.TimeoutExpired:
            reason = f"no answer within {TIMEOUT_SECONDS:g} s"
        except subprocess.CalledProcessError as error:
            said = f"{error.stdout or ''} {error.stderr or ''}".split()
            reason = " ".join(said)[:200] or f"exit status {error.returncode}"
        except OSError as error:
            reason = error.strerror or type(error).__name__
        else:
            self.raw.append((label, show(answer)))
            return answer
        self.raw.append((label, f"({reason})"))
        self.note(f"{label.split()[0]}: {reason}")
        return None
