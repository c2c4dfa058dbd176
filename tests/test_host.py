"""What the host's RAM must hold: loading, offloading, and its own verdict."""

from __future__ import annotations

from typing import Any

import pytest

from fitcheck.answer import check
from fitcheck.host import PROCESS
from fitcheck.report import Report

PARAMS, HEAD = 8_030_261_248, 128_256 * 4096
BACKBONE = PARAMS - HEAD + 4096  # with the score head


def answer(**wishes: Any) -> Report:
    return check("llama-3.1-8b", **{"gpu": "h100", **wishes})


def test_loading_reads_one_model_at_a_time() -> None:
    """The largest: a policy in fp32."""
    ram = answer(method="ppo").ram
    assert (ram.phase, ram.peak_bytes) == ("load", PROCESS + 4 * PARAMS)


def test_a_quantized_model_is_read_in_16_bits() -> None:
    qlora = answer(method="sft", tuning="qlora").ram
    assert qlora.peak_bytes == PROCESS + 2 * PARAMS


def test_inference_reads_what_it_runs() -> None:
    assert answer(method="inference").ram.peak_bytes == PROCESS + 2 * PARAMS
    gguf = answer(method="inference", quant="q4_k_m").ram
    assert gguf.peak_bytes == PROCESS + 4_920_739_232 - 7_841_184  # the file's tensors
    nf4 = answer(method="inference", quant="nf4").ram
    assert nf4.peak_bytes == PROCESS + 2 * PARAMS  # quantized on the card


def test_offloaded_models_stay_while_others_load() -> None:
    ram = answer(method="ppo", offload=("reference", "reward")).ram
    assert ram.peak_bytes == PROCESS + 2 * PARAMS + 2 * BACKBONE + 4 * PARAMS


def test_adam_on_the_cpu() -> None:
    """fp32 weight and two states, and the gradients in the weights' type."""
    ram = answer(method="sft", offload=("optimizer",)).ram
    assert (ram.phase, ram.peak_bytes) == ("step", PROCESS + (12 + 4) * PARAMS)


@pytest.mark.parametrize(
    ("ram", "verdict"), [(PROCESS + 2 * PARAMS, "fits"), (2**33, "does-not-fit")]
)
def test_the_hosts_verdict(ram: int, verdict: str) -> None:
    report = answer(method="inference", ram=ram)
    assert report.card_verdict == "fits"
    assert report.ram.verdict == report.verdict == verdict


def test_a_pretended_host_has_no_verdict() -> None:
    report = answer(method="inference")
    assert report.ram.verdict is report.ram.usable_bytes is None
    assert report.verdict == "fits"


def test_terms_add_up() -> None:
    ram = answer(method="ppo", tuning="lora", offload=("reward", "optimizer")).ram
    assert sum(term.bytes for term in ram.terms) == ram.peak_bytes
    assert all(term.why for term in ram.terms)
