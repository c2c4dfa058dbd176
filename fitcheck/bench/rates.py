"""How fast phases went: tokens/s, the share of the card's FLOP/s and of its memory bandwidth.

Model FLOPs as in PaLM (arXiv 2204.02311, appendix B): forward 2 for each parameter and token,
backward twice that. Recomputation under checkpointing does not count; a frozen base has no
gradients of its weights, so its backward counts once.
"""

from __future__ import annotations

from fitcheck import work
from fitcheck.model import Model
from fitcheck.plan import ROLLOUT, Plan
from fitcheck.rates import bandwidth as card_bandwidth
from fitcheck.rates import peak_flops


def rows(plan: Plan) -> int:
    """Sequences of one step; pairs are two."""
    return plan.batch * (2 if plan.method in ("dpo", "reward") else 1)


def tokens(plan: Plan, phase: str) -> int | None:
    """Tokens that a phase goes over in one step; None where they are not what it works on."""
    if phase == "prefill":  # one sequence, and one that all the others are copies of
        return (plan.context - 1) * min(plan.concurrency, 2)
    if phase == "decode":
        return plan.concurrency
    if phase == "rollout.prefill":
        return plan.batch * plan.prompt
    if phase == "rollout.decode":
        return plan.batch * (plan.response - 1)
    if phase.startswith("score."):
        return rows(plan) * plan.tokens
    if phase.startswith("update"):
        passes = plan.epochs if plan.method in ROLLOUT else 1
        mixed = plan.ptx_batch * plan.batch // plan.minibatch if plan.ptx_batch else 0
        return passes * (rows(plan) + (mixed if "critic" not in phase else 0)) * plan.tokens
    return None


def mfu(plan: Plan, update: str, seconds: float) -> float | None:
    """The share of the card's dense FLOP/s that an update ("update.policy", "update") reached."""
    rate, count = peak_flops(plan.gpu, plan.compute_dtype), tokens(plan, update)
    if not (rate and count and seconds > 0):
        return None
    model, tuning, headless = plan.model, plan.tuning, plan.method == "reward"
    if update == "update.critic":
        model, tuning, headless = plan.critic_architecture or model, plan.critic_tuning, True
    return count * update_flops(model, tuning, plan.tokens, headless) / seconds / rate


def update_flops(model: Model, tuning: str, length: int, headless: bool) -> float:
    """FLOPs of training on one token of a sequence of that length."""
    linear = 2.0 * work.block_params(model) + (0.0 if headless else work.head_flops(model, 1))
    return (3 if tuning == "full" else 2) * linear + 3 * work.attention_flops(model, length)


def bandwidth(plan: Plan, seconds: float) -> float | None:
    """The share of the card's memory bandwidth that decoding reached."""
    rate = card_bandwidth(plan.gpu)
    return decode_bytes(plan) / seconds / rate if rate and seconds > 0 else None


def decode_bytes(plan: Plan) -> float:
    """Bytes that decoding must read: weights in each step, and the cache so far."""
    model, width = plan.model, 4 if plan.compute_dtype == "fp32" else 2
    quant = "nf4" if plan.tuning == "qlora" else plan.quant
    stored = {"nf4": 0.5, "int8": 1.0}.get(quant or "", width)
    rows, first, steps = plan.batch, plan.prompt, (plan.response or 0) - 1
    if plan.method == "inference":
        rows, first, steps = plan.concurrency, plan.context - 1, 1
    weights = model.params * stored * work.share_read(model, rows)
    cache = 2 * model.num_layers * (model.num_key_value_heads or 0) * (model.head_dim or 0) * width
    return steps * weights + rows * cache * sum(range(first, first + steps))
