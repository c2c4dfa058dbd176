"""llama.cpp, vLLM and SGLang: against logs that others published, and values worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fitcheck import catalog, check, memory, quants
from fitcheck.engines import MICRO, best_quant, cache_bytes, compute_buffer, share_bytes, split
from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan

MIB = 2**20


def plan(model: str, **knobs: Any) -> Plan:
    wishes = {"method": "inference", "gpu": catalog.find_gpu("4090"), **knobs}
    return Plan(model=catalog.find_model(model), **wishes)


# K and V elements of one token over all layers that cache it, worked from the papers' sizes; the
# second figure is what a token adds once it is beyond every window.
KV = {
    "meta-llama/Llama-3.1-8B": (32 * 2 * 8 * 128, None),  # grouped queries
    "bigcode/gpt_bigcode-santacoder": (24 * 2 * 128, None),  # one head for all queries
    "google/gemma-2-9b": (42 * 2 * 8 * 256, 21 * 2 * 8 * 256),  # every other layer: 4,096
    "google/gemma-3-27b-pt": (62 * 2 * 16 * 128, 10 * 2 * 16 * 128),  # five of six layers: 1,024
    "openai/gpt-oss-20b": (24 * 2 * 8 * 64, 12 * 2 * 8 * 64),  # every other layer: 128
    "deepseek-ai/DeepSeek-V3": (61 * (512 + 64), None),  # a latent and its rotated part, no V
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (12 * 2 * 2 * 256, None),  # a quarter of 48 layers
    "ai21labs/Jamba-v0.1": (4 * 2 * 8 * 128, None),  # one layer of eight attends
    # The last 15 of 35 layers (18 of 42) read an earlier one's cache; of the others every fifth
    # (sixth) sees all, the rest 512.
    "google/gemma-3n-E4B-it": (20 * 2 * 2 * 256, 4 * 2 * 2 * 256),
    "google/gemma-4-E4B-it": (20 * 2 * 2 * 256 + 4 * 2 * 2 * 512, 4 * 2 * 2 * 512),
    "tiiuae/Falcon-H1-0.5B-Instruct": (36 * 2 * 2 * 64, None),  # beside a Mamba in each layer
}


@pytest.mark.parametrize("name", KV)
def test_cache_of_a_token(name: str) -> None:
    model = catalog.find_model(name)
    near, far = KV[name]
    one = memory.kv_cache(model, 1, 1, 2) - memory.kv_cache(model, 1, 0, 2)
    assert one == 2 * near
    late = [memory.kv_cache(model, 1, n, 2) for n in (100_000, 100_001)]
    assert late[1] - late[0] == 2 * (far or near)


@pytest.mark.parametrize(
    ("name", "context", "logged", "within"),
    [  # logs of llama.cpp and a fork, MiB on the card with flash attention, ubatch 512
        ("Qwen/Qwen3-235B-A22B", 4096, 304.75, 0.001),
        ("Qwen/Qwen3-8B", 4096, 304.75, 0.001),
        ("Qwen/Qwen3-30B-A3B", 32_768, 304.75, 0.014),  # one more row of hidden size there
        ("Qwen/Qwen2.5-3B", 4096, 304.75, 0.014),
    ],
)
def test_compute_buffer_of_logs(name: str, context: int, logged: float, within: float) -> None:
    model = catalog.find_model(name)
    assert compute_buffer(model, context, True) / MIB == pytest.approx(logged, rel=within)


def test_compute_buffer_of_a_long_context_is_its_mask() -> None:
    """Qwen3.5-9B at 262,144 tokens: 808.02 MiB in a published log."""
    model = catalog.find_model("Qwen/Qwen3.5-9B")
    assert compute_buffer(model, 262_144, True) / MIB == pytest.approx(808.02, abs=0.1)
    with_scores = compute_buffer(model, 262_144, False)
    assert with_scores > compute_buffer(model, 262_144, True) + 4 * MICRO * 262_144


def test_the_cache_of_a_log() -> None:
    """Qwen3-30B-A3B, 32,768 tokens in f16: 3,072 MiB; Qwen3-8B's 36 layers x 4,096: 576."""
    asked = plan("Qwen/Qwen3-30B-A3B", quant="q4_k_m", context=32_768)
    assert cache_bytes(asked, 1, 32_768) == 3072 * MIB
    asked = plan("Qwen/Qwen3-8B", quant="q4_k_m")
    assert cache_bytes(asked, 1, 4096) == 576 * MIB
    assert cache_bytes(asked, 1, 3841) == 576 * MIB  # cells come in 256s
    asked = plan("Qwen/Qwen3-8B", quant="q4_k_m", kv_cache="q8_0")
    assert cache_bytes(asked, 1, 4096) == 306 * MIB  # 34 bytes for 32 numbers of two


