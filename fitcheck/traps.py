"""What a framework ignores though it takes the setting, and how many GiB that costs in a plan.

    traps(plan)[1]   # "trl's PPO ignores gradient_checkpointing=True, which costs 27.1 GiB: ..."

A cost is how much more the peak of allocated memory is than it would be if the setting were obeyed.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

from fitcheck.gpu import GIB
from fitcheck.phases import phases
from fitcheck.plan import Plan
from fitcheck.report import ALLOCATED


def traps(plan: Plan) -> list[str]:
    """What the user of a recipe should know; empty where it has no traps."""
    return list(_of_ppo(plan)) if plan.recipe == "trl" and plan.method == "ppo" else []


def _of_ppo(plan: Plan) -> Iterator[str]:
    """Of TRL's PPOTrainer (trl.experimental.ppo up to 1.12.0 under transformers 5)."""
    peak = _peak(plan)

    def costs(other: Plan) -> str:
        return f"{(peak - _peak(other)) / GIB:.1f} GiB"

    autocast = "bf16-mixed" if plan.precision == "fp32" else "bf16-autocast"
    text = f"trl's PPO ignores bf16=True, which costs {costs(_obeying(plan, precision=autocast))}"
    if plan.precision == "fp32":
        in_16_bits = costs(_obeying(plan, precision="bf16"))
        text += f"; weights loaded in bf16 instead of fp32 would save {in_16_bits}"
    yield text
    yield (
        "trl's PPO ignores gradient_checkpointing=True, which costs "
        f"{costs(_obeying(plan, checkpointing=True))}: call gradient_checkpointing_enable() "
        "on the policy and on the value model yourself"
    )
    if plan.tuning != "full":
        yield (
            "trl's PPO trains the whole critic though the policy has an adapter, which costs "
            f"{costs(_obeying(plan, critic_tuning='lora'))}"
        )


def _obeying(plan: Plan, **fields: Any) -> Plan:
    """The plan if the framework did obey: what it would resolve otherwise is set as it stands."""
    other = copy(plan)
    for name, value in fields.items():
        object.__setattr__(other, name, value)
    return other


def _peak(plan: Plan) -> int:
    return max(moment.part(ALLOCATED) for phase in phases(plan) for moment in phase.moments)
