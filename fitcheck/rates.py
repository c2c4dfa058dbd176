"""How fast cards are in practice: classes of hardware and their constants, of catalog/speed.json.

    rates(catalog.find_gpu("4090")).matmul      # share of its dense rate that large products reach

benchmarks/fit_speed.py fits the constants on published measurements and writes the file.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from fitcheck import files
from fitcheck.gpu import GPU
from fitcheck.report import Error

# NVIDIA's chips with stacked memory, by compute capability; all others have GDDR or LPDDR.
STACKED = {
    **{(6, 0): "nvidia-old", (7, 0): "nvidia-old", (8, 0): "nvidia-a100", (9, 0): "nvidia-hopper"},
    **{(10, 0): "nvidia-blackwell", (10, 3): "nvidia-blackwell"},
}
ENGINES = ("llama.cpp", "graphs", "eager")


class Rates(NamedTuple):
    """Constants of one class of hardware; shares are of the rates on paper.

    matmul, attention: of the dense FLOP/s. Decoding with llama.cpp: `bandwidth` and `cache` of the
    memory bandwidth for weights and for KV cache, `layer` seconds a layer, `unpack` FLOP a weight
    of a K-quant. Its prefill: `prefill` and `prefill_attention` of the FLOP/s.
    """

    matmul: float
    attention: float
    bandwidth: float
    cache: float
    layer: float
    unpack: float
    prefill: float
    prefill_attention: float


class Engine(NamedTuple):
    """An engine whose constants no hardware class changes.

    bandwidth: the share it reaches. layer: the host's seconds for a layer's launches, layer_nf4
    with bitsandbytes' four bits; backward: how many forwards' launches a backward takes.
    """

    bandwidth: float
    layer: float
    layer_nf4: float
    backward: float


class Training(NamedTuple):
    """How much longer than at the ceilings a pass takes, and bytes a layer width it moves."""

    slowdown: float
    width_bytes: float


def hardware_class(gpu: GPU) -> str:
    """What kind of card it is, for speed: vendor and memory, of NVIDIA's large chips the name."""
    if gpu.vendor == "nvidia":
        return STACKED.get(gpu.compute_capability or (0, 0), "nvidia")
    if gpu.vendor == "amd":
        return "amd-unified" if gpu.unified_memory else _amd(gpu)
    if gpu.vendor == "apple":
        if gpu.arch in ("M5", "M6"):  # with matrix units
            return "apple-m5"
        return "apple-ultra" if "ultra" in gpu.id else _apple(gpu)
    return "intel-gaudi" if gpu.arch == "Gaudi" else "intel"


def _amd(gpu: GPU) -> str:
    return "amd-instinct" if gpu.segment == "instinct" else "amd"


def _apple(gpu: GPU) -> str:
    return "apple-m1" if gpu.arch == "M1" else "apple"


def _file() -> dict[str, Any]:
    return files.read("speed.json")


@cache
def rates_of(kind: str) -> Rates:
    """The constants of a hardware class; FitCheckError when the file is damaged."""
    try:
        row = _file()["classes"][kind]
        return Rates(**{name: float(row[name]) for name in Rates._fields})
    except (KeyError, TypeError, ValueError) as fault:
        raise files.damaged("speed.json", f"class {kind}: {fault!r}") from fault


def rates(gpu: GPU) -> Rates:
    return rates_of(hardware_class(gpu))


@cache
def engine(name: str) -> Engine:
    """graphs: CUDA graphs or compiled (vLLM, SGLang, gpt-fast); eager: transformers' generate."""
    try:
        row = _file()["engines"][name]
        return Engine(**{key: float(row[key]) for key in Engine._fields})
    except (KeyError, TypeError, ValueError) as fault:
        raise files.damaged("speed.json", f"engine {name}: {fault!r}") from fault


@cache
def training() -> Training:
    try:
        row = _file()["training"]
        return Training(float(row["slowdown"]), float(row["width_bytes"]))
    except (KeyError, TypeError, ValueError) as fault:
        raise files.damaged("speed.json", f"training: {fault!r}") from fault


def is_measured(gpu: GPU, what: str) -> bool:
    """Whether the rows behind an engine or training have a card of this class among them."""
    if what in ("graphs", "eager"):  # whose constants no class changes
        return hardware_class(gpu).startswith("nvidia")
    try:
        return what in _file()["classes"][hardware_class(gpu)]["measured"]
    except (KeyError, TypeError) as fault:
        raise files.damaged("speed.json", f"classes: {fault!r}") from fault


@cache
def stated_error(what: str) -> Error:
    """How far off speeds were; what: an engine, or training. Sources left out where that can be.

    |predicted / measured - 1| of tokens per second.
    """
    try:
        return Error(**_file()["errors"][what])
    except (KeyError, TypeError) as fault:
        raise files.damaged("speed.json", f"errors: {fault!r}") from fault


def peak_flops(gpu: GPU, dtype: str) -> float | None:
    """FLOP/s on paper of dense products in bf16, fp16 (summed in fp32) or fp32; None: unknown.

    Where there is no unit for the type, products run at the fp32 rate (V100: bf16 at 9.6 of its
    14.0 TFLOP/s; lablup/mlxcel #1654). torch leaves TF32 off.
    """
    rate = {"bf16": gpu.bf16_dense_tflops, "fp16": gpu.fp16_dense_tflops}.get(dtype)
    if dtype == "fp16" and rate and gpu.fp32_tflops and rate < gpu.fp32_tflops:
        rate = None  # Pascal's GeForce and P40: fp16 at 1/64 of fp32
    found = rate or gpu.fp32_tflops
    return found * 1e12 if found else None


def half_peak(gpu: GPU) -> float | None:
    """FLOP/s of fp16 products however they are summed, what llama.cpp's own kernels run at."""
    fast = gpu.fp16_dense_tflops_fp16acc
    return fast * 1e12 if fast else peak_flops(gpu, "fp16")


def bandwidth(gpu: GPU) -> float | None:
    """Bytes a second of the card's memory, on paper."""
    return gpu.bandwidth_gbs * 1e9 if gpu.bandwidth_gbs else None
