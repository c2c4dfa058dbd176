"""How each model_type runs, where it deviates from Llama: the architectures the estimate covers.

A field names a method: norms.py, rope.py, attention.py, mixture.py and decoder.py have them, each
written as the architecture's own code in transformers 5.x is. layouts.py says how its tensors are
named and fused.
"""

from __future__ import annotations

from typing import NamedTuple

# Names that PEFT's `all-linear` takes for those of stacked experts, where it adapts these.
EXPERT_LINEARS = ("gate_proj", "up_proj", "down_proj")


class Flow(NamedTuple):
    """The habits of one architecture; the defaults are Llama's."""

    block: str = "pre_norm"  # the order of a layer: decoder.py
    norm: str = "rms_norm"  # norms.py
    scaled_stream: bool = False  # what a block adds to the residual stream is multiplied first

    attention: str = "separate"  # how queries, keys and values come to be: attention.py
    qk_norm: str = "each"  # right after its projection; "all" three first; "rotated"; "wide"
    scaled_queries: str = ""  # multiplied "before" or "after" they are rotated
    rope: str = "halves"  # rope.py; "" for none
    rotary: float = 1.0  # share of a head that is rotated
    heads_first: bool = False  # queries and keys lie head by head, as cat has written them

    kernel: str = ""  # "eager": transformers runs it without scaled_dot_product_attention
    wide_scores: bool = False  # eager: queries and keys in fp32
    softcap: bool = False  # eager: tanh on the scores
    sinks: bool = False  # eager: a learned logit a head beside the scores
    narrow_softmax: bool = False  # eager: in the scores' own type
    stepwise: bool = False  # eager: the softmax and its cast are two lines
    returns_weights: bool = False  # a layer's weights stay until the next one has run

    mlp: str = "gated"  # decoder.py
    activation: str = ""  # where the model's row names none
    router: str = ""  # mixture.py
    expert_gate: str = "swiglu"  # mixture.py
    shared_last: bool = False  # the shared experts run after the routed ones
    shared_gate: bool = False  # and are scaled by a gate
    adapted_experts: bool = False  # PEFT 0.21 puts LoRA of all-linear on experts and router
    fp32: tuple[str, ...] = ()  # weights that a 16-bit model keeps in fp32, by their last name

    # Linear layers of a class of its own that multiply by a view of the weight: autocast does not
    # cache its casts, and transformers 5.24 quantizes nn.Linear alone (integrations/bitsandbytes).
    own_linear: bool = False
    logits: str = ""  # what follows the head: heads.py


LLAMA = Flow()
_GEMMA = Flow(norm="gemma_norm", qk_norm="all")
_GPT = Flow(block="gpt", norm="layer_norm", attention="fused_split", rope="", mlp="plain")
_PARTIAL = Flow(rope="partial", rotary=0.5, heads_first=True)
_GLM = _PARTIAL._replace(rope="partial_own", mlp="fused_gated", qk_norm="all")
_OLMO2 = Flow(block="post_norm", norm="wide_rms_norm", qk_norm="wide", rope="wide")
_COHERE = Flow(block="stablelm", norm="cohere_norm", qk_norm="all", rope="upcast", logits="scale")
_MOE = Flow(router="softmax_router", adapted_experts=True)
_SIGMOID = Flow(router="sigmoid_router", shared_last=True, adapted_experts=True, fp32=("gate",))
_MLA = Flow(attention="latent", rope="pairs", heads_first=True)
_DEEPSEEK = _MLA._replace(
    router="sigmoid_router", shared_last=True, adapted_experts=True, fp32=("gate",)
)

