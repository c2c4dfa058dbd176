"""The largest moments of an update's layers, walked from the first to the last and back."""

from __future__ import annotations

from typing import NamedTuple

from fitcheck import coefficients
from fitcheck.model import Model
from fitcheck.ops import Setting


class Stage(NamedTuple):
    """What is alive beside weights, states and older gradients at one point of an update."""

    phase: str  # forward, loss, backward
    name: str
    activations: int  # saved by the layers for backward, or their checkpoints
    casts: int  # autocast's 16-bit copies of weights
    working: int  # of the piece that is running
    gradients: int  # made so far


class Walked(NamedTuple):
    """The layers of an update: what they keep, their largest moments, their gradients."""

    kept: int
    casts: int
    forward: Stage
    backward: tuple[Stage, ...]
    gradients: int


def traced_layers(
    model: Model, setting: Setting, rows: int, length: int, checkpointing: bool, accumulate: bool,
    waiting: int,
) -> Walked:  # fmt: skip
    """Layers of several kinds, one after the other: the largest moment of each way."""
    costs, below = [], not setting.trains
    for kind in coefficients.order(model):
        what = (model, setting, rows, length, kind)
        cost = coefficients.layer(*what, first=below and not checkpointing, accumulate=accumulate)
        below = below and cost.gradients == 0
        costs.append(cost)
    kept = casts = 0
    runs = []
    for cost in costs:
        if checkpointing:  # its input stays, and autocast's casts
            runs.append((kept, casts, cost.forward, cost.hidden, cost.replay - cost.hidden))
            kept, casts = kept + cost.hidden, casts + cost.cached
        else:
            runs.append((kept, 0, cost.training, cost.kept, cost.backward - cost.kept))
            kept += cost.kept
    # Where there are older gradients, each new one is added to its own and freed.
    own_gradients = [0 if accumulate else cost.gradients for cost in costs]
    total = made = sum(own_gradients)
    forward = Stage("forward", "layer", 0, 0, 0, 0)
    backward = forward._replace(phase="backward")
    for i, (before, cast, rising, own, falling) in enumerate(runs, 1):
        made -= own_gradients[i - 1]  # of the layers above it
        up = Stage("forward", f"layer {i}", before, cast, rising, 0)
        down = Stage("backward", f"layer {i}", before + own, 0, falling, waiting + made)
        forward, backward = max(forward, up, key=_held), max(backward, down, key=_held)
    return Walked(kept, casts, forward, (backward,), total)


def _held(stage: Stage) -> int:
    return stage.activations + stage.casts + stage.working + stage.gradients
