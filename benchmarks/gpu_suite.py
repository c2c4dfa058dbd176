"""The truth on a card, inside one command: `make gpu-suite`.

    python3 benchmarks/gpu_suite.py [--minutes 9] [--to FOLDER]

What the driver takes for a context, what attention kernels take beside their results, then the
suite of `fitcheck bench`: each run against its dry run and estimate. It runs with the torch and
transformers of that machine and needs no network; what FitCheck needs beside them and the machine
lacks is taken from wheels/, where `make gpu-wheels` put it. Begun again, it goes on.

FOLDER/context.json, attention.json, runs/*.json: the last are measurements as in
catalog/measurements, to be copied there. Exit code 1: a prediction did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WHEELS, CARRIED = ROOT / "wheels", ROOT / ".carried"
# By the name under which each is imported; peft and accelerate do not bring torch with --no-deps.
NEEDED = {
    **{"peft": "peft", "accelerate": "accelerate", "pydantic": "pydantic"},
    **{"pydantic_core": "pydantic-core", "annotated_types": "annotated-types"},
    **{"typing_inspection": "typing-inspection", "psutil": "psutil", "pynvml": "nvidia-ml-py"},
    "platformdirs": "platformdirs",
}
# (rows, heads, kv heads, tokens, width) of one attention call, as the suite's models make it.
SHAPES = (
    *((2, 14, 2, 1024, 64), (1, 14, 2, 4096, 64), (2, 16, 2, 1024, 128), (2, 32, 8, 1024, 128)),
    *((1, 32, 8, 4096, 128), (1, 32, 32, 2048, 128), (4, 8, 8, 300, 80), (1, 8, 4, 2048, 256)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="in all (9)")
    parser.add_argument("--to", type=Path, default=ROOT / "gpu-suite", help="(gpu-suite)")
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part]()))
        return 0
    began = time.monotonic()
    carry()
    args.to.mkdir(parents=True, exist_ok=True)
    for part in PARTS:  # each in a process of its own: a context is made once
        path = args.to / f"{part}.json"
        if not path.exists():
            words = [sys.executable, __file__, "--part", part]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment())
            if done.returncode:
                return done.returncode
            path.write_text(json.dumps(json.loads(done.stdout.splitlines()[-1]), indent=1) + "\n")
        print(f"{part}: {path}")
    left = args.minutes - (time.monotonic() - began) / 60
    words = [sys.executable, "-m", "fitcheck", "bench", "--suite", "--to", str(args.to / "runs")]
    return subprocess.run([*words, "--minutes", f"{left:.2f}"], env=environment()).returncode


def carry() -> None:
    """Install what the machine lacks beside this checkout, from wheels/ alone."""
    sys.path.insert(0, str(CARRIED))
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        words = [*pip, "--find-links", str(WHEELS), "--target", str(CARRIED), *missing]
        if subprocess.run(words).returncode:
            sys.exit(f"missing: {', '.join(missing)}; `make gpu-wheels`, with a network, helps")


def environment() -> dict[str, str]:
    """No network; this checkout and what was carried first."""
    paths = [str(ROOT), str(CARRIED), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def context() -> dict[str, Any]:
    """What the card holds for this process outside of the allocator, as it comes to be."""
    import torch

    from fitcheck.bench.device import used_bytes, versions

    device = torch.device("cuda", 0)
    before = used_bytes(device)
    steps = []

    def read(what: str) -> None:
        torch.cuda.synchronize()
        used, reserved = used_bytes(device), torch.cuda.memory_reserved()
        known = before is not None and used is not None
        outside = used - before - reserved if known else None
        steps.append({"after": what, "used_bytes": used, "outside_bytes": outside})

    x = torch.ones(1024, 1024, device=device, dtype=torch.bfloat16)
    read("context")
    (x @ x).sum().item()
    read("matrix product")
    rows = x.view(1, 8, 1024, 128).requires_grad_()
    torch.nn.functional.scaled_dot_product_attention(rows, rows, rows).sum().backward()
    read("attention, forward and backward")
    free, total = torch.cuda.mem_get_info()
    return {
        "card": torch.cuda.get_device_name(),
        "versions": versions(),
        "total_bytes": total,
        "free_bytes": free,
        "steps": steps,
    }


def attention() -> dict[str, Any]:
    """What each attention kernel takes beside what it leaves: bytes, forward and backward."""
    import torch

    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "calls": list(_calls()),
    }


def _calls() -> Iterator[dict[str, Any]]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from fitcheck import kernels
    from fitcheck.kernels import Call, Card

    properties = torch.cuda.get_device_properties(0)
    card = Card((properties.major, properties.minor), properties.multi_processor_count)
    backends = {
        "default": None,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    for every, masked in ((shape, masked) for shape in SHAPES for masked in (False, True)):
        rows, heads, groups, tokens, width = every
        if masked:  # transformers repeats the heads of keys and values then
            groups = heads
        shape = (rows, heads, groups, tokens, width)
        call = Call(rows, tokens, tokens, heads, groups, width, width, 2)
        for name, backend in backends.items():
            found: dict[str, Any] = {"shape": shape, "masked": masked, "kernel": name}
            try:
                if backend is None:
                    found["hidden"] = _hidden_bytes(shape, masked)
                else:
                    with sdpa_kernel(backend):
                        found["hidden"] = _hidden_bytes(shape, masked)
            except RuntimeError as fault:  # this kernel does not take this call
                found["refused"] = str(fault).splitlines()[0]
            known = name if name in ("flash", "efficient") else "flash"
            found["modelled"] = [
                kernels.attention_forward(known, call, card),
                kernels.attention_backward(known, call, card),
            ]
            yield found


def _hidden_bytes(shape: tuple[int, ...], masked: bool) -> list[int]:
    """Bytes that are held while a call runs and neither before nor after: forward, backward."""
    import torch
    from torch.nn import functional as F

    rows, heads, groups, tokens, width = shape

    def leaf(count: int) -> Any:  # laid out as transformers has it: heads behind tokens
        x = torch.zeros(rows, tokens, count, width, device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2).requires_grad_()

    inputs = leaf(heads), leaf(groups), leaf(groups)
    mask = torch.ones(rows, 1, tokens, tokens, device="cuda", dtype=torch.bool) if masked else None
    for _ in range(2):  # the first call may allocate what stays
        out, forward = _transient(
            lambda: F.scaled_dot_product_attention(
                *(*inputs, mask), is_causal=not masked, enable_gqa=heads != groups
            )
        )
        gradient = torch.zeros_like(out)
        _, backward = _transient(
            lambda out=out, gradient=gradient: torch.autograd.grad(out, inputs, gradient)
        )
        del out, gradient
    return [forward, backward]


def _transient(call: Any) -> tuple[Any, int]:
    """A call's result, and the bytes that it took for itself and gave back."""
    import torch

    history = torch.cuda.memory._record_memory_history
    history(max_entries=100_000, context=None, stacks="python", clear_history=True)
    result = call()
    torch.cuda.synchronize()
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    history(enabled=None)
    held = most = 0
    sizes: dict[int, int] = {}
    for event in trace:
        if event["action"] == "alloc":
            sizes[event["addr"]] = size = -(-event["size"] // 512) * 512
            held += size
            most = max(most, held)
        elif event["action"] == "free_requested":
            held -= sizes.pop(event["addr"], 0)
    return result, most - held


PARTS = {"context": context, "attention": attention}


if __name__ == "__main__":
    sys.exit(main())
