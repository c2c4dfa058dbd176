"""The command line as a user meets it: exit codes, streams, flags, mistakes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fitcheck import __version__, catalog, cli, files, machine
from fitcheck.answer import plan_from
from fitcheck.cli import main

ROOT = Path(__file__).parent.parent
FITS = ("check", "qwen2.5-0.5b", "--gpu", "4090", "--method", "sft")
TOO_LARGE = ("check", "llama-3.1-8b", "--gpu", "4090", "--method", "sft")


def process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fitcheck of its own, its output to pipes."""
    return subprocess.run(
        [sys.executable, "-m", "fitcheck", *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
    )


# --- exit codes and streams ---


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (FITS, 0),
        (TOO_LARGE, 1),
        ((*FITS, "--ram", "1gib"), 1),  # the host's verdict counts
        (("check", "no-such-model"), 2),
        (("check", "--batch", "0"), 2),
        (("check", "--no-such-flag"), 2),
        (("no-such-verb",), 2),
    ],
)
@pytest.mark.parametrize("form", [(), ("--json",), ("--markdown",), ("--explain",)])
def test_exit_codes(
    words: tuple[str, ...], code: int, form: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *form]) == code
    captured = capsys.readouterr()
    assert bool(captured.out) == (code != 2)
    assert bool(captured.err) == (code == 2)


def test_tight_exits_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fitcheck.report import Error

    error = Error(0.99, 95, 1, "made up")
    monkeypatch.setattr(catalog, "stated_error", lambda method, rung: error)
    assert main(["check", "llama-3.1-8b", "--gpu", "4090", "--method", "inference"]) == 0
    assert "≈ TIGHT" in capsys.readouterr().out


def test_a_process_says_no_more_than_main(capsys: pytest.CaptureFixture[str]) -> None:
    run = process(*TOO_LARGE)
    main(list(TOO_LARGE))
    assert (run.returncode, run.stdout, run.stderr) == (1, capsys.readouterr().out, "")


def test_a_mistake_in_a_process() -> None:
    run = process("check", "llama-3.1-8b", "--gpu", "4090", "--micro-batch", "3")
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == (
        "error: --micro-batch 3 does not divide --minibatch 8\n\n"
        "hint: choose sizes where each divides the next larger one\n"
    )


