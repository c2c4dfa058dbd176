"""Loose names: what a user, a driver or a shop writes, against what the catalog calls it.

>>> squeeze("Llama-3.1_8B") == squeeze("llama 3.1 8b")
True
>>> CardName.of("rtx4060ti-16gb") == CardName.of("RTX 4060 Ti 16 GB")
True
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from fitcheck.errors import FitCheckError


class CardName(NamedTuple):
    """A card's name taken apart, so that spellings of one card compare equal, and only they."""

    words: frozenset[str]  # what makes it another card: 4060, ti, laptop, d, ada
    optional: frozenset[str]  # what may be left out: nvidia, rtx, sxm
    memory_gib: float | None = None
    cores: int | None = None  # Apple's GPU cores

    @classmethod
    def of(cls, text: str) -> CardName:
        """The parts of one name."""
        text = text.lower().replace("(r)", " ").replace("(tm)", " ")
        cores, memory = re.search(_CORES, text), re.search(_MEMORY, text)
        text = re.sub(_MEMORY, " ", re.sub(_CORES, " ", text))
        words = {_SAME.get(word, word) for word in re.findall(_CARD_WORD, text)}
        words = {word for word in words if f" {word} " not in _NOISE}
        optional = frozenset(word for word in words if f" {word} " in _OPTIONAL)
        return cls(
            frozenset(words - optional),
            optional,
            float(memory[1]) if memory else None,
            int(cores[1]) if cores else None,
        )

    @classmethod
    def readings(cls, text: str) -> Iterator[CardName]:
        """The name as it stands, then with a last bare number read as GB, then as cores."""
        yield cls.of(text)
        number = re.search(_LAST_NUMBER, text)
        rest = cls.of(text[: number.start()]) if number else None
        if number and rest and rest.words:
            yield rest._replace(memory_gib=float(number[1]))
            yield rest._replace(cores=int(number[1]))


# Patterns as text: re compiles them when they are first used, which most answers never do.
_CORES = r"(?<![a-z0-9])(\d+)[ -]*cores?\b"
_MEMORY = r"(?<![a-z0-9.])(\d+)[ -]*(?:gb|gib|g)\b"
_LAST_NUMBER = r"[ -](\d{1,3})\s*$"
_CARD_WORD = r"sxm\d?|hbm\d?e?|\d+|[a-z]+"
_SAME = {"mobile": "laptop", "notebook": "laptop"} | {f"sxm{n}": "sxm" for n in range(10)}
_NOISE = " card edition founders generation gpu graphics vram hbm hbm2 hbm2e hbm3 hbm3e "
_OPTIONAL = (
    " nvidia geforce gtx rtx tesla jetson amd radeon rx instinct intel arc data center apple "
    " pcie sxm nvl oam vf blackwell workstation "
)


def card_names(card: Mapping[str, Any]) -> tuple[str, ...]:
    """All that a GPU's row is called by."""
    return (card["name"], card["id"], *card.get("aliases", ()))


def card_sizes(card: Mapping[str, Any]) -> list[float]:
    """GiB sold or modded under the card's name."""
    return sorted({card["memory_gib"], *card.get("memory_options_gib", ())})


def sold_as(card: Mapping[str, Any]) -> str:
    """The card's name with its memory: `NVIDIA GeForce RTX 4090 (24 or 48 GB)`."""
    sizes = card_sizes(card)
    if len(sizes) == 1 and card["name"].endswith("GB"):
        return str(card["name"])
    return f"{card['name']} ({listed([f'{size:g}' for size in sizes])} GB)"


def is_called(card: Mapping[str, Any], name: CardName, partly: bool = False) -> bool:
    """Whether a card goes by that name; `partly`: by some of its words, which laptops never do."""
    own = card_names(card)
    if not name.words or not any(all(w in alias.lower() for w in name.words) for alias in own):
        return False  # taking names apart is slow
    names = [CardName.of(alias) for alias in own]
    if not name.optional <= frozenset().union(*(other.optional for other in names)):
        return False
    if partly:
        return not card.get("laptop") and any(name.words < other.words for other in names)
    return any(name.words == other.words for other in names)


def fits(card: Mapping[str, Any], name: CardName) -> bool:
    """Whether a card has the cores and (within 7 %: B200 is sold as 180 and 192 GB) the memory."""
    if name.cores not in (None, card.get("gpu_cores")):
        return False
    size = name.memory_gib
    return size is None or any(abs(own - size) <= 0.07 * size for own in card_sizes(card))


