"""`fitcheck models`, `gpus`, `rewards`, `methods`: what they list, and how it looks."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

import pytest

from fitcheck import catalog, check, decoder, fitting, listing, search
from fitcheck.errors import FitCheckError
from fitcheck.model import Model


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def arguments(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    listing.add_parsers(parser.add_subparsers())
    return parser.parse_args(line.split())


def run(line: str) -> int:
    args = arguments(line)
    return int(args.run(args))


def rows_of(line: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert run(f"{line} --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, list)
    return found


def ids(line: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    return {row["id"] for row in rows_of(line, capsys)}


def test_without_filters_everything_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(rows_of("models", capsys)) == len(catalog.model_entries())
    assert len(rows_of("gpus", capsys)) == len(list(catalog.gpu_rows()))
    rewards = catalog.rows("reward_models.json", "reward_models")
    assert rows_of("rewards", capsys) == rewards
    assert rows_of("methods", capsys) == catalog.rows("methods.json", "methods")


def test_json_is_the_full_row(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows_of("models qwen3-8b-base", capsys)
    assert row["hidden_size"] == 4096
    assert row["sources"]
    (card,) = [row for row in rows_of("gpus 4090", capsys) if row["id"].endswith("rtx-4090")]
    assert card["total_bytes"] == 24564 * 2**20


def test_every_word_must_appear(capsys: pytest.CaptureFixture[str]) -> None:
    found = ids("models llama 3.1 8b", capsys)
    assert "meta-llama/Llama-3.1-8B-Instruct" in found
    assert "allenai/Llama-3.1-Tulu-3-8B" in found
    assert not {name for name in found if not re.search("llama.*8b", name, re.IGNORECASE)}


def test_a_size_is_not_the_end_of_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert ids("models qwen1.5 8b", capsys) == set()
    assert "Qwen/Qwen1.5-1.8B" in ids("models qwen1.5 1.8b", capsys)


def test_models_by_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert {row["family"] for row in rows_of("models --family qwen3", capsys)} == {"Qwen3"}
    families = {row["family"] for row in rows_of("models --family tulu", capsys)}
    assert families == {"Tulu 2", "Tulu 2.5", "Tulu 3"}


def test_models_by_size(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [row["params"] for row in rows_of("models --params 1b..3b", capsys)]
    assert sizes
    assert all(10**9 <= size <= 3 * 10**9 for size in sizes)
    total = len(catalog.model_entries())
    small, rest = (len(rows_of(f"models --params {r}", capsys)) for r in ("..7b", "7b.."))
    assert small + rest == total


@pytest.mark.parametrize("method", listing.ALIGNED_BY)
def test_models_by_the_method_that_aligned_them(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows_of(f"models --aligned-by {method}", capsys)
    assert found
    assert all(method.upper() in row["alignment_recipe"] for row in found)


def test_simpo_is_not_ppo(capsys: pytest.CaptureFixture[str]) -> None:
    aligned = ids("models --aligned-by ppo", capsys)
    assert "princeton-nlp/Llama-3-Instruct-8B-SimPO" not in aligned
    assert "allenai/Llama-3.1-Tulu-3-8B" in aligned  # SFT+DPO+RLVR(PPO)


def test_gpus_by_vendor_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows_of("gpus --vendor amd --memory 16..24", capsys)
    assert {row["vendor"] for row in found} == {"amd"}
    for row in found:
        sizes = {row["memory_gib"], *row.get("memory_options_gib", ())}
        assert any(16 <= size <= 24 for size in sizes)
    assert "amd-radeon-rx-7900-xtx" in {row["id"] for row in found}
    assert "apple-m3-max-40-core-gpu" in ids("gpus --memory 64", capsys)  # sold with 48, 64, 128


def test_gpus_by_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert ids("gpus titan", capsys) == {"nvidia-titan-xp", "nvidia-titan-v", "nvidia-titan-rtx"}
    assert {row["arch"] for row in rows_of("gpus hopper", capsys)} == {"Hopper"}


def test_rewards_are_found_by_their_base(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows_of("rewards qwen3", capsys)
    assert all("qwen3" in (row["id"] + row["base_model"]).lower() for row in found)
    assert "WisdomShell/RewardAnything-8B-v1" in {row["id"] for row in found}
    assert not any("Qwen-32B" in row["id"] for row in found)  # another family


@pytest.mark.parametrize("verb", ["models", "gpus", "rewards", "methods"])
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_tables_fit_the_terminal(
    verb: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run(verb) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    if verb != "methods":
        rows = {"models": 622, "gpus": 238, "rewards": 106}[verb]
        assert len(lines) >= 1 + rows


def test_a_recalled_recipe_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    run("models --aligned-by dpo llama 8b")
    lines = capsys.readouterr().out.splitlines()
    by_model = {line.split()[0]: line for line in lines}
    assert "recalled: SFT+RS+PPO+DPO" in by_model["meta-llama/Meta-Llama-3-8B-Instruct"]
    assert "recalled" not in by_model["meta-llama/Llama-3.1-8B-Instruct"]
    assert by_model["meta-llama/Llama-3.1-8B-Instruct"].endswith("SFT+RM+RS+DPO")


def test_an_unverified_size_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    run("models kimi-k3")
    assert re.search(r"Kimi-K3 +2\.78T unverified", capsys.readouterr().out)
    run("rewards flan")
    assert capsys.readouterr().out.count("size nominal") == 2


def test_an_unverified_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    run("gpus a10")
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["A10G"].endswith("speed")  # its sources disagree
    assert not lines["A10"].endswith("speed")
    run("gpus 6800")
    assert all(
        line.endswith("memory") for line in capsys.readouterr().out.splitlines() if "6800" in line
    )


def test_each_reward_model_shows_its_base(capsys: pytest.CaptureFixture[str]) -> None:
    run("rewards armorm")
    assert re.search(
        r"ArmoRM-Llama3-8B-v0\.1 +7\.51B +FsfairX-LLaMA3-RM-v0\.1", capsys.readouterr().out
    )


def test_methods_say_what_trains(capsys: pytest.CaptureFixture[str]) -> None:
    run("methods")
    text = capsys.readouterr().out
    assert "trains: policy, critic   frozen: reference, reward" in text
    assert "(arXiv 1707.06347, 2017)" in text


@pytest.mark.parametrize("verb", ["models", "gpus", "rewards"])
def test_nothing_found(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{verb} zzzz") == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "matches" in shown.err
    assert rows_of(f"{verb} zzzz", capsys) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1b..13b", (1e9, 13e9)),
        ("500m..1b", (5e8, 1e9)),
        ("1..13", (1e9, 13e9)),
        ("..7B", (0, 7e9)),
        ("70b..", (7e10, float("inf"))),
        ("8b", (7.2e9, 8.8e9)),
        ("1.5t..", (1.5e12, float("inf"))),
    ],
)
def test_ranges_of_parameters(text: str, expected: tuple[float, float]) -> None:
    assert search.params_range(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("16..24", (16, 24)), ("24gb", (24, 24)), ("80..", (80, float("inf"))), ("..12", (0, 12))],
)
def test_ranges_of_memory(text: str, expected: tuple[float, float]) -> None:
    assert listing.memory_range(text) == expected


@pytest.mark.parametrize("text", ["", "..", "1x", "a..b", "1b..2b..3b", "-1b"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(FitCheckError, match="is not a range") as raised:
        search.params_range(text)
    assert "1b..13b" in raised.value.hint


def test_a_bad_range_is_the_users_mistake() -> None:
    with pytest.raises(FitCheckError, match="'1x' is not a range"):
        run("models --params 1x")
    with pytest.raises(FitCheckError, match="'big' is not a range"):
        run("gpus --memory big")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (8_030_261_248, "8.03B"),
        (124_439_808, "124M"),
        (1_026_000_000_000, "1.03T"),
        (14_067_712, "14.1M"),
        (None, "-"),
    ],
)
def test_counts_as_people_say_them(number: int | None, text: str) -> None:
    assert search.count(number) == text


PLAN = "--fits --gpu 4090 --method ppo --tuning lora"
ASKED = {"gpu": "4090", "method": "ppo", "tuning": "lora"}


def judged(line: str, capsys: pytest.CaptureFixture[str]) -> list[Model]:
    """The models that a list shows and the estimate covers."""
    entries = {entry["id"]: entry for entry in catalog.model_entries()}
    models = [catalog.model(entries[row["id"]]) for row in rows_of(line, capsys)]
    return [model for model in models if not decoder.covered(model, "lora")]


def test_fits_agrees_with_check(capsys: pytest.CaptureFixture[str]) -> None:
    answers = {m.id: check(m, **ASKED) for m in judged("models qwen2.5", capsys)}
    fitting = {name: r for name, r in answers.items() if r.verdict != "does-not-fit"}
    assert 0 < len(fitting) < len(answers)
    found = rows_of(f"models qwen2.5 {PLAN}", capsys)
    assert {row["id"]: (row["verdict"], row["peak_bytes"]) for row in found} == {
        name: (report.verdict, report.peak_bytes) for name, report in fitting.items()
    }
    sizes = [row["params"] for row in found]
    assert sizes == sorted(sizes, reverse=True)
    assert found[0]["sources"]  # the full row


def test_fits_shows_verdict_and_peak(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"models qwen2.5-1.5b {PLAN}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["MODEL", "PARAMS", "VERDICT", "GiB", "s/SAMPLE", "RELEASED"]
    report = check("Qwen/Qwen2.5-1.5B", **ASKED)
    (row,) = [line for line in lines if line.startswith("Qwen/Qwen2.5-1.5B ")]
    peak = f"{report.peak_bytes / 2**30:.1f}"
    assert report.speed and report.plan.batch == 8
    time = f"{report.speed.step_seconds / 8:.3g}"
    assert row.split() == ["Qwen/Qwen2.5-1.5B", "1.54B", report.verdict, peak, time, "2024-09"]


def test_fits_counts_what_it_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    every = rows_of("models llama", capsys)
    models = judged("models llama", capsys)
    tokens = 4096 + 4096
    short = [m for m in models if m.max_position_embeddings < tokens]
    assert short
    assert run(f"models llama {PLAN} --prompt 4096 --response 4096") == 0
    told = " ".join(capsys.readouterr().out.partition("\n\n")[2].split())
    left = len(models) - len(short)
    assert re.match(rf"\d+ of {left} models fit on 1 x NVIDIA GeForce RTX 4090 \(23\.7 GiB", told)
    assert f"{len(every) - len(models)} models are not covered by the estimate" in told
    assert f"{len(short)} models cannot read that many tokens" in told


def test_what_is_not_covered_is_not_judged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def covered(model: Model, tuning: str = "full") -> str:
        return "its shape" if model.id.endswith("Instruct") else ""

    for module in (listing, fitting):
        monkeypatch.setattr(module, "covered", covered)
    run("models qwen2.5-1.5b")
    lines = capsys.readouterr().out.splitlines()
    marks = {line.split()[0]: "none" in line for line in lines[1:]}
    assert "ESTIMATE" in lines[0]
    assert marks
    assert all(mark == name.endswith("Instruct") for name, mark in marks.items())
    found = rows_of(f"models qwen2.5-1.5b {PLAN}", capsys)
    assert {row["id"] for row in found} == {"Qwen/Qwen2.5-1.5B"}


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models qwen2.5-72b --fits --gpu 4090 --method sft") == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("none of 2 models fits")
    assert rows_of("models qwen2.5-72b --fits --gpu 4090 --method sft", capsys) == []


def test_a_plan_needs_fits() -> None:
    with pytest.raises(FitCheckError, match="--tuning is part of a plan") as raised:
        run("models qwen2.5 --tuning lora")
    assert "--fits" in raised.value.hint


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpu rtx9999", "no GPU in the catalog"),
        ("--method sft --group 4", "--group has no meaning for sft"),
        ("--method dpo --batch 8 --micro-batch 3", "does not divide"),
    ],
)
def test_a_plan_that_fits_no_model_is_the_users_mistake(flags: str, message: str) -> None:
    with pytest.raises(FitCheckError, match=message):
        run(f"models qwen2.5 --fits --gpu 4090 {flags}")


def test_a_plan_that_only_some_models_can_follow(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models qwen2.5 --fits --gpu h200 --method sft --tuning lora --lora-rank 1000") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "3 models cannot run this plan (--lora-rank 1,000 is more than the width" in told
