"""fit(): what is on the card when, by method, and how the verdict follows."""

from __future__ import annotations

import builtins
import json
from math import prod
from typing import Any

import pytest

from fitcheck import catalog, memory
from fitcheck.answer import check, resolve
from fitcheck.decoder import covered
from fitcheck.errors import FitCheckError
from fitcheck.fit import fit
from fitcheck.plan import METHODS, Plan
from fitcheck.report import ALLOCATED, CACHED, OUTSIDE, Error, Phase, Report, Term

PARAMS = 8_030_261_248
BACKBONE = PARAMS - 128_256 * 4096 + 4096  # with a score head
GIB = 2**30


def answer(model: str = "llama-3.1-8b", **wishes: Any) -> Report:
    return fit(resolve(model, **{"gpu": "a100 80", **wishes}))


def phase(report: Report, name: str) -> Phase:
    return next(phase for phase in report.phases if phase.name == name)


def held(report: Report, name: str, term: str, role: str = "") -> int:
    terms = phase(report, name).terms
    return sum(t.bytes for t in terms if t.name == term and role in ("", t.role))


# --- what is there when ---

UPDATE = ["forward", "loss", "backward", "step"]
SCORES = ["score.policy", "score.reference", "score.reward", "score.critic"]
ROLLOUT = ["rollout.prefill", "rollout.decode"]
PHASES = {
    "inference": ["load", "prefill", "decode"],
    "sft": ["load", *(f"update.{part}" for part in UPDATE)],
    "reward": ["load", *(f"update.{part}" for part in UPDATE)],
    "dpo": [
        *("load", "update.forward", "score.reference"),
        *("update.loss", "update.backward", "update.step"),
    ],
    "grpo": [
        *("load", *ROLLOUT, *SCORES[:3], "advantages"),
        *(f"update.policy.{part}" for part in UPDATE),
    ],
    "ppo": [
        *("load", *ROLLOUT, *SCORES, "advantages"),
        *(f"update.policy.{part}" for part in UPDATE),
        *("update.critic.forward", "update.critic.backward", "update.critic.step"),
    ],
}


@pytest.mark.parametrize("method", METHODS)
def test_phases_in_order(method: str) -> None:
    assert [phase.name for phase in answer(method=method).phases] == PHASES[method]


def test_mixed_precision_takes_16_bytes_a_parameter_and_foreach_4_more() -> None:
    report = answer(method="sft")
    parts = ("weights", "gradients", "optimizer states", "optimizer temporary")
    found = [held(report, "update.step", name) for name in parts]
    assert found == [4 * PARAMS, 4 * PARAMS, 8 * PARAMS, 4 * PARAMS]


def test_four_models_of_ppo() -> None:
    report = answer(method="ppo")
    roles = {role: held(report, "advantages", "weights", role) for role in
             ("policy", "reference", "reward", "critic")}  # fmt: skip
    assert roles == {
        "policy": 4 * PARAMS,
        "reference": 2 * PARAMS,
        "reward": 2 * BACKBONE,
        "critic": 4 * BACKBONE,
    }
    states = held(report, "advantages", "optimizer states")
    assert states == 8 * PARAMS + 8 * BACKBONE
    assert held(report, "load", "optimizer states") == 0


def test_a_critic_on_the_policy_is_a_value_head() -> None:
    report = answer(method="ppo", critic="shared", tuning="lora")
    assert not any(t.role == "critic" for p in report.phases for t in p.terms if t.bytes)
    assert held(report, "advantages", "weights", "policy") == 2 * PARAMS + 4 * 4096


def test_adapters_for_everything_share_one_base() -> None:
    wishes = {"method": "ppo", "tuning": "lora", "reward_model": "adapter", "critic": "adapter"}
    report = answer(**wishes)
    assert held(report, "advantages", "weights") == 2 * PARAMS + 2 * 4 * 4096
    assert held(report, "advantages", "adapters") == 3 * 4 * 41_943_040
    assert held(report, "advantages", "optimizer states") == 2 * 8 * 41_943_040 + 8 * 4096


