"""Record what one decoder layer of every architecture allocates: tests/data/cuda_layers.json.

    python tests/record_layers.py            # on a machine with a CUDA card (or its stand-in)
    python tests/record_layers.py gemma2     # some architectures, beside those recorded before

The committed file was recorded from the CUDA build of PyTorch 2.13.0 and transformers 5.24.0, run
on the host without a card: real operators and kernel choice, with nothing computed. Two layers of
the smallest catalog model of an architecture are built: one with a window or without experts first,
where it has such layers. Bytes are those that the code asks for.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from fitcheck.bench.configs import config_from  # noqa: E402
from fitcheck.bench.listed import config_of  # noqa: E402
from fitcheck.bench.precision import DTYPES  # noqa: E402
from fitcheck.catalog import models  # noqa: E402
from fitcheck.errors import FitCheckError  # noqa: E402
from fitcheck.flows import FLOWS  # noqa: E402
from fitcheck.model import Model  # noqa: E402
from fitcheck.weights import has_closed_form  # noqa: E402
from tests.test_model_oracle import shortened  # noqa: E402

DATA = Path(__file__).parent / "data" / "cuda_layers.json"
ROWS, LENGTH, RANK = 2, 1024, 16
# precision, tuning, padding, attention
SETTINGS = (
    *("bf16 full none sdpa", "bf16-mixed full none sdpa", "bf16-mixed full padded sdpa"),
    *("bf16-autocast lora none sdpa", "fp32 full none sdpa", "bf16 full none eager"),
)
FIELDS = ("kept", "first", "forward", "training", "backward", "gradients")
TOWERS = ("vision", "visual", "expert", "norms")  # lists of modules that are not the decoder


def smallest() -> dict[str, Model]:
    """Of each architecture that the estimate covers, the smallest model that is verified."""
    found: dict[str, Model] = {}
    for model in sorted((m for m in models() if m.is_verified), key=lambda m: m.params):
        if model.model_type in FLOWS and has_closed_form(model):
            found.setdefault(model.model_type, model)
    return found


def cut(model: Model) -> Model:
    """Two layers of it; of those with a window and those without, one each."""
    short = shortened(model)
    groups = sorted(model.kv_cache_groups or (), key=lambda group: group.window is None)[:2]
    layers = 2 if len(groups) == 1 else 1
    kept = tuple(group._replace(layers=layers) for group in groups)
    return replace(short, kv_cache_groups=kept, layer_type_counts=None)


def build(model: Model, dtype: torch.dtype, device: str, attention: str, tuning: str) -> Any:
    """The transformers class of the model on the device, with LoRA on all its linear layers."""
    import transformers
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    try:
        config = config_from(model)
    except FitCheckError:  # more than a language model: its decoder is what counts here
        config = config_of(model)
    text = config.get_text_config()
    if len(model.kv_cache_groups or ()) == 2 and hasattr(text, "layer_types"):
        text.layer_types = ["sliding_attention", "full_attention"]
    if model.attention.kv_lora_rank is not None:
        text.head_dim = text.qk_rope_head_dim  # the part of a head that is rotated
    if model.moe is not None:
        text.num_experts_per_tok = model.moe.experts_per_token
    kind = getattr(transformers, model.architecture_class or "")
    if attention == "sdpa" and not kind._supports_sdpa:
        attention = "eager"
    with torch.device(device):
        module = kind._from_config(config, dtype=dtype, attn_implementation=attention)
        if tuning == "lora":
            module.requires_grad_(False)
            transposed = any(isinstance(m, Conv1D) for m in module.modules())
            lora = LoraConfig(r=RANK, target_modules="all-linear", fan_in_fan_out=transposed)
            inject_adapter_in_model(lora, module)
            for name, parameter in module.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.float()
    return module.train()


def layers_of(module: nn.Module) -> nn.ModuleList:
    """The decoder's layers."""
    lists = [
        (path, child)
        for path, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and not any(tower in path for tower in TOWERS)
    ]
    return min(lists, key=lambda found: len(found[0]))[1]


class Meter(Protocol):
    """Bytes of tensors alive, and the most of them since `reset`."""

    def reset(self) -> None: ...
    def held(self) -> int: ...
    def most(self) -> int: ...


class CudaMeter:
    """The caching allocator's own count of what was asked for."""

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def held(self) -> int:
        return int(torch.cuda.memory_stats()["requested_bytes.all.current"])

    def most(self) -> int:
        return int(torch.cuda.memory_stats()["requested_bytes.all.peak"])


