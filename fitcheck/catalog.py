"""The catalog: models, GPUs, reward models, methods and prices, found by loose names.

    >>> find_gpu("4090").name
    'NVIDIA GeForce RTX 4090'
    >>> find_model("llama 3.1 8b").id
    'meta-llama/Llama-3.1-8B'

The data are the JSON files of `catalog/`, read when first needed: for a model the index and one
family, for a GPU one vendor at a time. A name that means several cards takes the one whose row is
marked `usual`: of namesakes the one sold first, of two sold together the smaller; of data-center
cards the SXM board (A100: 80 GB); of a Mac's chip the fullest. `GPU.assumed` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from fitcheck.errors import FitCheckError
from fitcheck.files import ROOT as ROOT
from fitcheck.files import Row as Row
from fitcheck.files import damaged, read
from fitcheck.gpu import GIB, GPU
from fitcheck.model import Model
from fitcheck.names import (
    CardName,
    card_names,
    card_sizes,
    find_entry,
    fits,
    is_called,
    listed,
    matcher,
    sold_as,
    unknown,
    vague,
)

if TYPE_CHECKING:
    from fitcheck.records import CloudPrice, Method, RewardModel
    from fitcheck.report import Error

VENDORS = ("nvidia", "amd", "intel", "apple")


def rows(name: str, key: str) -> list[Row]:
    """The rows under `key` of one catalog file, as they stand there."""
    found = read(name).get(key)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise damaged(name, f"no list of rows named {key!r}")
    return found


def model_entries() -> list[Row]:
    """The index of models: id, family, file, params, release_date, ... of each; unknown: absent."""
    return rows("models/index.json", "models")


def model(entry: Row) -> Model:
    """The model of an index entry, read from its family's file."""
    return Model.from_json(model_row(entry))


def model_row(entry: Row) -> Row:
    """The full row of an index entry, as it stands in its family's file."""
    name = f"models/{entry['file']}"
    for row in rows(name, "models"):
        if row.get("id") == entry["id"]:
            return row
    raise damaged(name, f"no model {entry['id']}, which the index places there")


def models() -> tuple[Model, ...]:
    """Every model of the catalog (some 600: 20 ms; the index alone is quicker)."""
    return tuple(model(entry) for entry in model_entries())


def gpu_rows() -> Iterator[Row]:
    """The rows of every vendor's GPUs, as they stand there."""
    for vendor in VENDORS:
        yield from rows(f"gpus/{vendor}.json", "gpus")


def gpus() -> tuple[GPU, ...]:
    """Every GPU of the catalog."""
    return tuple(GPU.from_json(row) for row in gpu_rows())


def cards() -> Iterator[tuple[Row, list[GPU]]]:
    """Every row of a GPU, and its cards in all sizes sold or modded, the smallest first."""
    for row in gpu_rows():
        yield row, [_card(row["name"], [row], size, None) for size in card_sizes(row)]


def reward_models() -> tuple[RewardModel, ...]:
    """Every reward model of the catalog."""
    return tuple(_reward_model(row) for row in rows("reward_models.json", "reward_models"))


def _reward_model(row: Row) -> RewardModel:
    from fitcheck.records import RewardModel  # most answers need none

    return RewardModel.from_json(row)


def methods() -> tuple[Method, ...]:
    """Every method, the default one first."""
    from fitcheck.records import Method

    return tuple(Method.from_json(row) for row in rows("methods.json", "methods"))


def clouds() -> tuple[CloudPrice, ...]:
    """Every dated cloud price."""
    from fitcheck.records import CloudPrice

    return tuple(CloudPrice.from_json(row) for row in rows("clouds.json", "prices"))


@cache
def stated_error(method: str, rung: str) -> Error | None:
    """The error that a Report states; None where no measurement of this method is recorded.

    accuracy.json is written by `python -m fitcheck.accuracy --write`.
    """
    from fitcheck.report import Error

    try:
        found = read("accuracy.json").get(rung, {}).get(method)
        error = Error(**found) if found else None
    except (AttributeError, TypeError) as fault:
        raise damaged("accuracy.json", str(fault)) from fault
    if error and (not isinstance(error.relative, float) or not 0 <= error.relative < 1):
        raise damaged("accuracy.json", f"relative is {error.relative!r}")
    return error


