"""One real step of each method, in plain PyTorch: the same code on meta, cpu and cuda.

    roles = build(plan, torch.device("cpu"))
    run_step(plan, roles)                  # a rollout and its updates, or one optimizer step

No Python branch depends on a tensor's value, so a step also runs where tensors have none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from torch import Tensor

from fitcheck.bench.precision import autocast_off_on_meta
from fitcheck.bench.recorder import Recorder
from fitcheck.bench.roles import Roles
from fitcheck.bench.steps.dpo import dpo
from fitcheck.bench.steps.grpo import grpo
from fitcheck.bench.steps.inference import inference
from fitcheck.bench.steps.ppo import ppo
from fitcheck.bench.steps.reward import reward
from fitcheck.bench.steps.sft import sft
from fitcheck.bench.steps.trl import trl_dpo, trl_grpo, trl_reward, trl_sft
from fitcheck.bench.steps.trl_ppo import trl_ppo
from fitcheck.plan import Plan

Step = Callable[[Plan, Roles, Recorder], dict[str, Tensor]]

STEPS: dict[str, Step] = {
    **{"inference": inference, "sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo, "grpo": grpo}
}
TRL: dict[str, Step] = {
    **{"sft": trl_sft, "reward": trl_reward, "dpo": trl_dpo},
    **{"ppo": trl_ppo, "grpo": trl_grpo},
}


def run_step(plan: Plan, roles: Roles, recorder: Recorder | None = None) -> dict[str, Tensor]:
    """One step of the plan's method; returns its figures (losses, rewards) as scalar tensors."""
    step = (STEPS | TRL if plan.recipe == "trl" else STEPS)[plan.method]
    on_meta = roles.device.type == "meta"
    with autocast_off_on_meta() if on_meta else nullcontext():
        return step(plan, roles, recorder or Recorder())
