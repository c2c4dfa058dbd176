"""What a field can become from the catalog, each judged under the plan as it is now.

    found = matching(candidates(plan, "model"), Query.parse("qwen 7b apache"))
    judgement(plan, found[0]).verdict

A search is words, all of which must appear (name, family, licence, method of alignment), and `7b`,
`1b..13b` or, of cards, `16..24` for sizes; `fits` leaves only what fits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from fitcheck import catalog, hub
from fitcheck.catalog import Row
from fitcheck.decoder import covered
from fitcheck.errors import FitCheckError
from fitcheck.gpu import GPU
from fitcheck.names import card_names
from fitcheck.plan import KNOBS, Plan
from fitcheck.search import count, has_words, memory_range, params_range
from fitcheck.text import gib
from fitcheck.tui.knobs import (
    PICKED,
    card_name,
    choices,
    ladder,
    put,
    read,
    shown,
)
from fitcheck.tui.view import answer


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of a picker. size: parameters, or GB of a card; words: what a search looks in."""

    id: str
    label: str
    detail: str
    words: tuple[str, ...]
    size: float
    change: Callable[[Plan], Plan]
    away: bool = False  # on the Hub or on disk: read only when it is chosen


class Judgement(NamedTuple):
    """What becomes of the plan: verdict and bytes, or why it cannot be judged."""

    verdict: str | None
    peak_bytes: int = 0
    usable_bytes: int = 0
    why: str = ""


@dataclass(frozen=True, slots=True)
class Query:
    """A search, taken apart."""

    words: tuple[str, ...] = ()
    low: float = 0.0
    high: float = float("inf")
    fits: bool = False

    @classmethod
    def parse(cls, text: str, field: str = "model") -> Query:
        """Never fails: a range that is none is a word."""
        words, low, high, fits = [], 0.0, float("inf"), False
        for word in text.lower().split():
            if word == "fits":
                fits = True
            elif re.fullmatch(r"[\d.]*\.\.[\d.]*[a-z]*|[\d.]+[a-z]*\.\.[\d.]*[a-z]*", word):
                try:
                    low, high = (memory_range if field == "gpu" else params_range)(word)
                except FitCheckError:  # half typed, such as ".."
                    continue
            else:
                words.append(word)
        return cls(tuple(words), low, high, fits)

    def chips(self, field: str = "model") -> list[str]:
        """The search as it was understood."""
        found = [*self.words]
        if (self.low, self.high) != (0.0, float("inf")):
            low = amount(self.low, field) if self.low else ""
            high = amount(self.high, field) if self.high != float("inf") else ""
            found.append(f"size {low}..{high}")
        return [*found, "only what fits"] if self.fits else found


def candidates(plan: Plan, field: str) -> list[Candidate]:
    """Everything that the field can become: of the catalog, of its choices, of its usual sizes."""
    if field == "gpu":
        return cards()
    if field == "model":
        return _kin_first(models(), plan.model.family)
    kind = "choice" if field == "method" else KNOBS.get(field, {"kind": "int"})["kind"]
    sizes = kind in ("int", "share")
    values = ladder(plan, field) if sizes else choices(plan, field)
    found = [_value(field, value) for value in values]
    return [*found, *scorers(field)] if field in PICKED else found


def _value(field: str, value: object) -> Candidate:
    words = shown(field, value)
    what = WHAT.get((field, words), "")
    return Candidate(words, words, what, (words,), 0.0, _putter(field, value))


def typed(plan: Plan, field: str, text: str) -> Candidate | None:
    """A value that is typed rather than chosen, such as 1000 or 48gib; of models one elsewhere.

    None where only names of the catalog can be meant.
    """
    text = text.strip()
    if field in ("model", "reward_model", "critic"):
        return _elsewhere(field, text)
    if not text or field in PICKED or field == "method":
        return None
    if field in KNOBS and KNOBS[field]["kind"] in ("choice", "flag"):
        return None
    return Candidate(text, text, "as typed", (text,), 0.0, lambda plan: read(plan, field, text))


def _elsewhere(field: str, text: str) -> Candidate | None:
    """The last row of a list of models: one of the Hub, in a folder, or in a GGUF file."""
    local = hub.is_path(text) and len(text) > 1
    if not local and not hub.is_hub_id(text):
        return None

    def change(plan: Plan) -> Plan:
        found = hub.find(text)
        return plan.change(model=found) if field == "model" else put(plan, field, found)

    label = f"read {text}" if local else f"fetch {text} from the Hub"
    return Candidate(text, label, "config and headers, no weights", (text,), 0.0, change, away=True)


