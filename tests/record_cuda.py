"""Record what the CUDA build of PyTorch allocates: tests/data/cuda_peaks.json.

    python tests/record_cuda.py             # on a machine with a CUDA card (or its stand-in)
    python tests/record_cuda.py --kernels   # the attention kernels of this card's capability alone
    python tests/record_cuda.py --steps     # cuda_steps.json: the runs of this card's capability

The committed file was recorded from the CUDA build of PyTorch 2.13.0, run on the host without a
card: its own operators, kernel choice and caching allocator, with nothing computed.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from fitcheck.bench.attention import implementation  # noqa: E402
from fitcheck.catalog import find_model  # noqa: E402
from fitcheck.gpu import GPU  # noqa: E402
from fitcheck.plan import Plan  # noqa: E402
from tests.cuda_steps import PeakRecorder, cut  # noqa: E402

DATA = Path(__file__).parent / "data" / "cuda_peaks.json"
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
aten = torch.ops.aten

# The plans of the steps that are recorded: the model, its number of layers, and the knobs.
PLANS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("Qwen/Qwen2.5-0.5B", 3, {"method": "sft", "sequence": 1024, "batch": 2}),
    ("Qwen/Qwen2.5-0.5B", 3, {"method": "sft", "sequence": 300, "batch": 2, "precision": "fp32"}),
    ("meta-llama/Llama-3.2-1B", 3, {"method": "sft", "sequence": 4096, "batch": 1}),
    (
        *("meta-llama/Llama-3.2-1B", 3),
        {"method": "sft", "precision": "bf16", "tuning": "lora", "batch": 2}
        | {"checkpointing": False},
    ),
    (
        *("Qwen/Qwen2.5-1.5B", 2),
        {"method": "sft", "padding": "padded", "loss": "chunked", "optimizer": "adamw-fused"},
    ),
    ("Qwen/Qwen2.5-0.5B", 3, {"method": "sft", "precision": "bf16-master", "attention": "eager"}),
    ("google/gemma-3-1b-it", 2, {"method": "sft", "precision": "bf16", "sequence": 1500}),
    ("Qwen/Qwen3-0.6B", 3, {"method": "sft", "attention": "flash", "padding": "padded"}),
    ("Qwen/Qwen2.5-0.5B", 3, {"method": "dpo", "sequence": 256, "batch": 2}),
    (
        *("meta-llama/Llama-3.2-1B", 3),
        {"method": "dpo", "sequence": 500, "tuning": "lora", "precision": "bf16", "batch": 2},
    ),
    ("Qwen/Qwen2.5-0.5B", 3, {"method": "reward", "sequence": 200, "micro_batch": 2}),
    (
        *("Qwen/Qwen2.5-0.5B", 2),
        {"method": "grpo", "prompt": 30, "response": 30, "group": 4, "precision": "bf16"},
    ),
    (
        *("Qwen/Qwen2.5-0.5B", 2),
        {"method": "ppo", "prompt": 64, "response": 40, "batch": 4, "micro_batch": 2, "epochs": 2},
    ),
    (
        *("Qwen/Qwen2.5-0.5B", 2),
        {"method": "ppo", "prompt": 64, "response": 40, "batch": 4, "tuning": "lora"}
        | {"padding": "none", "checkpointing": False},
    ),
    (
        *("meta-llama/Llama-3.2-1B", 2),
        {"method": "ppo", "prompt": 100, "response": 60, "batch": 16, "micro_batch": 4}
        | {"precision": "bf16", "empty_cache": True, "epochs": 1},
    ),
    (
        *("Qwen/Qwen2.5-0.5B", 2),
        {"method": "ppo", "prompt": 64, "response": 40, "batch": 4, "critic": "shared"},
    ),
)


def plan_of(name: str, layers: int, knobs: dict[str, Any]) -> Plan:
    """One of PLANS, for an A100 of 80 GB."""
    card = GPU.from_json(
        {"id": "a100", "name": "A100", "vendor": "nvidia", "arch": "Ampere", "memory_gib": 80}
        | {"segment": "datacenter", "sources": ["test"], "checked": "2026-11-27"}
        | {"compute_capability": "8.0", "sm_count": 108}
    )
    return Plan(model=cut(find_model(name), layers), gpu=card, **knobs)


def attention_case(
    dtype: torch.dtype, shape: tuple[int, int, int, int, int], masked: bool, back: bool
) -> Callable[[str], Callable[[], Any]]:
    """Scaled dot product attention on [batch, heads, kv heads, tokens, D], forward or backward."""

    def case(device: str) -> Callable[[], Any]:
        batch, heads, groups, tokens, width = shape
        size = (batch, tokens, heads, width)
        query = torch.empty(size, dtype=dtype, device=device).transpose(1, 2).requires_grad_(back)
        size = (batch, tokens, groups, width)
        key, value = (
            torch.empty(size, dtype=dtype, device=device).transpose(1, 2).requires_grad_(back)
            for _ in "kv"
        )
        mask = None
        if masked:
            mask = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool, device=device)

        def forward() -> Tensor:
            return F.scaled_dot_product_attention(
                *(query, key, value, mask), is_causal=mask is None, enable_gqa=heads != groups
            )

        if not back:
            return forward
        out = forward()
        gradient = torch.empty_like(out)
        inputs = (query, key, value)
        return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)

    return case


def _on(device: str, *shape: int, dtype: torch.dtype = bf16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=device)


def _ids(device: str, *shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64, device=device)


def _sum(*shape: int, dims: Any, dtype: torch.dtype = bf16) -> Callable[[str], Any]:
    def case(device: str) -> Callable[[], Any]:
        x = _on(device, *shape, dtype=dtype)
        return lambda: x.sum(dims)

    return case


def _embedding(tokens: int, width: int, rows: int) -> Callable[[str], Any]:
    def case(device: str) -> Callable[[], Any]:
        gradient, ids = _on(device, tokens, width), _ids(device, tokens)
        return lambda: aten.embedding_dense_backward(gradient, ids, rows, -1, False)

    return case


def _rows(call: Callable[[Tensor], Any], *shape: int, dtype: torch.dtype = fp32) -> Any:
    def case(device: str) -> Callable[[], Any]:
        x = _on(device, *shape, dtype=dtype)
        return lambda: call(x)

    return case


def _norms(device: str) -> Callable[[], Any]:
    weights = [_on(device, 5000, 2000) for _ in range(3)]
    return lambda: torch._foreach_norm(weights)


def _softmax_backward(device: str) -> Callable[[], Any]:
    x = _on(device, 64, 4096, dtype=fp32)
    return lambda: aten._softmax_backward_data(x, x, -1, fp32)


def _adam(device: str) -> Callable[[], Any]:
    weights = [torch.nn.Parameter(_on(device, 500, 300)) for _ in range(4)]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    optimizer = torch.optim.AdamW(weights, foreach=True)
    optimizer.step()
    return optimizer.step


def _meeting_gradients(device: str) -> Callable[[], Any]:
    """A weight that is used twice: the second gradient is added into the first."""
    x = _on(device, 256, 512).requires_grad_()
    out = x * 2 + x * 3
    gradient = torch.empty_like(out)
    return lambda: torch.autograd.grad(out, x, gradient, retain_graph=True)


def _one_head(tokens: int, keys: int, back: bool = False) -> Callable[[str], Callable[[], Any]]:
    """Queries of eight heads on one head of keys, without enable_gqa: Falcon's attention."""

    def case(device: str) -> Callable[[], Any]:
        query, key = _on(device, 4, 8, tokens, 64), _on(device, 4, 1, keys, 64)
        mask = _on(device, 4, 1, tokens, keys)
        inputs = [x.requires_grad_(back) for x in (query, key, torch.empty_like(key))]
        if not back:
            return lambda: F.scaled_dot_product_attention(*inputs, mask)
        out = F.scaled_dot_product_attention(*inputs, mask)
        gradient = torch.empty_like(out)
        return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)

    return case


