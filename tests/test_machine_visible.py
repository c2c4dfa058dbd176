"""Several NVIDIA cards: which of them a CUDA program would see, and which one is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from machine_world import GIB, MIB, Card, FakeNvml, World

from fitcheck.machine import Machine, best, detect


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path).with_nvidia_driver()


def look(world: World, *cards: Card, **changes: Any) -> Machine:
    return detect(world.system(nvml=FakeNvml(*cards), **changes))


def three() -> list[Card]:
    big = Card("NVIDIA A100-SXM4-80GB", total=81920 * MIB, uuid="GPU-bbbb", used=70 * GIB)
    return [Card(), big, Card(used=3 * GIB, uuid="GPU-cccc")]


@pytest.mark.parametrize(
    ("wish", "indices"),
    [
        (None, [0, 1, 2]),
        ("2,0", [2, 0]),
        ("1", [1]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,7,1", [0]),  # as in CUDA, what follows a wrong name is hidden too
        ("GPU-cc", [2]),
        ("GPU-bbbb, GPU-aaaaaaaa", [1, 0]),
    ],
)
def test_cuda_visible_devices(world: World, wish: str | None, indices: list[int]) -> None:
    env = {} if wish is None else {"CUDA_VISIBLE_DEVICES": wish}
    machine = look(world, *three(), env=env)
    assert [card.index for card in machine.accelerators] == indices
    hidden = [note for note in machine.notes if "hides" in note]
    assert bool(hidden) == (len(indices) < 3)


def test_indices_among_different_cards_are_doubtful(world: World) -> None:
    doubtful = look(world, *three(), env={"CUDA_VISIBLE_DEVICES": "1"})
    env = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert any("fastest first" in note for note in doubtful.notes)
    assert not any("fastest first" in note for note in look(world, *three(), env=env).notes)


def test_the_card_with_most_free_memory_is_judged(world: World) -> None:
    machine = look(world, *three())
    card = best(machine)
    assert card is not None and card.index == 0, "24 GB empty is more than 80 GB with 70 taken"
    assert any("of 3 accelerators" in note for note in card.notes)
    assert machine.accelerators[0].notes == (), "alone, no card needs that note"