WHAT = {
    ("reward_model", "policy"): "a copy of the policy's architecture with a score head",
    ("reward_model", "adapter"): "head and adapter on the policy's frozen base",
    ("reward_model", "rule"): "no model: a program judges",
    ("critic", "reward"): "starts as a copy of the reward model",
    ("critic", "shared"): "a value head on the policy",
    ("critic", "adapter"): "an adapter and a value head on the policy's base",
}


def _putter(field: str, value: object) -> Callable[[Plan], Plan]:
    return lambda plan: put(plan, field, value)


@lru_cache(maxsize=1)
def models() -> tuple[Candidate, ...]:
    """Every model, the newest family first, in it the smallest; last what no estimate covers."""
    entries = catalog.model_entries()
    newest: dict[str, str] = {}
    for entry in entries:
        family = entry["family"]
        newest[family] = max(newest.get(family, ""), entry.get("release_date") or "")
    ordered = sorted(entries, key=lambda e: e.get("params") or 0)
    ordered.sort(key=lambda e: (newest[e["family"]], e["family"]), reverse=True)
    ordered.sort(key=lambda e: covered(catalog.model(e)) != "")
    return tuple(map(_model, ordered))


def _model(entry: Row) -> Candidate:
    recipe, licence = entry.get("alignment_recipe") or "", entry.get("license") or ""
    words = (entry["id"], entry["family"], entry["model_type"], licence, recipe)
    detail = " · ".join(part for part in (entry["family"], licence) if part)
    label = entry["id"].rpartition("/")[2]

    def change(plan: Plan) -> Plan:
        return plan.change(model=catalog.model(entry))

    return Candidate(entry["id"], label, detail, words, entry.get("params") or 0, change)


def _kin_first(found: Iterable[Candidate], family: str) -> list[Candidate]:
    """The plan's own family before all others."""
    return sorted(found, key=lambda candidate: candidate.words[1] != family)


@lru_cache(maxsize=1)
def cards() -> list[Candidate]:
    """Every GPU, by maker, the largest first."""
    found = []
    for vendor in catalog.VENDORS:
        rows = catalog.rows(f"gpus/{vendor}.json", "gpus")
        rows = sorted(rows, key=lambda row: -row["memory_gib"])
        found += [_card(row) for row in rows]
    return found


def _card(row: Row) -> Candidate:
    names = (*card_names(row), row["arch"], row["segment"], row["vendor"])

    def change(plan: Plan) -> Plan:
        # The host of a card that is only pretended is not known.
        return plan.change(gpu=catalog.find_gpu(row["id"]), ram=None)

    detail = f"{row['arch']} · {row['segment']}"
    return Candidate(
        row["id"], card_name(GPU.from_json(row)), detail, names, row["memory_gib"], change
    )


@lru_cache(maxsize=4)
def scorers(field: str) -> tuple[Candidate, ...]:
    """Every reward model whose sizes are known, the largest first."""
    found = []
    for reward in sorted(catalog.reward_models(), key=lambda reward: -reward.params):
        try:
            model = catalog.architecture(reward)
        except FitCheckError:  # it stands on a model that the catalog does not have
            continue
        words = (reward.id, reward.base_model, reward.kind, reward.license or "", "reward")
        detail = f"{reward.kind} · {reward.license or 'licence unknown'}"
        label = reward.id.rpartition("/")[2]
        found.append(
            Candidate(reward.id, label, detail, words, reward.params, _putter(field, model))
        )
    return tuple(found)


def matching(found: Iterable[Candidate], query: Query) -> list[Candidate]:
    """Those that a search leaves; `fits` is for who has judged them."""
    ranged = (query.low, query.high) != (0.0, float("inf"))
    return [
        candidate
        for candidate in found
        if (not ranged or query.low <= candidate.size <= query.high)
        and has_words(query.words, candidate.words)
    ]


def judgement(plan: Plan, candidate: Candidate) -> Judgement:
    """The plan with that candidate in it; what is elsewhere is not read for that."""
    if candidate.away:
        return Judgement(None, why=candidate.detail)
    try:
        report = answer(candidate.change(plan))
    except FitCheckError as fault:
        return Judgement(None, why=fault.message)
    return Judgement(report.verdict, report.peak_bytes, report.usable_bytes)


def amount(size: float, field: str) -> str:
    """Parameters as people say them; of a card its GB; nothing for what has no size."""
    if not size:
        return ""
    return f"{size:g} GB" if field == "gpu" else count(int(size))


def told(found: Judgement, field: str) -> str:
    """The number beside a verdict: the peak, or of cards what they leave, in GiB."""
    if found.verdict is None:
        return "-"
    if field == "gpu":
        spare = found.usable_bytes - found.peak_bytes
        return f"{'+' if spare >= 0 else '−'}{gib(abs(spare))}"
    return gib(found.peak_bytes)
