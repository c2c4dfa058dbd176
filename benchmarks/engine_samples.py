"""The rows of engines whose constants no hardware class changes: CUDA graphs, and eager PyTorch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from benchmarks.speed_samples import GPUS, Sample, model_of, rows_of
from fitcheck import catalog, memory
from fitcheck.fit import fit
from fitcheck.passes import Step, decode_step, pass_seconds
from fitcheck.plan import Plan
from fitcheck.rates import bandwidth
from fitcheck.work import forward, share_read


def engine_rows(pattern: str) -> list[dict[str, str]]:
    return [
        row
        for row in rows_of("decode_speed.csv")
        if re.search(pattern, row["engine"])
        and (row["n_gpus"], row["batch"]) == ("1", "1")
        and row["weight_read_gib"]
    ]


LAYERS = {"StableLM-Alpha-3B": 16}  # not in the catalog (stabilityai/stablelm-base-alpha-3b)


def layers_of(name: str) -> int:
    model = model_of(name)
    return int(model.num_layers) if model else LAYERS[name]


def graphs_samples() -> list[Sample]:
    """gpt-fast and vLLM: no launches to wait for."""
    found = []
    for row in engine_rows("gpt-fast|vLLM"):
        gpu = GPUS[row["gpu_id"]]
        features = {
            "bandwidth": float(row["weight_read_gib"]) * 2**30 / (bandwidth(gpu) or 1.0),
            "layer": float(layers_of(row["model"])),
        }
        told = f"{gpu.name}, {row['model']} {row['quant']}"
        found.append(Sample(row["source"], "graphs", 1 / float(row["decode_tps"]), features, told))
    return found


LITGPT = {"phi-1.5": 24, "StableLM-3B": 16, "Llama-2-13B": 40}  # layers


def training_launches() -> float:
    """Seconds a layer of forward and backward with a LoRA where launches are all that counts.

    LitGPT trained on one short text (Alpaca's have some 100 tokens) at a time, without
    checkpointing. The least of its models, for what those tokens compute is in the others more.
    """
    rows = [r for r in rows_of("training_speed.csv") if r["metric"] == "time_per_1k_microbatches"]
    plain = [r for r in rows if "bf16" in r["method"]]
    return min(60 * float(r["value"]) / 1000 / LITGPT[r["model"]] for r in plain)


def eager_samples() -> list[Sample]:
    """LitGPT: the host's launches are all that counts, more of them with bitsandbytes' 4 bits."""
    found = []
    for row in engine_rows("eager"):
        name = "layer nf4" if row["quant"].startswith("nf4") else "layer"
        features = {name: float(layers_of(row["model"]))}
        told = f"{row['model']} {row['quant']}"
        # A source a row: all seven are of one table, so that rows are left out one by one.
        found.append(Sample(told, "eager", 1 / float(row["decode_tps"]), features, told))
    return found


def batches() -> Iterator[tuple[str, float, float]]:
    """(what, measured, predicted tokens a second) of rows that nothing was fitted on.

    Mistral 7B by vLLM on a 4090, 4 to 48 requests of 256 + 128 tokens at a time, prompts included.
    """
    model = catalog.find_model("mistral-7b-v0.3")
    for row in rows_of("decode_speed.csv"):
        if row["engine"] != "vLLM server":
            continue
        gpu, batch, read = GPUS[row["gpu_id"]], int(row["batch"]), 2.0 * model.params
        cache = memory.kv_cache(model, batch, 256 + 64, 2.0)
        step = Step(model, batch, read * share_read(model, batch), cache, "bf16")
        prompt = pass_seconds(gpu, "bf16", forward(model, batch, 256), read)
        took = prompt + 128 * decode_step(gpu, "graphs", step)
        yield f"vLLM, {batch} at a time", float(row["decode_tps"]), batch * 128 / took


def grpo_step(prompt: int) -> tuple[float, float]:
    """(measured, predicted seconds) of TRL's GRPO of Qwen2 7B, QLoRA in fp32 on a T4.

    Eight completions of up to 256 tokens, with rewards by rule and no reference; how long the
    prompts were is not told.
    """
    rows = [row for row in rows_of("training_speed.csv") if row["task"] == "GRPO"]
    row = next(row for row in rows if row["gpu_id"] == "tesla-t4")
    plan = Plan(
        model=catalog.find_model("qwen2-7b-instruct"),
        gpu=GPUS["tesla-t4"],
        method="grpo",
        tuning="qlora",
        precision="fp32",
        lora_rank=32,
        prompt=prompt,
        response=256,
        reward_model="rule",
        reference="none",
    )
    speed = fit(plan).speed
    assert speed is not None
    return float(row["value"]) / 500, speed.step_seconds
