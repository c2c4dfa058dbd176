"""`fitcheck compare`: every combination, judged as `check` judges it; what differs is shown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fitcheck import check
from fitcheck.cli import main

MODEL = "llama-3.1-8b"


def answers(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["compare", *words, "--json"]) in (0, 1)
    return json.loads(capsys.readouterr().out)


def test_every_combination_is_a_row_judged_as_check_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [MODEL, "qwen3-8b", "--gpu", "4090,a100 80", "--tuning", "lora,qlora"]
    found = answers([*words, "--method", "sft", "--sequence", "1k"], capsys)
    assert len(found) == 8
    asked = [tuple(row["asked"].values()) for row in found]
    assert len(set(asked)) == 8
    for row in found:
        report = check(**row["asked"])
        assert row["report"]["peak_bytes"] == report.peak_bytes
        assert row["report"]["verdict"] == report.verdict
        assert row["seconds_a_sample"] == pytest.approx(report.speed.step_seconds / 8)


def test_what_a_method_has_no_use_for_is_left_out_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [MODEL, "--gpu", "a100", "--method", "ppo,grpo,dpo,sft", "--tuning", "full,lora"]
    found = answers([*words, "--group", "4", "--lora-rank", "8", "--prompt", "200"], capsys)
    assert len(found) == 8
    plans = [row["report"]["plan"] for row in found]
    for plan in plans:
        assert plan["group"] == (4 if plan["method"] == "grpo" else None)
        assert plan["lora_rank"] == (8 if plan["tuning"] == "lora" else None)
        tokens = plan["sequence"] or plan["prompt"] + plan["response"]
        assert tokens == 200 + 512  # as long for all of them


def test_a_plan_that_the_rules_refuse_is_a_row_too(capsys: pytest.CaptureFixture[str]) -> None:
    found = answers(["gpt2", MODEL, "--gpu", "4090", "--method", "sft"], capsys)
    assert "can read" in found[0]["error"]  # GPT-2 reads 1024 tokens, the example has 2048
    assert found[1]["report"]["plan"]["sequence"] == 2048


def test_the_worst_stage_decides_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", MODEL, "--pipeline", "--tuning", "qlora", "--gpu"]
    assert main([*words, "4090"]) == 1
    shown = capsys.readouterr().out
    assert "The pipeline does not fit: its worst stage is ppo, 26.2 GiB" in shown
    assert main([*words, "a100"]) == 0
    assert "The pipeline fits" in capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1:4]] == ["sft", "reward", "ppo"]


def test_plans_from_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = []
    for tuning in ("lora", "qlora"):
        main(["check", MODEL, "--gpu", "4090", "--method", "dpo", "--tuning", tuning, "--json"])
        files.append(tmp_path / f"{tuning}.json")
        files[-1].write_text(capsys.readouterr().out, encoding="utf-8")
    words = [word for file in files for word in ("--plan", str(file))]
    for row, tuning in zip(answers(words, capsys), ("lora", "qlora"), strict=True):
        report = check(MODEL, gpu="4090", method="dpo", tuning=tuning)
        assert row["report"]["peak_bytes"] == report.peak_bytes
    assert main(["compare", *words]) == 0
    head = capsys.readouterr().out.splitlines()[0].split()
    assert head[:3] == ["PLAN", "TUNING", "FITS"]


def test_a_model_of_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": 2048}
    folder = tmp_path / "mine"
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["compare", str(folder), MODEL, "--gpu", "4090", "--tuning", "lora"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split()[:2] == ["mine", "yes"]
    assert main(["gpus", "4090", "--for", str(folder), "--tuning", "lora"]) == 0
    assert "PPO of mine" in capsys.readouterr().out


PAGES = {
    "compare-models": [MODEL, "qwen3-8b", "gemma-2-9b", "--gpu", "4090", "--tuning", "qlora"],
    "compare-methods": [MODEL, "--method", "ppo,dpo,grpo,sft", "--gpu", "4090", "--tuning", "lora"],
    "compare-markdown": ["qwen3-4b", "--pipeline", "--gpu", "3090,h100", "--markdown"],
}


@pytest.mark.parametrize("name", PAGES)
def test_pages(
    name: str, golden: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *PAGES[name]]) in (0, 1)
    shown = capsys.readouterr().out
    assert "--markdown" in PAGES[name] or max(map(len, shown.splitlines())) <= 80
    seconds = r"[\d.]+ (?= *(?:update|rollout|score)\.)"  # speed.py's: tested elsewhere
    shown = re.sub(seconds, lambda found: "?".ljust(len(found[0])), shown)
    if name == "compare-models":
        golden(name, shown)
    assert "The same for all: " in shown and "GiB needed at the peak" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "ppo,rlhf"], "--method cannot be 'rlhf'"),
        (["--gpu", "4090,9999"], "no GPU in the catalog"),
        (["--pipeline", "--method", "dpo"], "--pipeline has its own methods"),
        (["--plan", "nosuchfile.json"], "cannot read nosuchfile.json"),
        (["--plan", "README.md"], "README.md is not JSON"),
        (["--plan", "tests/tiny.py", "--gpu", "4090"], "--gpu changes no plan"),
        (["--batch", ",".join(str(n) for n in range(1, 200))], "199 combinations are too many"),
        (["--lora-rank", "8"], "--lora-rank has no meaning"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = [] if "--plan" in words else [MODEL]
    assert main(["compare", *model, *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
