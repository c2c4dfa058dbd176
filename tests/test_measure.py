"""The measurement on a CPU: what is counted, where it ends, what it says of itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny import CARD, CPU, tiny_model, tiny_plan  # noqa: E402

from fitcheck import kernels, resolve, worker  # noqa: E402
from fitcheck.bench import rates, roles, steps, weights  # noqa: E402
from fitcheck.bench.dryrun import dry_run  # noqa: E402
from fitcheck.bench.measure import Wishes, measure  # noqa: E402
from fitcheck.bench.meter import CountingMeter  # noqa: E402
from fitcheck.bench.witness import Witness, is_out_of_memory  # noqa: E402
from fitcheck.errors import FitCheckError  # noqa: E402
from fitcheck.measured import Measurement  # noqa: E402
from fitcheck.measured_text import allocated  # noqa: E402
from fitcheck.plan import Plan  # noqa: E402

pytestmark = pytest.mark.oracle
WHAT_RUNS = [
    ("sft", {}),
    ("sft", {"tuning": "lora", "checkpointing": False}),
    ("dpo", {"micro_batch": 1}),
    ("reward", {"precision": "bf16"}),
    ("ppo", {}),
    ("ppo", {"tuning": "lora", "precision": "bf16"}),
    ("grpo", {"empty_cache": True}),
    ("inference", {"context": 64, "concurrency": 3}),
    ("inference", {"context": 64, "quant": "int8"}),
    ("sft", {"tuning": "qlora"}),
]


SMALL = tiny_model(hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=1000)


def plan_of(method: str, **knobs: Any) -> Any:
    """A tiny plan that runs the same operators here as on a card."""
    knobs = {"model": SMALL, "attention": "eager", **knobs}
    if method == "inference":
        return Plan(gpu=CARD, method=method, **knobs)
    return tiny_plan(method, **knobs)


@pytest.fixture(scope="module")
def sft() -> Measurement:
    return measure(plan_of("sft"), Wishes(steps=2))


@pytest.mark.parametrize(("method", "knobs"), WHAT_RUNS)
def test_real_tensors_live_as_the_dry_run_says(method: str, knobs: dict[str, Any]) -> None:
    plan = plan_of(method, **knobs)
    measured, traced = measure(plan, Wishes(steps=1)), dry_run(plan)[0]
    predicted = allocated(traced)
    seen = {reading.phase: reading.peak_allocated_bytes for reading in measured.readings}
    # Random weights are drawn in ways of their own; what follows agrees to the byte.
    loaded, load = predicted.pop("load"), seen.pop("load")
    if plan.tuning != "qlora":  # quantizing takes each layer in full first
        assert loaded == pytest.approx(load, rel=0.005)
    assert predicted == seen
    assert measured.report.source == "measured"
    assert measured.report.card_verdict == traced.card_verdict == "fits"


def test_counting_changes_no_result() -> None:
    """Gradients that meet are added in place, as they are where nobody watches."""
    plan = plan_of("sft", tuning="full")
    found = []
    for counted in (False, True):
        torch.manual_seed(0)
        meter = CountingMeter(CPU, lambda phase, step: None, kernels.card(plan.gpu))
        built = roles.build(plan, CPU)
        if counted:
            with meter:
                figures = [steps.run_step(plan, built, meter) for _ in range(2)]
        else:
            figures = [steps.run_step(plan, built) for _ in range(2)]
        found.append([figure["loss"].item() for figure in figures])
    assert found[0] == found[1]


def test_readings(sft: Measurement) -> None:
    assert (sft.run.device, sft.run.steps, sft.run.warmup) == ("cpu", 2, 1)
    assert not sft.run.on_card and not sft.stopped
    for reading in sft.readings:
        assert 0 < reading.allocated_bytes <= reading.peak_allocated_bytes
        assert reading.peak_allocated_bytes <= reading.peak_reserved_bytes
        assert reading.seconds > 0
    # 4 sequences of 10 tokens in each step.
    forward = next(r for r in sft.readings if r.phase == "update.forward")
    assert forward.tokens_per_second == pytest.approx(40 / forward.seconds)
    assert "are not" in sft.report.notes[-1] and "verified" in sft.report.notes[-1]


def test_json_gives_it_back(sft: Measurement) -> None:
    back = Measurement.from_json(sft.to_json(), sft.report.plan)
    assert back.readings == sft.readings and back.run == sft.run
    assert back.report.peak_bytes == sft.report.peak_bytes


@pytest.mark.parametrize("step", [1, 2, 3])
def test_what_was_measured_until_it_was_stopped(step: int) -> None:
    def stop(phase: str, at: int) -> None:
        if at == step and phase == "update.backward":
            raise KeyboardInterrupt

    measured = measure(plan_of("sft"), Wishes(steps=2), stop)
    assert measured.stopped and measured.oom is None
    assert measured.run.steps == max(0, step - 2)  # the first one is to warm up
    assert measured.readings[0].phase == "load"
    assert f"{measured.run.steps} of 2 steps" in " ".join(measured.report.notes)


def test_out_of_memory_is_a_result() -> None:
    plan = plan_of("sft")
    enough = measure(plan, Wishes(steps=1)).report
    assert measure(plan, Wishes(1, enough.reserved_bytes)).oom is None
    room = enough.allocated_bytes - 2**20
    failed = measure(plan, Wishes(1, limit_bytes=room))
    assert failed.oom is not None
    assert failed.report.verdict == "does-not-fit"
    assert failed.oom.requested_bytes and failed.oom.free_bytes is not None
    assert failed.oom.requested_bytes > failed.oom.free_bytes >= 0
    assert failed.oom.phase in {phase.name for phase in enough.phases}
    assert failed.oom.operator.startswith(("aten.", "cublas"))


def test_messages_of_allocators_and_libraries() -> None:
    text = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has 8 GiB of which 512.00 MiB is"
    assert is_out_of_memory(torch.OutOfMemoryError(text))
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("a size does not match"))
    oom = Witness({}).oom(RuntimeError(text), "update.step", 1)
    assert (oom.requested_bytes, oom.free_bytes) == (3 * 2**29, 2**29)


def test_the_witness_names_call_and_module() -> None:
    module = torch.nn.Linear(2, 2)
    witness = Witness({id(module): "policy.head"}, limit_bytes=None)
    module.register_forward_pre_hook(lambda *_: witness.observe(0, 1024, 4096, 512))
    module(torch.zeros(1, 2))
    assert witness.seen is not None
    operator, requested, free = witness.seen
    assert operator.endswith("in policy.head") and (requested, free) == (1024, 512)


def test_a_fault_that_is_none_of_memory_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a size does not match")

    monkeypatch.setattr(steps, "run_step", broken)
    with pytest.raises(RuntimeError, match="does not match"):
        measure(plan_of("sft"), Wishes())


# --- rates ---


def test_model_flops_of_llama_3_1_8b() -> None:
    """8 030 261 248 parameters, 525 336 576 of them an embedding that is looked up."""
    plan = resolve("llama-3.1-8b", gpu="a100", method="sft", sequence=4096, batch=1)
    weights, attention = 8_030_261_248 - 525_336_576, 4 * 32 * 4096 * 4096
    full = rates.update_flops(plan.model, "full", 4096, headless=False)
    assert full == 6 * weights + 3 * attention
    assert rates.update_flops(plan.model, "lora", 4096, False) == 4 * weights + 3 * attention
    headless = rates.update_flops(plan.model, "full", 4096, headless=True)
    assert full - headless == 6 * 525_336_576
    # 312 TFLOP/s on paper: half of that is 50 % MFU.
    seconds = 4096 * full / (312e12 / 2)
    assert rates.mfu(plan, "update", seconds) == pytest.approx(0.5, rel=1e-3)


def test_decoding_reads_the_weights_in_every_step() -> None:
    plan = resolve("llama-3.1-8b", gpu="a100", prompt=4, response=3, batch=2, precision="bf16")
    weights = 2 * (8_030_261_248 - 525_336_576)
    cache = 2 * 32 * 8 * 128 * 2  # bytes of one token
    assert rates.decode_bytes(plan) == pytest.approx(2 * weights + 2 * cache * (4 + 5))


@pytest.mark.parametrize(
    ("method", "phase", "count"),
    [
        ("ppo", "rollout.prefill", 4 * 6),
        ("ppo", "rollout.decode", 4 * 3),
        ("ppo", "score.critic", 4 * 10),
        ("ppo", "update.critic.backward", 2 * 4 * 10),
        ("dpo", "update.forward", 2 * 4 * 10),
        ("inference", "prefill", 2 * 63),
        ("inference", "decode", 3),
        ("sft", "load", None),
    ],
)
def test_tokens(method: str, phase: str, count: int | None) -> None:
    knobs = {"ppo": {"epochs": 2}, "inference": {"context": 64, "concurrency": 3}}.get(method, {})
    assert rates.tokens(plan_of(method, **knobs), phase) == count


# --- weights of one's own ---


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_weights_from_a_folder(tuning: str, tmp_path: Any) -> None:
    plan = plan_of("dpo", tuning=tuning, precision="fp32")
    torch.manual_seed(1)
    theirs = roles.build(plan.change(tuning="full"), CPU).policy
    theirs.save_pretrained(tmp_path)
    built = roles.build(plan, CPU)
    weights.load_weights(built, str(tmp_path))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
        assert torch.equal(built.policy(ids).logits, expected)  # a new adapter adds nothing
        if built.reference is not None:
            assert torch.equal(built.reference(ids).logits, expected)


def test_weights_of_another_model(tmp_path: Any) -> None:
    roles.build(plan_of("sft"), CPU).policy.save_pretrained(tmp_path)
    wider = plan_of("sft", model=tiny_model(hidden_size=128))
    with pytest.raises(FitCheckError, match="is not the plan's model"):
        weights.load_weights(roles.build(wider, CPU), str(tmp_path))
    with pytest.raises(FitCheckError, match="cannot be read"):
        weights.load_weights(roles.build(wider, CPU), str(tmp_path / "nothing"))


# --- in a process of its own ---


def test_a_process_that_is_asked_to_stop_shows_what_it_has() -> None:
    plan = resolve("pythia-14m", gpu="a100", method="sft", sequence=16, batch=1, attention="eager")
    told: list[tuple[str, int]] = []

    def press_once(phase: str, step: int) -> None:
        told.append((phase, step))
        if step == 3 and told.count((phase, step)) == 1 and phase == "update.forward":
            raise KeyboardInterrupt

    found = worker.measure(plan, ["--steps=100000"], press_once)
    assert told[0] == ("load", 0)
    assert {phase for phase, _ in told} >= {"update.forward", "update.step"}
    assert found.stopped
    assert 1 <= found.run.steps < 1000


def test_a_process_that_is_stopped_at_once_has_nothing_to_show() -> None:
    plan = resolve("pythia-14m", gpu="a100", method="sft", sequence=16, batch=1)
    with pytest.raises(FitCheckError, match="stopped"):
        worker.measure(plan, seconds=0.2)


def test_no_step_for_a_method_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(steps.STEPS, "sft")
    with pytest.raises(FitCheckError, match="sft cannot be measured yet"):
        measure(plan_of("sft"), Wishes())


@pytest.mark.parametrize(
    ("knobs", "fault"),
    [({"gpus": 2}, "runs on one card"), ({"rollout": "vllm"}, "does not start vllm")],
)
def test_what_one_process_on_one_card_does_not_do(knobs: dict[str, Any], fault: str) -> None:
    with pytest.raises(FitCheckError, match=fault):
        measure(plan_of("ppo", **knobs), Wishes())


def test_another_card_than_this_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    from fitcheck.bench import device

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    plan = replace(plan_of("sft"))
    with pytest.raises(FitCheckError, match="this machine's NVIDIA H100, not on card"):
        device.check_card(plan, torch.device("cuda", 0))
