"""README.md holds what the program prints: every command is run, every output compared.

`make golden` writes the outputs anew. A command without output below it is only run; of an output
that ends in "..." the first lines are compared.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fitcheck.cli import VERBS, main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def blocks(kind: str, text: str = TEXT) -> list[str]:
    """The fenced blocks of a kind, without their fences."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands() -> Iterator[tuple[str, str]]:
    """(command, the output shown below it) of every console block."""
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            yield command, shown


def cases() -> list[Any]:
    oracle = {True: [pytest.mark.oracle], False: []}  # what needs torch
    return [
        pytest.param(
            command, shown, id=command, marks=oracle[command.split()[1] in ("dryrun", "bench")]
        )
        for command, shown in commands()
    ]


@pytest.fixture
def accept(request: pytest.FixtureRequest) -> Callable[[str, str], bool]:
    """With --update-golden: puts what is printed now into the README instead of comparing."""

    def put(old: str, new: str) -> bool:
        if not request.config.getoption("--update-golden"):
            return False
        text = README.read_text(encoding="utf-8")
        assert text.count(old) == 1
        README.write_text(text.replace(old, new), encoding="utf-8", newline="\n")
        return True

    return put


@pytest.mark.parametrize(("command", "shown"), cases())
def test_command(
    command: str,
    shown: str,
    accept: Callable[[str, str], bool],
    capsys: pytest.CaptureFixture[str],
) -> None:
    program, *words = shlex.split(command)
    assert program == "fitcheck"
    assert main(words) in (0, 1)
    printed = capsys.readouterr()
    assert printed.out
    assert printed.err == ""
    now = printed.out
    if shown.endswith("...\n"):
        lines = now.splitlines(keepends=True)[: len(shown.splitlines()) - 1]
        now = "".join([*lines, "...\n"])
    if shown and not accept(f"$ {command}\n{shown}", f"$ {command}\n{now}"):
        assert now == shown
    assert max(map(len, shown.splitlines()), default=0) <= 80


def test_python(accept: Callable[[str, str], bool]) -> None:
    (block,) = blocks("pycon")
    names: dict[str, Any] = {}
    now = ""
    for example in doctest.DocTestParser().get_examples(block):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(example.source, "README.md", "single"), names)
        first, *more = example.source.splitlines()
        now += "".join([f">>> {first}\n", *(f"... {line}\n" for line in more), printed.getvalue()])
    if not accept(block, now):
        assert now == block


def test_shell_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = [line.partition("#")[0] for block in blocks("sh") for line in block.splitlines()]
    assert {line.split()[0] for line in lines} == {"make", "uvx", "pip"}
    for program, *words in map(shlex.split, lines):
        if program == "make":
            assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE)
        elif program == "uvx":
            assert words[0] in PROJECT["scripts"]
            assert words[0] == PROJECT["name"]
            assert main(words[1:]) in (0, 1)
        else:
            name, _, extra = words[1].removesuffix("]").partition("[")
            assert (words[0], name) == ("install", PROJECT["name"])
            assert not extra or extra in PROJECT["optional-dependencies"]


def test_files_that_are_named_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).is_file()
    for name in re.findall(r"`(\w+\.py)`", TEXT):
        assert (ROOT / "fitcheck" / name).is_file()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_no_verb_or_target_is_promised_that_does_not_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = set(re.findall(r"(?:`|\$ )fitcheck ([a-z]+)", text))
    later = re.findall(r"\*\*Not there yet\*\*:[^.]*`fitcheck ([a-z]+)`", text)
    assert verbs - set(VERBS) == set(later)
    for target in re.findall(r"(?:`|^ *)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 190
    assert TEXT.isascii() or not re.search("[\U0001f300-\U0001faff]", TEXT)  # no emoji
