"""Several cards side by side: against DeepSpeed's estimators, by hand, and what must be less."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fitcheck import catalog, links, memory, shards
from fitcheck.decoder import covered
from fitcheck.errors import FitCheckError
from fitcheck.fit import fit
from fitcheck.memory import Role
from fitcheck.plan import SHARDINGS, Plan
from fitcheck.report import OUTSIDE, Report
from fitcheck.scene import Scene
from fitcheck.speed import step_seconds
from tests.test_properties import Draw

WAYS = SHARDINGS[1:]
STATES = ("weights", "gradients", "optimizer states")
LLAMA = "llama-3.1-8b"


def plan(model: str = LLAMA, gpu: str = "h100", **fields: Any) -> Plan:
    fields = {"method": "sft", **fields}
    if fields["method"] != "ppo":
        fields = {"sequence": 256, **fields}
    return Plan(model=catalog.find_model(model), gpu=catalog.find_gpu(gpu), **fields)


def named(report: Report, phase: str, *names: str) -> int:
    """Bytes of the terms so named in the phase's largest moment."""
    found = next(p for p in report.phases if p.name == phase)
    return sum(term.bytes for term in found.terms if term.name in names)


# --- DeepSpeed's own estimators ---

MODELS = ("qwen2.5-0.5b", "llama-3.2-1b", LLAMA)
CARDS = (2, 4, 8)
ASK = """
import json, sys
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as two
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as three
def answer(stage, params, largest, cards, offload):
    if stage == 2:
        return two(params, cards, 1, offload)[1]
    return three(params, largest, cards, 1, offload, False)[1]
print(json.dumps([answer(*row) for row in json.loads(sys.argv[1])]))
"""


def estimator(stage: int, params: int, largest: int, cards: int, offload: bool) -> int:
    """What those functions return (DeepSpeed 0.19.8, estimate_zero[23]_model_states_mem_needs)."""
    if stage == 2:
        return 2 * params if offload else 2 * params + int(18 * params / cards)
    share = int((2 if offload else 18) * params / cards)
    return 4 * largest + share


def estimated() -> list[tuple[int, int, int, int, bool]]:
    rows = []
    for name in MODELS:
        role = Scene(plan(name)).roles["policy"]
        found = shards.units(role, 1)
        largest = max(found.table, found.block)
        for cards in CARDS:
            for stage in (2, 3):
                rows += [(stage, role.model.params, largest, cards, x) for x in (False, True)]
    return rows


def ours(name: str, stage: int, cards: int, offload: bool) -> int:
    """What the estimator counts: weights, states, gradients in 16 bits and, for the step, in 32.

    For ZeRO-3 it takes the largest layer twice, gathered and as the gradients of its backward; it
    has all fp32 gradients at once, where stage 3 steps a sub-group of 1e9 elements at a time; it
    leaves out the 16-bit gradients, for which stage 3 has a buffer (grad_partitions_flat_buffer).
    """
    wishes = {"offload": ("optimizer",)} if offload else {}
    p = plan(
        name, gpus=cards, sharding=f"zero{stage}", precision="bf16-master",
        optimizer="adamw-fused", **wishes,
    )  # fmt: skip
    report = fit(p)
    size = named(report, "update.step", *STATES, "optimizer temporary")
    if stage == 3:
        size += 2 * named(report, "update.backward", "unsharded block")
        size -= named(report, "update.step", "gradients")
        share = p.model.params // cards
        size += 0 if offload else 4 * max(0, share - 1_000_000_000)
    return size


def test_model_states_are_those_of_deepspeed() -> None:
    asked = [
        (name, stage, cards, offload)
        for name in MODELS
        for cards in CARDS
        for stage in (2, 3)
        for offload in (False, True)
    ]
    assert [ours(*row) for row in asked] == [estimator(*row) for row in estimated()]


# Where `make test` puts it: not on the path, since transformers imports it wherever it sees it.
DEEPSPEED = Path(sys.prefix, "deepspeed")


