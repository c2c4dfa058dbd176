"""Models from the Hub, from folders: through a server of our own, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import LLAMA, folder, safetensors, tensors_of
from hub_server import COMMIT, serving

from fitcheck import catalog, check, resolve
from fitcheck.answer import find_model, plan_from
from fitcheck.config import model_from
from fitcheck.errors import FitCheckError
from fitcheck.folder import is_hub_id
from fitcheck.hub import read
from fitcheck.weights import weights

ROOT = Path(__file__).parent.parent
PARAMS = 2 * 128 * 64 + 64 + 2 * (2 * 64 + 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96)  # by hand
READ = """
import json, sys
from fitcheck.errors import FitCheckError
from fitcheck.hub import read
for name in sys.argv[1:]:
    try:
        print(json.dumps([name, read(name).to_json()]))
    except FitCheckError as fault:
        print(json.dumps([name, fault.message, fault.hint]))
"""
SPLIT = {f"model-0000{n}-of-00002.safetensors": {} for n in (1, 2)}


def sharded() -> dict[str, bytes]:
    tensors = tensors_of(LLAMA)
    names, (one, two) = sorted(tensors), SPLIT
    files = {one: names[::2], two: names[1::2]}
    found = {file: safetensors({n: tensors[n] for n in some}) for file, some in files.items()}
    index = {"weight_map": {n: file for file, some in files.items() for n in some}}
    return {
        "config.json": json.dumps(LLAMA).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        **found,
    }


def adapter(base: str) -> dict[str, bytes]:
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 8}
    weights = {"q.lora_A.weight": ("F32", (8, 64)), "q.lora_B.weight": ("F32", (64, 8))}
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": safetensors(weights),
    }


REPOS = {
    "org/tiny": folder(LLAMA),
    "org/sharded": sharded(),
    "org/private": folder(LLAMA),
    "org/adapter": adapter("org/tiny"),
    "org/climbing": adapter("../../etc"),
    "org/gguf": {"tiny-Q4_K_M.gguf": b"GGUF", "README.md": b""},
    "org/bare": {"README.md": b""},
    "org/odd": {"config.json": b'{"model_type": "never-heard-of"}'},
    "org/nojson": {"config.json": b"<html>"},
    "org/escape": {
        "config.json": json.dumps(LLAMA).encode(),
        "model.safetensors.index.json": b'{"weight_map": {"a": "../../../etc/passwd"}}',
    },
    "org/pickled": {"config.json": json.dumps(LLAMA).encode(), "pytorch_model.bin": b"\x80"},
    "org/damaged": folder(LLAMA) | {"model.safetensors": b"\xff" * 4000},
}
REFUSED = {
    "org/gated": (403, "GatedRepo"),
    "org/limited": (429, ""),
    "org/down": (503, ""),
    "org/forbidden": (403, ""),
}


def asked(names: list[str], home: Path, **environment: str) -> dict[str, Any]:
    """What a fresh process reads under each name: a row, or a message and a hint."""
    run = subprocess.run(
        [sys.executable, "-c", READ, *names],
        **{"cwd": ROOT, "capture_output": True, "encoding": "utf-8", "timeout": 60},
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **environment},
    )
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    return {name: rest[0] if len(rest) == 1 else tuple(rest) for name, *rest in rows}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(answers of the Hub, requests it saw, answers once it is gone, offline, in a used cache)."""
    home = tmp_path_factory.mktemp("hf")
    more = ["org/absent", f"org/tiny@{COMMIT}", "org/tiny@nowhere"]
    with serving(REPOS, REFUSED) as (url, seen):
        found = asked([*REPOS, *REFUSED, *more], home, HF_ENDPOINT=url)
        secret = asked(["org/private"], home, HF_ENDPOINT=url, HF_TOKEN="secret")
    gone = asked(["org/new", "org/tiny"], home, HF_ENDPOINT=url)
    offline = asked(["org/new", "org/tiny"], home, HF_ENDPOINT=url, HF_HUB_OFFLINE="1")
    return found, seen, secret, gone, offline


@pytest.mark.parametrize("name", ["org/tiny", "org/sharded", f"org/tiny@{COMMIT}"])
def test_a_model_of_the_hub_is_counted_by_its_headers(answers: Any, name: str) -> None:
    row = answers[0][name]
    assert (row["id"], row["params"], row["status"]) == (name, PARAMS, "headers")
    assert row["checkpoint"]["bytes"] == 2 * PARAMS