def test_the_kv_cache_lives_through_the_rollout_only() -> None:
    report = answer(method="ppo", batch=4, prompt=100, response=50)
    token = 4 * 32 * 1024 * (4 + 2)  # under autocast keys are fp32: so are the angles' cos and sin
    assert held(report, "rollout.prefill", "KV cache") == 100 * token
    assert held(report, "rollout.decode", "KV cache") == 150 * token
    others = [p.name for p in report.phases if not p.name.startswith("rollout")]
    assert sum(held(report, name, "KV cache") for name in others) == 0


def test_the_kv_cache_of_inference() -> None:
    for kv_cache, width in (("bf16", 2.0), ("fp8", 1.0), ("q4_0", 18 / 32)):
        report = answer(method="inference", context=1024, concurrency=3, kv_cache=kv_cache)
        expected = int(3 * 1024 * 65_536 * width)
        assert held(report, "prefill", "KV cache") == held(report, "decode", "KV cache") == expected


def test_gradients_wait_for_the_next_micro_batch() -> None:
    one = answer(method="sft", batch=1)
    assert held(one, "update.forward", "gradients") == 0
    more = answer(method="sft", batch=2)
    assert held(more, "update.forward", "gradients") == 4 * PARAMS


def test_a_precomputed_reference_is_never_run() -> None:
    report = answer(method="dpo", reference="precomputed")
    assert "score.reference" not in [phase.name for phase in report.phases]
    assert not any(term.role == "reference" for p in report.phases for term in p.terms)


def test_a_rule_needs_no_model() -> None:
    report = answer(method="grpo", reward_model="rule")
    assert "score.reward" not in [phase.name for phase in report.phases]
    assert not any(term.role == "reward" for p in report.phases for term in p.terms)


def test_offloaded_roles_come_for_their_phase() -> None:
    report = answer(method="ppo", offload=("reference", "reward"))
    for name in ("load", "rollout.decode", "update.policy.step", "update.critic.backward"):
        assert held(report, name, "weights", "reference") == 0
        assert held(report, name, "weights", "reward") == 0
    assert held(report, "score.reference", "weights", "reference") == 2 * PARAMS
    assert held(report, "score.reference", "weights", "reward") == 0
    assert held(report, "score.reward", "weights", "reward") == 2 * BACKBONE


def test_an_offloaded_optimizer_keeps_nothing_on_the_card() -> None:
    report = answer(method="sft", offload=("optimizer",))
    for name in ("optimizer states", "optimizer temporary"):
        assert held(report, "update.step", name) == 0
    assert held(report, "update.step", "gradients") == 4 * PARAMS


def test_an_engine_takes_its_share_outside_the_allocator() -> None:
    wishes = {"method": "grpo", "rollout": "vllm", "rollout_memory": 0.4}
    report = answer(**wishes)
    share = int(0.4 * report.plan.memory.total_bytes)
    for name in ("rollout", "update.policy.step"):
        assert held(report, name, "inference engine") == share
    assert "rollout.prefill" not in [phase.name for phase in report.phases]
    asleep = answer(**wishes, rollout_sleep=True)
    assert held(asleep, "rollout", "inference engine") == share
    assert held(asleep, "update.policy.step", "inference engine") == 0
    engine = next(t for t in phase(report, "rollout").terms if t.name == "inference engine")
    assert engine.place == OUTSIDE


def test_an_engine_too_small_for_the_weights_is_an_error() -> None:
    with pytest.raises(FitCheckError, match="less than the .* of its own weights") as raised:
        answer(method="ppo", rollout="vllm", rollout_memory=0.05)
    share = float(raised.value.hint.split()[1].rstrip(","))
    assert answer(method="ppo", rollout="vllm", rollout_memory=share)  # the hint works


