"""Inference on engines that manage their own memory: llama.cpp, vLLM, SGLang.

    phases = PHASES[plan.engine](scene, rows)       # as phases.inference, for transformers
    lines = facts(plan)                             # layers that fit, pools, the engine's own flags

llama.cpp holds its weights, its cache and one compute buffer from start to end. vLLM and SGLang
take a share of the card; what weights, activations and CUDA graphs leave of it is a pool of pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fitcheck import memory, quants
from fitcheck.activations import Shape
from fitcheck.errors import FitCheckError
from fitcheck.model import Model
from fitcheck.plan import GGUF_QUANTS, Plan
from fitcheck.report import OUTSIDE, Moment, Phase, Term
from fitcheck.scene import Scene
from fitcheck.stays import Terms

MICRO = 512  # tokens that llama.cpp computes at a time (--ubatch-size)
CELLS = 256  # its caches are multiples of so many tokens (llama-kv-cache.cpp)
PAGE = {"vllm": 16, "sglang": 1}  # tokens of a page: --block-size, --page-size
CHUNK = 2048  # tokens vLLM prefills at a time on cards below 70 GB (max_num_batched_tokens)
SAMPLED = 256  # sequences whose logits vLLM's profile run samples (max_num_seqs)
GRAPHS = 360 * 2**20  # CUDA graphs: an estimate, logs of vLLM 0.21 to 0.27 say 0.13 to 0.36 GiB


def pad(tokens: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-tokens // step) * step


def cache_bytes(plan: Plan, rows: int, context: int) -> int:
    """The KV cache of `rows` sequences as the engine rounds it; FitCheckError where unknown."""
    model, width = plan.model, memory.KV_BYTES[plan.kv_cache]
    if plan.engine == "llama.cpp":
        step, beside = CELLS, MICRO
    else:
        step, beside = PAGE[plan.engine], CHUNK
    context = pad(context, step)
    groups = tuple(  # a window's cache has room for the tokens that are computed beside it
        g._replace(window=min(context, pad(g.window + beside, step))) if g.window else g
        for g in model.kv_cache_groups or ()
    )
    held = model if model.kv_cache_groups is None else replace(model, kv_cache_groups=groups)
    return memory.kv_cache(held, rows, context, width)


def compute_buffer(model: Model, cells: int, flash: bool) -> int:
    """llama.cpp's CUDA compute buffer: the largest of a layer's and the head's intermediates.

    The head: logits and their input, fp32, of MICRO tokens. A layer: the mask as it comes (fp32)
    and as it is used (fp16), the MLP's intermediate, two of hidden size; without flash attention
    the scores of all heads too. Public logs: Llama's vocabulary aside, Qwen3-30B-A3B at 32k says
    304.75 MiB (here 300.75), Qwen3-235B 304.75 (304.75), Qwen3.5-9B at 256k 808.02 (808.00).
    """
    hidden, inner = model.hidden_size, model.intermediate_size or 0
    if model.moe:
        inner = max(inner, model.moe.experts_per_token * model.moe.moe_intermediate_size)
    head = 4 * (model.vocab_size + hidden)
    layer = 6 * cells + 4 * (inner + 2 * hidden)
    if not flash:
        layer += 4 * cells * (model.num_attention_heads or 0)
    return MICRO * max(head, layer)


def llama_cpp(scene: Scene, rows: int) -> Iterator[Phase]:
    """All of it is there before the first token, and nothing comes later."""
    plan = scene.plan
    cells = pad(plan.context, CELLS)  # each sequence's tokens see its own alone
    size = compute_buffer(plan.model, cells, plan.attention != "eager")
    buffer = Term("compute buffer", "policy", size, f"the largest node of a {MICRO}-token graph")
    terms = (*scene.resident("prefill"), *_cache(plan, rows), buffer)
    terms = tuple(t for t in terms if t.name != "cuBLAS workspace")  # PyTorch's
    for name in ("prefill", "decode"):
        yield Phase(name, (Moment("graph", terms),))


def paged(scene: Scene, rows: int) -> Iterator[Phase]:
    """Weights, activations, graphs and the pages these sequences need, within the share."""
    plan = scene.plan
    share, usable = share_bytes(plan), plan.memory.usable_bytes
    beyond = max(0, usable - share)
    why = f"{plan.engine} leaves {1 - plan.engine_memory:.0%} of the card alone"
    shape = Shape(1, min(plan.context, CHUNK))
    rest = (*(_cache(plan, rows), Term("CUDA graphs", "policy", GRAPHS, "an estimate", OUTSIDE)),)
    extra = (*rest[0], rest[1], Term("beyond the share", "card", beyond, why, OUTSIDE))
    prefill = scene.forward("prefill", "policy", shape, "last_logits", extra)
    rows_sampled = SAMPLED if plan.engine == "vllm" else rows
    size = 10 * rows_sampled * plan.model.vocab_size  # bf16, fp32, their softmax
    logits = Term("logits", "policy", size, f"{rows_sampled} rows x vocabulary x (2 + 4 + 4) B")
    stays = (*scene.resident("decode"), *extra, logits)
    yield prefill
    yield Phase("decode", (Moment("sampling", stays),))


PHASES = {"llama.cpp": llama_cpp, "vllm": paged, "sglang": paged}


def _cache(plan: Plan, rows: int) -> Terms:
    size = cache_bytes(plan, rows, plan.context)
    width = memory.KV_BYTES[plan.kv_cache]

    def why() -> str:
        return memory.kv_why(plan.model, rows, plan.context, width) + f", as {plan.engine} pads it"

    return (Term("KV cache", "policy", size, why),)


def share_bytes(plan: Plan) -> int:
    """What vLLM (gpu_memory_utilization) or SGLang (mem_fraction_static) may take of the card."""
    return int(plan.engine_memory * plan.memory.total_bytes)


def split(plan: Plan, free: int) -> tuple[int, int, int]:
    """(layers that fit into `free` bytes, bytes they take there, RAM the rest takes), llama.cpp.

    Layers move with their part of the cache, the last first; the head counts as one more layer.
    """
    held = quants.gguf_parts(plan.model, plan.quant)
    rows = plan.on_card(plan.concurrency)
    cache = cache_bytes(plan, rows, plan.context) // plan.model.num_layers
    head = held.bytes - held.embedding - sum(held.layers)
    taken = layers = 0
    for size in (head, *(layer + cache for layer in reversed(held.layers))):
        if taken + size > free:
            break
        taken, layers = taken + size, layers + 1
    total = held.bytes + cache * plan.model.num_layers
    return layers, taken, total - taken


def facts(plan: Plan, phases: tuple[Phase, ...]) -> list[str]:
    """What an engine's user asks next; empty for transformers."""
    if plan.method != "inference" or plan.engine == "transformers":
        return []
    peak = max((phase.peak for phase in phases), key=lambda moment: moment.bytes)
    sizes = {term.name: term.bytes for term in peak.terms}
    spare = plan.memory.usable_bytes - peak.bytes
    rows = plan.on_card(plan.concurrency)
    pool = sizes["KV cache"] + spare
    found = []
    if plan.engine == "llama.cpp":
        found.append(_flags(plan))
        if spare < 0:
            found += _partly(plan, plan.memory.usable_bytes, sizes)
    else:
        name = "--gpu-memory-utilization" if plan.engine == "vllm" else "--mem-fraction-static"
        found.append(
            f"{plan.engine} takes its whole share, {share_bytes(plan) / 2**30:.1f} GiB "
            f"({name} {plan.engine_memory}), whatever is asked of it"
        )
    sequences = pool // cache_bytes(plan, 1, plan.context)
    longest = _longest(plan, rows, pool)
    if sequences > 0 and longest > 0:
        found.append(
            f"room for {sequences:,} x {plan.context:,} tokens of context, or "
            f"{rows:,} x {longest:,}"
        )
    if plan.engine == "llama.cpp" and (best := best_quant(plan, spare)):
        found.append(f"the most bits a weight that fit here: --quant {best}")
    return found