def find_model(text: str) -> Model:
    """The model a loose name means: `llama 3.1 8b`, `qwen3-8b`, `Qwen/Qwen3-8B`.

    Without a suffix the base model is meant, of the original vendor, in its newest release. Raises
    FitCheckError, naming the nearest three, when nothing fits or models of several sizes do.
    """
    try:
        return model(find_entry(text, model_entries(), "model", "family"))
    except KeyError as fault:
        raise damaged("models/index.json", f"a row without {fault}") from fault


def find_reward_model(text: str) -> RewardModel:
    """The reward model a loose name means; FitCheckError as for find_model."""
    entries = rows("reward_models.json", "reward_models")
    try:
        return _reward_model(find_entry(text, entries, "reward model", "base_model"))
    except KeyError as fault:
        raise damaged("reward_models.json", f"a row without {fault}") from fault


def architecture(reward: RewardModel) -> Model:
    """The transformer under a reward model, under the reward model's id."""
    return under_reward(reward.id, reward.root_base_model)


def under_reward(name: str, base: str) -> Model:
    """The transformer `base`, under the id of the reward model that stands on it."""
    for entry in model_entries():
        if entry["id"] == base:
            return replace(model(entry), id=name, name=name.partition("/")[2])
    raise FitCheckError(
        f"{name} stands on {base}, whose sizes are not in the catalog",
        "choose another reward model; `fitcheck rewards` lists them",
    )


def find_gpu(text: str, total_bytes: int | None = None) -> GPU:
    """The GPU a loose name means: `4090`, `a100 40`, `NVIDIA GeForce RTX 3060`, `m3 max 64gb`.

    `total_bytes` is what a live driver reports (a Mac: its RAM); it tells namesakes apart and
    becomes the card's total. A laptop's card needs the word laptop. Raises FitCheckError, naming
    the nearest three, when nothing fits.
    """
    try:
        return _find_gpu(text, total_bytes)
    except KeyError as fault:
        raise damaged("gpus", f"a row without {fault}") from fault


def _find_gpu(text: str, total_bytes: int | None) -> GPU:
    exact, other_sizes = matcher(text), list[Row]()
    for vendor in VENDORS:
        cards = rows(f"gpus/{vendor}.json", "gpus")
        if same := [card for card in cards if any(map(exact, card_names(card)))]:
            return _card(text, same, None, total_bytes)
    for partly in (False, True):
        for name in CardName.readings(text):
            called = [card for card in gpu_rows() if is_called(card, name, partly)]
            if fitting := [card for card in called if fits(card, name)]:
                return _card(text, fitting, name.memory_gib, total_bytes)
            other_sizes += [] if partly else called
    if other_sizes:
        raise FitCheckError(
            f"the catalog has no {text!r}",
            f"there is {listed(list(dict.fromkeys(map(sold_as, other_sizes))), 'and')}",
        )
    raise unknown(text, "GPU", map(card_names, gpu_rows()))


def _card(text: str, found: list[Row], size: float | None, total_bytes: int | None) -> GPU:
    """The card meant among namesakes, with the memory that was asked for or is live."""
    if len({CardName.of(row["name"]).words for row in found}) > 1 and not total_bytes:
        raise vague(text, "GPU", [row["name"] for row in found])
    size = total_bytes / GIB if total_bytes else size

    def distance(row: Row) -> tuple[float, int]:
        return min(abs(s - size) for s in card_sizes(row)) if size else 0.0, row.get("usual", 99)

    row = min(found, key=distance)
    gpu, changes = GPU.from_json(row), dict[str, Any]()
    equals = [other for other in found if distance(other)[0] == distance(row)[0]]
    if len(equals) > 1 or (not size and gpu.unified_memory and gpu.memory_options_gib):
        changes["assumed"] = f"{text!r} can be {listed([sold_as(card) for card in equals])}"
    memory = min(card_sizes(row), key=lambda s: abs(s - size)) if size else gpu.memory_gib
    if total_bytes and size and abs(memory - size) > 0.15 * size:
        memory = round(size)  # memory chips were swapped, in a size that the catalog does not know
    if memory != gpu.memory_gib:
        known = memory in card_sizes(row)
        changes |= {"memory_gib": memory, "id": f"{gpu.id}-{memory:g}gb" if known else gpu.id}
        changes |= {"total_bytes": None, "total_verified": False}
    if total_bytes:
        changes |= {"total_bytes": total_bytes, "total_verified": True}
    if memory != gpu.memory_gib or (gpu.unified_memory and gpu.memory_options_gib):
        changes["name"] = f"{re.sub(r' [0-9]+GB$', '', gpu.name)} {memory:g}GB"
    return replace(gpu, **changes)
