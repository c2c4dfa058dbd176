"""Every architecture's layer on the tape against the layer that transformers has.

tests/data/cuda_layers.json was recorded on the CUDA build of PyTorch by tests/record_layers.py:
real operators, kernel choice and hidden workspaces. A dozen architectures are compared again with
transformers as installed, on meta tensors.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fitcheck import catalog
from fitcheck.activations import Shape, groups, training_cost
from fitcheck.decoder import Decoder, covered
from fitcheck.flows import FLOWS, Flow
from fitcheck.kernels import Card, attention_kernel
from fitcheck.layouts import LAYOUTS
from fitcheck.model import Model
from fitcheck.ops import BYTES, Setting

DATA: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "cuda_layers.json").read_text())
LAYERS: dict[str, Any] = DATA["layers"]
CARD = Card(tuple(DATA["capability"]), DATA["sms"])
# Of a layer's peaks; a tensor too many or too few shows, the smallest ones of a router do not.
TOLERANCE = 0.01
EXCEPT = {
    # Experts hand their input's fp32 on under autocast, which makes the stream fp32 from then on.
    ("phimoe", "bf16-autocast lora none sdpa"): "PEFT cannot run its router",
}


def two_layers(model: Model) -> Model:
    """As tests/record_layers.py cuts it."""
    moe, kinds = model.moe, sorted(model.kv_cache_groups or (), key=lambda g: g.window is None)[:2]
    if moe:
        dense = min(1, moe.dense_layers or 0)
        moe = moe._replace(dense_layers=dense, moe_layers=2 - dense, first_k_dense=dense)
    kept = tuple(group._replace(layers=2 // len(kinds)) for group in kinds)
    return replace(model, num_layers=2, moe=moe, kv_cache_groups=kept)


def setting(model: Model, how: str) -> Setting:
    """What roles.py makes of such a plan."""
    precision, tuning, padding, attention = how.split()
    dtype = precision.partition("-")[0]
    weight = 4 if precision.endswith("-mixed") else BYTES[dtype]
    gpu = catalog.find_gpu("NVIDIA A100-SXM4-80GB")
    choice = FLOWS[model.model_type].kernel or attention
    dim = model.head_dim or 0
    return Setting(
        compute=BYTES[dtype],
        weight=weight,
        stream=weight,
        autocast="-" in precision,
        trains=tuning == "full",
        kernel=attention_kernel(gpu, dtype, padding == "padded", dim, choice),
        masked_kernel=attention_kernel(gpu, dtype, True, dim, choice),
        masked=padding == "padded",
        adapter=4 if tuning == "lora" else 0,
        rank=DATA["rank"],
        card=CARD,
    )


def played(model: Model, how: Setting, rows: int, length: int) -> list[dict[str, int]]:
    """What the tape says of each layer, in the words of the recording."""
    found = []
    for count, kind, piece in groups(model, how, length):
        cost = training_cost(model, kind, Shape(rows, length), piece)
        first = training_cost(model, kind, Shape(rows, length), piece, first=True)
        figures = {
            **{"kept": cost.kept, "first": first.kept, "forward": cost.forward},
            **{"training": cost.training, "backward": cost.backward},
            **{"gradients": cost.gradients},
        }
        found += [figures] * count
    return found


def far_off(ours: dict[str, int], theirs: dict[str, int]) -> dict[str, tuple[int, int]]:
    """The figures that differ by more than TOLERANCE, and by more than 64 KiB."""
    return {
        name: (ours[name], value)
        for name, value in theirs.items()
        if abs(ours[name] - value) > max(TOLERANCE * value, 2**16)
    }


@pytest.mark.parametrize("how", sorted(LAYERS["llama"]["runs"]))
@pytest.mark.parametrize("model_type", sorted(LAYERS))
def test_layer_is_that_of_the_cuda_build(model_type: str, how: str) -> None:
    recorded = LAYERS[model_type]["runs"][how]
    model = two_layers(catalog.find_model(LAYERS[model_type]["model"]))
    if isinstance(recorded, str):
        assert (model_type, how) in EXCEPT, recorded
        return
    ours = played(model, setting(model, how), *DATA["shape"])
    for layer, figures in enumerate(recorded):
        theirs = dict(zip(DATA["fields"], figures, strict=True))
        assert not far_off(ours[layer], theirs), (model.id, layer)


def test_every_covered_architecture_was_recorded() -> None:
    """A flow that was compared with nothing covers nothing."""
    rows = {model.model_type for model in catalog.models() if model.is_verified}
    assert set(FLOWS) & rows == set(LAYERS)


def test_data_says_how_it_was_made() -> None:
    assert DATA["versions"]["torch"].startswith("2.13.0")
    assert DATA["versions"]["transformers"] and DATA["versions"]["peft"] and DATA["source"]


# --- the table of flows ---

METHODS = ("block", "norm", "attention", "rope", "mlp", "router", "expert_gate", "logits")


@pytest.mark.parametrize("model_type", sorted(FLOWS))
def test_flow_names_methods_that_exist(model_type: str) -> None:
    flow = FLOWS[model_type]
    for field in METHODS:
        name = getattr(flow, field)
        assert not name or callable(getattr(Decoder, name)), (field, name)
    assert flow.qk_norm in ("each", "all", "rotated", "wide")
    assert flow.scaled_queries in ("", "before", "after")
    assert model_type in LAYOUTS


def test_every_field_of_a_flow_is_used() -> None:
    for field in Flow._fields:
        values = {getattr(flow, field) for flow in FLOWS.values()}
        assert len(values) > 1, field


# --- what is covered ---


def test_covered_says_what_is_not() -> None:
    assert covered(catalog.find_model("meta-llama/Llama-3.1-8B")) == ""
    assert covered(catalog.find_model("LiquidAI/LFM2-350M")) == ""
    assert covered(catalog.find_model("databricks/dbrx-base")).startswith("the architecture dbrx (")
    assert covered(catalog.find_model("moonshotai/Kimi-K3")) == "the architecture kimi_k3"


def test_lora_that_peft_refuses_is_not_covered() -> None:
    phimoe = catalog.find_model("microsoft/Phi-tiny-MoE-instruct")
    assert covered(phimoe) == covered(phimoe, "lora", "attention") == ""
    assert "LoRA on all-linear" in covered(phimoe, "lora", "all-linear")
    assert "LoRA on attention" in covered(
        catalog.find_model("arcee-ai/Trinity-Nano-Preview"), "qlora", "attention"
    )


# --- against transformers as installed ---

INSTALLED = (
    *("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "olmo2"),
    *("cohere", "bloom", "mixtral"),
)


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", INSTALLED)
def test_layer_is_that_of_transformers(model_type: str) -> None:
    """bf16, full tuning: saved bytes and peaks on meta tensors, to the block of 512 bytes."""
    from contextlib import nullcontext

    import torch

    from fitcheck.bench.attention import as_on_cuda
    from fitcheck.bench.tracer import Tracer
    from tests import record_layers

    class TraceMeter:
        """What the dry run's tracer has seen."""

        def __init__(self, tracer: Tracer) -> None:
            self.events, self.done, self.now, self.top = tracer.events, 0, 0, 0
            self.sizes: dict[int, int] = {}

        def held(self) -> int:
            while self.done < len(self.events):
                size, name = self.events[self.done]
                if size > 0:
                    self.sizes[name] = size
                self.now += size if size > 0 else -self.sizes.pop(name, 0)
                self.top = max(self.top, self.now)
                self.done += 1
            return self.now

        def reset(self) -> None:
            self.top = self.held()

        def most(self) -> int:
            self.held()
            return self.top

    model = two_layers(catalog.find_model(LAYERS[model_type]["model"]))
    module = record_layers.build(model, torch.bfloat16, "meta", "sdpa", "full")
    ours = played(model, setting(model, "bf16 full none sdpa"), record_layers.ROWS, 256)
    tracer = Tracer(CARD)
    with as_on_cuda(CARD.capability), tracer:
        calls = record_layers.layer_calls(module, "meta", False, nullcontext, 256)
        for layer, (part, call, like) in enumerate(calls):
            record_layers.measured(TraceMeter(tracer), part, call, like, nullcontext)
            theirs = record_layers.measured(TraceMeter(tracer), part, call, like, nullcontext)
            assert not far_off(ours[layer], theirs), (model.id, layer)