FLOWS: dict[str, Flow] = {
    **dict.fromkeys(
        (
            *("exaone", "internlm2", "internlm3", "iquestcoder", "k2_horizon", "llama", "mimo"),
            *("mistral", "qwen2", "qwen2_5_vl", "qwen3", "qwen3_vl", "seed_oss", "smollm3"),
        ),
        LLAMA,
    ),
    "afmoe": Flow(
        block="sandwich",
        norm="wide_rms_norm",
        attention="gated_separate",
        qk_norm="all",
        router="minimax_router",
        adapted_experts=True,
        fp32=("expert_bias",),
    ),
    "apertus": Flow(mlp="plain", qk_norm="all"),
    "arcee": Flow(mlp="plain"),
    "bloom": _GPT._replace(block="bloom_block", activation="bloom_gelu", returns_weights=True),
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "deepseek_v2": _DEEPSEEK._replace(rope="complex", router="deepseek_router"),
    "deepseek_v3": _DEEPSEEK,
    "dots1": _SIGMOID,
    "ernie4_5": Flow(rope="upcast_parts"),
    "ernie4_5_moe": Flow(
        rope="upcast_parts",
        router="ernie_router",
        adapted_experts=True,
        fp32=("gate", "e_score_correction_bias"),
    ),
    "exaone4": Flow(block="post_norm", qk_norm="all"),
    "exaone_moe": _SIGMOID._replace(qk_norm="all"),
    "falcon": Flow(
        block="falcon_block",
        norm="layer_norm",
        attention="falcon",
        mlp="plain",
        own_linear=True,
        narrow_softmax=True,
        returns_weights=True,
    ),
    "flex_olmo": _OLMO2._replace(router="softmax_router", adapted_experts=True),
    "gemma": _GEMMA,
    "gemma2": _GEMMA._replace(block="sandwich", kernel="eager", softcap=True, logits="softcapped"),
    "gemma3": _GEMMA._replace(block="sandwich"),
    "gemma3_text": _GEMMA._replace(block="sandwich"),
    "glm": _GLM,
    "glm4": _GLM._replace(block="sandwich"),
    "glm4_moe": _SIGMOID._replace(rope="partial", rotary=0.5, qk_norm="all", heads_first=True),
    "glm4_moe_lite": _DEEPSEEK,
    "gpt2": _GPT._replace(narrow_softmax=True, stepwise=True),
    "gpt_bigcode": _GPT,
    "gpt_neo": _GPT._replace(
        attention="separate", kernel="eager", wide_scores=True, stepwise=True, returns_weights=True
    ),
    "gpt_neox": _GPT._replace(
        block="parallel_norms", rope="partial", rotary=0.25, heads_first=True
    ),
    "gpt_oss": Flow(
        norm="wide_rms_norm",
        router="top_softmax_router",
        expert_gate="clamped_swiglu",
        kernel="eager",
        rope="pairs",
        heads_first=True,
        sinks=True,
    ),
    "gptj": Flow(
        block="parallel",
        norm="layer_norm",
        rope="partial_repeated",
        rotary=0.25,
        mlp="plain",
        wide_scores=True,
        stepwise=True,
    ),
    "granite": Flow(scaled_stream=True, logits="scale"),
    "granitemoe": Flow(scaled_stream=True, router="granite_router", logits="scale"),
    "hunyuan_v1_dense": Flow(qk_norm="rotated"),
    "hunyuan_v1_moe": Flow(
        qk_norm="rotated", router="hunyuan_router", adapted_experts=True, fp32=("wg",)
    ),
    "hy_v3": Flow(qk_norm="all", router="hy_router", shared_last=True, fp32=("gate",)),
    "jais2": Flow(norm="layer_norm", mlp="plain"),
    "kimi_k25": _DEEPSEEK._replace(adapted_experts=False),
    "mellum": _MOE,
    "minimax_m2": _PARTIAL._replace(qk_norm="wide", router="minimax_router", adapted_experts=True),
    "mistral3": Flow(scaled_queries="after"),
    "mixtral": Flow(router="wide_softmax_router", adapted_experts=True),
    "mpt": _GPT._replace(attention="mpt", activation="gelu", returns_weights=True),
    "nemotron": _PARTIAL._replace(norm="nemotron_norm", mlp="plain"),
    "olmo": Flow(norm="bare_norm", rope="wide"),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "olmoe": _MOE._replace(qk_norm="wide"),
    "opt": Flow(block="opt", norm="layer_norm", rope="", mlp="plain", scaled_queries="before"),
    "phi": _PARTIAL._replace(
        block="parallel", norm="layer_norm", rope="partial_inline", mlp="plain"
    ),
    "phi3": Flow(attention="fused_slices", rope="joined", mlp="fused_gated", heads_first=True),
    "phimoe": Flow(norm="layer_norm", router="sparsemixer"),
    "qwen2_moe": _MOE._replace(shared_gate=True, adapted_experts=False),
    "qwen3_moe": _MOE,
    "qwen3_vl_moe": _MOE._replace(adapted_experts=False),
    "solar_open": _SIGMOID,
    "stablelm": _PARTIAL._replace(
        block="stablelm", norm="layer_norm", rope="partial_inline", rotary=0.25, qk_norm="all"
    ),
    "starcoder2": Flow(norm="layer_norm", mlp="plain"),
    "vaultgemma": _GEMMA._replace(kernel="eager", softcap=True, logits="softcapped"),
    "youtu": _MLA,
}

# Architectures whose layers are traced (coefficients.py): only what comes after the last layer.
HEADS: dict[str, Flow] = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"), _GEMMA),
    **dict.fromkeys(("falcon_h1", "granite_swa", "granitemoehybrid"), Flow(logits="scale")),
    "dbrx": Flow(norm="layer_norm"),
    "recurrent_gemma": _GEMMA._replace(logits="softcapped"),
}
