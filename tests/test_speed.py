"""Seconds: their orderings, values worked by hand, and the rows that the constants stand on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import permutations
from typing import Any

import pytest

from benchmarks import engine_samples, fit_speed
from benchmarks import speed_samples as samples
from fitcheck import catalog, links
from fitcheck.answer import resolve
from fitcheck.fit import fit
from fitcheck.plan import METHODS
from fitcheck.rates import Rates, hardware_class, rates, stated_error
from fitcheck.report import Report
from fitcheck.speed import step_seconds, tokens_per_second
from fitcheck.work import attention_flops, block_params, forward, share_read

MODEL = "qwen2.5-1.5b"


@cache
def answer(model: str = MODEL, **wishes: Any) -> Report:
    return fit(resolve(model, **({"gpu": "a100 80"} | wishes)))


def seconds(report: Report) -> float:
    found = step_seconds(report.plan, report)
    assert found is not None
    return found


# Work


def test_the_parameters_that_multiply_leave_out_embedding_and_head() -> None:
    llama = catalog.find_model("llama-3.1-8b")
    assert block_params(llama) == 8_030_261_248 - 2 * 128_256 * 4096
    tied = catalog.find_model(MODEL)
    assert block_params(tied) == tied.params - tied.vocab_size * tied.hidden_size


def test_attention_flops_by_hand() -> None:
    llama = catalog.find_model("llama-3.1-8b")
    assert attention_flops(llama, 1000) == 4 * 32 * 1000 * 4096
    sliding = catalog.find_model("gemma-3-4b-it")
    assert attention_flops(sliding, 100_000) < 0.3 * 100_000 / 1000 * attention_flops(sliding, 1000)


def test_a_mixture_multiplies_its_active_parameters() -> None:
    moe = catalog.find_model("qwen3-30b-a3b")
    dense = catalog.find_model("qwen3-32b")
    assert forward(moe, 1, 100).linear < forward(dense, 1, 100).linear / 8


def test_a_batch_reads_more_experts_and_never_more_than_all() -> None:
    moe = catalog.find_model("qwen3-30b-a3b")
    shares = [share_read(moe, rows) for rows in (1, 2, 8, 64, 4096)]
    assert shares == sorted(shares)
    assert moe.params_active
    untied = moe.params_embedding
    assert shares[0] == pytest.approx((moe.params_active - untied) / moe.params, rel=1e-9)
    assert shares[-1] == pytest.approx((moe.params - untied) / moe.params, rel=1e-6)


# Orderings


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("card", ["4090", "a100 80", "m3 max 64", "7900 xtx", "arc a770 16gb"])
def test_more_bandwidth_and_more_flops_are_never_slower(method: str, card: str) -> None:
    plan = resolve(MODEL, method=method, gpu=card)
    slow = fit(plan)
    for changes in (
        {"bandwidth_gbs": 1.5},
        {"bf16_dense_tflops": 1.5, "fp16_dense_tflops": 1.5, "fp32_tflops": 1.5},
    ):
        more = {name: getattr(plan.gpu, name) * factor for name, factor in changes.items()}
        fast = fit(plan.change(gpu=replace(plan.gpu, **more)))
        for a, b in zip(slow.phases, fast.phases, strict=True):
            assert a.seconds is b.seconds is None or b.seconds <= a.seconds


def test_the_better_card_of_a_class_is_never_slower() -> None:
    """Real cards: every pair of a class where one has no less of anything that counts."""
    rates_of = ("bandwidth_gbs", "bf16_dense_tflops", "fp16_dense_tflops", "fp32_tflops")
    plans = [
        resolve(MODEL, method="sft", tuning="lora", gpu="4090"),
        resolve(MODEL, method="inference", quant="q4_k_m", gpu="4090"),
    ]
    pairs = 0
    for plan in plans:
        found: dict[str, list[tuple[tuple[float, ...], float]]] = {}
        for gpu in catalog.gpus():
            own = [getattr(gpu, name) or 0.0 for name in rates_of]
            report = fit(plan.change(gpu=gpu))
            if report.speed:
                size = (*own, gpu.fp16_dense_tflops_fp16acc or 0.0)
                found.setdefault(hardware_class(gpu), []).append((size, report.speed.step_seconds))
        for cards in found.values():
            for (big, fast), (small, slow) in permutations(cards, 2):
                if all(a >= b for a, b in zip(big, small, strict=True)):
                    assert fast <= slow * (1 + 1e-9)
                    pairs += 1
    assert pairs > 1000


@pytest.mark.parametrize("method", METHODS)
def test_more_tokens_are_never_faster(method: str) -> None:
    knobs = {"inference": ("context", "concurrency"), "ppo": ("prompt", "response", "batch")}
    knobs |= {"grpo": ("prompt", "response", "batch")}
    base = answer(method=method)
    for name in knobs.get(method, ("sequence", "batch")):
        times = [seconds(base)]
        for factor in (2, 4):
            plan = base.plan.change(**{name: factor * getattr(base.plan, name)})
            times.append(seconds(fit(plan)))
        assert times == sorted(times), name
        assert times[-1] > times[0], name


@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "ppo", "grpo"])
def test_lora_is_faster_and_checkpointing_slower(method: str) -> None:
    full = answer(method=method, precision="bf16")
    lora = answer(method=method, precision="bf16", tuning="lora")
    assert seconds(lora) < seconds(full)
    assert seconds(full) > seconds(answer(method=method, precision="bf16", checkpointing=False))


def test_a_mixture_is_faster_than_a_dense_model_of_its_size() -> None:
    for method in ("sft", "inference"):
        moe, dense = (
            answer(name, method=method, gpu="h200") for name in ("qwen3-30b-a3b", "qwen3-32b")
        )
        assert seconds(moe) < seconds(dense)


def test_fewer_bits_decode_faster_with_llama_cpp() -> None:
    times = [seconds(answer(method="inference", gpu="4090", quant=q)) for q in ("q8_0", "q4_k_m")]
    assert times[1] < times[0]


def test_a_ppo_step_is_its_rollout_its_scores_and_its_updates() -> None:
    ppo = answer(method="ppo")
    found = {phase.name: phase.seconds or 0.0 for phase in ppo.phases}
    updates = sum(value for name, value in found.items() if name.startswith("update"))
    twice = fit(ppo.plan.change(epochs=8))
    again = sum(p.seconds or 0.0 for p in twice.phases if p.name.startswith("update"))
    assert again == pytest.approx(2 * updates)
    assert seconds(ppo) == pytest.approx(sum(found.values()))
    assert seconds(ppo) > seconds(answer(method="grpo"))  # two models train, four times


def test_tokens_a_second_count_what_the_method_makes() -> None:
    decoding = answer(method="inference", concurrency=4)
    decode = next(p.seconds for p in decoding.phases if p.name == "decode")
    assert decode is not None
    assert tokens_per_second(decoding.plan, decoding) == pytest.approx(4 / decode)
    ppo = answer(method="ppo")
    assert tokens_per_second(ppo.plan, ppo) == pytest.approx(8 * 512 / seconds(ppo))


def test_no_rate_no_seconds() -> None:
    plan = resolve(MODEL, method="sft", gpu="a100 80")
    unknown = fit(plan.change(gpu=replace(plan.gpu, bandwidth_gbs=None)))
    assert {phase.seconds for phase in unknown.phases} == {None}
    assert step_seconds(plan, unknown) is tokens_per_second(plan, unknown) is None


# Constants


def test_every_card_has_a_class_with_possible_constants() -> None:
    classes = {hardware_class(gpu) for gpu in catalog.gpus()}
    assert classes == set(catalog.read("speed.json")["classes"])
    for gpu in catalog.gpus():
        rate = rates(gpu)
        assert 0 < rate.bandwidth <= 1 and 0 < rate.matmul <= 1 or hardware_class(gpu) == "apple-m5"
        assert 0 <= rate.layer < 1e-3


@pytest.fixture(scope="module")
def fits() -> dict[str, Any]:
    return fit_speed.results(lambda line: None)


def leaves(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(where, what) of every value in nested objects."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from leaves(value, f"{path}/{name}")
    else:
        yield path, content


def test_the_constants_in_the_catalog_are_those_of_the_fit(fits: dict[str, Any]) -> None:
    """Within 2 %: a corrected row of a model moves them a little. More: fit them anew."""
    written = dict(leaves(json.loads(fit_speed.FILE.read_text(encoding="utf-8"))))
    now = dict(leaves(fit_speed.content(fits)))
    assert written.keys() == now.keys()
    for path, value in now.items():
        near = pytest.approx(value, rel=0.02, abs=1e-6) if isinstance(value, float) else value
        assert written[path] == near, path


def test_the_goals_of_accuracy(fits: dict[str, Any]) -> None:
    """Decode: median 6 %, nine of ten within 20 %; 10 and 28 % with each source left out."""
    decode, training = fits["llama.cpp"], fits["training"]
    assert len(decode.inside) > 250
    assert len(decode.outside) > 200
    assert fit_speed.median(decode.inside) < 0.06
    assert fit_speed.percentile(decode.inside, 90) < 0.20
    assert fit_speed.median(decode.outside) < 0.10
    assert fit_speed.percentile(decode.outside, 90) < 0.28
    assert len(training.outside) > 150
    assert fit_speed.median(training.outside) < 0.15


def test_the_page_states_these_errors(fits: dict[str, Any]) -> None:
    """docs/speed.md: another Python may round a percent the other way."""
    text = fit_speed.PAGE.read_text(encoding="utf-8")
    shown = text.partition(fit_speed.MARKS[0])[2].partition(fit_speed.MARKS[1])[0].strip()
    now = fit_speed.table(fits)
    assert re.sub(r"\d+", "#", shown) == re.sub(r"\d+", "#", now)
    for old, new in zip(*(map(int, re.findall(r"\d+", t)) for t in (shown, now)), strict=True):
        assert abs(old - new) <= 1


def test_the_readme_states_these_errors(fits: dict[str, Any]) -> None:
    text = " ".join((fit_speed.ROOT / "README.md").read_text("utf-8").split())
    number = r"([\d.]+) %"
    shown = re.search(
        rf"off by {number} in the median .*?, {number} where .*? by {number} of .*?, {number} left",
        text,
    )
    assert shown
    parts = [part for n in ("llama.cpp", "training") for part in (fits[n].inside, fits[n].outside)]
    for figure, part in zip(shown.groups(), parts, strict=True):
        assert float(figure) == pytest.approx(100 * fit_speed.median(part), abs=0.3)


def test_a_constant_share_of_the_bandwidth_is_far_worse(fits: dict[str, Any]) -> None:
    """What simpler tools do: 0.55 of the bandwidth, whatever card and model."""
    flat = [
        abs(
            s.seconds / (sum(v for k, v in s.features.items() if k.startswith("weights")) / 0.55)
            - 1
        )
        for s in samples.decode_samples()
    ]
    assert fit_speed.median(flat) > 4 * fit_speed.median(fits["llama.cpp"].inside)


def test_the_fit_finds_constants_that_made_the_rows() -> None:
    rows = [
        samples.Sample("s", "k", 2.0 * x + 0.5 * y, {"a": x, "b": y}, "")
        for x, y in ((1.0, 3.0), (2.0, 1.0), (5.0, 8.0), (0.1, 4.0))
    ]
    rows.append(samples.Sample("s", "k", 99.0, {"a": 1.0, "b": 1.0}, "an outlier"))
    found = fit_speed.fitted(rows)
    assert found["a"] == pytest.approx(2.0, rel=1e-2)
    assert found["b"] == pytest.approx(0.5, rel=1e-2)


def test_what_was_not_fitted() -> None:
    found = list(engine_samples.batches())
    assert len(found) == 5
    for told, measured, predicted in found:
        assert abs(predicted / measured - 1) < 0.15, told
    measured, shortest = engine_samples.grpo_step(64)
    assert shortest < measured * 1.15  # its prompts' length is not told
    assert engine_samples.grpo_step(512)[1] > measured


def test_a_kind_of_card_that_nobody_measured_is_told() -> None:
    told = {
        gpu: dict(answer(gpu=gpu, method="sft").speed.errors)["training"].basis  # type: ignore[union-attr]
        for gpu in ("a100 80", "7900 xtx")
    }
    assert "none on a card of this kind" not in told["a100 80"]
    assert "none on a card of this kind" in told["7900 xtx"]


def test_a_stated_error_is_a_percentile() -> None:
    for name in ("llama.cpp", "graphs", "eager", "training"):
        error = stated_error(name)
        assert (error.percentile, error.n > 5, 0 < error.relative < 1) == (90, True, True)
    assert len(Rates._fields) == 8


# Several cards


def several(monkeypatch: pytest.MonkeyPatch, gpus: int, **wishes: Any) -> Report:
    """Before several cards are offered: the rules aside."""
    monkeypatch.setattr("fitcheck.plan.check_together", lambda plan: None)
    return fit(resolve(MODEL, gpus=gpus, **({"gpu": "a100 80", "method": "sft"} | wishes)))


def test_several_cards_share_the_batch_and_sum_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    one, four = (several(monkeypatch, n, batch=64) for n in (1, 4))
    assert seconds(one) / 4 < seconds(four) < seconds(one) / 3  # each card steps its optimizer
    thin = replace(catalog.find_gpu("4090"), pcie_gen=1, pcie_lanes=1)
    slow = several(monkeypatch, 4, batch=64, gpu=thin)
    backward = next(p.seconds for p in slow.phases if p.name == "update.backward")
    gradients = 4 * slow.plan.model.params
    assert backward == pytest.approx(2 * 3 / 4 * gradients / (0.25e9 * 0.8), rel=0.01)


def test_collectives_by_hand() -> None:
    assert links.all_reduce(8e9, 4, 100e9) == pytest.approx(2 * 3 / 4 * 8e9 / 100e9)
    assert links.all_gather(8e9, 4, 100e9) == pytest.approx(3 / 4 * 8e9 / 100e9)
    assert links.all_reduce(8e9, 1, 100e9) == 0


def test_a_link_is_nvlink_where_there_is_one() -> None:
    a100, card = catalog.find_gpu("a100 80"), catalog.find_gpu("4090")
    assert links.link_bandwidth(a100, 8) == 300e9  # 600 GB/s both ways
    assert links.link_bandwidth(card, 2) == pytest.approx(16 * 1.969e9 * 0.8)
