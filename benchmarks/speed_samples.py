"""The measured rows that constants are fitted on: tests/data/decode_speed.csv, training_speed.csv.

Each becomes a Sample: its seconds, and what each constant is multiplied with to predict them. Rows
that cannot be used, and why, are told by `unfit` and the conditions below.
"""

from __future__ import annotations

import csv
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fitcheck import catalog, memory
from fitcheck.errors import FitCheckError
from fitcheck.model import Model
from fitcheck.rates import bandwidth, half_peak, hardware_class, peak_flops
from fitcheck.work import block_params, forward

DATA = Path(__file__).parent.parent / "tests" / "data"
GPUS = {gpu.id: gpu for gpu in catalog.gpus()}

# Shares of the dense rate on paper that large bf16 products and attention reach; where from.
MAMF = "stas00/ml-engineering, maximum achievable matmul FLOPS"
FA2 = "FlashAttention-2 reaches 50 to 73 % of an A100 (arXiv 2307.08691)"
FA3 = "FlashAttention-2 reaches 35 % of an H100 (arXiv 2407.08608)"
CEILINGS: dict[str, tuple[float, str, float, str]] = {
    "nvidia": (1.0, "assumed: a 5090 reached 253 of 209.5 (kekzl/imp #606)", 0.7, FA2),
    "nvidia-old": (
        0.78,
        "V100, fp16: 95 to 100 of 125 (lablup/mlxcel #1654)",
        0.39,
        "assumed: half",
    ),
    "nvidia-a100": (0.869, MAMF, 0.7, FA2),
    "nvidia-hopper": (0.803, MAMF, 0.35, FA3),
    "nvidia-blackwell": (0.776, MAMF, 0.7, "assumed: as on an A100"),
    "amd": (0.4, "llama.cpp's prefill on RDNA 3 and 4: 0.34 to 0.42", 0.2, "assumed: half"),
    "amd-unified": (0.4, "assumed: as amd", 0.2, "assumed: half"),
    "amd-instinct": (0.514, MAMF + " (MI300X)", 0.26, "assumed: half"),
    "intel": (0.45, MAMF + " (A770: 58.7 of 131)", 0.22, "assumed: half"),
    "intel-gaudi": (0.741, MAMF + " (Gaudi 3; Gaudi 2: 0.969)", 0.37, "assumed: half"),
    "apple": (0.75, "llama.cpp's prefill on M1 to M4: 0.61 to 0.78", 0.37, "assumed: half"),
    "apple-m1": (0.75, "as apple", 0.37, "assumed: half"),
    "apple-ultra": (0.75, "as apple", 0.37, "assumed: half"),
    "apple-m5": (
        2.5,
        "of the fp32 rate: matrix units, 3.6 x an M4's prefill",
        1.2,
        "assumed: half",
    ),
}
STACKED = ("nvidia-a100", "nvidia-hopper", "nvidia-blackwell", "nvidia-old", "amd-instinct")
# Classes that nobody measured borrow: decode (llama.cpp) and prefill.
BORROWED = {"nvidia-old": "nvidia-a100", "nvidia-blackwell": "nvidia-hopper"}
BORROWED |= {"amd-instinct": "nvidia-a100", "intel-gaudi": "nvidia-a100"}


class Sample(NamedTuple):
    """One measured row: seconds, and what each constant is multiplied with to predict them."""

    source: str
    kind: str  # the hardware class
    seconds: float
    features: dict[str, float]
    told: str


# Decode


