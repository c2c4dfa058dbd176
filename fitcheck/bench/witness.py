"""Who asked for the memory that was not there: the operator, its module, the bytes.

CUDA calls an observer before it raises OutOfMemoryError, in the thread that asked: there the
operator's call is still on Python's stack, or its node of autograd runs. Elsewhere the message is
all there is.
"""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Mapping
from types import FrameType

import torch
from torch import nn

from fitcheck.measured import Oom

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Witness:
    """Remembers the last request that failed.

    names: of modules, by their id; limit_bytes: what the allocator may take, if not all.
    """

    def __init__(self, names: Mapping[int, str], limit_bytes: int | None = None) -> None:
        self.names, self.limit_bytes = names, limit_bytes
        self.seen: tuple[str, int, int] | None = None  # operator, bytes asked, bytes free
        if torch.cuda.is_available():
            torch._C._cuda_attach_out_of_memory_observer(self.observe)  # type: ignore[attr-defined]

    def observe(self, device: int, requested: int, total: int, free: int) -> None:
        """Called by PyTorch. It asks twice: the second time its cache is empty."""
        if self.limit_bytes is not None:
            free = min(free, self.limit_bytes - torch.cuda.memory_reserved(device))
        node = torch._C._current_autograd_node()
        self.seen = (self._operator(sys._getframe().f_back, node), requested, max(0, free))

    def _operator(self, frame: FrameType | None, node: object) -> str:
        """The call in Python that led to it, or autograd's node; and the module that ran."""
        line = ""
        if frame is not None:
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            call = re.search(r"([A-Za-z_][\w.]*)\(", line)
            line = call[1] if call else line[:80]
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self.names:
                return f"{line} in {self.names[id(owner)]}"
            frame = frame.f_back
        return node.name() if node is not None else line or "unknown"  # type: ignore[attr-defined]

    def oom(self, fault: RuntimeError, phase: str, step: int) -> Oom:
        """What is known of a failed request."""
        if self.seen is not None:
            return Oom(phase, step, *self.seen)
        text = str(fault)
        return Oom(phase, step, "unknown", _bytes(r"allocate ", text), _bytes(r"of which ", text))


def is_out_of_memory(fault: RuntimeError) -> bool:
    """Whether an error means that memory ran out: the allocator's, a library's, the driver's."""
    text = str(fault)
    return (
        isinstance(fault, torch.OutOfMemoryError)
        or "out of memory" in text
        or "ALLOC_FAILED" in text  # cuBLAS, cuDNN
    )


def _bytes(before: str, text: str) -> int | None:
    """The bytes named behind some words of a message."""
    found = re.search(before + r"([\d.]+) (bytes|KiB|MiB|GiB)", text)
    return int(float(found[1]) * UNITS[found[2]]) if found else None
