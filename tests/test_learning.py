"""The steps learn: tiny models trained for some seconds on a CPU do better than before."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from fitcheck.bench.roles import Roles  # noqa: E402
from fitcheck.bench.steps import run_step  # noqa: E402
from fitcheck.plan import Plan  # noqa: E402
from tests.tiny import built, tiny_plan  # noqa: E402

pytestmark = pytest.mark.oracle


def learner(plan: Plan, lr: float) -> Roles:
    """The plan's roles with every optimizer at that learning rate."""
    torch.set_num_threads(1)
    roles = built(plan)
    if plan.tuning != "full" and plan.method != "reward":
        with torch.no_grad():  # random heads are so small that no hidden state moves the logits
            roles.policy.get_output_embeddings().weight.mul_(4)
    for training in (roles.policy_training, roles.critic_training):
        for group in training.optimizer.param_groups if training else ():
            group["lr"] = lr
    return roles


def rewards(plan: Plan, steps: int, lr: float) -> list[float]:
    """The mean reward of each step's rollout: the share of tokens that the rule likes."""
    roles = learner(plan, lr)
    return [float(run_step(plan, roles)["reward"]) for _ in range(steps)]


@pytest.mark.parametrize(
    ("method", "knobs", "steps", "lr"),
    [
        ("ppo", {}, 20, 3e-3),
        ("ppo", {"critic": "shared", "loss": "fused", "precision": "bf16-mixed"}, 20, 3e-3),
        ("ppo", {"tuning": "lora", "critic": "adapter"}, 20, 1e-2),
        ("grpo", {"epochs": 2, "loss": "chunked"}, 20, 3e-3),
        ("grpo", {"tuning": "qlora", "optimizer": "adamw-8bit"}, 24, 1e-2),
    ],
)
def test_reward_rises(method: str, knobs: dict[str, Any], steps: int, lr: float) -> None:
    """From the half of all tokens that a random policy gives, to most of them."""
    sizes = {"prompt": 4, "response": 8, "batch": 32, "micro_batch": 32, "epochs": 4}
    sizes |= {"group": 8} if method == "grpo" else {}
    plain = {"reward_model": "rule", "checkpointing": False, "precision": "fp32"}
    plan = tiny_plan(method, **{**sizes, **plain, **knobs})
    found = rewards(plan, steps, lr)
    assert 0.35 < found[0] < 0.65
    assert sum(found[-5:]) / 5 > 0.75


@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("sft", {}),
        ("sft", {"tuning": "qlora", "loss": "chunked"}),
        ("sft", {"precision": "bf16-master", "loss": "fused"}),
        ("dpo", {}),
        ("dpo", {"tuning": "lora"}),
        ("reward", {}),
        ("reward", {"tuning": "lora"}),
    ],
)
def test_a_batch_is_learned(method: str, knobs: dict[str, Any]) -> None:
    """The same random examples, again and again, are told apart in the end."""
    roles = learner(tiny_plan(method, **knobs), lr=1e-2)
    losses = []
    for _ in range(40):
        torch.manual_seed(7)  # of the batch
        losses.append(float(run_step(roles.plan, roles)["loss"]))
    assert losses[-1] < losses[0] / 3