def test_a_closed_pipe_is_no_error() -> None:
    """As with `fitcheck ... | head -1`."""
    for words in (FITS, ("models",)):
        with subprocess.Popen(
            [sys.executable, "-m", "fitcheck", *words],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as run:
            assert run.stdout and run.stderr
            run.stdout.close()
            assert run.stderr.read() == b""
        assert run.returncode == 0


def test_a_pipe_gets_no_escapes_and_no_colour_is_obeyed() -> None:
    assert "\x1b" not in process(*FITS).stdout
    assert "\x1b" not in process(*FITS, NO_COLOR="1").stdout


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminals")
@pytest.mark.parametrize(("no_colour", "expected"), [("", True), ("1", False)])
def test_a_terminal_gets_colour(no_colour: str, expected: bool) -> None:
    import pty

    reader, writer = pty.openpty()
    environment = {**os.environ, "NO_COLOR": no_colour, "TERM": "xterm"}
    command = [sys.executable, "-m", "fitcheck", *FITS]
    run = subprocess.run(command, cwd=ROOT, env=environment, stdout=writer, stderr=writer)
    os.close(writer)
    shown = b""
    try:
        while chunk := os.read(reader, 65536):
            shown += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(reader)
    assert run.returncode == 0
    assert (b"\x1b[1;32m" in shown) is expected


def test_output_that_is_not_utf8() -> None:
    run = process(*FITS, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert run.returncode == 0
    assert "FITS" in run.stdout


# --- JSON ---

KEYS = {
    *("plan", "verdict", "peak_bytes", "allocated_bytes", "reserved_bytes", "usable_bytes"),
    *("spare_bytes", "ram", "peak_phase", "phases", "source", "error", "advice"),
}


@pytest.mark.parametrize("method", ["ppo", "inference", "sft", "reward", "dpo", "grpo"])
def test_json(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["check", "qwen2.5-0.5b", "--gpu", "4090", "--method", method, "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer.keys() >= KEYS
    assert answer["verdict"] in ("fits", "tight", "does-not-fit")
    assert (answer["verdict"] == "does-not-fit") == (code == 1)
    assert answer["source"] == "estimate"
    assert answer["ram"].keys() == {"peak_bytes", "usable_bytes", "verdict", "phase"}
    assert answer["ram"]["verdict"] is answer["ram"]["usable_bytes"] is None
    sizes = [
        answer[f"{name}_bytes"] for name in ("peak", "allocated", "reserved", "usable", "spare")
    ]
    assert all(type(size) is int for size in sizes)
    assert answer["spare_bytes"] == answer["usable_bytes"] - answer["peak_bytes"]
    assert answer["peak_phase"] in {phase["name"] for phase in answer["phases"]}
    for phase in answer["phases"]:
        timed = phase["name"] != "load"
        assert phase["seconds"] >= 0 if timed else phase["seconds"] is None
        assert phase["bytes"] == sum(term["bytes"] for term in phase["terms"])
        for term in phase["terms"]:
            assert term.keys() == {"name", "role", "bytes", "place", "why"}
            assert term["why"] and term["bytes"] > 0
    assert max(phase["bytes"] for phase in answer["phases"]) == answer["peak_bytes"]
    error = answer["error"]
    assert error is None or error.keys() == {"relative", "percentile", "n", "basis"}
    assert isinstance(answer["advice"], list)
    assert plan_from(answer["plan"]).method == method


# --- flags ---

# Every flag is a promise: a new one is added here with intent, none is ever lost by accident.
PLAN_FLAGS = (
    *("method", "gpu", "gpus", "nodes", "ram", "sharding", "tuning", "lora-rank"),
    *("lora-targets", "adapter-precision", "precision", "optimizer", "checkpointing"),
    *("attention", "padding", "loss", "sequence", "prompt", "response", "batch", "micro-batch"),
    *("minibatch", "score-batch", "epochs", "group", "ptx-batch", "reward-model"),
    *("reward-precision", "critic", "critic-tuning", "reference", "offload", "empty-cache"),
    *("rollout", "rollout-memory", "rollout-sleep", "recipe", "quant", "context"),
    *("concurrency", "kv-cache", "engine", "engine-memory"),
)
FROZEN_FLAGS = {
    "check": {*PLAN_FLAGS, "help", "json", "markdown", "explain"},
    "advise": {*PLAN_FLAGS, "help", "json", "dryrun"},
    "compare": {*PLAN_FLAGS, "help", "json", "markdown", "pipeline", "plan"},
    "dryrun": {*PLAN_FLAGS, "help", "json", "compare", "explain", "snapshot", "html", "svg"},
    "cost": {
        *(*PLAN_FLAGS, "help", "json", "samples", "tokens", "passes"),
        *("kwh", "price", "card", "card-hours", "watts"),
    },
    "bench": {*PLAN_FLAGS, "help", "json", "explain", "until-oom", "suite", "export", "steps"}
    | {"minutes", "limit", "weights", "save", "to"},
}


def verbs() -> dict[str, argparse.ArgumentParser]:
    actions = cli.parser()._actions
    (found,) = [a for a in actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found.choices)


@pytest.mark.parametrize("verb", FROZEN_FLAGS)
def test_the_flags_are_frozen(verb: str) -> None:
    words = [word for action in verbs()[verb]._actions for word in action.option_strings]
    assert {word.removeprefix("--") for word in words if word.startswith("--")} == FROZEN_FLAGS[
        verb
    ]
    assert [word for word in words if not word.startswith("--")] == ["-h"]


def test_the_verbs_are_frozen() -> None:
    expected = [
        "check",
        "advise",
        "compare",
        "dryrun",
        "bench",
        "models",
        "gpus",
        "rewards",
        "methods",
    ]
    expected += ["cost", "machine"]
    assert list(verbs()) == expected


@pytest.mark.parametrize(
    "words", [["--help"], ["check", "--help"], ["dryrun", "--help"], ["bench", "--help"]]
)
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for flag in FROZEN_FLAGS.get(words[0], ()):
        assert f"--{flag}" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"fitcheck {__version__}\n"


def test_without_a_verb_the_default_question_is_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "best", lambda found: None)
    assert main([]) == 1
    assert capsys.readouterr().out.startswith("PPO of meta-llama/Llama-3.1-8B (full)")


def test_flags_may_be_switched_on_by_name_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FITS, "--empty-cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["empty_cache"] is True
    assert main([*FITS, "--checkpointing", "off", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["checkpointing"] is False


# --- mistakes, as they are typed: (words, part of the message, part of the hint) ---

MISTAKES = [
    ("--batch 0", "--batch cannot be 0", "whole number from 1"),
    ("--batch -3", "--batch cannot be -3", "whole number from 1"),
    ("--batch 1e99", "--batch cannot be '1e99'", "512 or 32k"),
    ("--batch 1000000000000", "--batch cannot be 1000000000000", "100,000,000"),
    ("--batch abc", "--batch cannot be 'abc'", "512 or 32k"),
    ("--batch 2.5", "--batch cannot be '2.5'", "whole number"),
    (f"--batch {'9' * 5000}", "--batch cannot be '99999", "512 or 32k"),
    ("--batch", "--batch: expected one argument", "fitcheck check --help"),
    ("--bacth 8", "unrecognized arguments: --bacth 8", "did you mean --batch?"),
    ("--lora-ran 8", "unrecognized arguments", "did you mean --lora-rank?"),
    ("--xyzzy", "unrecognized arguments: --xyzzy", "--help"),
    ("--method rlhf", "--method: invalid choice: 'rlhf'", "fitcheck check --help"),
    ("--tuning dora", "--tuning cannot be 'dora'", "qlora"),
    ("--checkpointing maybe", "--checkpointing cannot be 'maybe'", "on, off"),
    ("--json --markdown", "--markdown: not allowed with argument --json", "--help"),
    ("--gpu 9999", "no GPU in the catalog is called '9999'", "fitcheck gpus"),
    ("--reward-model skywrok", "no reward model in the catalog", "did you mean"),
    ("--nodes 2", "more than one machine is not modelled", "--nodes 1"),
    ("--sharding zero3", "--sharding zero3 shares work among cards", "--gpus 2"),
    ("--gpus 0", "--gpus cannot be 0", "whole number"),
    ("--gpus many", "--gpus cannot be 'many'", "such as 1"),
    ("--ram 64", "--ram 64 is in bytes", "64gib"),
    ("--ram -5", "--ram cannot be -5", "whole number"),
    ("--ram 1e99", "--ram cannot be '1e99'", "64gib"),
    ("--reference adapter", "--reference adapter needs an adapter", "--reference copy"),
    ("--reference precomputed", "--reference precomputed is for dpo", "--reference copy"),
    ("--micro-batch 3", "--micro-batch 3 does not divide --minibatch 8", "divides"),
    ("--prompt 100k --response 64k", "167,936 tokens are more than the 131,072", "--prompt"),
    ("--method inference --context 1m", "1,048,576 tokens are more than", "lower --context"),
    ("--method sft --prompt 5", "--prompt has no meaning for sft", "ppo, grpo"),
    ("--padding packed", "--padding packed needs an attention kernel", "--attention flash"),
    ("--offload foo", "--offload cannot be 'foo'", "reference, reward"),
    ("--offload reward --reward-model rule", "keeps no reward of its own", "leave it out"),
    ("--rollout-memory 0.5", "--rollout-memory has no meaning", "--rollout vllm"),
    ("--rollout vllm --rollout-memory 5", "--rollout-memory cannot be 5.0", "0.3"),
    ("--rollout vllm --rollout-memory half", "--rollout-memory cannot be 'half'", "0.3"),
    ("--rollout vllm --rollout-memory 0.01", "less than", "--rollout transformers"),
    ("--tuning lora --lora-targets foo", "is called 'foo'", "q_proj"),
    ("--tuning lora --lora-targets q_proj,foo", "is called 'foo'", "q_proj"),
    ("--lora-rank 8", "--lora-rank has no meaning", "--tuning lora"),
    ("--tuning lora --lora-rank 1m", "--lora-rank 1,048,576 is more than the width", "256"),
    ("--method inference --quant q9", "--quant cannot be 'q9'", "q4_k_m"),
]


@pytest.mark.parametrize(("line", "message", "hint"), MISTAKES, ids=[m[0][:50] for m in MISTAKES])
def test_mistakes(line: str, message: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = line.split()
    card = [] if "--gpu" in words else ["--gpu", "h100"]
    assert main(["check", "llama-3.1-8b", *card, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    first, blank, second = captured.err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert blank == ""
    assert second.startswith("hint: ")
    assert hint in second


@pytest.mark.parametrize("name", ["models/index.json", "gpus/nvidia.json", "accuracy.json"])
def test_a_damaged_file_of_the_catalog(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for original in Path(catalog.ROOT).rglob("*.json"):
        copy = tmp_path / original.relative_to(catalog.ROOT)
        copy.parent.mkdir(exist_ok=True, parents=True)
        copy.symlink_to(original)
    (tmp_path / name).unlink()
    (tmp_path / name).write_text("{half a fi")
    monkeypatch.setattr(files, "ROOT", str(tmp_path))
    caches = (files.read, catalog.stated_error)
    for cached in caches:
        cached.cache_clear()
    try:
        assert main(list(FITS)) == 2
    finally:
        for cached in caches:
            cached.cache_clear()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{name} is damaged" in captured.err
    assert "hint: reinstall FitCheck" in captured.err
