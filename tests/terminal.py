"""The screen in a real pseudo-terminal: what a user's terminal gets, and how long that takes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
ESCAPES = re.compile(
    r"\x1b(\[[0-9;?<>=]*[a-zA-Z]|\][^\x07\x1b]*(\x07|\x1b\\)|[()][A-Z0-9]|[=>78M])"
)


class Terminal:
    """A program in a terminal of its own; a context manager that always ends it."""

    def __init__(
        self, arguments: Sequence[str], size: tuple[int, int], env: dict[str, str] | None = None
    ) -> None:
        self.master, slave = pty.openpty()
        columns, rows = size
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.before = termios.tcgetattr(slave)
        wanted = {name: value for name, value in os.environ.items() if name not in SIZES}
        self.begun = time.perf_counter()
        self.child = subprocess.Popen(
            [sys.executable, "-m", "fitcheck", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env=wanted | {"TERM": "xterm-256color", "COLORTERM": "truecolor"} | (env or {}),
            start_new_session=True,
        )
        self.slave = slave
        self.received = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *fault: object) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        os.close(self.master)
        os.close(self.slave)

    def wait_for(self, pattern: str, seconds: float = 30.0) -> float:
        """Seconds from the start until the output since the last wait matches; it is then used up.

        AssertionError with what came instead.
        """
        ends = time.perf_counter() + seconds
        while time.perf_counter() < ends:
            found = re.search(pattern, ESCAPES.sub("", self.received))
            if found:
                self.received = ""
                return time.perf_counter() - self.begun
            self._read(min(0.05, max(0.0, ends - time.perf_counter())))
        raise AssertionError(f"no {pattern!r} in {ESCAPES.sub('', self.received)[-2000:]!r}")

    def _read(self, seconds: float) -> None:
        ready, _, _ = select.select([self.master], [], [], seconds)
        if ready:
            try:
                self.received += os.read(self.master, 2**16).decode("utf-8", "replace")
            except OSError:  # Linux: the program has closed its end
                time.sleep(0.01)

    def quiet(self, seconds: float) -> None:
        """Read until nothing has come for so long."""
        while True:
            before = len(self.received)
            self._read(seconds)
            if len(self.received) == before:
                return

    def send(self, keys: str) -> float:
        """Type; the time, for a difference with what wait_for returns."""
        os.write(self.master, keys.encode())
        return time.perf_counter() - self.begun

    def ended(self, seconds: float = 30.0) -> int:
        """The exit code, when the program has ended by itself."""
        ends = time.perf_counter() + seconds
        while self.child.poll() is None and time.perf_counter() < ends:
            self._read(0.05)
        assert self.child.returncode is not None, "it did not end"
        return self.child.returncode

    def cpu_seconds(self) -> float:
        """Processor time of the program so far, on Linux; a busy machine does not add to it."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def restored(self) -> bool:
        """Whether the terminal's modes are as they were before."""
        return termios.tcgetattr(self.slave) == self.before


SIZES = ("COLUMNS", "LINES", "NO_COLOR", "CI")
