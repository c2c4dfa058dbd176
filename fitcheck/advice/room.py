"""room(plan): what may be turned up while the plan still fits, each to the most that does.

for fix in room(plan):
    print(fix.rank, fix.flags, -fix.saves)      # "faster", "--checkpointing off", bytes it takes
"""

from __future__ import annotations

from fitcheck.advice.ceiling import Ceiling
from fitcheck.advice.changes import Level, Offers, divisors, family_of, one
from fitcheck.advice.fix import Fix, judged
from fitcheck.errors import FitCheckError
from fitcheck.plan import Plan
from fitcheck.report import Report

GAINS = ("faster", "better", "more")
QUANTS = ("bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")


def room(plan: Plan, ceilings: dict[str, Ceiling]) -> list[Fix]:
    """What still fits and takes more memory; nothing when the plan itself does not fit.

    ceilings: of this plan. "faster" leaves the result unchanged, "better" does not save bits or
    parameters, "more" is longer text or more of it.
    """
    before = judged(plan)
    if before.verdict != "fits":
        return []
    found = []
    for gain, offered in zip(GAINS, (_faster(plan), _better(plan), _more(ceilings)), strict=True):
        for effect, levels in offered:
            for level in levels:
                fix = _changed(before, level, gain, effect)
                if fix and fix.verdict == "fits" and fix.saves < 0:
                    found.append(fix)
                    break
    return found


def _changed(before: Report, level: Level, gain: str, effect: str) -> Fix | None:
    try:
        return Fix.of(before, judged(before.plan.change(**level), False), level, gain, (effect,))
    except FitCheckError:
        return None  # the rules, or the formulas, refuse it


def _faster(plan: Plan) -> Offers:
    if plan.method == "inference":
        return
    if plan.checkpointing:
        yield "no layer is computed twice", one("checkpointing", False)
    if plan.offload:
        yield "nothing waits in RAM", one("offload", ())
    whole = plan.minibatch or plan.batch
    yield "the same batch in fewer passes", one("micro_batch", *_multiples(plan.micro_batch, whole))
    if plan.score_batch:
        most = plan.micro_batch if plan.method == "dpo" else plan.batch
        sizes = _multiples(plan.score_batch, most)
        yield "fewer scoring passes", one("score_batch", *sizes)


def _multiples(size: int, whole: int) -> list[int]:
    """The divisors of `whole` above `size`, the largest first."""
    return [n for n in (whole, *divisors(whole)) if n > size]


def _better(plan: Plan) -> Offers:
    yield "a larger model of the family", _larger_models(plan)
    if plan.method == "inference":
        order = QUANTS[: QUANTS.index(plan.quant)] if plan.quant in QUANTS else QUANTS[:1]
        yield "more bits a weight", one("quant", *order)
        yield "keys and values in 16 bits", one("kv_cache", "bf16")
        return
    if plan.tuning != "full":
        yield "all weights train", one("tuning", "full")
    if plan.tuning == "qlora":
        yield "a base in 16 bits", one("tuning", "lora")
    if plan.lora_rank:
        ranks = [rank for rank in (256, 128, 64, 32) if rank > plan.lora_rank]
        yield "adapters of a higher rank", one("lora_rank", *ranks)
    if plan.lora_targets == "attention":
        yield "adapters on all linear layers", one("lora_targets", "all-linear")
    if plan.adapter_precision == "bf16":
        yield "adapters and their states in fp32", one("adapter_precision", "fp32")
    if plan.precision in ("bf16", "bf16-master"):
        regime = "bf16-mixed" if plan.tuning == "full" else "bf16-autocast"
        yield "fp32 where it matters", one("precision", regime)
    if plan.optimizer in ("adamw-8bit", "paged-adamw-8bit", "adafactor"):
        yield "whole fp32 states", one("optimizer", "adamw-fused")
    if plan.reward_precision in ("int8", "nf4"):
        yield "a reward model in 16 bits", one("reward_precision", "bf16")
    if plan.critic in ("shared", "adapter"):
        yield "a critic of its own", one("critic", "reward")
    if plan.reference == "none":
        reference = "copy" if plan.tuning == "full" else "adapter"
        yield "a KL penalty towards the start", one("reference", reference)


def _larger_models(plan: Plan) -> list[Level]:
    return [{"model": m} for m in family_of(plan.model) if m.params > 1.1 * plan.model.params]


def _more(ceilings: dict[str, Ceiling]) -> Offers:
    for field, words in (
        *(("response", "longer responses"), ("prompt", "longer prompts")),
        *(("sequence", "longer examples"), ("context", "a longer context")),
        *(("concurrency", "more sequences at a time"), ("batch", "more samples in a step")),
    ):
        ceiling = ceilings.get(field)
        if ceiling and ceiling.value and ceiling.value > ceiling.now:
            yield words, [{field: ceiling.value}]
