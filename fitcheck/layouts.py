"""How each model_type names, fuses and shapes its tensors in transformers 5.x: the one place.

Everything a row's fields say (sizes, biases, tied head, mixture, latent attention) is not here but
in `weights.py`; an entry below says only what deviates from Llama.
"""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """The names and habits of one architecture; the defaults are Llama's."""

    embedding: str = "embed_tokens"
    embedding_norm: str = ""
    positions: str = ""  # learned absolute positions
    extra_positions: int = 0  # rows of that table beyond max_position_embeddings
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # a single name: fused into one
    out: str = "o_proj"
    attention_gate: str = ""  # a projection as wide as the queries that gates attention's output
    sinks: bool = False  # a learned logit a head
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    qk_norm_style: str = "shared"  # by all heads; "wide": over all at once; "table"; "modules"
    conv1d: bool = False  # GPT-2's Conv1D stores the transpose of a Linear
    mlp: str = "mlp"
    up: tuple[str, ...] = ()  # default: gate_proj, up_proj where gated, else up_proj
    down: str = "down_proj"
    slopes: tuple[str, ...] = ()  # learned numbers of the activation
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    only_norm: str = ""  # the norm of a layer that has one (attention and mlp in parallel)
    norm_bias: bool = True  # of a LayerNorm; an RMSNorm has none
    final_norm: str = "norm"
    mixture: str = "mlp"
    router: str = "gate"
    router_is_linear: bool = False
    router_bias: str = ""
    router_bias_rows: tuple[int, ...] = ()  # dimensions before that of the experts
    experts: str = "stacked"  # "transposed" and with biases; "flat": all experts in one matrix
    shared_experts: str = "shared_experts"
    shared_expert_gate: str = ""


LLAMA = Layout()
_GPT2 = Layout(
    embedding="wte",
    positions="wpe",
    attention="attn",
    qkv=("c_attn",),
    out="c_proj",
    conv1d=True,
    up=("c_fc",),
    down="c_proj",
    norms=("ln_1", "ln_2"),
    final_norm="ln_f",
)
_NEOX = Layout(
    embedding="embed_in",
    attention="attention",
    qkv=("query_key_value",),
    out="dense",
    up=("dense_h_to_4h",),
    down="dense_4h_to_h",
    final_norm="final_layer_norm",
)
_BLOOM = _NEOX._replace(
    embedding="word_embeddings",
    embedding_norm="word_embeddings_layernorm",
    attention="self_attention",
    final_norm="ln_f",
)
_MPT = Layout(
    embedding="wte",
    attention="attn",
    qkv=("Wqkv",),
    out="out_proj",
    mlp="ffn",
    norms=("norm_1", "norm_2"),
    norm_bias=False,
    final_norm="norm_f",
)
_GEMMA2 = LLAMA._replace(
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
)
_GLM = LLAMA._replace(up=("gate_up_proj",))
_POST_NORM = LLAMA._replace(norms=("post_attention_layernorm", "post_feedforward_layernorm"))
_OLMO2 = _POST_NORM._replace(qk_norm_style="wide")
_COHERE = LLAMA._replace(qk_norm_style="table", norms=("input_layernorm",), norm_bias=False)
_HUNYUAN = LLAMA._replace(
    qk_norms=("query_layernorm", "key_layernorm"),
    router="gate.wg",
    router_is_linear=True,
    shared_experts="shared_mlp",
)

LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(
        (
            *("arcee", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "exaone_moe"),
            *("glm4_moe", "glm4_moe_lite", "granite", "hy_v3", "jais2", "kimi_k25", "llama"),
            *("mellum", "mistral", "mistral3", "mixtral", "nemotron", "olmo", "qwen2"),
            *("qwen2_5_vl", "qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe", "seed_oss"),
            *("gemma", "smollm3", "solar_open", "youtu"),
            # Remote code with Llama's or Qwen2's layers; counted with those classes.
            *("exaone", "internlm2", "internlm3", "iquestcoder", "k2_horizon", "mimo"),
        ),
        LLAMA,
    ),
    "afmoe": _GEMMA2._replace(
        norms=(*_GEMMA2.norms[:2], "pre_mlp_layernorm", "post_mlp_layernorm"),
        attention_gate="gate_proj",
        router="router.gate",
        router_is_linear=True,
        router_bias="expert_bias",
    ),
    "apertus": LLAMA._replace(
        slopes=("act_fn.alpha_p", "act_fn.alpha_n"),
        norms=("attention_layernorm", "feedforward_layernorm"),
    ),
    "bloom": _BLOOM,
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "dbrx": _MPT._replace(
        attention="norm_attn_norm.attn",
        norms=("norm_attn_norm.norm_1", "norm_attn_norm.norm_2"),
        mixture="ffn",
        router="router.layer",
        router_is_linear=True,
        experts="flat",
    ),
    "ernie4_5_moe": LLAMA._replace(
        router_bias="gate.moe_statics.e_score_correction_bias", router_bias_rows=(1,)
    ),
    "exaone4": _POST_NORM,
    "falcon": _BLOOM._replace(
        embedding_norm="", norms=("ln_attn", "ln_mlp"), only_norm="input_layernorm"
    ),
    "flex_olmo": _OLMO2,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "glm": _GLM,
    "glm4": _GLM._replace(
        norms=(*LLAMA.norms, "post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2._replace(conv1d=False),
    "gpt_neo": _GPT2._replace(
        conv1d=False, attention="attn.attention", qkv=LLAMA.qkv, out="out_proj"
    ),
    "gpt_neox": _NEOX,
    "gpt_oss": LLAMA._replace(
        sinks=True, router="router", router_bias="router.bias", experts="transposed"
    ),
    "gptj": _GPT2._replace(
        conv1d=False,
        positions="",
        qkv=LLAMA.qkv,
        out="out_proj",
        up=("fc_in",),
        down="fc_out",
        norms=("ln_1",),
    ),
    "granitemoe": LLAMA._replace(mixture="block_sparse_moe", router="router"),
    "hunyuan_v1_dense": _HUNYUAN,
    "hunyuan_v1_moe": _HUNYUAN,
    "minimax_m2": LLAMA._replace(qk_norm_style="wide"),
    "mpt": _MPT,
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "olmoe": LLAMA._replace(qk_norm_style="wide"),
    "opt": LLAMA._replace(
        positions="embed_positions",
        extra_positions=2,
        out="out_proj",
        mlp="",
        up=("fc1",),
        down="fc2",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        final_norm="final_layer_norm",
    ),
    "phi": LLAMA._replace(
        out="dense",
        up=("fc1",),
        down="fc2",
        norms=("input_layernorm",),
        final_norm="final_layernorm",
    ),
    "phi3": _GLM._replace(qkv=("qkv_proj",)),
    "phimoe": LLAMA._replace(router="router", router_is_linear=True),
    "qwen2_moe": LLAMA._replace(
        shared_experts="shared_expert", shared_expert_gate="shared_expert_gate"
    ),
    "stablelm": LLAMA._replace(
        qk_norms=("q_layernorm.norms", "k_layernorm.norms"),
        qk_norm_style="modules",
        only_norm="input_layernorm",
    ),
    "starcoder2": LLAMA._replace(up=("c_fc",), down="c_proj"),
    "vaultgemma": LLAMA._replace(norms=("input_layernorm", "pre_feedforward_layernorm")),
}