class Seed(torch.autograd.Function):
    """Where backward begins: makes the gradient of a layer's output, then lets it go."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = (x.shape, x.dtype, x.device)
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        shape, dtype, device = ctx.like
        return torch.empty(shape, dtype=dtype, device=device)


Region = Callable[[], AbstractContextManager[Any]]


def measured(
    meter: Meter, layer: nn.Module, call: Callable[[Tensor], Any], like: Tensor, region: Region
) -> dict[str, int]:
    """Peaks and kept bytes of one layer, its input included, in the words of activations.Cost."""
    found: dict[str, int] = {}
    with region(), torch.no_grad():
        before = call(torch.empty_like(like))
    before = before[1:] if isinstance(before, tuple) else None
    with region(), torch.no_grad():  # a model holds what the layer before returned
        base = meter.held() - held_by(before)
        meter.reset()
        call(torch.empty_like(like))
        found["forward"] = meter.most() - base
        del before
    for first in (False, True):
        leaf = torch.empty_like(like).requires_grad_(not first)
        base = meter.held()
        meter.reset()
        with region():
            x = leaf.clone() if not first else torch.empty_like(like)
            y = call(x)
            y = y[0] if isinstance(y, tuple) else y
        peak = meter.most() - base
        edge = torch.autograd.graph.get_gradient_edge(Seed.apply(y))  # type: ignore[no-untyped-call]
        del x, y
        if first:
            found["first"] = meter.held() - base
            del edge
            continue
        found |= {"training": peak, "kept": meter.held() - base}
        meter.reset()
        torch.autograd.backward([edge], [torch.empty((), device=like.device)])
        del edge
        found["backward"] = meter.most() - base
        made = [p.grad for p in layer.parameters() if p.grad is not None]
        found["gradients"] = sum(gradient.nbytes for gradient in made)
        for parameter in layer.parameters():
            parameter.grad = None
        del made
    return found


def held_by(returned: Any) -> int:
    return sum(t.nbytes for t in returned or () if isinstance(t, Tensor))


def layer_calls(
    module: Any, device: str, padded: bool, region: Region, length: int = LENGTH
) -> Iterator[tuple[nn.Module, Callable[[Tensor], Any], Tensor]]:
    """Each layer, a call of it as the model calls it, and a tensor like its input."""
    seen: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    layers = layers_of(module)
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: seen.__setitem__(i, (args, kwargs)), with_kwargs=True
        )
        for i, layer in enumerate(layers)
    ]
    ids = torch.zeros(ROWS, length, dtype=torch.long, device=device)
    options: dict[str, Any] = {"use_cache": False}
    if padded:
        options["attention_mask"] = torch.ones_like(ids)
        if "position_ids" in signature(module.forward).parameters:
            options["position_ids"] = torch.zeros_like(ids)
    with torch.no_grad(), region():
        module.base_model(ids, **options)
    for hook in hooks:
        hook.remove()
    for i, layer in enumerate(layers):
        args, kwargs = seen[i]
        like = args[0] if args else kwargs.pop("hidden_states")
        rest = args[1:]
        yield layer, lambda x, layer=layer, rest=rest, kw=kwargs: layer(x, *rest, **kw), like


def record(model: Model, setting: str) -> list[list[int]] | str:
    """FIELDS of each layer, on CUDA; or why it cannot run."""
    precision, tuning, padding, attention = setting.split()
    low = DTYPES[precision.partition("-")[0]]
    dtype = torch.float32 if precision.endswith("-mixed") else low

    def region() -> AbstractContextManager[Any]:
        return torch.autocast("cuda", dtype=low) if "-" in precision else nullcontext()

    try:
        module = build(cut(model), dtype, "cuda", attention, tuning)
        calls = layer_calls(module, "cuda", padding == "padded", region)
        found = []
        for layer, call, like in calls:
            measured(CudaMeter(), layer, call, like, region)  # cuBLAS takes its workspace
            figures = measured(CudaMeter(), layer, call, like, region)
            found.append([figures[field] for field in FIELDS])
        return found
    except AttributeError as fault:
        return f"{type(fault).__name__}: {fault}"


@contextmanager
def as_unpadded() -> Iterator[None]:
    """The stand-in for a card reads zeros, which transformers takes for packed sequences."""
    from transformers import masking_utils

    real = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = real


def main(names: list[str]) -> None:
    import peft
    import transformers

    data = json.loads(DATA.read_text()) if DATA.exists() and names else {"layers": {}}
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    data |= {
        "source": "tests/record_layers.py on the CUDA build of PyTorch, run on the host",
        "versions": versions,
        "capability": list(torch.cuda.get_device_capability()),
        "sms": torch.cuda.get_device_properties(0).multi_processor_count,
        "shape": [ROWS, LENGTH],
        "rank": RANK,
        "fields": FIELDS,
    }
    with as_unpadded():
        for name, model in smallest().items():
            if names and name not in names:
                continue
            runs = {setting: record(model, setting) for setting in SETTINGS}
            data["layers"][name] = {"model": model.id, "runs": runs}
            print(name, model.id, flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            DATA.write_text(as_json(data))


def as_json(data: dict[str, Any]) -> str:
    """One architecture a line."""
    layers = data.pop("layers")
    head = json.dumps(data, indent=1)[1:-2]
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(layers.items()))
    data["layers"] = layers
    return f'{{{head},\n "layers": {{\n{lines}\n }}\n}}\n'


if __name__ == "__main__":
    main(sys.argv[1:])
