"""Layers read from the catalog: the data, the arithmetic on them, and a sample traced again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fitcheck import catalog, coefficients, memory
from fitcheck.answer import check, resolve
from fitcheck.decoder import covered
from fitcheck.errors import FitCheckError
from fitcheck.fit import fit
from fitcheck.flows import FLOWS
from fitcheck.kernels import Card
from fitcheck.model import Model
from fitcheck.ops import Setting
from fitcheck.weights import has_closed_form, weights

FOLDER = Path(catalog.ROOT) / "coefficients"
INDEX: dict[str, Any] = json.loads((FOLDER / "index.json").read_text())
FILES = {path.name: json.loads(path.read_text()) for path in FOLDER.glob("[!i]*.json")}
SAMPLE = ("LiquidAI/LFM2-350M", "Qwen/Qwen3.5-0.8B")
PLAIN = Setting(2, 2, False, True, "flash", False, 2, card=Card((8, 0), 108))


def traced() -> list[Model]:
    return [m for m in catalog.models() if coefficients.is_traced(m) and not covered(m)]


# --- the data ---


def test_a_model_without_a_flow_is_traced_or_refused_with_a_reason() -> None:
    for model in catalog.models():
        if model.model_type in FLOWS and has_closed_form(model):
            assert model.id not in INDEX
        elif "file" in INDEX.get(model.id, {}):
            assert model.id in coefficients.entry(model)["ids"]
        else:
            assert f"the architecture {model.model_type}" in covered(model)


@pytest.mark.parametrize("name", sorted(FILES))
def test_file_says_how_it_was_made_and_is_whole(name: str) -> None:
    data = FILES[name]
    assert data["checked"] and data["source"] and set(data["versions"]) >= {"torch", "transformers"}
    for entry in data["models"]:
        model = catalog.find_model(entry["ids"][0])
        assert len(entry["order"]) == model.num_layers
        assert set(entry["order"]) == {str(i) for i in range(len(entry["kinds"]))}
        assert entry["state"] >= 0
        names = {weight.name.rpartition(".")[2] for weight in weights(model)}
        assert set(entry["fp32"]) <= names
        for run, kinds in entry["runs"].items():
            assert isinstance(kinds, str) or len(kinds) == len(entry["kinds"]), run


def test_gradients_are_those_of_the_weights() -> None:
    """In bf16 full tuning every weight of the layers has a gradient of its own size."""
    for model in traced():
        if model.moe and model.moe.dense_layers:
            continue
        made = sum(
            coefficients.layer(model, PLAIN, 2, 1024, kind).gradients
            for kind in coefficients.order(model)
        )
        sizes = memory.base_tensors(model, "none")
        whole = sum(
            memory.prod(shape) * copies * (4 if wide else 2)
            for shape, copies, kind, wide in sizes
            if kind not in ("embedding", "head", "tower")
        )
        assert made == pytest.approx(whole, rel=0.02), model.id


# --- the arithmetic ---


def test_heights_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """a + b RT + c RT^2 + r (d + e RT); the highest counts; a chunk is padded to its step."""
    figures = {
        "hidden": [0, 2],
        "forward": [[100], [0, 3, 0.5]],
        "cached": [7],
        "kept": [1, 10],
        "training": [[0, 20]],
        "backward": [[50, 30, 0, 2, 1]],
        "accumulate": [[50, 30]],
        "replay": [[0, 21]],
        "gradients": [9],
    }
    made = {"runs": {"bf16 full none": [figures]}, "kinds": [{"window": 0}], "order": "0"}
    monkeypatch.setattr(coefficients, "entry", lambda model: {**made, "step": 4})
    coefficients.kinds.cache_clear()
    model = catalog.find_model("state-spaces/mamba-130m-hf")
    one = coefficients.layer(model, PLAIN, 2, 3, 0)  # three tokens are padded to four: RT = 8
    assert one == (16, 100, 7, 81, 160, 290, 176, 9)
    ranked = PLAIN._replace(rank=5)
    many = coefficients.layer(model, ranked, 1, 20, 0)
    assert many.forward == 3 * 20 + 0.5 * 400
    assert many.backward == 50 + 30 * 20 + 5 * (2 + 20)
    assert coefficients.layer(model, ranked, 1, 20, 0, accumulate=True).backward == 650
    coefficients.kinds.cache_clear()


@pytest.mark.parametrize("name", SAMPLE)
def test_orderings(name: str) -> None:
    def peak(**wishes: Any) -> int:
        return check(name, gpu="h200", method="sft", **wishes).peak_bytes

    assert peak(checkpointing=True, sequence=4096) < peak(checkpointing=False, sequence=4096)
    assert peak(tuning="lora") < peak(tuning="full")
    assert peak(tuning="qlora") < peak(tuning="lora")
    assert peak(sequence=1024) < peak(sequence=4096) < peak(sequence=8192)
    assert peak(micro_batch=1) < peak(micro_batch=4)


def test_recurrent_states_count_once_a_sequence() -> None:
    """The delta rule keeps a matrix a head in fp32 and conv_kernel inputs, whatever the length."""
    model = catalog.find_model("Qwen/Qwen3.5-0.8B")
    hybrid = model.hybrid or {}
    heads, wide, tall = 16, hybrid["linear_key_head_dim"], hybrid["linear_value_head_dim"]
    conv = 2 * heads * wide + heads * tall
    state = memory.recurrent_state(model)
    assert state == 18 * (4 * heads * wide * tall + 2 * conv * hybrid["linear_conv_kernel_dim"])
    few, more = (memory.kv_cache(model, 3, tokens, 2) for tokens in (0, 1000))
    assert few == 3 * state and more > few


# --- what is covered ---


def test_what_is_missing_is_said() -> None:
    lfm = catalog.find_model("LiquidAI/LFM2-350M")
    assert covered(lfm) == covered(lfm, "lora") == covered(lfm, "qlora") == ""
    assert "it was not traced" in covered(lfm, "lora", ("w1",))
    unsure = next(m for m in catalog.models() if not m.is_verified and not m.tensors)
    assert covered(unsure) == f"the architecture {unsure.model_type}"


def test_a_run_that_was_not_traced_is_refused() -> None:
    plan = resolve("Qwen/Qwen3.5-0.8B", gpu="a100", method="sft", tuning="lora")
    with pytest.raises(FitCheckError, match="of the architecture qwen3_5"):
        fit(plan.change(adapter_precision="bf16"))
    with pytest.raises(FitCheckError, match="compute capability 8.0"):
        check("Qwen/Qwen3.5-0.8B", gpu="rtx 2080 ti", method="sft", precision="fp16")


def test_slow_kernels_are_told() -> None:
    assert any("mamba-ssm" in n for n in check("Qwen/Qwen3.5-0.8B", gpu="a100", method="sft").notes)
    assert not any("mamba-ssm" in n for n in check("qwen3-0.6b", gpu="a100", method="sft").notes)


# --- against transformers as installed ---


@pytest.mark.oracle
@pytest.mark.parametrize("run", ("bf16 full none", "bf16-autocast lora:all-linear padded"))
@pytest.mark.parametrize("name", SAMPLE)
def test_layer_is_that_of_transformers(name: str, run: str) -> None:
    """Traced again at another length: kept bytes to 0.5 %, the highest ones to 2 %."""
    pytest.importorskip("peft")
    from fitcheck.bench.coefficients import RUNS
    from fitcheck.bench.layer_trace import prepared
    from fitcheck.bench.layer_trace import traced as traced_layers
    from fitcheck.roles import roles, setting

    rank = {"lora_rank": 24} if "lora" in run else {}
    plan = resolve(
        name, gpu="A100-SXM4-80GB", method="sft", checkpointing=False, **RUNS[run], **rank
    )
    how = setting(plan, roles(plan)["policy"])
    assert coefficients.run_of(how) == run
    module, kinds = prepared(plan, None)
    layers = traced_layers(module, plan, kinds, 3, 1280, True)
    for i, layer in enumerate(layers):
        ours = coefficients.layer(plan.model, how, 3, 1280, i)
        assert ours.kept == pytest.approx(layer.kept, rel=0.005)
        assert ours.gradients == layer.gradients
        for field in ("forward", "training", "backward"):
            top = max(height for _, height in getattr(layer, field))
            assert getattr(ours, field) == pytest.approx(top, rel=0.02), field


@pytest.mark.oracle
@pytest.mark.parametrize("wishes", ({"precision": "bf16", "checkpointing": False},
                                    {"tuning": "lora"}))  # fmt: skip
def test_estimate_is_the_dry_run(wishes: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    from fitcheck.bench.dryrun import dry_run

    plan = resolve("LiquidAI/LFM2-350M", gpu="a100", method="sft", sequence=1500, **wishes)
    measured, _ = dry_run(plan)
    assert fit(plan).allocated_bytes == pytest.approx(measured.allocated_bytes, rel=0.02)