def _longest(plan: Plan, rows: int, pool: int) -> int:
    """The longest context whose cache fits into `pool`, as far as the model reads; 0: none."""
    low, high = 0, plan.model.max_position_embeddings or 2**20
    while low < high:
        middle = (low + high + 1) // 2
        fits = cache_bytes(plan, rows, middle) <= pool
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def best_quant(plan: Plan, spare: int) -> str:
    """The largest type of GGUF whose weights fit where these are; empty where none does."""
    try:
        now = quants.gguf_parts(plan.model, plan.quant)
        now_bytes = now.bytes - now.embedding
        sizes = {}
        for quant in ("bf16", *GGUF_QUANTS[:-2]):
            held = quants.gguf_parts(plan.model, quant)
            sizes[quant] = held.bytes - held.embedding
    except FitCheckError:
        return ""
    fitting = {quant: size for quant, size in sizes.items() if size - now_bytes <= spare}
    return max(fitting, key=lambda quant: fitting[quant], default="")


def _partly(plan: Plan, usable: int, sizes: dict[str, int]) -> list[str]:
    """How much of the model the card takes, and the RAM for the rest."""
    fixed = sum(size for name, size in sizes.items() if name not in ("weights", "KV cache"))
    layers, _, ram = split(plan, usable - fixed)
    most = plan.model.num_layers + 1
    found = [
        f"{layers} of {most} layers fit (-ngl {layers}): the rest takes {ram / 2**30:.1f} GiB RAM"
    ]
    held = quants.gguf_parts(plan.model, plan.quant)
    if held.experts:
        experts = sum(held.experts)
        left = usable - fixed - sizes["KV cache"] - sizes["weights"] + experts
        verdict = "fits" if left >= 0 else "does not fit either"
        found.append(
            f"with all experts on the CPU (--cpu-moe, {experts / 2**30:.1f} GiB RAM) it {verdict}"
        )
    return found


def _flags(plan: Plan) -> str:
    """The plan in llama.cpp's, Ollama's and LM Studio's own words."""
    total = plan.context * plan.concurrency
    kind = {"bf16": "f16", "fp16": "f16", "fp32": "f32"}.get(plan.kv_cache, plan.kv_cache)
    layers = plan.model.num_layers + 1
    return (
        f"llama.cpp: -c {total} -np {plan.concurrency} -ngl {layers} -fa on -ctk {kind} -ctv {kind}"
        f"; Ollama: num_ctx {plan.context}, num_gpu {layers}, "
        f"OLLAMA_NUM_PARALLEL={plan.concurrency}, OLLAMA_KV_CACHE_TYPE={kind}; "
        f"LM Studio: Context Length {plan.context}, GPU Offload {layers}"
    )
