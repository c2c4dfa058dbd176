"""The real steps: each runs in every regime, and computes what it should."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from fitcheck.bench.recorder import Recorder  # noqa: E402
from fitcheck.bench.roles import Roles  # noqa: E402
from fitcheck.bench.steps import fused, losses, run_step  # noqa: E402
from fitcheck.bench.steps.batches import Batch, inputs, random_batch  # noqa: E402
from fitcheck.bench.steps.fused import FusedLogprobs  # noqa: E402
from fitcheck.bench.steps.generate import generate  # noqa: E402
from fitcheck.bench.steps.logprobs import token_logprobs  # noqa: E402
from fitcheck.plan import PRECISIONS, TRAINING, Plan  # noqa: E402
from tests.tiny import CPU, META, MasksArePadded, built, tiny_model, tiny_plan  # noqa: E402

pytestmark = pytest.mark.oracle

TUNINGS = ("full", "lora", "qlora")
REGIMES = [
    regime
    for regime in product(TRAINING, TUNINGS, PRECISIONS)
    if regime[1] == "full" or regime[2] != "bf16-master"
]
SMALL = {"batch": 2, "micro_batch": 1}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def figures_of(plan: Plan, device: torch.device = CPU) -> dict[str, Tensor]:
    with MasksArePadded() if device is META else nullcontext():
        return run_step(plan, built(plan, device))


# Every regime runs


@pytest.mark.parametrize(("method", "tuning", "precision"), REGIMES)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_every_regime_on_a_cpu(
    method: str, tuning: str, precision: str, checkpointing: bool
) -> None:
    knobs = {"tuning": tuning, "precision": precision, "checkpointing": checkpointing}
    figures = figures_of(tiny_plan(method, **SMALL, **knobs))
    assert all(math.isfinite(value) for value in figures.values())
    norms = [value for name, value in figures.items() if name.endswith("gradient_norm")]
    assert norms and all(norm > 0 for norm in norms)


# Tracing is slow, and what a method does depends little on the types: not all of the product.
ON_META = [
    *(("sft", tuning, precision) for method, tuning, precision in REGIMES if method == "sft"),
    *((method, tuning, "bf16-mixed") for method in TRAINING[:-1] for tuning in TUNINGS),
]


@pytest.mark.parametrize(("method", "tuning", "precision"), ON_META)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_every_regime_on_meta(
    method: str, tuning: str, precision: str, checkpointing: bool
) -> None:
    knobs = {"tuning": tuning, "precision": precision, "checkpointing": checkpointing}
    figures = figures_of(tiny_plan(method, **SMALL, **knobs), META)
    assert all(value.is_meta and value.shape == () for value in figures.values())


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("ppo", {"critic": "shared"}),
    ("ppo", {"critic": "shared", "loss": "fused", "tuning": "lora"}),
    ("ppo", {"critic": "shared", "loss": "chunked"}),
    ("ppo", {"tuning": "lora", "critic": "adapter", "reward_model": "adapter"}),
    ("ppo", {"tuning": "qlora", "critic": "adapter"}),
    ("ppo", {"tuning": "lora", "critic_tuning": "full", "reference": "copy"}),
    ("ppo", {"critic_tuning": "lora"}),
    ("ppo", {"reward_model": "rule", "reference": "none"}),
    ("ppo", {"reward_precision": "int8"}),
    ("ppo", {"reward_precision": "nf4"}),
    ("ppo", {"ptx_batch": 3}),
    ("ppo", {"offload": ("reference", "reward", "critic", "optimizer")}),
    ("ppo", {"rollout": "vllm"}),
    ("ppo", {"empty_cache": True, "score_batch": 2}),
    ("ppo", {"padding": "none", "loss": "chunked"}),
    ("ppo", {"padding": "packed", "attention": "flash"}),
    ("grpo", {"reward_model": "rule", "loss": "fused"}),
    ("dpo", {"reference": "precomputed"}),
    ("dpo", {"loss": "chunked", "tuning": "qlora", "reference": "copy"}),
    ("dpo", {"padding": "packed", "attention": "flash"}),
    ("sft", {"padding": "packed", "attention": "flash"}),
    ("sft", {"attention": "eager", "recipe": "hf-4.48"}),
    ("sft", {"lora_targets": "attention", "adapter_precision": "bf16", "tuning": "lora"}),
    ("sft", {"lora_targets": ("q_proj",), "tuning": "lora"}),
    ("reward", {"padding": "none"}),
    *(("sft", {"optimizer": o}) for o in ("adamw-fused", "adamw-8bit", "paged-adamw-8bit")),
    *(("sft", {"optimizer": o}) for o in ("adafactor", "lion", "sgd", "muon")),
]


@pytest.mark.parametrize(("method", "knobs"), VARIANTS)
@pytest.mark.parametrize("device", [CPU, META], ids=str)
def test_every_variant(method: str, knobs: dict[str, Any], device: torch.device) -> None:
    figures = figures_of(tiny_plan(method, **{**SMALL, **knobs}), device)
    if device is CPU:
        assert all(math.isfinite(value) for value in figures.values())


ARCHITECTURES = (
    *("openai-community/gpt2", "Qwen/Qwen3-0.6B", "google/gemma-2-2b", "bigscience/bloom-560m"),
    *("facebook/opt-125m", "tiiuae/falcon-7b", "Qwen/Qwen1.5-MoE-A2.7B", "openai/gpt-oss-20b"),
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str) -> None:
    model = tiny_model(name)
    for tuning in ("full", "lora"):
        plan = tiny_plan("ppo", model, **SMALL, tuning=tuning, precision="bf16")
        assert all(math.isfinite(value) for value in figures_of(plan).values())
        plan = tiny_plan("sft", model, **SMALL, tuning=tuning, precision="bf16")
        figures_of(plan, META)


class Phases(Recorder):
    def __init__(self) -> None:
        self.names: list[str] = []

    def phase(self, name: str) -> Any:
        if name not in self.names:
            self.names.append(name)
        return nullcontext()


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("sft", "update.forward update.loss update.backward update.step"),
        ("reward", "update.forward update.loss update.backward update.step"),
        ("dpo", "update.forward update.loss score.reference update.backward update.step"),
        (
            "ppo",
            "rollout.prefill rollout.decode score.policy score.reference score.reward score.critic"
            " advantages update.policy.forward update.policy.loss update.policy.backward"
            " update.policy.step update.critic.forward update.critic.backward update.critic.step",
        ),
        (
            "grpo",
            "rollout.prefill rollout.decode score.policy score.reference score.reward advantages"
            " update.policy.forward update.policy.loss update.policy.backward update.policy.step",
        ),
    ],
)
def test_phases_in_their_order(method: str, names: str) -> None:
    plan, recorder = tiny_plan(method), Phases()
    run_step(plan, built(plan), recorder)
    assert recorder.names == names.split()


# The rollout


@pytest.mark.parametrize("padding", ["padded", "none"])
@pytest.mark.parametrize(
    "name",
    ["meta-llama/Llama-3.2-1B", "openai-community/gpt2", "facebook/opt-125m"]
    + ["bigscience/bloom-560m", "google/gemma-3-1b-it"],
)
def test_generate_with_a_cache_as_without(name: str, padding: str) -> None:
    model = tiny_model(name, sliding_window=4 if "gemma" in name else None)
    plan = tiny_plan("ppo", model, precision="fp32", padding=padding, response=8)
    roles = built(plan)
    prompts = random_batch(plan, 3, plan.prompt, CPU)
    torch.manual_seed(1)
    ids = generate(roles, prompts, plan.response, Recorder())
    torch.manual_seed(1)
    batch = prompts
    for t in range(plan.response):
        with torch.no_grad():
            logits = roles.policy(**inputs(roles.policy, batch)).logits[:, -1]
        token = torch.multinomial(torch.softmax(logits, -1), 1)
        assert torch.equal(token[:, 0], ids[:, t]), f"token {t}"
        batch = batch.extended(token)


def test_padding_changes_no_logprob() -> None:
    plan = tiny_plan("sft", precision="fp32")
    policy = built(plan).policy.eval()
    ids = torch.randint(48, (1, 7))
    padded = torch.cat([torch.randint(48, (1, 3)), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    alone = token_logprobs(policy, Batch(ids), 1, "full")
    beside = token_logprobs(policy, Batch(padded, mask), 4, "full")
    torch.testing.assert_close(alone, beside)


def test_packed_rows_do_not_see_each_other() -> None:
    plan = tiny_plan("sft", precision="fp32")
    policy = built(plan).policy.eval()
    ids = torch.randint(48, (3, 7))
    packed = token_logprobs(policy, Batch(ids, packed=True), 1, "full")
    torch.testing.assert_close(packed, token_logprobs(policy, Batch(ids), 1, "full"))


# Log-probabilities, in three ways


def gradients(roles: Roles, batch: Batch, loss: str, first: int) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities, and the gradients of a weighted sum of them."""
    logprobs = token_logprobs(roles.policy.train(), batch, first, loss)
    weights = torch.linspace(-1, 1, logprobs.numel()).view(logprobs.shape)
    parameters = roles.policy_training.parameters
    (logprobs * weights).sum().backward()
    found = [p.grad.clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return logprobs.detach(), found


@pytest.mark.parametrize("loss", ["chunked", "fused"])
@pytest.mark.parametrize(
    ("name", "tuning"),
    [
        ("meta-llama/Llama-3.2-1B", "full"),
        ("meta-llama/Llama-3.2-1B", "lora"),
        ("google/gemma-2-2b", "full"),  # caps its logits
        ("CohereLabs/aya-23-8B", "full"),  # scales them
        ("ibm-granite/granite-3.1-2b-instruct", "full"),  # divides them
        ("EleutherAI/gpt-j-6b", "full"),  # has a bias
    ],
)
def test_logprobs_without_whole_logits(
    loss: str, name: str, tuning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to those from whole logits, in value and in gradient, over several tiles."""
    for constant, value in {"TILE_TOKENS": 8, "TILE_WORDS": 20, "BLOCK_ROWS": 3}.items():
        monkeypatch.setattr(fused, constant, value)
    monkeypatch.setattr("fitcheck.bench.steps.logprobs.CHUNK", 5)
    sizes = {"hidden_size": 256, "head_dim": 64} if "gpt-j" in name else {}
    plan = tiny_plan("sft", tiny_model(name, **sizes), precision="fp32", tuning=tuning)
    roles = built(plan)
    for parameter in roles.policy_training.parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    if hasattr(roles.policy.lm_head, "bias") and roles.policy.lm_head.bias is not None:
        torch.nn.init.normal_(roles.policy.lm_head.bias)
    batch = random_batch(plan, 3, 9, CPU)
    expected, slopes = gradients(roles, batch, "full", first=2)
    found, found_slopes = gradients(roles, batch, loss, first=2)
    torch.testing.assert_close(found, expected)
    for slope, other in zip(slopes, found_slopes, strict=True):
        torch.testing.assert_close(other, slope, atol=1e-4, rtol=1e-4)


def test_fused_logprobs_as_in_trl() -> None:
    pytest.importorskip("trl.trainer.utils")
    trl = pytest.importorskip("trl.kernels.chunked_logprob")
    torch.manual_seed(0)
    weight, ids = torch.randn(50, 8, requires_grad=True), torch.randint(50, (20,))
    hidden, slope = torch.randn(20, 8, requires_grad=True), torch.randn(20)
    ours = FusedLogprobs.apply(hidden, weight, None, ids, 0.5, 3.0, torch.float32)
    expected = trl.ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, 16, 3.0, 0.5, ())
    torch.testing.assert_close(ours, expected[0])
    for mine, theirs in zip(
        torch.autograd.grad(ours, (hidden, weight), slope),
        torch.autograd.grad(expected[0], (hidden, weight), slope),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_checkpointing_changes_no_gradient(tuning: str) -> None:
    found = []
    for checkpointing in (True, False):
        plan = tiny_plan("sft", tuning=tuning, precision="fp32", checkpointing=checkpointing)
        roles = built(plan)
        found.append(gradients(roles, random_batch(plan, 2, 8, CPU), "full", 1))
    (value, slopes), (other_value, other_slopes) = found
    torch.testing.assert_close(value, other_value)
    for slope, other in zip(slopes, other_slopes, strict=True):
        torch.testing.assert_close(slope, other)


# The arithmetic of the methods


@pytest.mark.parametrize("reference", ["copy", "adapter"])
def test_ppo_begins_at_the_reference(reference: str) -> None:
    """Before the first update the ratio is 1, and there is no KL to the reference."""
    tuning = "lora" if reference == "adapter" else "full"
    figures = figures_of(tiny_plan("ppo", reference=reference, tuning=tuning, precision="fp32"))
    assert float(figures["ratio"]) == pytest.approx(1, abs=1e-5)
    assert float(figures["kl"]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_the_reference_has_no_adapter(tuning: str) -> None:
    """As long as the adapter adds nothing, policy and reference agree; then they do not."""
    for method, name, agreed in (("dpo", "loss", math.log(2)), ("ppo", "kl", 0.0)):
        roles = built(tiny_plan(method, tuning=tuning, precision="fp32"))
        assert float(run_step(roles.plan, roles)[name]) == pytest.approx(agreed, abs=1e-5)
        for parameter in roles.policy_training.parameters:
            torch.nn.init.normal_(parameter, std=0.2)
        assert abs(float(run_step(roles.plan, roles)[name]) - agreed) > 1e-2


def test_ppo_departs_from_the_reference() -> None:
    plan = tiny_plan("ppo", precision="fp32", epochs=3)
    roles = built(plan)
    roles.policy_training.optimizer.param_groups[0]["lr"] = 1e-2
    figures = run_step(plan, roles)
    assert abs(float(figures["ratio"]) - 1) > 1e-3
    assert abs(float(run_step(plan, roles)["kl"])) > 1e-3


def test_generalized_advantages_by_hand() -> None:
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, -1.0]])
    advantages, returns = losses.advantages_and_returns(rewards, values, gamma=0.5, lam=0.8)
    last = 2 - -1.0
    middle = (0 + 0.5 * -1 - 1) + 0.5 * 0.8 * last
    first = (1 + 0.5 * 1 - 0.5) + 0.5 * 0.8 * middle
    assert advantages.tolist()[0] == pytest.approx([first, middle, last])
    assert returns.tolist()[0] == pytest.approx([first + 0.5, middle + 1, last - 1])


def test_policy_loss_by_hand() -> None:
    """A gain is capped at a ratio of 1.2; a loss is not."""
    ratios, advantages = torch.tensor([[1.5, 1.5, 0.5, 0.9]]), torch.tensor([[1.0, -1.0, 1.0, 2.0]])
    found = losses.policy_loss(ratios.log(), torch.zeros(1, 4), advantages)
    assert float(found) == pytest.approx((-1.2 + 1.5 - 0.5 - 1.8) / 4)


def test_value_loss_by_hand() -> None:
    values, old, returns = torch.tensor([[1.0, 0.1]]), torch.zeros(1, 2), torch.tensor([[1.0, 1.0]])
    # The first moves too far and is judged where it may move to, 0.2; the second may.
    assert float(losses.value_loss(values, old, returns)) == pytest.approx(
        0.5 * (0.8**2 + 0.9**2) / 2
    )


def test_kl_estimates_by_hand() -> None:
    logprobs, reference = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    assert float(losses.kl_estimate(logprobs, reference, "k1")) == pytest.approx(math.log(2))
    assert float(losses.kl_estimate(logprobs, reference, "k3")) == pytest.approx(
        0.5 - 1 + math.log(2)
    )


def test_k3_is_an_unbiased_kl() -> None:
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    for kind in ("k1", "k3"):
        mean = (policy * losses.kl_estimate(policy.log(), reference.log(), kind)).sum()
        assert float(mean) == pytest.approx(float((policy * (policy / reference).log()).sum()))


def test_preference_losses_by_hand() -> None:
    policy, reference = torch.tensor([-1.0, -2.0, -5.0, -3.0]), torch.tensor([-2.0, -2.0, -4.0, -6])
    margins = [0.1 * (1 - 0), 0.1 * (-1 - 3)]  # chosen less rejected, each against the reference
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / 2
    assert float(losses.preference_loss(policy, reference)) == pytest.approx(expected)
    scores = torch.tensor([1.0, -1.0, 0.0, 2.0])
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2
    assert float(losses.ranking_loss(scores)) == pytest.approx(expected)


def test_group_advantages_by_hand() -> None:
    found = losses.group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), group=2)
    one = 1 / (math.sqrt(2) + 1e-4)
    assert found.tolist() == pytest.approx([-one, one, 0, 0])


def test_whitening() -> None:
    x = torch.tensor([1.0, 2.0, 6.0])
    assert float(losses.whitened(x).mean()) == pytest.approx(0, abs=1e-6)
    assert float(losses.whitened(x, keep_mean=True).mean()) == pytest.approx(3)
    assert float(losses.whitened(x).var(unbiased=False)) == pytest.approx(1)


@pytest.mark.parametrize("recipe", ["plain", "hf-4.48"])
def test_next_token_loss_as_in_transformers(recipe: str) -> None:
    plan = tiny_plan("sft", precision="fp32")
    policy, ids = built(plan).policy, torch.randint(48, (2, 9))
    output = policy(input_ids=ids, labels=ids)
    torch.testing.assert_close(losses.causal_lm_loss(output.logits, ids, recipe), output.loss)


def test_rule_reward_counts_tokens() -> None:
    from fitcheck.bench.steps.scoring import rule_reward

    plan = tiny_plan("ppo", reward_model="rule", prompt=1, response=4)
    ids = torch.tensor([[0, 0, 1, 40, 47], [0, 47, 24, 30, 23]])
    assert rule_reward(plan, Batch(ids)).tolist() == [0.5, 0.25]


def test_pretraining_gradients_are_added() -> None:
    """PPO-ptx changes the update; the rest of the step is the same."""
    plain = figures_of(tiny_plan("ppo", precision="fp32"))
    mixed = figures_of(tiny_plan("ppo", precision="fp32", ptx_batch=2))
    assert float(plain["policy_loss"]) == pytest.approx(float(mixed["policy_loss"]), abs=1e-6)
    assert float(mixed["policy_gradient_norm"]) > 5 * float(plain["policy_gradient_norm"])


def stepped(plan: Plan, lr: float) -> tuple[Roles, dict[str, Tensor]]:
    """The roles after a step at that learning rate, and its figures."""
    roles = built(plan)
    for training in (roles.policy_training, roles.critic_training):
        for group in training.optimizer.param_groups if training else ():
            group["lr"] = lr
    return roles, run_step(plan, roles)


@pytest.mark.parametrize("method", TRAINING)
def test_micro_batches_add_up(method: str) -> None:
    """An update over a batch is the same in one piece and in four."""
    found = []
    for micro in (1, 4):
        plan = tiny_plan(method, precision="fp32", micro_batch=micro, optimizer="sgd")
        roles, figures = stepped(plan, lr=1.0)
        found.append([v for name, v in figures.items() if name.endswith("gradient_norm")])
        found[-1] += roles.policy_training.parameters
        if roles.critic_training:
            found[-1] += roles.critic_training.parameters
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_offloading_changes_nothing() -> None:
    """Not the figures of a second epoch, which follow from the first one's updates."""
    everything = ("reference", "reward", "critic", "optimizer")
    _, stays = stepped(tiny_plan("ppo", precision="fp32", epochs=2), lr=1e-3)
    moving = tiny_plan("ppo", precision="fp32", epochs=2, offload=everything)
    roles, moves = stepped(moving, lr=1e-3)
    assert abs(float(stays["ratio"]) - 1) > 1e-4
    for name, value in stays.items():
        assert float(moves[name]) == pytest.approx(float(value), rel=1e-4), name


def test_cross_entropy_is_what_it_was_called() -> None:
    """token_logprobs is the log-softmax at the token, shifted by one."""
    plan = tiny_plan("sft", precision="fp32", padding="none")
    policy, ids = built(plan).policy.eval(), torch.randint(48, (2, 6))
    with torch.no_grad():
        expected = F.log_softmax(policy(ids).logits, -1)
        found = token_logprobs(policy, Batch(ids), 3, "full")
    for row, t in product(range(2), range(3, 6)):
        assert float(found[row, t - 3]) == pytest.approx(
            float(expected[row, t - 1, ids[row, t]]), abs=1e-5
        )
