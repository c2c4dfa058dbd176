"""python -m fitcheck.bench.defaults: catalog/configs.json, what a config.json may leave unsaid.

Of each architecture with a closed form: the names its config class gives to sizes, the defaults of
that class, and the traits that all rows of the catalog share (a norm's type is in no config.json).
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from fitcheck import catalog
from fitcheck.config import NAMES
from fitcheck.files import ROOT
from fitcheck.layouts import LAYOUTS
from fitcheck.model import Model
from fitcheck.weights import has_closed_form

TRAITS = ("norm_type", "norms_per_layer", "mlp_gated", "lm_head_bias", "qk_norm", "mlp_bias")
NOT_OURS = ("internlm2", "internlm3", "iquestcoder", "k2_horizon", "mimo", "exaone")  # as Llama


def entry(model_type: str, rows: list[Model]) -> dict[str, Any]:
    """What is known of one architecture."""
    config = AutoConfig.for_model("llama" if model_type in NOT_OURS else model_type)
    text = config.get_text_config()
    names = {k: v for k, v in text.attribute_map.items() if k in NAMES}
    own = {field.name for field in fields(type(text))}
    defaults = {}
    for name in NAMES:
        key = names.get(name, name)
        value = getattr(type(text), key, None) if key in own else None
        if isinstance(value, (int, float, str)):
            defaults[name] = value
    shared: dict[str, Any] = {}
    for trait in TRAITS:
        values = {getattr(row, trait) for row in rows}
        if len(values) == 1:
            shared[trait] = values.pop()
    biases = {row.attention_bias for row in rows}
    shared["out_bias"] = all(bias.out == bias.qkv for bias in biases)
    if len(biases) == 1 and "attention_bias" not in defaults:
        shared["attention_bias"] = list(biases.pop())
    shared["architecture_class"] = rows[0].architecture_class
    shared["position"] = rows[0].attention.position
    shared["activation"] = rows[0].activation
    return {"names": names, "defaults": defaults, "traits": shared}


def main() -> None:
    rows: dict[str, list[Model]] = {}
    for model in catalog.models():
        if has_closed_form(model) and model.is_verified:
            rows.setdefault(model.model_type, []).append(model)
    table = {name: entry(name, rows[name]) for name in sorted(LAYOUTS) if name in rows}
    content = {
        "source": "config classes of transformers, and the rows of catalog/models",
        "checked": f"python -m fitcheck.bench.defaults, transformers {transformers.__version__}",
        "configs": table,
    }
    rest = {key: content[key] for key in ("source", "checked")}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
    text = json.dumps(rest, indent=1)[:-2] + f',\n "configs": {{\n{lines}\n }}\n}}\n'
    Path(ROOT, "configs.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