def test_a_window_of_llama_cpp_has_room_for_a_micro_batch() -> None:
    """gpt-oss: 12 layers keep 128 + 512 tokens, in cells of 256: 768; 12 keep all."""
    asked = plan("openai/gpt-oss-20b", quant="q8_0", context=8192)
    assert cache_bytes(asked, 1, 8192) == 2 * (2 * 8 * 64) * (12 * 768 + 12 * 8192)


def test_vllm_rounds_to_its_pages() -> None:
    asked = plan("Qwen/Qwen3-0.6B", engine="vllm", context=1000)
    token = 28 * 2 * 8 * 128 * 2
    assert cache_bytes(asked, 3, 1000) == 3 * 1008 * token
    asked = plan("Qwen/Qwen3-0.6B", engine="sglang", context=1000)
    assert cache_bytes(asked, 3, 1000) == 3 * 1000 * token


@pytest.mark.parametrize("quant", ["q4_k_m", "q8_0", "q2_k", "iq4_xs", "bf16"])
@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "openai/gpt-oss-20b", "google/gemma-3-1b-pt"])
def test_the_parts_of_a_gguf_are_the_whole(name: str, quant: str) -> None:
    model = catalog.find_model(name)
    held = quants.gguf_parts(model, quant)
    assert held.bytes == quants.weight_bytes(model, quant)
    ends = held.bytes - sum(held.layers) - held.embedding
    assert len(held.layers) == model.num_layers and min(held.layers) > 0 and ends > 0
    assert (held.embedding == 0) == model.tie_word_embeddings
    assert bool(held.experts) == bool(model.moe)


def test_llama_cpp_keeps_the_embedding_in_ram() -> None:
    asked = plan("meta-llama/Llama-3.1-8B", quant="q4_k_m")
    held = quants.gguf_parts(asked.model, "q4_k_m")
    report = check(asked.model, gpu="4090", method="inference", quant="q4_k_m")
    weights = {t.name: t.bytes for t in report.phases[0].terms}["weights"]
    assert weights == held.bytes - 128_256 * 4096 // 256 * 144
    assert held.embedding == 128_256 * 4096 // 256 * 144


def test_partial_offload_moves_whole_layers() -> None:
    asked = plan("llama-3.3-70b", quant="q4_k_m", context=8192)
    held = quants.gguf_parts(asked.model, "q4_k_m")
    everything = held.bytes + cache_bytes(asked, 1, 8192)
    before = 0
    for free in range(0, 60 * 2**30, 2**30):
        layers, taken, ram = split(asked, free)
        assert taken <= free and taken + ram == everything and layers >= before
        before = layers
    assert before == asked.model.num_layers + 1 and ram == held.embedding


def test_what_does_not_fit_says_how_many_layers_do() -> None:
    report = check("llama-3.3-70b", gpu="4090", method="inference", quant="q4_k_m")
    assert report.verdict == "does-not-fit"
    assert any("of 81 layers fit (-ngl" in note for note in report.notes)
    report = check("qwen3-30b-a3b", gpu="4090", method="inference", quant="q8_0")
    assert any("--cpu-moe" in note and note.endswith("it fits") for note in report.notes)