def find_entry(text: str, entries: list[dict[str, Any]], noun: str, kin: str) -> dict[str, Any]:
    """The entry whose `id` a loose name means; relatives share the value of the key `kin`.

    Exact names come first, then those that leave the least unsaid, and of these the newest.
    FitCheckError when none has all the words, or when those that do differ in kin or size.
    """
    exact = matcher(text)
    for entry in entries:
        if exact(entry["id"]) or exact(entry["id"].partition("/")[2]):
            return entry
    wanted = _words(text)
    letters = [word for word in wanted if word.isalpha() and word != "instruct"]
    likely = (e for e in entries if wanted and all(w in e["id"].lower() for w in letters))
    costs = ((_unsaid(wanted, entry["id"]), entry) for entry in likely)
    found = sorted(((c, e) for c, e in costs if c is not None), key=lambda pair: pair[0])
    if not found:
        raise unknown(text, noun, ((entry["id"],) for entry in entries))
    sized = any(word[0].isdigit() and word[-1] in "bm" for word in wanted)
    reach = found[0][0] + (0 if sized else _SIZE - 1)  # a bare name must leave no doubt on size
    near = [entry for cost, entry in found if cost <= reach]
    sizes = [entry.get("params") or 0 for entry in near]
    if len({entry[kin] for entry in near}) > 1 or max(sizes) > 1.05 * min(sizes):
        raise vague(text, noun, [entry["id"] for entry in near])
    best = [entry for cost, entry in found if cost == found[0][0]]
    return max(best, key=lambda entry: (entry.get("release_date") or "", entry["id"]))


# What a word of a model's name costs that the user did not write: little for a base model, a
# version, a date, a context length or active experts, more for a variant, most for a size.
_SMALL, _INSTRUCT, _VARIANT, _SIZE = 1, 3, 4, 10
_WORD = (
    r"v\d+(?:\.\d+)*|a\d+(?:\.\d+)?[bm](?![a-z])|\d+x\d+b|\d+(?:\.\d+)?[bmkt](?![a-z])"
    r"|\d+(?:\.\d+)?|[a-z]+"
)
_SLIGHT = r"base|pt|v\d.*|a\d.*[bm]|\d+[kt]|[0-2]\d[0-3]\d"
_NEVER_SAID = " hf meta nvidia c4ai ai21 bf16 intermediate step "


def _words(text: str) -> frozenset[str]:
    text = re.sub(r"(?<=\d)_(?=\d)", ".", text.lower())
    words = ("instruct" if w in ("it", "chat") else w for w in re.findall(_WORD, text))
    return frozenset(word for word in words if f" {word} " not in _NEVER_SAID)


def _unsaid(wanted: frozenset[str], name: str) -> int | None:
    """How much of `name` the wanted words leave unsaid; None when it lacks one of them."""
    vendor, _, short = name.rpartition("/")
    words = _words(short)
    if not wanted <= words | _words(vendor):
        return None
    return sum(_price(word) for word in words - wanted)


def _price(word: str) -> int:
    if re.fullmatch(_SLIGHT, word):
        return _SMALL
    if word[0].isdigit():
        return _SIZE
    return _INSTRUCT if word == "instruct" else _VARIANT


def matcher(text: str) -> Callable[[str], bool]:
    """Whether a name is that text, case and separators aside; opt-13b is not opt-1.3b."""
    key, numbers = squeeze(text), re.findall(r"\d+", text)

    def matches(name: str) -> bool:
        return squeeze(name) == key and re.findall(r"\d+", name) == numbers

    return matches


def squeeze(name: str) -> str:
    """A name without case and separators."""
    return name.lower().translate(_SEPARATORS)


_SEPARATORS = str.maketrans("", "", " -_./:")


def listed(names: list[str], word: str = "or") -> str:
    """A, B or C."""
    *most, last = names
    return f"{', '.join(most)} {word} {last}" if most else last


_VERB: Mapping[str, str] = {"model": "models", "reward model": "rewards", "GPU": "gpus"}


def unknown(text: str, noun: str, names: Iterable[tuple[str, ...]]) -> FitCheckError:
    """The error for a name that nothing has; it names the nearest three.

    `names`: of each thing the name to show, then the others it goes by.
    """
    from difflib import SequenceMatcher  # 5 ms, and only for mistakes

    words = re.findall(r"[a-z]+|\d+", text.lower())
    compare = SequenceMatcher(b=squeeze(text))

    def nearness(own: tuple[str, ...]) -> tuple[int, float]:
        keys = [squeeze(name.rpartition("/")[2]) for name in own]
        shared = max(sum(len(word) for word in words if word in key) for key in keys)
        ratios = []
        for key in keys:
            compare.set_seq1(key)
            ratios.append(compare.ratio())
        return shared, max(ratios)

    near = [own[0] for own in sorted(names, key=nearness, reverse=True)[:3]]
    return FitCheckError(
        f"no {noun} in the catalog is called {text!r}",
        f"did you mean {listed(near)}? `fitcheck {_VERB[noun]}` lists all",
    )


def vague(text: str, noun: str, names: list[str]) -> FitCheckError:
    """The error for a name that several different things have; it names three of them."""
    return FitCheckError(
        f"{text!r} could be any of {len(names)} {noun}s",
        f"say which, such as {listed(names[:3])}; `fitcheck {_VERB[noun]} {text}` lists them",
    )
