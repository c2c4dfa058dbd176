"""The dry run of inference: estimate and trace of one engine, transformers, phase by phase."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from fitcheck import FitCheckError, fit, resolve  # noqa: E402
from fitcheck.bench.dryrun import dry_run  # noqa: E402
from fitcheck.bench.roles import build  # noqa: E402
from fitcheck.bench.steps import run_step  # noqa: E402
from fitcheck.bench.trace import trace  # noqa: E402
from fitcheck.report import ALLOCATED, Report  # noqa: E402
from tests.tiny import tiny_model  # noqa: E402

pytestmark = pytest.mark.oracle
WITHIN = 0.04  # of each phase

PLANS: tuple[dict[str, Any], ...] = (
    {"model": "qwen2.5-0.5b"},
    {"model": "qwen2.5-0.5b", "quant": "fp16", "concurrency": 16, "context": 2048},
    {"model": "qwen2.5-0.5b", "quant": "fp32", "concurrency": 4},  # grouped heads: torch's formula
    {"model": "qwen2.5-0.5b", "quant": "int8"},
    {"model": "llama-3.2-1b", "quant": "nf4", "concurrency": 4, "context": 8192},
    {"model": "gemma-3-1b-it", "concurrency": 4},  # layers with a window
    {"model": "gpt2", "attention": "eager", "concurrency": 2, "context": 1024},
)


def inference(model: str, **knobs: Any) -> Any:
    return resolve(model, method="inference", gpu="4090", **knobs)


def allocated(report: Report) -> dict[str, int]:
    return {p.name: max(m.part(ALLOCATED) for m in p.moments) for p in report.phases}


@pytest.mark.parametrize("wishes", PLANS, ids=lambda w: " ".join(map(str, w.values())))
def test_estimate_and_dry_run_agree_in_every_phase(wishes: dict[str, Any]) -> None:
    plan = inference(**wishes)
    guessed, (report, _) = allocated(fit(plan)), dry_run(plan)
    traced = allocated(report)
    assert list(traced) == list(guessed) == ["load", "prefill", "decode"]
    assert guessed == pytest.approx(traced, rel=WITHIN)


def test_the_cache_is_of_all_sequences_at_full_length() -> None:
    """K and V of 24 layers x 2 heads x 64, bf16: 12,288 B a token."""

    def held(sequences: int) -> list[int]:
        traced = trace(inference("qwen2.5-0.5b", concurrency=sequences, context=1024))
        at = traced.peaks()
        moments = traced.held([at[1, "prefill"], at[1, "decode"]])
        return [sum(moment.values()) for moment in moments]

    (few, few_decode), (many, many_decode) = held(2), held(12)
    assert many - few == 10 * 1023 * 12_288
    head = 151_936 * (2 + 4 + 4)  # logits, those in fp32, their softmax
    assert many_decode - few_decode == pytest.approx(10 * (1024 * 12_288 + head), abs=4096)


def test_4_bit_weights_are_never_whole_on_the_card() -> None:
    report, traced = dry_run(inference("llama-3.2-1b", quant="nf4"))
    (load,) = (phase for phase in report.phases if phase.name == "load")
    weights = next(t.bytes for t in load.terms if t.name == "weights")
    assert weights < 1.1e9 < 2 * traced.plan.model.params
    assert load.peak.part(ALLOCATED) == pytest.approx(weights, rel=0.02)


@pytest.mark.parametrize(
    ("wishes", "flag", "said"),
    [
        *(({"quant": q}, "--quant", "transformers engine") for q in ("q4_k_m", "awq", "fp8")),
        *(({"quant": q}, "--quant", "transformers engine") for q in ("gptq", "mxfp4", "q8_0")),
        *(({"kv_cache": k}, "--kv-cache", "in bf16") for k in ("fp8", "q8_0", "q4_0", "fp32")),
        *(({"engine": e}, "--engine", "transformers alone") for e in ("llama.cpp", "vllm")),
    ],
)
def test_what_transformers_does_not_run(wishes: dict[str, Any], flag: str, said: str) -> None:
    with pytest.raises(FitCheckError) as fault:
        dry_run(inference("qwen2.5-0.5b", **wishes))
    assert fault.value.message.startswith(flag) and said in fault.value.message
    assert "fitcheck check" in fault.value.hint


@pytest.mark.parametrize("quant", ["bf16", "fp16", "fp32"])
def test_the_cache_has_the_type_of_the_products(quant: str) -> None:
    assert inference("qwen2.5-0.5b", quant=quant).kv_cache == quant


@pytest.mark.parametrize("quant", ["fp32", "int8", "nf4"])
def test_it_runs_on_a_cpu(quant: str) -> None:
    plan = resolve(
        *(tiny_model(),), gpu="4090", method="inference", quant=quant, context=9, concurrency=3
    )
    assert run_step(plan, build(plan, torch.device("cpu"))) == {}
