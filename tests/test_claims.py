"""docs/claims.md: every command is run, every figure shown is one that it prints.

`make golden` puts in the lines that are printed now, and their figures into the sentences; whether
a sentence is still true is for a person to read.
"""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from fitcheck.cli import main

PATH = Path(__file__).parent.parent / "docs" / "claims.md"
TEXT = PATH.read_text(encoding="utf-8")
GAP = "..."
NUMBER = r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w])"
PRINTED: dict[str, str] = {}


def blocks() -> list[tuple[str, list[str]]]:
    """(command, the lines shown) of every console block."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        command, *lines = block.splitlines()
        found.append((command.removeprefix("$ "), lines))
    return found


def printed(command: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    if command not in PRINTED:
        program, *words = shlex.split(command)
        assert program == "fitcheck"
        assert main(words) in (0, 1)
        PRINTED[command] = capsys.readouterr().out
    return PRINTED[command].splitlines()


def runs_of(lines: list[str]) -> list[list[str]]:
    """The lines between gaps."""
    runs: list[list[str]] = [[]]
    for line in lines:
        if line == GAP:
            runs.append([])
        else:
            runs[-1].append(line)
    return [run for run in runs if run]


def like(line: str) -> str:
    """The beginning that a line keeps when its figures change."""
    return re.split(r"\d", line)[0] or line


@pytest.mark.parametrize(("command", "shown"), blocks())
def test_what_is_shown_is_printed(
    command: str,
    shown: list[str],
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    lines = printed(command, capsys)
    if request.config.getoption("--update-golden"):
        accept(command, shown, [line if line == GAP else renewed(line, lines) for line in shown])
        return
    at = 0
    for run in runs_of(shown):
        places = [i for i in range(at, len(lines)) if lines[i : i + len(run)] == run]
        assert places, f"not printed, in this order: {run}"
        at = places[0] + len(run)


def accept(command: str, shown: list[str], now: list[str]) -> None:
    """Put the lines that are printed now into the page, and their figures into the sentence."""
    text = PATH.read_text(encoding="utf-8")
    before, found, after = text.partition("\n".join([f"$ {command}", *shown, "```"]))
    assert found
    start = before.rfind("**FitCheck**:")
    sentence = before[start:]
    for old, new in zip(shown, now, strict=True):
        for a, b in zip(re.findall(NUMBER, old), re.findall(NUMBER, new), strict=False):
            if a != b:
                sentence = re.sub(rf"(?<![\w.]){re.escape(a)}(?![\w.]*\d)", b, sentence)
    page = before[:start] + sentence + "\n".join([f"$ {command}", *now, "```"]) + after
    PATH.write_text(page, encoding="utf-8", newline="\n")


def renewed(line: str, lines: list[str]) -> str:
    found = [new for new in lines if like(new) == like(line)]
    assert found, f"nothing like {line!r} is printed any more"
    return found[0]


@cache
def sections() -> list[tuple[str, str]]:
    """(a sentence of FitCheck, the blocks under it) of the page."""
    parts = re.split(r"^\*\*FitCheck\*\*:", TEXT, flags=re.MULTILINE)[1:]
    found = []
    for part in parts:
        sentence, _, rest = part.partition("```console\n")
        found.append((" ".join(sentence.split()), rest.partition("\n## ")[0]))
    return found


@pytest.mark.parametrize(("sentence", "shown"), sections(), ids=lambda text: text[:40])
def test_the_numbers_of_a_sentence_are_shown_under_it(sentence: str, shown: str) -> None:
    figures = set(re.findall(NUMBER, sentence)) - WORDS
    assert not (figures - set(re.findall(NUMBER, shown)) - {str(roles_of(shown))}), sentence


WORDS = {"80", "12", "8", "64", "4090"}  # sizes and names of cards, and the batches asked for


def roles_of(shown: str) -> int:
    """How many models the table under a sentence has."""
    found = re.search(r"^Phase, GiB +(.*?) +other", shown, re.MULTILINE)
    return len(found[1].split()) if found else 0


def test_every_claim_is_quoted_and_answered() -> None:
    claims = re.findall(r'^## "(.+)"$', TEXT, re.MULTILINE)
    assert len(claims) >= 4
    for part in TEXT.split("\n## ")[1:]:
        assert "**FitCheck**:" in part
        assert "$ fitcheck " in part