OPERATORS: dict[str, Callable[[str], Callable[[], Any]]] = {
    "one head of keys, one token": _one_head(1, 200),
    "one head of keys": _one_head(200, 200),
    "one head of keys, backward": _one_head(200, 200, back=True),
    "sum of a norm's gradient, bf16": _sum(2, 512, 1024, dims=(0, 1)),
    "sum over 4096 tokens": _sum(4096, 4096, dims=0),
    "sum over tokens, fp32": _sum(1, 2048, 896, dims=(0, 1), dtype=fp32),
    "sum over many tokens, fp32": _sum(8192, 1024, dims=0, dtype=fp32),
    "sum of more than 32-bit indices reach": _sum(70_000, 16_384, dims=0),
    "sum of an odd width": _sum(5000, 130, dims=0, dtype=fp32),
    "sum along rows": _sum(2, 512, 1024, dims=-1, dtype=fp32),
    "sum of a vector": _sum(100_000, dims=0, dtype=fp32),
    "sum over heads": _sum(2, 4, 4, 512, 64, dims=2),
    "embedding of 3072 tokens": _embedding(3072, 896, 1000),
    "embedding of 8192 tokens": _embedding(8192, 896, 1000),
    "embedding of few of many rows": _embedding(4000, 896, 50_000),
    "cumsum of a mask": _rows(lambda x: x.bool().cumsum(-1), 4, 100),
    "multinomial": _rows(lambda x: torch.multinomial(x, 1), 8, 152_064),
    "softmax in fp32": _rows(lambda x: torch.softmax(x, -1, dtype=fp32), 8, 4096, dtype=bf16),
    "log-softmax": _rows(lambda x: torch.log_softmax(x, -1), 512, 32_000),
    "argmax": _rows(lambda x: x.argmax(-1), 8, 152_064),
    "norms of weights": _norms,
    "softmax backward": _softmax_backward,
    "AdamW, foreach": _adam,
    "two gradients of one tensor": _meeting_gradients,
    **{
        f"{'backward' if back else 'forward'} of {str(dtype)[6:]} attention {shape}"
        + (", masked" if masked else ""): attention_case(dtype, shape, masked, back)
        for dtype in (bf16, fp32)
        for shape in (
            (2, 8, 8, 128, 64),
            (2, 8, 2, 128, 64),
            (2, 8, 8, 100, 64),
            (2, 8, 8, 128, 60),
            (1, 4, 1, 64, 256),
            (2, 8, 2, 300, 128),
            (1, 2, 2, 2000, 128),
            (4, 32, 32, 600, 80),
        )
        for masked in (False, True)
        for back in (False, True)
        if not (masked and shape[1] != shape[2])  # transformers repeats the heads before
    },
}


