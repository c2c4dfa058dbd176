"""Model: the facts of a transformer that decide how much memory it takes.

A `Model` is one row of `catalog/models/*.json`, or what `hub.py` reads from a config.json:

    llama = Model.from_json(row)        # FitCheckError, naming the row, when it is malformed
    llama.params, llama.head_params     # 8030261248, 525336576
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

from fitcheck.errors import FitCheckError

# A size no source states: only rows of status `unverified` lack one, and `weights()` refuses them.
# Typed Any so that the arithmetic may treat sizes as plain int.
UNKNOWN: Any = None

# Statuses whose parameter count was reproduced by instantiating the transformers class; of models
# that were read: by the closed form, and (headers) by the shapes in their files.
READ = frozenset({"headers", "config"})
VERIFIED = frozenset({"exact", "exact_sibling", "instantiated", "headers", "config"})

# What the arithmetic cannot do without; a verified row has them all.
SIZES = ("params", "hidden_size", "num_layers", "vocab_size", "tie_word_embeddings", "attention")


class Weight(NamedTuple):
    """One parameter tensor, and how many modules of the model hold one like it.

    `name` is the module's name without root and layer index ("self_attn.q_proj"); a bias or a
    loose parameter keeps its own last part. `shape` is that of one tensor, as stored. `kind`:
      embedding, position  rows that are looked up
      linear    the weight of an nn.Linear or Conv1D other than the head: what PEFT's `all-linear`
                and bitsandbytes act on (a router too, where transformers makes it an nn.Linear)
      expert    stacked matrices of a mixture: bare parameters, no nn.Linear
      router    what chooses the experts, where it is a bare parameter
      norm      weight and bias of a norm
      bias      bias of a linear or of stacked experts
      other     loose parameters: convolutions, decay rates, attention sinks, activation slopes
      head      lm_head and its bias; a tied head has no weight of its own
      tower     all that sees or hears, lumped into one flat shape
    """

    name: str
    shape: tuple[int, ...]
    copies: int
    kind: str

    @property
    def params(self) -> int:
        """Parameters of all copies together."""
        return prod(self.shape) * self.copies


class Attention(NamedTuple):
    """How queries meet keys; the ranks are those of MLA (DeepSeek-V2, arXiv 2405.04434)."""

    kind: str  # MHA, GQA, MQA, MLA, "none (SSM)", ...
    position: str | None = None  # RoPE, learned absolute, ALiBi, none; None: unknown
    q_lora_rank: int | None = None  # None: queries are projected directly
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    qk_nope_head_dim: int | None = None
    v_head_dim: int | None = None
    o_lora_rank: int | None = None
    head_dim: int | None = None
    index_n_heads: int | None = None
    index_head_dim: int | None = None
    index_topk: int | None = None
    sparse_indexer: Mapping[str, int] | None = None


class AttentionBias(NamedTuple):
    """Whether the projections of attention carry a bias."""

    qkv: bool
    out: bool


class MoE(NamedTuple):
    """The mixture of experts: how many there are, and how many a token visits."""

    num_experts: int
    experts_per_token: int
    moe_intermediate_size: int
    shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None  # None: shared_experts x moe_intermediate
    moe_layers: int = UNKNOWN
    dense_layers: int | None = None
    first_k_dense: int | None = None
    routed_expert_hidden_size: int | None = None

    @property
    def shared_width(self) -> int:
        """Intermediate size of all shared experts together; 0 without any."""
        if not self.shared_experts:
            return 0
        own = self.shared_expert_intermediate_size
        return self.shared_experts * self.moe_intermediate_size if own is None else own


class KVGroup(NamedTuple):
    """Layers that cache alike: elements of K and of V kept for one token in one layer.

    A group with a `window` never holds more tokens than that; MLA keeps one latent as K, no V.
    """

    layers: int
    kind: str  # full_attention, sliding_attention, chunked_attention, mla, ...
    k_elems_per_token: int
    v_elems_per_token: int
    window: int | None = None

    @property
    def elems_per_token(self) -> int:
        """K and V elements one token adds over all layers of the group."""
        return self.layers * (self.k_elems_per_token + self.v_elems_per_token)


class Checkpoint(NamedTuple):
    """What the headers of a model's files say.

    `bytes` is what is loaded of them (no second copy of a tied head, no multi-token prediction),
    `layers` that of each layer, `experts` the part of each that is its stacked experts.
    """

    format: str  # safetensors, gguf
    bytes: int
    types: tuple[tuple[str, int], ...]  # (type as the files call it, bytes), the largest first
    quantization: str = ""  # gptq 4 bit, fp8 in blocks of 128 x 128, ...; empty: none
    layers: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    embedding: int = 0  # an embedding that is no head: rows that are only looked up

    @property
    def dtype(self) -> str:
        """What most of it is stored in, as Plan calls it."""
        known = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
        return known.get(self.types[0][0].upper(), "bf16") if self.types else "bf16"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Model:
    """One transformer: sizes, layer kinds, parameter counts and where they come from.

    `status` says how far `params` is proven: `exact` (the class, instantiated, has as many as the
    repository publishes), `exact_sibling` (as a repository of the same architecture does),
    `instantiated` (counted, nothing to compare with), `mismatch`, `unverified`; `checked` says how.
    `params` is the unique parameter count of the class as transformers loads it (a tied head
    counts once; no buffers, no multi-token-prediction block). `params_active` of a mixture
    includes embeddings and head. `vocab_size` is the embedding's rows, padding included.
    `gated` is vendor practice, never checked on the Hub (see `gated_basis`).
    """

    id: str
    family: str
    name: str
    model_type: str
    status: str
    sources: tuple[str, ...]
    checked: str
    size_label: str | None = None
    params: int = UNKNOWN
    params_published: int | None = None
    params_published_note: str | None = None
    params_active: int | None = None
    params_text: int | None = None
    params_vision_audio: int | None = None
    params_embedding: int = UNKNOWN
    hidden_size: int = UNKNOWN
    num_layers: int = UNKNOWN
    num_attention_heads: int = UNKNOWN
    num_key_value_heads: int = UNKNOWN
    head_dim: int = UNKNOWN
    intermediate_size: int = UNKNOWN
    vocab_size: int = UNKNOWN
    tie_word_embeddings: bool = UNKNOWN
    max_position_embeddings: int = UNKNOWN
    attention: Attention = UNKNOWN
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    layer_type_counts: Mapping[str, int] | None = None
    kv_cache_groups: tuple[KVGroup, ...] | None = None  # None: unknown; (): caches no K and V
    attention_bias: AttentionBias = UNKNOWN
    mlp_bias: bool = UNKNOWN
    lm_head_bias: bool = UNKNOWN
    qk_norm: bool = UNKNOWN
    mlp_gated: bool = UNKNOWN
    activation: str | None = None
    norm_type: str = UNKNOWN
    norms_per_layer: int = UNKNOWN
    moe: MoE | None = None
    hybrid: Mapping[str, Any] | None = None
    tensors: tuple[Weight, ...] | None = None  # listed where no closed form gives them
    has_mtp_in_checkpoint: bool | None = None
    checkpoint_precision: str | None = None
    native_fp8: bool | None = None
    architecture_class: str | None = None
    license: str | None = None
    release_date: str | None = None
    gated: bool | None = None
    gated_basis: str | None = None
    alignment_recipe: str | None = None
    alignment_recipe_source: str | None = None
    alignment_recipe_seen_in_stored_source: bool | None = None
    rewardbench_dpo_ref_model: str | None = None
    note: str | None = None
    formula_matches: bool | None = None
    checkpoint: Checkpoint | None = None
    adapter_bytes: int | None = None  # of a PEFT adapter that was read with its base
    sibling: str | None = (
        None  # the catalog's model of the same sizes, where that is how it is known
    )

    def __hash__(self) -> int:
        return hash((self.id, self.num_layers, self.hidden_size))  # mappings have no hash

    def __repr__(self) -> str:
        return f"<Model {self.id}>"  # fifty fields help nobody in a traceback

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Model:
        """The model of one catalog row; FitCheckError, naming the row, for a missing or odd key."""
        found = dict(row)
        try:
            found["sources"] = tuple(found["sources"])
            for key, parse in _NESTED.items():
                if found.get(key) is not None:
                    found[key] = parse(found[key])
            for key in SIZES if found.get("status") in VERIFIED else ():
                if found.get(key) is None:
                    raise KeyError(key)
            return cls(**found)
        except (KeyError, TypeError, ValueError) as fault:
            raise FitCheckError(
                f"the model row {row.get('id', '(without id)')!r} is malformed: "
                + (f"no {fault}" if isinstance(fault, KeyError) else str(fault)),
                "compare it with its neighbours in catalog/models/",
            ) from fault

    def to_json(self) -> dict[str, Any]:
        """The row that from_json reads back; unknown fields are left out."""
        found = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def is_read(self) -> bool:
        """Whether it was read from the Hub, a folder or a file, and is no row of the catalog."""
        return self.status in READ or self.checkpoint is not None

    @property
    def is_verified(self) -> bool:
        """Whether the parameter count was reproduced from the architecture."""
        return self.status in VERIFIED

    @property
    def doubt(self) -> str:
        """What to tell the user about this row's reliability; empty when there is nothing."""
        if self.is_verified:
            return f"counted, but {self.note}" if self.status == "config" and self.note else ""
        return f"{self.status}: {self.note or self.checked}"

    @property
    def recipe_doubt(self) -> str:
        """`recalled` when the alignment recipe was not seen in a stored source, else empty."""
        if self.alignment_recipe is None or self.alignment_recipe_seen_in_stored_source:
            return ""
        return "recalled"

    @property
    def embedding_width(self) -> int:
        """Width of a token's embedding and of the head's input: hidden_size, except OPT-350m."""
        if self.params_embedding is None or self.vocab_size is None:
            return self.hidden_size
        return self.params_embedding // self.vocab_size

    @property
    def head_params(self) -> int:
        """Parameters that an untied lm_head owns; 0 when it shares the embedding."""
        if self.tensors is not None:
            return sum(tensor.params for tensor in self.tensors if tensor.kind == "head")
        bias = self.vocab_size if self.lm_head_bias else 0
        return bias + (0 if self.tie_word_embeddings else self.vocab_size * self.embedding_width)

    @property
    def backbone_params(self) -> int:
        """Parameters without the lm_head: what a reward model or a critic is built on."""
        return self.params - self.head_params

    @property
    def score_head_params(self) -> int:
        """The Linear(width, 1) without bias that replaces lm_head in *ForSequenceClassification."""
        return self.embedding_width


def _plain(value: Any) -> Any:
    """A field as JSON holds it."""
    if isinstance(value, Weight):
        return list(value)
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _tensors(rows: list[tuple[str, list[int], int, str]]) -> tuple[Weight, ...]:
    return tuple(Weight(name, tuple(shape), copies, kind) for name, shape, copies, kind in rows)


def _kv_groups(rows: list[dict[str, Any]]) -> tuple[KVGroup, ...]:
    return tuple(KVGroup(**row) for row in rows)


def _checkpoint(row: dict[str, Any]) -> Checkpoint:
    types = tuple((str(name), int(size)) for name, size in row["types"])
    layers, experts = (tuple(map(int, row.get(key, ()))) for key in ("layers", "experts"))
    return Checkpoint(**{**row, "types": types, "layers": layers, "experts": experts})


_NESTED: dict[str, Any] = {
    "checkpoint": _checkpoint,
    "attention": lambda row: Attention(**row),
    "attention_bias": lambda row: AttentionBias(**row),
    "moe": lambda row: MoE(**row),
    "kv_cache_groups": _kv_groups,
    "tensors": _tensors,
    "layer_type_counts": MappingProxyType,
    "hybrid": MappingProxyType,
}
