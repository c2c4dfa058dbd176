"""Real steps on the CUDA build of PyTorch: their peaks phase by phase, and what a limit does.

The plans and the recorded answers are tests/data/cuda_steps.json; record_cuda.py writes the answers
anew. A run has a `plan`; `card`, the compute capability; `layers`, where the model is cut to fewer;
`peaks`, for each phase of the second step [allocated, reserved]; and, where near its limit is of
interest, `limits`: [bytes that the driver has, expandable segments?, outcome]. The limits are the
edges that were found on the card itself: the least that fits and 2 MiB less, the least that does
after cache flushes and 2 MiB less.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fitcheck import resolve
from fitcheck.bench import roles, steps
from fitcheck.bench.attention import implementation
from fitcheck.bench.recorder import Recorder
from fitcheck.gpu import GPU
from fitcheck.model import Model
from fitcheck.plan import Plan

DATA = Path(__file__).parent / "data" / "cuda_steps.json"
MIB = 2**20
PAGE = 2 * MIB  # what the allocator asks the driver for is a multiple of it
SMS = 108  # of the card that the answers were recorded on, whatever its capability

Run = dict[str, Any]


def plan_of(run: Run) -> Plan:
    """The plan of a recorded run, on a card of its capability."""
    fields = dict(run["plan"])
    plan = resolve(fields.pop("model"), gpu=card(run["card"]), **fields)
    if "layers" not in run:
        return plan
    changed = {"model": cut(plan.model, run["layers"])}
    return replace(plan, **changed)


def card(capability: str) -> GPU:
    """An 80 GB card of that compute capability, with the multiprocessors of an A100."""
    arch = {"7": "Turing", "8": "Ampere", "9": "Hopper"}[capability[0]]
    return GPU.from_json(
        {"id": "card", "name": "card", "vendor": "nvidia", "arch": arch, "memory_gib": 80}
        | {"segment": "datacenter", "sources": ["test"], "checked": "2026-11-27"}
        | {"compute_capability": capability, "sm_count": SMS}
    )


def cut(whole: Model, layers: int) -> Model:
    """A model of the catalog with fewer layers."""
    head = whole.params_embedding * (1 if whole.tie_word_embeddings else 2)
    layer = (whole.params - head - whole.hidden_size) // whole.num_layers
    return replace(
        whole,
        params=whole.params - layer * (whole.num_layers - layers),
        num_layers=layers,
        kv_cache_groups=None,
        layer_type_counts=None,
    )


class PeakRecorder(Recorder):
    """The allocator's own peaks, phase by phase: [allocated, reserved]."""

    def __init__(self) -> None:
        self.peaks: dict[str, list[int]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats()
        yield
        peak = self.peaks.setdefault(name, [0, 0])
        peak[0] = max(peak[0], torch.cuda.max_memory_allocated())
        peak[1] = max(peak[1], torch.cuda.max_memory_reserved())


def run_steps(plan: Plan, recorders: Sequence[Recorder]) -> None:
    """Build a plan's roles on this card and run a step for each recorder."""
    from transformers import masking_utils

    # Where nothing is computed all values read 0, and transformers would see packed rows.
    found = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda ids: (found(ids), None)[1]
    built = roles.build(plan, torch.device("cuda"), implementation(plan.attention))
    for recorder in recorders:
        steps.run_step(plan, built, recorder)


def peaks(run: Run) -> dict[str, list[int]]:
    """Of each phase of the second step: [allocated, reserved]."""
    recorder = PeakRecorder()
    run_steps(plan_of(run), [Recorder(), recorder])
    return recorder.peaks


def outcome(run: Run, limit: int | None, expandable: bool) -> tuple[str, int]:
    """What two steps come to where the driver has `limit` bytes; the most ever reserved."""
    torch.cuda.init()
    if expandable:
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    if limit is not None:
        take_all_but(limit)
    try:
        run_steps(plan_of(run), [Recorder(), Recorder()])
    except torch.OutOfMemoryError:
        return "does-not-fit", torch.cuda.max_memory_reserved()
    retries = torch.cuda.memory_stats()["num_alloc_retries"]
    return ("tight" if retries else "fits"), torch.cuda.max_memory_reserved()


def take_all_but(limit: int) -> None:
    """Leave the driver that many bytes: the rest is taken past PyTorch's allocator."""
    rest = (torch.cuda.mem_get_info()[0] - limit) // PAGE * PAGE
    address = ctypes.c_void_p()
    fault = ctypes.CDLL(None).cudaMalloc(ctypes.byref(address), ctypes.c_size_t(rest))
    assert fault == 0 and 0 <= torch.cuda.mem_get_info()[0] - limit < PAGE


def edges(run: Run, expandable: bool) -> list[list[Any]]:
    """[limit, expandable, outcome] on both sides of fits | tight and of tight | does-not-fit."""
    _, enough = alone(outcome, run, None, expandable)
    fails = max(allocated for allocated, _ in run["peaks"].values()) // PAGE * PAGE - PAGE
    works = enough
    known = [limit for limit, kind, _ in run["limits"] if kind == expandable]
    guesses = known[-2:]  # where the edge was when last recorded
    while works - fails > PAGE:
        middle = guesses.pop() if guesses else (fails + works) // 2 // PAGE * PAGE
        if not fails < middle < works:
            continue
        if alone(outcome, run, middle, expandable)[0] == "does-not-fit":
            fails = middle
        else:
            works = middle
    limits = sorted({enough, enough - PAGE, works, fails}, reverse=True)
    return [[limit, expandable, alone(outcome, run, limit, expandable)[0]] for limit in limits]


def alone(call: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a process of its own, whose allocator starts empty."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(call, args)


def record() -> None:
    """Write the answers of every run of this card's capability anew."""
    import peft
    import transformers

    data = json.loads(DATA.read_text())
    capability = ".".join(map(str, alone(torch.cuda.get_device_capability)))
    for run in data["runs"]:
        if run["card"] != capability:
            continue
        print(run["plan"], flush=True)
        run["peaks"] = alone(peaks, run)
        if "limits" in run:
            run["limits"] = [*edges(run, False), *edges(run, True)]
    data |= {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}
        | {"peft": peft.__version__},
        "checked": f"{date.today()}",
    }
    runs = ",\n".join(f" {json.dumps(run)}" for run in data.pop("runs"))
    head = json.dumps(data, indent=1)[:-2]
    DATA.write_text(f'{head},\n "runs": [\n{runs}\n ]\n}}\n')
