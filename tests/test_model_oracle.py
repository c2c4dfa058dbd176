"""`weights()` against transformers: the class itself on the meta device, tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fitcheck.bench.listed import config_of
from fitcheck.model import Model
from fitcheck.weights import has_closed_form, weights

pytestmark = pytest.mark.oracle

ROOT = Path(__file__).parents[1] / "catalog" / "models"
PREFIX = re.compile(r"^(model\.|language_model\.|transformer\.|gpt_neox\.|decoder\.|backbone\.)+")
LAYER = re.compile(r"^(layers|h|blocks)\.\d+\.")
TOWER = re.compile(r"vision|visual|projector|tower|embed_audio")

# Of the architectures whose rows list their tensors, those that a row's fields rebuild.
LISTED = (
    *("falcon_h1", "falcon_mamba", "granite_swa", "granitemoehybrid", "lfm2"),
    *("lfm2_moe", "mamba", "mimo_v2_flash", "muse_glimmer", "nemotron_h", "olmo_hybrid"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_next", "recurrent_gemma"),
)
# Full size: no layer left out. A family each of dense, tied, vision, mixture, latent attention.
WHOLE = (
    *("openai-community/gpt2", "facebook/opt-350m", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B"),
    *("google/gemma-2-9b", "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3", "openai/gpt-oss-20b"),
)


@cache
def models() -> dict[str, Model]:
    files = (path for path in ROOT.glob("*.json") if path.name != "index.json")
    rows = (row for path in files for row in json.loads(path.read_text("utf-8"))["models"])
    return {row["id"]: Model.from_json(row) for row in rows}


def closed() -> dict[str, list[Model]]:
    """The models with a closed form by model_type."""
    found: dict[str, list[Model]] = {}
    for model in models().values():
        if has_closed_form(model):
            found.setdefault(model.model_type, []).append(model)
    return found


def distinct(group: list[Model]) -> Iterator[Model]:
    """One model of each architecture: fine-tunes repeat the sizes of their base."""
    seen = set()
    for model in group:
        tensors = weights(shortened(model))
        if tensors not in seen:
            seen.add(tensors)
            yield model


def loaded(model: Model) -> Any:
    """The class of `model` as transformers builds it, without storage."""
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, model.architecture_class or "")._from_config(config_of(model))


def tensors_of(module: Any) -> Counter[tuple[str, tuple[int, ...], str]]:
    """(name, shape, kind) of every parameter outside the towers, as `weights()` tells them."""
    modules = dict(module.named_modules())
    head = module.get_output_embeddings()
    found: Counter[tuple[str, tuple[int, ...], str]] = Counter()
    for path, parameter in module.named_parameters():
        if TOWER.search(path):
            continue
        owner, _, last = path.rpartition(".")
        name = re.sub(r"\.\d+(?=\.|$)", "", LAYER.sub("", PREFIX.sub("", path)))
        kind = "head" if modules[owner] is head else kind_of(modules[owner], last)
        found[name.removesuffix(".weight"), tuple(parameter.shape), kind] += 1
    return found


def kind_of(owner: Any, name: str) -> str:
    """What PEFT, bitsandbytes and an optimizer can tell apart: the class of the module."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(owner, nn.Embedding):
        return "embedding"
    if isinstance(owner, (nn.Linear, Conv1D)):
        return "linear" if name == "weight" else "bias"
    return "norm" if "Norm" in type(owner).__name__ else "bare"


KIND = {"position": "embedding", "expert": "bare", "router": "bare", "other": "bare"}


def told(model: Model) -> Counter[tuple[str, tuple[int, ...], str]]:
    """`weights(model)` in the terms of `tensors_of`."""
    found: Counter[tuple[str, tuple[int, ...], str]] = Counter()
    for weight in weights(model):
        kind = KIND.get(weight.kind, weight.kind)
        kind = "bare" if ".experts." in weight.name and kind == "bias" else kind
        if kind != "tower":
            found[weight.name, weight.shape, kind] += weight.copies
    return found


@pytest.mark.parametrize("model_type", sorted(closed()))
def test_tensors_of_every_architecture(model_type: str) -> None:
    """Every distinct architecture of the catalog with a closed form, two layers of it."""
    for model in distinct(closed()[model_type]):
        short = shortened(model)
        assert tensors_of(loaded(short)) == told(short), model.id


@pytest.mark.parametrize("id", WHOLE)
def test_tensors_of_whole_models(id: str) -> None:
    model = models()[id]
    assert tensors_of(loaded(model)) == told(model)


@pytest.mark.parametrize("model_type", LISTED)
def test_tensors_that_rows_list(model_type: str) -> None:
    """Whole, too; what the fields of a row do not say (a latent's width) is left to its total."""
    listed = [m for m in models().values() if m.tensors and m.model_type == model_type]
    assert listed
    for model in {model.tensors: model for model in listed}.values():
        if not (model.moe and model.moe.routed_expert_hidden_size):
            assert tensors_of(loaded(model)) == told(model), model.id


@pytest.mark.parametrize(
    "id",
    (
        *("meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.1", "google/gemma-2-9b"),
        *("mistralai/Mistral-7B-Instruct-v0.2", "google/gemma-3-27b-it", "openai/gpt-oss-20b"),
        *("EleutherAI/gpt-neo-125m", "deepseek-ai/DeepSeek-V3", "Qwen/Qwen3.5-4B"),
        *("CohereLabs/c4ai-command-r7b-12-2024", "LiquidAI/LFM2-1.2B"),
        *("allenai/Olmo-3-1025-7B", "microsoft/Phi-3-mini-4k-instruct"),
    ),
)
def test_cache_groups_are_those_of_the_cache(id: str) -> None:
    """How many layers keep every token and how many a window, as transformers' own cache does."""
    from transformers import DynamicCache

    model = models()[id]
    layers = DynamicCache(config=config_of(model)).layers
    kept = Counter(getattr(layer, "sliding_window", None) for layer in layers if is_kv(layer))
    groups = model.kv_cache_groups or ()
    assert kept == sum((Counter({g.window: g.layers}) for g in groups), Counter())


def is_kv(layer: Any) -> bool:
    return "Linear" not in type(layer).__name__


def shortened(model: Model, layers: int = 2) -> Model:
    """The same architecture with fewer layers, a dense one first where the mixture has any."""
    moe = model.moe
    if moe:
        dense = min(1, moe.dense_layers or 0)
        moe = moe._replace(dense_layers=dense, moe_layers=layers - dense, first_k_dense=dense)
    return dataclasses.replace(model, num_layers=layers, moe=moe)
