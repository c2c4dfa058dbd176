"""What must hold of every plan: no traceback, no negative term, and which change may cost memory.

A few hundred plans are drawn once (always the same ones); each test holds one property against all.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from random import Random
from typing import Any

import pytest

from fitcheck import catalog, coefficients
from fitcheck.answer import plan_from
from fitcheck.decoder import covered
from fitcheck.errors import FitCheckError
from fitcheck.fit import fit
from fitcheck.flows import FLOWS
from fitcheck.model import Model
from fitcheck.plan import (
    KNOBS,
    KV_TYPES,
    METHODS,
    OFFLOADS,
    OPTIMIZERS,
    PRECISIONS,
    QUANTS,
    TRAINING,
    Plan,
)
from fitcheck.report import Report

PLANS = 300
GPUS = ("4090", "a100 80", "h100", "t4", "mi300x", "b200", "m3 max 64", "rtx 3060 12")
answer = cache(fit)


def models() -> list[Model]:
    """Of each architecture that is covered the smallest and the largest."""
    found = defaultdict(list)
    for model in catalog.models():
        if not covered(model):
            found[model.model_type].append(model)
    ends = [
        sorted(kin, key=lambda model: model.params)[:: max(1, len(kin) - 1)]
        for kin in found.values()
    ]
    return [model for kin in ends for model in kin]


class Draw:
    """Random plans, many of them contradictory."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.models = models()
        self.gpus = [catalog.find_gpu(name) for name in GPUS]
        self.scorers = ["policy", "rule", "adapter", catalog.find_model("qwen2.5-0.5b")]

    def fields(self) -> dict[str, Any]:
        r = self.random
        method = r.choice(METHODS)
        fields = {"method": method, "model": r.choice(self.models), "gpu": r.choice(self.gpus)}
        micro = r.choice((1, 1, 2, 3))
        mini = micro * r.choice((1, 2))
        batch = mini * r.choice((1, 2)) * (8 if method == "grpo" else 1)
        wishes: dict[str, tuple[float, list[Any]]] = {
            **{
                name: (0.5, list(KNOBS[name]["choices"]))
                for name in ("tuning", "attention", "loss")
            },
            "recipe": (0.2, ["hf-4.48"]),
            "lora_rank": (0.3, [1, 3, 64]),
            "lora_targets": (0.2, ["attention"]),
            "adapter_precision": (0.2, ["bf16"]),
            "precision": (0.4, list(PRECISIONS)),
            "optimizer": (0.5, list(OPTIMIZERS)),
            "checkpointing": (0.5, [True, False]),
            "padding": (0.4, ["padded", "none", "packed"]),
            "sequence": (0.6, [1, 2, 100, 1000, 2048]),
            "prompt": (0.5, [1, 100, 1000]),
            "response": (0.5, [1, 77, 1000]),
            "batch": (1.0, [batch]),
            "micro_batch": (0.8, [micro]),
            "minibatch": (0.6, [mini]),
            "score_batch": (0.3, [1, batch]),
            "epochs": (0.2, [1, 4]),
            "ptx_batch": (0.3, [1, 5]),
            "reward_model": (0.5, self.scorers),
            "reward_precision": (0.3, ["int8", "nf4"]),
            "critic": (0.4, ["shared", "adapter", self.scorers[-1]]),
            "critic_tuning": (0.3, ["full", "lora", "qlora"]),
            "reference": (0.4, list(KNOBS["reference"]["choices"])),
            "offload": (0.3, [(), *((part,) for part in OFFLOADS), OFFLOADS]),
            "empty_cache": (0.2, [True]),
            "rollout": (0.2, ["vllm", "sglang"]),
            "quant": (0.6, list(QUANTS)),
            "kv_cache": (0.4, list(KV_TYPES)),
            "context": (0.6, [1, 500, 2000]),
            "concurrency": (0.6, [1, 2, 33]),
        }
        for name, (share, values) in wishes.items():
            if method in KNOBS[name]["methods"] and r.random() < share:
                fields[name] = r.choice(values)
        return fields


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    """Plans with an answer; every other draw must end in a FitCheckError, with a hint."""
    draw, found, refused = Draw(seed=0), list[Plan](), 0
    while len(found) < PLANS:
        fields = draw.fields()
        try:
            plan = Plan(**fields)
            answer(plan)
        except FitCheckError as fault:
            assert fault.message and fault.hint, fields
            refused += 1
        except Exception as fault:
            raise AssertionError(f"a traceback for {fields}") from fault
        else:
            found.append(plan)
    assert refused < 3 * PLANS
    assert {plan.method for plan in found} == set(METHODS)
    return found


def described(plan: Plan) -> str:
    given = {name: getattr(plan, name) for name in sorted(plan.given)}
    return f"{plan.method} of {plan.model.id} on {plan.gpu.name}: {given}"