def test_weights_are_read_by_range_alone(answers: Any) -> None:
    weights = [(how, span) for how, path, span in answers[1] if path.endswith(".safetensors")]
    assert weights and all(how == "HEAD" or span.startswith("bytes=0-") for how, span in weights)


def test_a_token_opens_a_private_model(answers: Any) -> None:
    assert answers[2]["org/private"]["params"] == PARAMS


def test_an_adapter_adds_its_lora_to_its_base(answers: Any) -> None:
    row = answers[0]["org/adapter"]
    assert (row["params"], row["adapter_bytes"]) == (PARAMS, 4 * 2 * 8 * 64)


def test_without_headers_the_config_alone_is_counted_and_said_so(answers: Any) -> None:
    row = answers[0]["org/pickled"]
    assert (row["params"], row["status"]) == (PARAMS, "config")
    assert "config.json" in row["note"]


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("org/absent", "no model org/absent, or it is private", "HF_TOKEN"),
        ("org/private", "no model org/private, or it is private", "HF_TOKEN"),
        ("org/gated", "gated", "accept its terms"),
        ("org/limited", "rate limit", "wait"),
        ("org/down", "answers 503", "later"),
        ("org/forbidden", "refuses", "HF_TOKEN"),
        ("org/tiny@nowhere", "no revision nowhere", "branch"),
        ("org/gguf", "GGUF", "hf download org/gguf tiny-Q4_K_M.gguf"),
        ("org/bare", "no config.json", "transformers"),
        ("org/odd", "not understood", "fitcheck models"),
        ("org/nojson", "no JSON", "again"),
        ("org/escape", "passwd", "again"),
        ("org/climbing", "no Hub id", "base"),
        ("org/damaged", "header", "again"),
    ],
)
def test_each_refusal_has_its_own_words(answers: Any, name: str, message: str, hint: str) -> None:
    said, advice = answers[0][name]
    assert message in said and hint in advice


def test_a_hub_out_of_reach_and_one_switched_off_are_told_apart(answers: Any) -> None:
    gone, offline = answers[3], answers[4]
    assert "cannot be reached" in gone["org/new"][0]
    assert "HF_HUB_OFFLINE" in offline["org/new"][0]