def test_paged_states_are_outside_the_allocator() -> None:
    report = answer(method="sft", optimizer="paged-adamw-8bit")
    paged = [t for t in phase(report, "update.step").terms if t.name == "paged states"]
    assert [term.place for term in paged] == [OUTSIDE]
    assert 2.03 * PARAMS < sum(term.bytes for term in paged) < 2.04 * PARAMS


def test_pretraining_text_in_ppos_update() -> None:
    without, mixed = (answer(method="ppo", ptx_batch=n) for n in (0, 1))
    more = phase(mixed, "update.policy.backward").moments
    assert len(more) > len(phase(without, "update.policy.backward").moments)
    assert mixed.peak_bytes >= without.peak_bytes


# --- a report ---


def test_an_answer_reads_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = resolve("llama-3.1-8b", gpu="4090", method="ppo", tuning="qlora")
    expected = fit(plan).to_json()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"opened {args}")

    monkeypatch.setattr(builtins, "open", refuse)
    assert fit(plan).to_json() == expected


def test_json_is_json_and_reads_back() -> None:
    for method in METHODS:
        report = answer(method=method)
        values = json.loads(json.dumps(report.to_json()))
        back = Report.from_json(values, report.plan)
        assert back.peak_bytes == report.peak_bytes
        assert [phase.name for phase in back.phases] == [phase.name for phase in report.phases]
        assert back.to_json()["phases"] == values["phases"]


def test_the_parts_of_a_report() -> None:
    report = answer(method="ppo", tuning="qlora")
    for one in report.phases:
        for moment in one.moments:
            parts = [moment.part(place) for place in (ALLOCATED, CACHED, OUTSIDE)]
            assert sum(parts) == moment.bytes
            assert moment.bytes <= one.peak.bytes
    assert report.peak_phase.peak.bytes == report.peak_bytes


def on(report: Report, usable: int, error: float | None = None) -> Report:
    """The same plan on a card with that much memory."""
    memory = report.plan.memory._replace(total_bytes=usable, reserve_bytes=0, other_bytes=0)
    stated = None if error is None else Error(error, 95, 1, "made up")
    return fit(report.plan.change(gpu=report.plan.gpu, memory=memory), stated)


def test_the_verdict_turns_at_the_last_byte() -> None:
    report = answer("qwen2.5-7b", method="sft", tuning="lora")
    assert on(report, report.peak_bytes).verdict == "fits"
    assert on(report, report.peak_bytes).spare_bytes == 0
    assert report.needed_bytes < report.peak_bytes  # the allocator's cache can be given back
    assert on(report, report.peak_bytes - 1).verdict == "tight"
    assert on(report, report.needed_bytes).verdict == "tight"
    assert on(report, report.needed_bytes - 1).verdict == "does-not-fit"


def test_the_error_makes_it_tight_but_never_impossible() -> None:
    report = answer(method="sft", tuning="lora")
    room = int(1.02 * report.peak_bytes)
    assert on(report, room, error=0.01).verdict == "fits"
    assert on(report, room, error=0.03).verdict == "tight"


def test_a_host_too_small_decides() -> None:
    report = answer(method="inference", ram=2**33)
    assert report.card_verdict == "fits"
    assert report.verdict == "does-not-fit"


def test_reasons_are_written_when_asked_for() -> None:
    asked = []
    term = Term("a", "policy", 1, lambda: asked.append(1) or "because")  # type: ignore[func-returns-value]
    assert not asked
    assert term.why == "because"


# --- what must be said ---


