"""What a plan's scene shares between models and between plans: only what is equal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fitcheck import activations, catalog, resolve, scene, stays
from fitcheck.fit import fit
from fitcheck.model import Model


@pytest.fixture(scope="module")
def base() -> Model:
    return catalog.find_model("meta-llama/Llama-3.1-8B")


def test_a_base_and_its_tuning_share_their_tapes(base: Model) -> None:
    tuned = catalog.find_model("meta-llama/Llama-3.1-8B-Instruct")
    assert tuned != base
    assert scene._alike(tuned) is scene._alike(base)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral"},
        {"num_layers": 31},
        {"vocab_size": 128257},
        {"num_key_value_heads": 4},
        {"tie_word_embeddings": True},
        {"sliding_window": 4096},
        {"qk_norm": True},
        {"norm_type": "LayerNorm"},
    ],
)
def test_other_sizes_share_nothing(base: Model, change: dict[str, Any]) -> None:
    other = replace(base, **change)
    assert scene._alike(base) is not other
    assert scene._alike(other) is other


def test_caches_change_no_answer() -> None:
    """A plan asked in a fresh state, and asked after plans that share parts with it."""
    wishes = {"method": "ppo", "gpu": "a100", "tuning": "lora"}
    name = "meta-llama/Llama-3.1-8B-Instruct"
    for other in ({}, {"critic_tuning": "full"}, {"precision": "bf16"}, {"micro_batch": 2}):
        fit(resolve("meta-llama/Llama-3.1-8B", **wishes | other))
    warm = fit(resolve(name, **wishes)).to_json()
    scene._first.clear()
    cached = (activations.forward_peak, activations.training_cost, activations.inference_peak)
    for function in (*cached, activations.update_stages, scene._alike, stays.stays):
        function.cache_clear()
    assert fit(resolve(name, **wishes)).to_json() == warm
