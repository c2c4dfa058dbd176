"""The three readers on what nobody meant to be read: always a Model or a FitCheckError.

`make fuzz` tries 100,000 inputs; the suite a few hundred of the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from checkpoints import LLAMA, folder, safetensors, tensors_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_gguf import written

from fitcheck import catalog
from fitcheck.checkpoint import safetensors_header, shards, weighed
from fitcheck.config import NAMES, model_from
from fitcheck.errors import FitCheckError
from fitcheck.folder import is_hub_id
from fitcheck.gguf import ARCHITECTURES, gguf_header, gguf_model
from fitcheck.hub import local
from fitcheck.model import Model
from fitcheck.weights import has_weights, weights

INPUTS = int(os.environ.get("FUZZ", "0")) or 150
often = settings(
    max_examples=INPUTS,
    deadline=None,
    derandomize=INPUTS <= 150,
    database=None,
    suppress_health_check=list(HealthCheck),
)

KEYS = (*NAMES, "model_type", "text_config", "layer_types", "mlp_layer_types", "mlp_only_layers")
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["sliding_attention", "full_attention", "dense", "sparse"])
)
values = st.recursive(
    scalars,
    lambda v: st.lists(v, max_size=6) | st.dictionaries(st.sampled_from(KEYS), v, max_size=6),
)
types = sorted(json.loads(Path("catalog/configs.json").read_text())["configs"]) + ["qwen3_next"]
changes = st.dictionaries(st.sampled_from(KEYS), values, max_size=6)


def outcome(run: Callable[[], Model]) -> None:
    """A Model whose tensors add up, or a FitCheckError: nothing else passes."""
    with suppress(FitCheckError):
        model = run()
        assert isinstance(model, Model)
        assert type(model.params) is int and model.params > 0
        if has_weights(model):
            assert sum(w.params for w in weights(model)) > 0
        assert Model.from_json(json.loads(json.dumps(model.to_json()))) == model


@often
@given(st.sampled_from(types), changes)
def test_any_config_is_a_model_or_an_error(model_type: str, change: dict[str, Any]) -> None:
    outcome(lambda: model_from(LLAMA | {"model_type": model_type} | change, "x"))


@often
@given(values)
def test_any_json_is_a_model_or_an_error(value: Any) -> None:
    outcome(lambda: model_from(value, "x"))
    with suppress(FitCheckError):
        shards(value, "x")


def changed(data: bytes, edits: list[tuple[int, bytes]], cut: int) -> bytes:
    """The data with some bytes written over, then cut off."""
    found = bytearray(data)
    for at, piece in edits:
        at %= len(found) + 1
        found[at : at + len(piece)] = piece
    return bytes(found[: len(found) - cut % 300]) if cut else bytes(found)


edits = st.lists(
    st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=12)), min_size=1, max_size=6
)
cuts = st.just(0) | st.integers(0, 10**6)


@often
@given(edits, cuts, values)
def test_any_safetensors_is_a_model_or_an_error(
    edits: list[tuple[int, bytes]], cut: int, quantization: Any
) -> None:
    data = changed(safetensors(tensors_of(LLAMA))[:6000], edits, cut)
    plan = quantization if isinstance(quantization, dict) else {}

    def run() -> Model:
        found = safetensors_header(lambda at, n: data[at : at + n], "x")
        return weighed(model_from(LLAMA, "x"), found, plan)

    outcome(run)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    data = written(tmp_path_factory.mktemp("fuzz") / "x.gguf").read_bytes()
    return data[:9000]  # the header; what follows are zeros


@often
@given(edits=edits, cut=cuts, kind=st.sampled_from(["llama", *ARCHITECTURES]))
def test_any_gguf_is_a_model_or_an_error(
    tiny: bytes, edits: list[tuple[int, bytes]], cut: int, kind: str
) -> None:
    data = changed(tiny, edits, cut)

    def run() -> Model:
        metadata, tensors = gguf_header(data, 2**30, "x")
        renamed = {k.replace("llama.", f"{kind}."): v for k, v in metadata.items()}
        if "general.architecture" in renamed:
            renamed["general.architecture"] = kind
        return gguf_model(renamed, tensors, "x")

    outcome(run)


@often
@given(st.text(max_size=40) | st.from_regex(r"[\w./@~-]{1,30}", fullmatch=True))
def test_any_name_is_a_hub_id_or_not(name: str) -> None:
    if is_hub_id(name):
        assert name.count("/") >= 1 and ".." not in name.partition("@")[0].split("/")


@settings(often, max_examples=max(20, INPUTS // 100))
@given(edits=edits, cut=cuts, file=st.sampled_from(["config.json", "model.safetensors"]))
def test_any_folder_is_a_model_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, bytes]], cut: int, file: str
) -> None:
    place = tmp_path_factory.mktemp("folder")
    files = folder(LLAMA)
    files[file] = changed(files[file], edits, cut)
    for name, content in files.items():
        (place / name).write_bytes(content)
    outcome(lambda: local(str(place)))


def test_every_catalog_model_survives_the_way_a_plan_takes_it() -> None:
    for row in catalog.models():
        assert Model.from_json(json.loads(json.dumps(row.to_json()))) == row