def kernel_grid() -> Iterator[tuple[Any, ...]]:
    """(type, D, kv heads, queries, keys, masked, causal, gradient) that choose a kernel."""
    for dtype in (bf16, fp16, fp32):
        for width in (32, 40, 60, 64, 72, 80, 96, 128, 160, 192, 200, 224, 256, 320, 512):
            for groups in (8, 2):
                for tokens, keys in ((128, 128), (1, 128), (64, 128), (1, 1)):
                    for masked, causal in ((False, False), (False, True), (True, False)):
                        for gradient in (False, True):
                            yield dtype, width, groups, tokens, keys, masked, causal, gradient


def record_kernels() -> str:
    """A digit for each of `kernel_grid`, of SDPBackend: 0 math, 1 flash, 2 efficient, 3 cuDNN."""
    digits = []
    for dtype, width, groups, tokens, keys, masked, causal, gradient in kernel_grid():
        query = _on("cuda", 2, 8, tokens, width, dtype=dtype).requires_grad_(gradient)
        key = _on("cuda", 2, groups, keys, width, dtype=dtype).requires_grad_(gradient)
        mask = _on("cuda", 2, 1, tokens, keys, dtype=torch.bool) if masked else None
        choice = torch._fused_sdp_choice(
            query, key, key, attn_mask=mask, is_causal=causal, enable_gqa=groups != 8
        )
        digits.append(str(choice))
    return "".join(digits)


def record_operator(case: Callable[[str], Callable[[], Any]]) -> int:
    """The most that one call holds at a time, in 512-byte blocks; its outputs included."""
    call = case("cuda")
    call()  # whatever is allocated once
    gc.collect()
    history = torch.cuda.memory._record_memory_history
    history(enabled=None)
    history(max_entries=100_000, context=None, stacks="python")
    call()
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
    return most


def record_step(plan: Plan) -> dict[str, list[int]]:
    """Peaks of the phases of a plan's second step."""
    from transformers import masking_utils

    from fitcheck.bench import roles, steps

    # Where nothing is computed all values read 0, and transformers would see packed rows.
    found = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda ids: (found(ids), None)[1]
    built = roles.build(plan, torch.device("cuda"), implementation(plan.attention))
    for _ in range(2):
        recorder = PeakRecorder()
        steps.run_step(plan, built, recorder)
    masking_utils.find_packed_sequence_indices = found
    return recorder.peaks


def main() -> None:
    import peft
    import transformers

    data = json.loads(DATA.read_text()) if DATA.exists() else {}
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    data.setdefault("kernels", {})[capability] = record_kernels()
    if "--kernels" not in sys.argv:
        data |= {
            "source": "recorded from the CUDA build of PyTorch, run on the host (record_cuda.py)",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__}
            | {"peft": peft.__version__},
            "checked": "2026-11-27",
            "capability": capability,
            "sms": torch.cuda.get_device_properties(0).multi_processor_count,
            "operators": {name: record_operator(case) for name, case in OPERATORS.items()},
            "steps": [
                {"model": name, "layers": layers, "knobs": knobs} | {"peaks": run_alone(number)}
                for number, (name, layers, knobs) in enumerate(PLANS)
            ],
        }
    DATA.write_text(json.dumps(data, indent=1) + "\n")


def run_alone(number: int) -> dict[str, list[int]]:
    """One of PLANS in a process of its own: the allocator starts empty."""
    import subprocess

    done = subprocess.run(
        [sys.executable, __file__, "--plan", str(number)], stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if "--steps" in sys.argv:
        from tests.cuda_steps import record

        record()
    elif "--plan" in sys.argv:
        print(json.dumps(record_step(plan_of(*PLANS[int(sys.argv[-1])]))))
    else:
        main()