def changed(
    plans: list[Plan], change: Callable[[Plan], dict[str, Any] | None]
) -> Iterator[tuple[Plan, Plan]]:
    """(plan, the same changed) where the change makes sense; at least a tenth of the plans."""
    count = 0
    for plan in plans:
        wishes = change(plan)
        if wishes is None:
            continue
        try:
            other = plan.change(**wishes)
            answer(other)
        except FitCheckError:
            continue  # longer than the model reads, an engine that needs more, ...
        count += 1
        yield plan, other
    assert count >= 10


def assert_never_less(
    plans: list[Plan],
    change: Callable[[Plan], dict[str, Any] | None],
    measure: Callable[[Report], int] = lambda report: report.peak_bytes,
) -> None:
    """The change never lowers the measure."""
    for plan, other in changed(plans, change):
        less, more = measure(answer(plan)), measure(answer(other))
        assert less <= more, f"{described(plan)}\n{described(other)}\n{more - less:,} B"


def assert_never_more(
    plans: list[Plan],
    change: Callable[[Plan], dict[str, Any] | None],
    measure: Callable[[Report], int] = lambda report: report.peak_bytes,
) -> None:
    assert_never_less(plans, change, lambda report: -measure(report))


def of_policy(report: Report, *names: str) -> int:
    """Bytes of the policy's terms of these names while its optimizer steps."""
    phase = next(p for p in report.phases if p.name in ("update.step", "update.policy.step"))
    return sum(t.bytes for t in phase.terms if t.role == "policy" and t.name in names)


STATES = ("adapters", "gradients", "optimizer states", "paged states")


# --- one answer ---


def test_no_term_is_negative(plans: list[Plan]) -> None:
    for plan in plans:
        report = answer(plan)
        moments = [moment for phase in report.phases for moment in phase.moments]
        for term in (*(term for moment in moments for term in moment.terms), *report.ram.terms):
            assert type(term.bytes) is int, (described(plan), term.name)
            assert term.bytes >= 0, (described(plan), term.name, term.bytes)


def test_every_term_says_why(plans: list[Plan]) -> None:
    for plan in plans:
        for phase in answer(plan).phases:
            assert all(term.why for term in phase.terms), described(plan)


def test_seconds_are_numbers_and_none_is_negative(plans: list[Plan]) -> None:
    for plan in plans:
        report = answer(plan)
        assert report.speed is not None, described(plan)
        assert 0 < report.speed.step_seconds < 1e9, described(plan)
        assert 0 < report.speed.tokens_per_second < 1e9, described(plan)
        for phase in report.phases:
            timed = phase.name != "load"
            assert phase.seconds is None or phase.seconds >= 0, described(plan)
            assert (phase.seconds is not None) == timed


def test_more_work_is_never_faster(plans: list[Plan]) -> None:
    def doubled(plan: Plan) -> dict[str, Any] | None:
        name = next(n for n in ("sequence", "response", "context") if getattr(plan, n))
        return {name: 2 * getattr(plan, name)}

    for change in (doubled, lambda p: {"epochs": 2 * p.epochs} if p.epochs else None):
        for plan, other in changed(plans, change):
            assert step(other) >= step(plan), described(plan)
    for plan, other in changed(
        plans, lambda p: {"checkpointing": False} if p.checkpointing else None
    ):
        assert step(other) <= step(plan), described(plan)


def step(plan: Plan) -> float:
    speed = answer(plan).speed
    assert speed is not None
    return speed.step_seconds


def test_json_round_trip(plans: list[Plan]) -> None:
    for plan in plans:
        values = json.loads(json.dumps(answer(plan).to_json()["plan"]))
        back = plan_from(values)
        assert back == plan, described(plan)
        assert answer(back).peak_bytes == answer(plan).peak_bytes, described(plan)


def test_phases_are_those_of_the_method(plans: list[Plan]) -> None:
    names = {method.id: {stage.name for stage in method.stages} for method in catalog.methods()}
    for plan in plans:
        phases = [phase.name for phase in answer(plan).phases]
        assert len(phases) == len(set(phases))
        assert phases[0] == "load"
        assert set(phases) - {"rollout"} <= names[plan.method], described(plan)


def test_the_sums_of_a_report(plans: list[Plan]) -> None:
    for plan in plans:
        report = answer(plan)
        assert 0 < report.allocated_bytes <= report.reserved_bytes <= report.peak_bytes
        assert report.allocated_bytes <= report.needed_bytes <= report.peak_bytes
        assert report.usable_bytes - report.spare_bytes == report.peak_bytes


# --- more work needs no less memory ---


def test_batch(plans: list[Plan]) -> None:
    assert_never_less(plans, lambda p: {"batch": 2 * p.batch} if p.batch else None)
    assert_never_less(
        plans, lambda p: {"concurrency": 2 * p.concurrency} if p.concurrency else None
    )


def test_micro_batch(plans: list[Plan]) -> None:
    def double(plan: Plan) -> dict[str, Any] | None:
        if not plan.batch:
            return None
        sizes = ("batch", "minibatch", "micro_batch")
        return {name: 2 * size for name in sizes if (size := getattr(plan, name))}

    assert_never_less(plans, double)


@pytest.mark.parametrize("name", ["sequence", "prompt", "response", "context"])
def test_tokens(plans: list[Plan], name: str) -> None:
    assert_never_less(plans, lambda p: {name: 2 * getattr(p, name)} if getattr(p, name) else None)