def test_the_best_quantization_is_the_largest_that_fits() -> None:
    asked = plan("qwen3-8b", quant="q4_k_m")
    sizes = {q: quants.gguf_parts(asked.model, q) for q in ("q4_k_m", "q5_k_m", "q8_0")}
    now = sizes["q4_k_m"]
    for quant, held in sizes.items():
        more = (held.bytes - held.embedding) - (now.bytes - now.embedding)
        assert best_quant(asked, more) == quant
    assert best_quant(asked, -(2**40)) == ""


def test_room_is_what_fits() -> None:
    """The noted sequences and context fit; one more sequence does not."""
    knobs: dict[str, Any] = {"gpu": "4090", "method": "inference", "quant": "q8_0", "context": 8192}
    report = check("qwen3-8b", **knobs)
    (note,) = (n for n in report.notes if n.startswith("room for"))
    sequences = int(note.split()[2].replace(",", ""))
    longest = int(note.split()[-1].replace(",", ""))
    assert check("qwen3-8b", **(knobs | {"context": longest})).verdict == "fits"
    at_most = check("qwen3-8b", **knobs, concurrency=sequences)
    assert at_most.verdict == "fits"
    assert check("qwen3-8b", **knobs, concurrency=sequences + 1).verdict == "does-not-fit"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_server_must_fit_its_share(engine: str) -> None:
    small = check("qwen3-8b", gpu="4090", method="inference", engine=engine, engine_memory=0.5)
    assert small.verdict == "does-not-fit"  # 15.3 GiB of weights, 12 GiB of share
    large = check("qwen3-8b", gpu="4090", method="inference", engine=engine)
    assert large.verdict == "fits"
    needed = large.peak_bytes - large.plan.memory.usable_bytes + share_bytes(large.plan)
    assert 0 < needed < share_bytes(large.plan)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"engine": "vllm", "quant": "q4_k_m"}, "llama.cpp"),
        ({"engine": "llama.cpp", "quant": "awq"}, "q4_k_m"),
        ({"engine": "llama.cpp", "kv_cache": "fp8"}, "q8_0"),
        ({"engine": "vllm", "kv_cache": "q8_0"}, "fp8"),
        ({"engine_memory": 0.5}, "--engine vllm"),
    ],
)
def test_what_an_engine_does_not_run(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(FitCheckError) as fault:
        plan("qwen3-8b", **knobs)
    assert words in fault.value.hint


def test_the_words_of_other_programs_are_told() -> None:
    report = check(
        "qwen3-8b", gpu="4090", method="inference", quant="q4_k_m", context=32_768, concurrency=2
    )
    (note,) = (n for n in report.notes if n.startswith("llama.cpp:"))
    assert "-c 65536 -np 2 -ngl 37" in note
    assert "num_ctx 32768" in note and "LM Studio: Context Length 32768" in note


def test_the_pages_of_a_vllm_log() -> None:
    """Qwen3-0.6B, 0.8 of 79.19 GiB: weights 1.12 GiB, a pool of 61.84, 36,184 blocks of 16."""
    asked = plan("Qwen/Qwen3-0.6B", engine="vllm", engine_memory=0.8, context=8192)
    weights = {
        t.name: t.bytes for t in check(asked.model, gpu="4090", method="inference").phases[0].terms
    }
    assert weights["weights"] / 2**30 == pytest.approx(1.12, abs=0.01)
    block = cache_bytes(asked, 1, 16)
    assert 61.84 * 2**30 / block == pytest.approx(36_184, abs=3)  # the pool is told to 5 MiB
    most = 36_184 * block / cache_bytes(asked, 1, 8192)
    assert most == pytest.approx(70.67, abs=0.01)  # "Maximum concurrency for 8192 tokens"