@pytest.mark.parametrize(
    ("model", "wishes", "words"),
    [
        ("llama-3.1-8b", {"gpu": "m3 max 64"}, "training on Apple is not modelled"),
        ("llama-3.1-8b", {"gpu": "h100"}, "cuDNN attention's own workspace is not known"),
        ("llama-3.1-8b", {"gpu": "mi300x"}, "attention on AMD"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", {"method": "inference"}, "text only"),
    ],
)
def test_notes(model: str, wishes: dict[str, Any], words: str) -> None:
    if covered(catalog.find_model(model)):
        pytest.skip(f"{model} is not covered")
    assert words in " ".join(answer(model, **wishes).notes)


def test_nothing_to_say_of_a_plain_case() -> None:
    assert answer(gpu="4090", method="sft").notes == ()


def test_doubts_about_a_row_are_shown() -> None:
    doubtful = [m for m in catalog.models() if m.doubt and not covered(m)]
    for model in doubtful[:3]:
        assert any(model.id in note for note in fit(resolve(model, gpu="4090")).notes)
    unsure = next(gpu for gpu in catalog.gpus() if gpu.doubt and gpu.vendor == "nvidia")
    plan = resolve("llama-3.1-8b", gpu=unsure)
    assert any("unverified" in note for note in fit(plan).notes)


# --- every model of the catalog ---


@pytest.mark.parametrize("wishes", [{"method": "inference"}, {"method": "sft", "tuning": "lora"}])
def test_every_model_has_an_answer_or_a_reason(wishes: dict[str, Any]) -> None:
    gpu, answered = catalog.find_gpu("4090"), 0
    for model in catalog.models():
        tokens = {"context" if wishes["method"] == "inference" else "sequence": 128}
        plan = Plan(model=model, gpu=gpu, **tokens, **wishes)
        if why := covered(model, plan.tuning or ""):
            with pytest.raises(FitCheckError, match="the estimate does not cover") as raised:
                fit(plan)
            assert why in raised.value.message
            continue
        try:
            report = fit(plan)
        except FitCheckError as fault:
            assert model.kv_cache_groups is None, fault.message  # what it caches is not known
            continue
        answered += 1
        weights = sum(t.bytes for t in report.phases[0].terms if t.name == "weights")
        masks = model.num_layers * (model.max_position_embeddings or 0) ** 2  # gpt_neo's buffers
        more = masks if model.model_type == "gpt_neo" else 0
        tensors = memory.base_tensors(model, "lm")
        more += 2 * sum(prod(shape) * copies for shape, copies, _, in_fp32 in tensors if in_fp32)
        assert weights == 2 * model.params + more, model.id
        assert report.peak_bytes > weights
    assert answered > 300


def test_an_uncovered_reward_model_or_critic_is_refused() -> None:
    dbrx = catalog.find_model("databricks/dbrx-base")
    for name in ("reward_model", "critic"):
        with pytest.raises(FitCheckError, match="dbrx-base: the estimate does not cover"):
            check("llama-3.1-8b", gpu="4090", **{name: dbrx})


def test_memory_grows_by_the_token() -> None:
    """Inference of one more token of context: its KV cache, and what the prefill needs for it."""
    llama = catalog.find_model("llama-3.1-8b")
    few, more = (answer(method="inference", context=n) for n in (4096, 8192))
    cache = memory.kv_cache(llama, 1, 4096, 2)
    assert more.peak_bytes - few.peak_bytes > cache
    assert held(more, "decode", "KV cache") - held(few, "decode", "KV cache") == cache


def test_falcon_keeps_its_own_linear_layers_in_16_bits() -> None:
    """transformers 5.24 quantizes nn.Linear alone, and Falcon's is a class of its own."""
    plan = resolve("falcon-7b", gpu="a100", method="sft", tuning="qlora", sequence=256)
    other = resolve("mistral-7b-v0.1", gpu="a100", method="sft", tuning="qlora", sequence=256)
    for each, width in ((plan, 2.0), (other, 0.57)):
        report = fit(each)
        weights = sum(t.bytes for t in report.phases[0].peak.terms if t.name == "weights")
        assert weights == pytest.approx(width * each.model.params, rel=0.02)
        assert any("nn.Linear" in note for note in report.notes) == (each is plan)