@cache
def rows_of(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


QUANT = re.compile(r"[-.](UD-)?(Q\d\w*|BF16|mxfp4|GGUF)$")


@cache
def model_of(name: str) -> Model | None:
    """The catalog's model of a row; None where it has none with these sizes."""
    for text in (name, QUANT.sub("", name), name.replace("Phi-4-14B", "phi-4")):
        try:
            return catalog.find_model(text)
        except FitCheckError:
            continue
    return None


def is_native(engine: str) -> bool:
    """llama.cpp on the vendor's own backend (CUDA, ROCm, Metal, SYCL), or a shell around it."""
    engine = engine.lower()
    known = any(name in engine for name in ("llama.cpp", "ollama", "mlx"))
    return known and "vulkan" not in engine


def decode_group(kind: str) -> str:
    """Classes that share the share of bandwidth: memory chips and driver decide it."""
    if kind in STACKED:
        return "stacked"
    return "intel" if kind == "intel" else "other"


def cache_group(kind: str) -> str:
    if kind.startswith("apple") and kind != "apple-m5":
        return "apple"
    return "stacked" if kind in STACKED else "other"


def layer_group(kind: str) -> str:
    if kind in STACKED:
        return "stacked"
    return "apple" if kind == "apple-m1" else kind


def decode_samples() -> list[Sample]:
    """One dense model on one card, batch 1, llama.cpp on its native backend."""
    found = []
    for row in rows_of("decode_speed.csv"):
        model, gpu = model_of(row["model"]), GPUS[row["gpu_id"]]
        single = row["n_gpus"] == "1" and row["batch"] == "1"
        dense = row["params_b"] == row["active_params_b"]
        if not (single and dense and is_native(row["engine"]) and row["weight_read_gib"] and model):
            continue
        kind, speed = hardware_class(gpu), float(row["bandwidth_gbs"]) * 1e9
        context = float(row["depth"] or 0) + float(row["n_gen"] or 128) / 2
        weights = float(row["weight_read_gib"]) * 2**30
        cache = memory.kv_cache(model, 1, int(context), 2.0)
        features = {
            f"weights {decode_group(kind)}": weights / speed,
            f"cache {cache_group(kind)}": cache / speed,
            f"layer {layer_group(kind)}": float(model.num_layers),
        }
        if kind == "apple-m1" and "_K" in row["quant"]:
            features["unpack apple-m1"] = block_params(model) / (peak_flops(gpu, "fp32") or 1.0)
        told = f"{gpu.name}, {row['model']} {row['quant']} at {context:.0f}"
        found.append(Sample(row["source"], kind, 1 / float(row["decode_tps"]), features, told))
    return found


def prefill_samples() -> list[Sample]:
    """Prompts without anything before them; rows that their source or collector doubts are out."""
    found = []
    for row in rows_of("decode_speed.csv"):
        model, gpu = model_of(row["model"]), GPUS[row["gpu_id"]]
        asked = row["prefill_tps"] and row["n_prompt"] and (row["depth"] or "0") == "0"
        single = row["n_gpus"] == "1" and row["batch"] == "1"
        dense = row["params_b"] == row["active_params_b"]
        if not (asked and single and dense and is_native(row["engine"]) and model) or row["note"]:
            continue
        flops, kind = half_peak(gpu), prefill_group(hardware_class(gpu))
        if not flops:
            continue
        tokens = int(row["n_prompt"])
        work = forward(model, 1, tokens)
        features = {
            f"prefill {kind}": work.linear / flops,
            f"attention {attention_group(kind)}": work.attention / flops,
        }
        told = f"{gpu.name}, {row['model']} {row['quant']}, {tokens} tokens"
        seconds = tokens / float(row["prefill_tps"])
        found.append(Sample(row["source"], kind, seconds, features, told))
    return found


def prefill_group(kind: str) -> str:
    return "apple" if kind in ("apple-m1", "apple-ultra") else kind


def attention_group(kind: str) -> str:
    """Few classes have prompts of several lengths; the others share."""
    return kind if kind in ("apple", "nvidia-a100", "nvidia-hopper") else "other"


# Training

MPT = {  # hidden size, layers (llm-foundry's configurations)
    **{"MPT-125m": (768, 12), "MPT-350m": (1024, 24), "MPT-760m": (1536, 24), "MPT-1b": (2048, 24)},
    **{"MPT-3b": (2560, 32), "MPT-7b": (4096, 32), "MPT-13b": (5120, 40), "MPT-30b": (7168, 48)},
    "MPT-70b": (8192, 80),
}


def unfit(row: dict[str, str]) -> str:
    """Why a row of training_speed.csv cannot be used; empty when it can."""
    method, note = row["method"], row["note"]
    if row["task"] not in ("pretrain/full", "SFT"):
        return "a step with a rollout, of sizes that are not told"
    if "offload" in method:
        return "offload to the host"
    if "float8" in method or "fp8" in note:
        return "8-bit products"
    if "table says" in note:
        return "its card is in doubt"
    if row["metric"] == "achieved" and "ckpt" not in method.split("+") and "no ckpt" in method:
        return ""
    if "throughput" not in row["metric"]:
        return "tokens are not told"
    return ""


def training_samples() -> list[Sample]:
    """Seconds a token on one card: three passes, two where weights are frozen, one more for

    checkpointing; attention is counted over the whole square, as in the sources' MFU.
    """
    found = []
    for row in rows_of("training_speed.csv"):
        if unfit(row):
            continue
        length, gpu = int(row["seq_len"]), GPUS[row["gpu_id"]]
        linear, attention, widths = token_work(row, length)
        lora = "LoRA" in row["method"]
        again = checkpointed(row)
        attention *= 3 + (1 if again or "selective" in row["note"] else 0)
        linear *= (2 if lora else 3) + again
        widths *= 3 + again
        kind = hardware_class(gpu)
        flops, speed = peak_flops(gpu, "bf16") or 1.0, bandwidth(gpu) or 1.0
        matmul, _, kernel, _ = CEILINGS[kind]
        features = {
            "slowdown": (linear / matmul + attention / kernel) / flops,
            "width bytes": widths / speed,
        }
        told = f"{gpu.name}, {row['model']} {row['method']}, {length} tokens, {row['n_gpus']} cards"
        found.append(Sample(row["source"], kind, token_seconds(row), features, told))
    return found


def token_work(row: dict[str, str], length: int) -> tuple[float, float, float]:
    """Of one token forward: FLOPs of products, of attention; layers x width."""
    if row["model"] in MPT:
        hidden, layers = MPT[row["model"]]
        params = (
            float(row["params_b"]) * 1e9 - length * hidden
        )  # learned positions multiply nothing
        return 2 * params, 4.0 * layers * length * hidden, float(layers * hidden)
    model = catalog.find_model(row["model"])
    work = forward(model, 1, length)
    head = 2.0 * model.vocab_size * model.embedding_width
    return work.linear / length + head, work.attention / length, work.widths / length


def checkpointed(row: dict[str, str]) -> int:
    """1 where layers run again in the backward pass: said, or HFU is a third above MFU."""
    method, note = row["method"], row["note"]
    if "HFU" in note:
        return int(float(note.partition("HFU ")[2]) > 1.1 * float(row["mfu_pct"]))
    if "torchtune" in row["source"] and row["gpu_id"] == "nvidia-a100-sxm4-80gb":
        before = ("full +compile", "full +chunked CE")  # its table adds one technique a row
        return int(method not in before)
    return int("ckpt" in method and "no ckpt" not in method or "torchtune" in row["source"])


def token_seconds(row: dict[str, str]) -> float:
    value = float(row["value"])
    if row["metric"] == "achieved":  # 6 P and 12 L s d FLOP a token, as its source counts
        linear, attention, _ = token_work(row, int(row["seq_len"]))
        return 3 * (linear + attention) / (value * 1e12)
    return (int(row["n_gpus"]) if row["metric"] == "throughput_total" else 1) / value