@pytest.mark.skipif(not DEEPSPEED.is_dir(), reason="DeepSpeed could not be installed")
def test_deepspeed_itself_says_so() -> None:
    rows = estimated()
    words = [sys.executable, "-c", ASK, json.dumps(rows)]
    with_it = os.environ | {"PYTHONPATH": str(DEEPSPEED)}
    found = subprocess.run(words, capture_output=True, text=True, check=True, env=with_it)
    said = json.loads(found.stdout.splitlines()[-1])
    assert said == [estimator(*row) for row in rows]


# --- by hand ---


def test_fsdp_of_llama_8b() -> None:
    """4,096 wide, 32 layers of 218,112,000 parameters; embedding and head 525,336,576 each."""
    layer, root = 218_112_000, 2 * 525_336_576 + 4096
    params = 32 * layer + root
    report = fit(plan(gpus=8, sharding="fsdp"))  # fp32 shards, 16 bits gathered
    assert named(report, "load", "weights") == 4 * params // 8
    assert named(report, "update.step", "gradients") == 4 * params // 8
    assert named(report, "update.step", "optimizer states") == 8 * params // 8
    assert named(report, "update.backward", "unsharded root") == 2 * root
    moments = {m.name: m for p in report.phases if p.name == "update.backward" for m in p.moments}
    blocks = [
        sum(term.bytes for term in moments[name].terms if term.name == "unsharded block")
        for name in ("logits", "last layer", "first layer", "embedding")
    ]
    assert blocks == [2 * layer, 2 * 2 * layer, 2 * layer, 0]


def test_a_mixture_gathers_its_largest_layer() -> None:
    """Its first layer is dense; the others hold 64 experts."""
    model = catalog.find_model("moonlight-16b-a3b")
    role = Scene(plan("moonlight-16b-a3b")).roles["policy"]
    root, _, block = shards.units(role, 1)
    assert model.moe
    experts = model.moe.num_experts * 3 * model.moe.moe_intermediate_size * model.hidden_size
    assert experts < block < 1.2 * experts
    assert root + (model.num_layers - 1) * block < model.params < root + model.num_layers * block


def test_no_layer_is_forgotten_or_larger_than_its_model() -> None:
    """Of every architecture that is covered: the layers at their largest hold all weights."""
    seen, odd = set[str](), 0
    for model in catalog.models():
        if model.model_type in seen or covered(model):
            continue
        seen.add(model.model_type)
        role = Role("policy", model, 2)
        root, table, block = shards.units(role, 2)
        whole = shards.gathered_bytes(role, 2)
        assert 0 < table <= root and root + block <= whole, model.id
        assert whole <= root + model.num_layers * (block + 1), model.id
        odd += whole < 0.9 * (root + model.num_layers * block)
    assert len(seen) > 30 and odd < len(seen) / 3


def test_ddp_is_one_card_and_its_buckets() -> None:
    """The batch is that of all cards: twice as many share twice the batch."""
    alone, both = fit(plan(batch=4)), fit(plan(batch=8, gpus=2))
    assert both.plan.sharding == "ddp"
    for one, two in zip(alone.phases, both.phases, strict=True):
        ours = {t.name: t.bytes for t in two.terms if t.name not in ("NCCL", "reduce buckets")}
        assert ours == {t.name: t.bytes for t in one.terms}
    params = alone.plan.model.params
    assert named(both, "update.step", "reduce buckets") == 4 * params
    assert [t.place for t in both.phases[0].terms if t.name == "NCCL"] == [OUTSIDE]


def test_deepspeed_buckets_are_of_fixed_size() -> None:
    for way in ("zero1", "zero2", "zero3"):
        report = fit(plan("qwen2.5-0.5b", gpus=4, sharding=way, precision="bf16-master"))
        assert named(report, "update.backward", "reduce bucket") == 2 * 500_000_000


