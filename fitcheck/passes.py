"""Seconds of one pass of a model: a decode step by engine, a prompt, a pass of large products."""

from __future__ import annotations

from typing import NamedTuple

from fitcheck.gpu import GPU
from fitcheck.model import Model
from fitcheck.rates import bandwidth, engine, half_peak, peak_flops, rates, training
from fitcheck.work import Work, block_params, forward, head_flops


class Step(NamedTuple):
    """One decode step of `rows` sequences with `past` tokens each. bytes: what a step reads."""

    model: Model
    rows: int
    weight_bytes: float
    cache_bytes: float
    dtype: str
    k_quant: bool = False
    nf4: bool = False


def decode_step(gpu: GPU, name: str, step: Step) -> float:
    """Seconds of one decode step on a card, by an engine: llama.cpp, graphs, eager."""
    rate, speed, model = rates(gpu), bandwidth(gpu) or 1.0, step.model
    work, layers = forward(model, step.rows, 1), model.num_layers or 0
    flops = peak_flops(gpu, step.dtype) or 1.0
    compute = (work.linear + head_flops(model, step.rows)) / (rate.matmul * flops)
    if name == "llama.cpp":
        reading = step.weight_bytes / (rate.bandwidth * speed)
        if step.k_quant and rate.unpack:
            reading += rate.unpack * block_params(model) / (peak_flops(gpu, "fp32") or 1.0)
        return max(reading, compute) + step.cache_bytes / (rate.cache * speed) + layers * rate.layer
    how = engine(name)
    reading = step.weight_bytes / (how.bandwidth * speed)
    if name == "graphs":
        return (
            max(reading, compute) + step.cache_bytes / (how.bandwidth * speed) + layers * how.layer
        )
    # Eager: the host launches kernel after kernel, and the card waits for it or it for the card.
    cache = step.cache_bytes * cache_passes(model) / (how.bandwidth * speed)
    launches = layers * (how.layer_nf4 if step.nf4 else how.layer)
    return max(max(reading, compute) + cache, launches)


def cache_passes(model: Model) -> int:
    """How often transformers' eager decoding moves its KV cache in a step: DynamicCache.update

    copies it (read, write), repeat_kv writes a row for every query head, SDPA reads that.
    """
    repeats = max(1, (model.num_attention_heads or 1) // max(1, model.num_key_value_heads or 1))
    return 3 if repeats == 1 else 3 + 2 * repeats


def llama_cpp_prefill(gpu: GPU, model: Model, tokens: int) -> float:
    """Seconds in which llama.cpp reads a prompt."""
    rate, work, flops = rates(gpu), forward(model, 1, tokens), half_peak(gpu) or 1.0
    # Tokens attend to half of the prompt on average.
    return (work.linear / rate.prefill + work.attention / rate.prefill_attention) / flops


def pass_seconds(gpu: GPU, dtype: str, work: Work, read: float = 0.0, moved: float = 0.0) -> float:
    """A pass of large products: FLOPs at what such products reach, or the weights' `read` bytes.

    moved: bytes that casts and the like move besides.
    """
    rate, how, speed = rates(gpu), training(), bandwidth(gpu) or 1.0
    flops = peak_flops(gpu, dtype) or 1.0
    products = work.linear / rate.matmul + work.attention / rate.attention
    busy = max(how.slowdown * products / flops, read / speed)
    return busy + (work.widths * how.width_bytes + moved) / speed
