"""Searching lists: words in names, ranges of sizes, and parameters as people say them.

params_range("1b..13b")                       # (1e9, 13e9)
has_words(["8b"], ["Llama-3.1-8B"])           # True, and False for Llama-3.1-38B
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fitcheck.errors import FitCheckError

Range = tuple[float, float]


def count(number: int | None) -> str:
    """Parameters as people say them: 8030261248 is 8.03B; None is a dash."""
    if not number:
        return "-"
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def params_range(text: str) -> Range:
    """`1b..13b`, `..7b`, `70b..`, or `8b`: within a tenth of it. Without a unit: billions."""
    return _range(text, {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12, "": 1e9}, 0.1, "1b..13b")


def memory_range(text: str) -> Range:
    """`16..24`, `..12`, `80..`, or `24` alone, in GB as on the box."""
    return _range(text, {"": 1.0, "g": 1.0, "gb": 1.0, "gib": 1.0}, 0.0, "16..24")


def _range(text: str, units: dict[str, float], slack: float, example: str) -> Range:
    ends: list[float | None] = []
    for end in text.lower().replace(" ", "").split(".."):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]*)", end)
        if end and (not match or match[2] not in units):
            ends = []
            break
        ends.append(float(match[1]) * units[match[2]] if match else None)
    if len(ends) == 1 and ends[0] is not None:
        return ends[0] * (1 - slack), ends[0] * (1 + slack)
    if len(ends) != 2 or ends == [None, None]:
        raise FitCheckError(f"{text!r} is not a range", f"write it as {example}")
    low, high = ends
    return low or 0.0, float("inf") if high is None else high


def has_words(words: Iterable[str], texts: Iterable[str]) -> bool:
    """Whether every word appears, separators aside and numbers whole: no 8b in 1.8b or 38b."""
    text = " ".join(texts).lower()
    return all(re.search(_pattern(word), text) for word in words)


def _pattern(word: str) -> str:
    parts = re.findall(r"[a-z]+|\d+", word.lower())
    whole = [rf"(?<!\d){part}(?!\d)" if part.isdigit() else part for part in parts]
    start = r"(?<!\.)" if word[:1].isdigit() else ""
    return start + "[ _./:-]*".join(whole)
