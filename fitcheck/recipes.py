"""A framework's habits as data (catalog/recipes/*.json): its defaults, and what it does not obey.

    defaults("trl", "ppo")["response"]                     # 53
    runs_as("trl", "ppo", "precision", "bf16-autocast")    # "bf16": TRL's PPO ignores bf16=True

What a framework keeps alive, and when, is code: trl.py for the estimate, bench/steps for the dry
run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import lcm
from typing import Any

from fitcheck.errors import FitCheckError
from fitcheck.files import read

BUILT_IN = ("plain", "hf-4.48")  # recipes whose habits are code alone
FRAMEWORKS = ("trl",)


@cache
def habits(recipe: str | None, method: str) -> dict[str, Any]:
    """What a recipe's file says of one method; empty where it has nothing to say."""
    if recipe not in FRAMEWORKS:
        return {}
    found: dict[str, Any] = read(f"recipes/{recipe}.json")["methods"].get(method, {})
    return found


def defaults(recipe: str, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that a recipe sets otherwise than the plain step, given what was set."""
    found = habits(recipe, method)
    rows = found.get("defaults", {}) | found.get(given.get("tuning", "full"), {})
    values = {name: row["value"] for name, row in rows.items()}
    return values | _sizes(values, method, given) if values else {}


def _sizes(values: Mapping[str, Any], method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Micro-batches as large as the default if they divide what is given, and one of them a batch.

    A trainer is told the micro-batch and how many make a batch (one by default).
    """
    whole = given.get("minibatch") or given.get("batch") or values["micro_batch"]
    micro = given.get("micro_batch") or _divisor(whole, values["micro_batch"])
    group = given.get("group", 8) if method == "grpo" else 1
    batch = given.get("batch") or lcm(whole if "minibatch" in given else micro, group)
    sizes = {"micro_batch": micro, "batch": batch}
    if "score_batch" in values:
        sizes["score_batch"] = min(values["score_batch"], batch)
    return sizes


def _divisor(whole: int, most: int) -> int:
    return max(n for n in range(1, min(whole, most) + 1) if whole % n == 0)


def runs_as(recipe: str | None, method: str, name: str, value: Any) -> Any:
    """What a framework makes of a setting: the setting, unless it ignores it."""
    row = habits(recipe, method).get("runs_as", {}).get(name)
    key = "true" if value is True else value
    return row["values"].get(key, value) if row else value


def check_recipe(recipe: str | None, method: str, name: str, value: Any) -> None:
    """FitCheckError for a setting that the framework has no way to follow."""
    if recipe in FRAMEWORKS and not habits(recipe, method):
        raise FitCheckError(f"{recipe} has no {method}", "leave --recipe out")
    only = habits(recipe, method).get("only", {}).get(name)
    if only is None or value in only or (name == "offload" and not value):
        return
    if name in ("critic", "reward_model") and not isinstance(value, str) and only != ["rule"]:
        return  # another model
    flag = "--" + name.replace("_", "-")
    said = "on" if value is True else "off" if value is False else value
    said = ",".join(value) if isinstance(value, tuple) else getattr(said, "id", said)
    ways = ", ".join(str(each) for each in only) or "nothing"
    raise FitCheckError(
        f"{flag} {said}: {recipe}'s {method} does not do that",
        f"it knows {ways}; --recipe plain knows more",
    )