def test_what_is_in_the_cache_needs_no_network(answers: Any) -> None:
    for answer in answers[3:]:
        row = answer["org/tiny"]
        assert (row["params"], row["status"]) == (PARAMS, "config")
        assert "cached" in row["note"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    place = tmp_path / "tiny"
    place.mkdir()
    for name, content in folder(LLAMA).items():
        (place / name).write_bytes(content)
    return place


def test_a_folder_is_a_model_and_its_plan_travels_whole(tiny: Path) -> None:
    report = check(str(tiny), gpu="4090", method="sft")
    assert (report.plan.model.params, report.plan.model.id) == (PARAMS, "tiny")
    plan = json.loads(json.dumps(report.plan.to_json()))
    assert str(tiny.parent) not in json.dumps(plan)  # whose computer it was is nobody's business
    assert plan_from(plan) == report.plan


def test_a_plan_from_elsewhere_opens_no_files_and_no_network(tiny: Path) -> None:
    for name in (str(tiny), "org/tiny", "x.gguf"):
        with pytest.raises(FitCheckError):
            plan_from({"model": name, "gpu": "4090"})


@pytest.mark.parametrize("change", [{"num_layers": "2"}, {"hidden_size": -1}, {"params": 2**60}])
def test_a_plan_with_a_forged_model_is_refused(tiny: Path, change: dict[str, Any]) -> None:
    plan = check(str(tiny), gpu="4090", method="sft").plan.to_json()
    plan["models"]["tiny"] |= change
    with pytest.raises(FitCheckError):
        plan_from(plan)


def test_an_inference_of_a_checkpoint_loads_its_own_type(tiny: Path) -> None:
    (tiny / "model.safetensors").write_bytes(safetensors(tensors_of(LLAMA, "F32")))
    plan = check(str(tiny), gpu="4090", method="inference").plan
    assert (plan.quant, plan.precision) == ("fp32", "fp32")


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
PACKED |= {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def packed(config: dict[str, Any], rows: int, columns: int) -> dict[str, Any]:
    """How each format stores one matrix of that shape."""
    groups = columns // 32
    match config["quant_method"]:
        case "gptq":
            return {
                "qweight": ("I32", (columns // 8, rows)),
                "qzeros": ("I32", (groups, rows // 8)),
                "scales": ("F16", (groups, rows)),
                "g_idx": ("I32", (columns,)),
            }
        case "awq":
            return {
                "qweight": ("I32", (columns, rows // 8)),
                "qzeros": ("I32", (groups, rows // 8)),
                "scales": ("F16", (groups, rows)),
            }
        case "fp8":
            scales = ("F32", (-(-rows // 32), -(-columns // 32)))
            return {"weight": ("F8_E4M3", (rows, columns)), "weight_scale_inv": scales}
        case "compressed-tensors":
            return {
                "weight_packed": ("I32", (rows, columns // 8)),
                "weight_scale": ("BF16", (rows, groups)),
                "weight_shape": ("I64", (2,)),
            }
    return {
        "weight": ("U8", (rows * columns // 2, 1)),
        "weight.absmax": ("U8", (rows * columns // 64,)),
        "weight.quant_map": ("F32", (16,)),
        "weight.nested_absmax": ("F32", (1,)),
        "weight.nested_quant_map": ("F32", (256,)),
        "weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
    }


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPTQ, "gptq 4 bit, groups of 32"),
        (AWQ, "awq 4 bit, groups of 32"),
        (FP8, "fp8, blocks of 32 x 32"),
        (PACKED, "compressed-tensors pack-quantized"),
        (BNB, "nf4 (bitsandbytes)"),
    ],
    ids=["gptq", "awq", "fp8", "compressed-tensors", "bitsandbytes"],
)
def test_a_quantized_checkpoint_is_unpacked_to_its_parameters(
    tiny: Path, config: dict[str, Any], words: str
) -> None:
    shapes, bytes_of = dict[str, Any](), 0
    for name, (dtype, shape) in tensors_of(LLAMA).items():
        if len(shape) == 2 and "layers" in name:
            rows = packed(config, *shape)
            shapes |= {f"{name.removesuffix('weight')}{leaf}": row for leaf, row in rows.items()}
        else:
            shapes[name] = (dtype, shape)
    content = safetensors(shapes)
    (tiny / "model.safetensors").write_bytes(content)
    (tiny / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": config}))
    model = read(str(tiny))
    assert (model.status, model.params) == ("headers", PARAMS)
    assert model.checkpoint and model.checkpoint.quantization == words
    bytes_of = len(content) - 8 - int.from_bytes(content[:8], "little")
    assert model.checkpoint.bytes == bytes_of
    plan = check(str(tiny), gpu="4090", method="inference").plan
    assert plan.quant == "checkpoint"
    report = check(str(tiny), gpu="4090", method="inference")
    terms = {t.name: t.bytes for t in report.phases[0].terms}
    assert terms["weights"] == bytes_of


def test_mxfp4_experts_are_unpacked(tmp_path: Path) -> None:
    """gpt-oss: blocks of 32 numbers in 16 bytes, and an exponent each."""
    config = LLAMA | {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2}
    config |= {"head_dim": 16, "intermediate_size": 64}
    expected, shapes = model_from(config, "x"), dict[str, Any]()
    for weight in weights(expected):
        for layer in range(weight.copies):
            name = f"model.layers.{layer}.{weight.name}"
            name = name if weight.copies > 1 else f"model.{weight.name}.weight"
            name = "lm_head.weight" if weight.kind == "head" else name
            if weight.kind == "expert":
                experts, inputs, outputs = weight.shape
                blocks = (experts, outputs, inputs // 32)
                shapes |= {
                    f"{name}_blocks": ("U8", (*blocks, 16)),
                    f"{name}_scales": ("U8", blocks),
                }
            else:
                shapes[name] = ("BF16", weight.shape)
    (tmp_path / "model.safetensors").write_bytes(safetensors(shapes))
    quantization = {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config | quantization))
    model = read(str(tmp_path))
    assert (model.params, model.status) == (expected.params, "headers")
    assert model.checkpoint and model.checkpoint.quantization == "mxfp4"
    assert sum(model.checkpoint.experts) > 0


def test_headers_that_contradict_the_config_are_a_doubt(tiny: Path) -> None:
    (tiny / "config.json").write_text(json.dumps(LLAMA | {"intermediate_size": 128}))
    model = read(str(tiny))
    assert model.status == "mismatch" and f"{PARAMS:,}" in model.doubt


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "model.safetensors").write_bytes(safetensors(tensors_of(LLAMA), 1)), "end"),
        (lambda p: (p / "model.safetensors").write_bytes(b"version https://git-lfs"), "LFS"),
        (lambda p: (p / "model.safetensors").write_bytes(b""), "begin with a header"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 16), "begin with a header"),
        (lambda p: (p / "config.json").write_bytes(b"[" * 100_000), "JSON"),
        (lambda p: (p / "config.json").write_bytes(b"[]"), "object"),
        (lambda p: (p / "config.json").unlink(), "no config.json"),
    ],
    ids=["half", "pointer", "empty", "noise", "deep", "list", "absent"],
)
def test_a_damaged_folder_says_what_is_wrong(tiny: Path, damage: Any, words: str) -> None:
    damage(tiny)
    with pytest.raises(FitCheckError, match=words):
        read(str(tiny))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    for name, content in sharded().items():
        (tmp_path / name).write_bytes(content)
    assert read(str(tmp_path)).params == PARAMS
    (tmp_path / list(SPLIT)[1]).unlink()
    with pytest.raises(FitCheckError, match="1 of 2 files are missing"):
        read(str(tmp_path))


def test_an_adapter_on_a_catalog_model_needs_no_network(tmp_path: Path) -> None:
    for name, content in adapter("Qwen/Qwen3-0.6B").items():
        (tmp_path / name).write_bytes(content)
    plain = check("qwen3-0.6b", gpu="4090", method="inference")
    report = check(str(tmp_path), gpu="4090", method="inference")
    assert report.peak_bytes - plain.peak_bytes == 4 * 2 * 8 * 64


@pytest.mark.parametrize(
    "name", ["llama-3.1-8b", "Qwen/Qwen3-8B", "qwen/qwen3-8b", "meta-llama/llama 3.1 8b"]
)
def test_a_catalog_name_wins(name: str) -> None:
    assert catalog.find_model(name) == find_model(name)


@pytest.mark.parametrize("name", ["nvidia/Llama-3.1-8B", "org/unheard", "Qwen/Qwen3-8B@main"])
def test_another_owners_name_goes_to_the_hub(name: str) -> None:
    with pytest.raises(FitCheckError, match="HF_HUB_OFFLINE"):
        find_model(name)


@pytest.mark.parametrize(
    "name", ["a/b/c", "../a", "a/..", "org/", "/org", "org/a b", "org/a@", "org/a\n", "-a/b", "é/b"]
)
def test_no_other_text_is_a_hub_id(name: str) -> None:
    assert not is_hub_id(name)


def test_reading_a_hub_model_leaves_catalog_tensors_alone(tiny: Path) -> None:
    model = read(str(tiny))
    assert sum(weight.params for weight in weights(model)) == model.params


@pytest.mark.oracle
def test_an_unknown_architecture_is_built_on_meta_and_traced(tmp_path: Path) -> None:
    """Helium is in transformers and in no formula; by hand as Llama's, its head of its own."""
    config = LLAMA | {"model_type": "helium", "head_dim": 16}
    for name, content in folder(LLAMA, **{"config.json": json.dumps(config).encode()}).items():
        (tmp_path / name).write_bytes(content)
    model = read(str(tmp_path))
    assert (model.params, model.status) == (PARAMS, "headers")
    assert sum(weight.params for weight in weights(model)) == PARAMS
    kinds = {(w.name, w.kind) for w in weights(model)}
    assert {("embed_tokens", "embedding"), ("self_attn.q_proj", "linear")} <= kinds
    assert {("input_layernorm", "norm"), ("lm_head", "head")} <= kinds
    with pytest.raises(FitCheckError) as fault:
        check(model, gpu="4090", method="sft")
    assert "fitcheck dryrun" in fault.value.hint
    plan = resolve(model, gpu="4090", method="sft", sequence=64)
    told = subprocess.run(
        [sys.executable, "-m", "fitcheck.bench", "dryrun"],
        input=json.dumps(plan.to_json()), capture_output=True, encoding="utf-8", cwd=ROOT,
    )  # fmt: skip
    report = json.loads(told.stdout.splitlines()[-1])["report"]
    assert report["peak_bytes"] > 16 * PARAMS  # bf16-mixed: fp32 weights, gradients, two states


@pytest.mark.oracle
def test_what_the_class_refuses_is_an_error(tmp_path: Path) -> None:
    config = LLAMA | {"model_type": "helium", "hidden_size": "many"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FitCheckError):
        read(str(tmp_path))
