"""What is kept between two sessions: the last plan, the pinned ones, the theme.

A state file is untrusted: bounded, every plan read as any plan from outside is. One that cannot be
read is set aside under another name and reported, never fatal, and never lost.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_config_path

from fitcheck import catalog
from fitcheck.answer import plan_from
from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan

LARGEST = 2**20  # bytes; a plan takes about 1 KiB
MOST_PINS = 12


@dataclass(slots=True)
class State:
    """live: the plan was asked of this machine's own card, which is to be looked at again."""

    plan: Plan | None = None
    live: bool = True
    pins: tuple[Plan, ...] = ()
    theme: str | None = None


def path() -> Path:
    """Where the state is kept: ~/.config/fitcheck/state.json on Linux."""
    return Path(user_config_path("fitcheck"), "state.json")


def load() -> tuple[State, str]:
    """The kept state, and what is to be said about it; nothing said where all is well."""
    file = path()
    try:
        if file.stat().st_size > LARGEST:
            raise ValueError("it is larger than 1 MiB")
        return _state(json.loads(file.read_bytes())), ""
    except FileNotFoundError:
        return State(), ""
    except OSError as fault:
        return State(), f"{file} cannot be read: {fault.strerror}"
    except FitCheckError as fault:
        return State(), _set_aside(file, fault.message)
    except (ValueError, RecursionError) as fault:
        return State(), _set_aside(file, str(fault))


def _state(values: Any) -> State:
    if not isinstance(values, dict) or values.keys() - {"plan", "live", "pins", "theme"}:
        raise ValueError("it is not what FitCheck writes")
    pins, theme = values.get("pins", []), values.get("theme")
    if not isinstance(pins, list) or len(pins) > MOST_PINS or not isinstance(theme, str | None):
        raise ValueError("its pins or theme are not what FitCheck writes")
    plan = values.get("plan")
    return State(
        plan=_plan(plan) if plan is not None else None,
        live=values.get("live") is True,
        pins=tuple(map(_plan, pins)),
        theme=theme,
    )


def _plan(values: Any) -> Plan:
    """The plan; a card's row is the catalog's as it is now, and so is what it leaves usable."""
    if not isinstance(values, dict) or not isinstance(values.get("gpu"), str):
        raise ValueError("a plan without a card")
    if not _known(values.get("model")):
        raise ValueError("its model is not of the catalog")
    return plan_from({name: value for name, value in values.items() if value is not None})


def _set_aside(file: Path, fault: str) -> str:
    """Rename a file that cannot be read, so that it can be looked at; what happened, in words."""
    aside = file.with_suffix(".broken.json")
    try:
        file.replace(aside)
    except OSError as error:
        return f"{file} cannot be read ({fault}), nor set aside ({error.strerror})"
    return f"the saved state could not be read ({fault}); it is now {aside}"


def save(state: State) -> str:
    """Keep it; what went wrong, in words, or nothing. A half-written file never replaces it."""
    file = path()
    values = {
        "plan": written(state.plan) if state.plan and of_catalog(state.plan) else None,
        "live": state.live,
        "pins": [written(plan) for plan in state.pins[-MOST_PINS:] if of_catalog(plan)],
        "theme": state.theme,
    }
    draft = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        draft.replace(file)
    except OSError as fault:
        return f"{file} cannot be written: {fault.strerror}"
    return ""


def of_catalog(plan: Plan) -> bool:
    """Whether its card and models are the catalog's: starting must not wait for the Hub or a disk.

    A card of this machine that the catalog lacks is looked at again anyway.
    """
    models = [plan.model, plan.reward_architecture, plan.critic_architecture]
    return any(card.id == plan.gpu.id for card in catalog.gpus()) and all(
        _known(model.id) for model in models if model is not None
    )


def _known(name: object) -> bool:
    return any(entry["id"] == name for entry in catalog.model_entries()) or any(
        row["id"] == name for row in catalog.rows("reward_models.json", "reward_models")
    )


def written(plan: Plan) -> dict[str, Any]:
    """A plan as JSON, with only what was set: what was a default stays one."""
    values = plan.to_json()
    always = {"model", "gpu", "method", "gpus", "nodes", "ram", "memory"}
    kept = {name: value for name, value in values.items() if name in always | plan.given}
    if plan.memory == plan.gpu.usable_memory():
        del kept["memory"]
    return kept