def test_lora_rank(plans: list[Plan]) -> None:
    assert_never_less(plans, lambda p: {"lora_rank": 2 * p.lora_rank} if p.lora_rank else None)


# --- what saves memory does ---


def test_qlora_weights(plans: list[Plan]) -> None:
    def quantized(plan: Plan) -> dict[str, Any] | None:
        flow = FLOWS.get(plan.model.model_type)
        left = flow is not None and flow.own_linear  # which transformers does not quantize
        return {"tuning": "qlora"} if plan.tuning == "lora" and not left else None

    for plan, other in changed(plans, quantized):
        assert of_policy(answer(other), "weights") < of_policy(answer(plan), "weights"), described(
            plan
        )


def test_lora_trains_less(plans: list[Plan]) -> None:
    def full(plan: Plan) -> dict[str, Any] | None:
        return {"tuning": "full"} if plan.tuning in ("lora", "qlora") else None

    for plan, other in changed(plans, full):
        lora, whole = of_policy(answer(plan), *STATES), of_policy(answer(other), *STATES)
        assert lora < whole, described(plan)


def test_checkpointing(plans: list[Plan]) -> None:
    """Of some length: running a layer again costs more than what two tokens would have saved."""

    def off(plan: Plan) -> dict[str, Any] | None:
        layers = plan.model.num_layers > 1 and plan.tokens >= 100
        return {"checkpointing": False} if plan.checkpointing and layers else None

    assert_never_less(plans, off)


def test_reference_by_adapter(plans: list[Plan]) -> None:
    assert_never_less(plans, lambda p: {"reference": "copy"} if p.reference == "adapter" else None)


def test_no_reference(plans: list[Plan]) -> None:
    held = ("copy", "adapter")
    assert_never_more(plans, lambda p: {"reference": "none"} if p.reference in held else None)


def test_fused_optimizer(plans: list[Plan]) -> None:
    assert_never_more(
        plans, lambda p: {"optimizer": "adamw-fused"} if p.optimizer == "adamw" else None
    )


def test_eight_bit_optimizer(plans: list[Plan]) -> None:
    """Of fp32 weights; states of small 16-bit ones are larger: bitsandbytes keeps these in fp32."""

    def eight(plan: Plan) -> dict[str, Any] | None:
        narrow = "bf16" in (plan.adapter_precision, plan.precision) or plan.precision == "fp16"
        return {"optimizer": "adamw-8bit"} if plan.optimizer == "adamw" and not narrow else None

    assert_never_more(plans, eight)
    for plan, other in changed(plans, eight):
        if plan.tuning == "full" and "optimizer" not in plan.offload:
            less, more = (of_policy(answer(p), "optimizer states") for p in (other, plan))
            assert less < more, described(plan)


@pytest.mark.parametrize("loss", ["chunked", "fused"])
def test_loss_in_pieces(plans: list[Plan], loss: str) -> None:
    """Never above the full one where logits outweigh the table, whose gradient is summed apart."""

    def pieces(plan: Plan) -> dict[str, Any] | None:
        if plan.loss != "full":
            return None
        tokens = plan.micro_batch * (plan.response or plan.sequence)
        least = 500 if plan.tuning != "full" else 2 * plan.model.hidden_size
        return {"loss": loss} if tokens >= least else None

    assert_never_more(plans, pieces)


@pytest.mark.parametrize("part", OFFLOADS)
def test_offload(plans: list[Plan], part: str) -> None:
    def away(plan: Plan) -> dict[str, Any] | None:
        if plan.method not in TRAINING or part in plan.offload:
            return None
        return {"offload": (*plan.offload, part)}

    assert_never_more(plans, away)
    assert_never_less(plans, away, lambda report: report.ram.peak_bytes)


def test_empty_cache(plans: list[Plan]) -> None:
    assert_never_more(plans, lambda p: {"empty_cache": True} if p.empty_cache is False else None)


def test_rule_instead_of_a_reward_model(plans: list[Plan]) -> None:
    """With the same critic: without a reward model it has the policy's architecture."""

    def rule(plan: Plan) -> dict[str, Any] | None:
        same = (
            plan.reward_model == "policy"
            or isinstance(plan.critic, Model)
            or plan.critic == "shared"
        )
        judged = plan.reward_model not in (None, "rule")
        return {"reward_model": "rule"} if judged and (same or plan.method == "grpo") else None

    assert_never_more(plans, rule)


def test_inference_needs_less_than_training() -> None:
    for model in models():
        for precision in ("bf16", "fp32"):
            if precision == "fp32" and coefficients.is_traced(model):
                continue  # few of them were traced in that regime
            common = {"model": model, "gpu": catalog.find_gpu("h100"), "precision": precision}
            tokens = min(1024, model.max_position_embeddings or 1024)
            runs = Plan(method="inference", quant=precision, context=tokens, **common)
            trains = Plan(method="sft", sequence=tokens, **common)
            assert answer(runs).peak_bytes <= answer(trains).peak_bytes, (model.id, precision)