@pytest.mark.parametrize("way", WAYS)
def test_frozen_models_are_split_where_weights_are(way: str) -> None:
    report = fit(plan(method="ppo", gpus=2, sharding=way))
    whole = memory.total(memory.weight_sizes(Scene(report.plan).roles["reference"]))
    held = [t.bytes for t in report.phases[0].terms if (t.name, t.role) == ("weights", "reference")]
    assert held == [-(-whole // 2) if way in ("zero3", "fsdp") else whole]


def test_generation_gathers_all_weights() -> None:
    report = fit(plan(method="ppo", gpus=4, sharding="zero3", precision="bf16"))
    assert named(report, "rollout.decode", "gathered weights") == 2 * report.plan.model.params
    assert not named(report, "score.policy", "gathered weights")


# --- what must be less ---


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
@pytest.mark.parametrize("method", ["sft", "dpo", "ppo"])
def test_model_states_fall(method: str, tuning: str) -> None:
    phase = "update.policy.step" if method == "ppo" else "update.step"
    found = [
        named(fit(plan(method=method, tuning=tuning, gpus=4, sharding=way)), phase, *STATES)
        for way in ("ddp", "zero1", "zero2", "zero3")
    ]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 4


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("tuning", ["full", "qlora"])
@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_more_cards_never_need_more_of_each(method: str, tuning: str, way: str) -> None:
    for batch in (8, 32):
        fields = {"method": method, "tuning": tuning, "sharding": way, "batch": batch}
        peaks = [fit(plan(gpus=cards, **fields)).peak_bytes for cards in (2, 4, 8)]
        assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("way", WAYS)
def test_any_plan_can_be_shared(way: str) -> None:
    """Plans as the properties draw them: with one card's states, half of them at least, or why not.

    With the optimizer offloaded, gradients and FSDP's weights go to RAM with it.
    """
    draw, answered = Draw(seed=1), 0
    while answered < 30:
        try:
            alone = fit(Plan(**draw.fields()))
        except FitCheckError:
            continue
        if alone.plan.method == "inference":
            continue
        try:
            shared = fit(alone.plan.change(gpus=2, sharding=way))
        except FitCheckError as fault:
            assert fault.hint
            continue
        answered += 1
        assert all(t.bytes >= 0 for p in shared.phases for m in p.moments for t in m.terms)
        for phase, same in zip(alone.phases, shared.phases, strict=True):
            assert phase.name == same.name
            if phase.name.endswith("step"):
                states = [named(r, phase.name, *STATES) for r in (alone, shared)]
                kept = 0 if "optimizer" in alone.plan.offload else states[0] // 2
                assert states[0] >= states[1] >= kept


# --- host, time, edges ---


def test_the_host_holds_all_shares() -> None:
    def needed(way: str, gpus: int) -> int:
        p = plan(gpus=gpus, sharding=way, offload=("optimizer",), precision="bf16-master")
        terms = {t.name: t.bytes for t in fit(p).ram.terms}
        assert terms["process"] == gpus * 700 * 2**20
        return terms["optimizer on the CPU"]

    alone = needed("none", 1)
    assert needed("zero2", 4) == needed("zero3", 4) == alone
    assert needed("ddp", 4) == 4 * alone


def test_offloaded_split_gradients_leave_the_card() -> None:
    """ZeRO-Offload (arXiv 2101.06840): only 16-bit weights stay."""
    p = plan(gpus=2, sharding="zero2", precision="bf16-master", offload=("optimizer",))
    assert named(fit(p), "update.step", *STATES) == 2 * p.model.params


def test_seconds_of_collectives() -> None:
    """ddp: all-reduce of 16-bit gradients; zero3: two gathers of weights and a scatter, 1.5 x."""
    from fitcheck.clock import Clock

    def told(way: str) -> float:
        p = plan("llama-3.2-1b", "rtx 4090", gpus=8, sharding=way, precision="bf16", batch=8)
        clock = Clock(p)
        again = clock.gathering(clock.roles["policy"])  # of the forward
        return clock.communication("policy", 1) + again

    size = 2 * catalog.find_model("llama-3.2-1b").params
    link = links.link_bandwidth(catalog.find_gpu("rtx 4090"), 8)
    assert told("ddp") == told("zero2") == pytest.approx(2 * 7 / 8 * size / link)
    assert told("zero3") == told("fsdp") == pytest.approx(3 * 7 / 8 * size / link)


def test_cards_share_the_time() -> None:
    """Never faster than an equal part, and slower over a slower link."""
    alone = step_seconds(p := plan(batch=64), fit(p))
    fast = step_seconds(p := plan(batch=64, gpus=8, sharding="zero2"), fit(p))
    assert alone and fast
    assert alone / 8 <= fast < alone


def test_a_changed_number_of_cards_takes_its_default_sharding() -> None:
    many = plan(gpus=4, sharding="zero3")
    assert many.change(gpus=8).sharding == "zero3"
    assert many.change(gpus=1).sharding == "none"
    assert many.change(gpus=1).change(gpus=2).sharding == "ddp"


def test_a_dry_run_plays_one_card() -> None:
    pytest.importorskip("torch")
    from fitcheck.bench.trace import trace

    with pytest.raises(FitCheckError, match="a single card"):
        trace(plan("qwen2.5-0.5b", gpus=2))


# --- torch itself ---


@pytest.fixture(scope="module")
def torchs() -> dict[str, Any]:
    """What torch's FSDP and DDP hold while small models train."""
    pytest.importorskip("torch")
    script = Path(__file__).with_name("fsdp_world.py")
    words = [sys.executable, "-W", "ignore", str(script)]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def fsdp(torchs: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = torchs["fsdp"]
    return rows


@pytest.mark.oracle
def test_buckets_of_ddp_are_a_second_copy_of_gradients(torchs: dict[str, Any]) -> None:
    ddp = torchs["ddp"]
    assert ddp["buckets"] == ddp["gradients"] > 0
    assert ddp["apart"] and ddp["kept"]


def as_run(row: dict[str, Any]) -> Plan:
    return plan(
        *("llama-3.2-1b", "a100-80"),
        **{"gpus": 4, "sharding": "fsdp", "tuning": "lora" if row["frozen"] else "full"},
        checkpointing=row["reentrant"] is not None,
        recipe="hf-4.48" if row["reentrant"] else "plain",
    )


@pytest.mark.oracle
def test_layers_that_fsdp_gathers(fsdp: list[dict[str, Any]]) -> None:
    assert len(fsdp) == 6
    for row in fsdp:
        p, layers = as_run(row), row["layers"]
        assert shards.layers_gathered(p, "forward", "last layer") == layers["forward"]
        assert shards.layers_gathered(p, "loss", "logits") == layers["loss"]
        for piece in ("last layer", "first layer"):
            assert shards.layers_gathered(p, "backward", piece) == layers[piece], row


@pytest.mark.oracle
def test_what_hooks_of_frozen_layers_hold(fsdp: list[dict[str, Any]]) -> None:
    """Beside the first layer's input and incoming gradient, where layers run again."""
    for row in fsdp:
        p = as_run(row)
        role = replace(p.model, num_layers=6)
        held = shards.hooked(p, Role("policy", role, 2, p.tuning), 1)
        beside = row["alive"] - 2 if p.checkpointing else 0
        assert sum(term.bytes for term in held) == beside, row


@pytest.mark.oracle
def test_a_unit_that_trains_joins_its_gradients(fsdp: list[dict[str, Any]]) -> None:
    """The root's embedding and head, 100 words of 64 elements each; of an adapter 4 x 64."""
    for row in fsdp:
        assert row["joined"] == (4 * 64 if row["frozen"] else 2 * 100 * 64), row
        report = fit(as_run(row))
        moments = [m for p in report.phases for m in p.moments if m.name == "embedding reduced"]
        assert bool(moments) is not row["frozen"]
        root = 2 * shards.units(Scene(report.plan).roles["policy"], 2).root
        for moment in moments:  # gathered 16 bits of fp32, and gradients alike
            assert [t.bytes for t in moment.terms if t.name == "joined gradients"] == [root]
