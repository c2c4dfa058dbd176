"""check(): what names, wishes and stored plans become, and how they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fitcheck import answer, catalog, files, machine
from fitcheck.answer import DEFAULT_MODEL, PRETENDED, check, parse, plan_from, resolve
from fitcheck.errors import FitCheckError
from fitcheck.machine import System
from fitcheck.plan import KNOBS

DETECT, BEST = machine.detect, machine.best


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A computer without a GPU, whatever the tests run on."""
    monkeypatch.setattr(machine, "best", lambda found: None)


# --- names ---


def test_defaults() -> None:
    plan = resolve()
    assert (plan.model.id, plan.gpu.name, plan.method) == (DEFAULT_MODEL, PRETENDED, "ppo")
    assert plan.ram is None
    report = check()
    assert "no GPU was found here" in report.notes[0]


def test_loose_names() -> None:
    plan = resolve("qwen2.5 7b", gpu="rtx4090", reward_model="llama-3.2-1b", critic="shared")
    assert plan.model.id == "Qwen/Qwen2.5-7B"
    assert plan.gpu.name == "NVIDIA GeForce RTX 4090"
    assert plan.reward_model is not None


def test_objects_are_taken_as_they_are() -> None:
    model, gpu = catalog.find_model("qwen2.5-7b"), catalog.find_gpu("4090")
    plan = resolve(model, gpu=gpu, reward_model=model)
    assert (plan.model, plan.gpu, plan.reward_model) == (model, gpu, model)


def test_a_reward_model_by_name_and_a_plain_one_by_full_id() -> None:
    reward = resolve(gpu="4090", reward_model="Skywork/Skywork-Reward-V2-Llama-3.2-1B").reward_model
    assert reward.id == "Skywork/Skywork-Reward-V2-Llama-3.2-1B"  # type: ignore[union-attr]
    plain = resolve(gpu="4090", reward_model="meta-llama/Llama-3.2-1B").reward_model
    assert plain.id == "meta-llama/Llama-3.2-1B"  # type: ignore[union-attr]


def test_a_name_with_several_meanings_is_told() -> None:
    report = check(gpu="a100")
    assert "'a100' can be" in report.notes[0]


@pytest.mark.parametrize(
    ("model", "wishes", "message", "hint"),
    [
        ("lama-3.1-8b", {}, "no model in the catalog is called 'lama-3.1-8b'", "meta-llama/Llama"),
        ("", {}, "", "fitcheck models"),
        ("qwen2.5", {}, "could be any of", "fitcheck models qwen2.5"),
        (3, {}, "a model cannot be 3", "llama-3.1-8b"),
        ("qwen2.5-7b", {"gpu": "rtx 9999"}, "no GPU in the catalog", "fitcheck gpus"),
        ("qwen2.5-7b", {"gpu": ""}, "", "fitcheck gpus"),
        ("qwen2.5-7b", {"gpu": 4090}, "a GPU cannot be 4090", "rtx 4090"),
        ("qwen2.5-7b", {"reward_model": "skywrok"}, "no reward model", "Skywork"),
        ("qwen2.5-7b", {"critic": "nobody"}, "no reward model", "any model can score too"),
        ("qwen2.5-7b", {"batchsize": 4}, "a plan has no field 'batchsize'", "micro_batch"),
        ("qwen2.5-7b", {"memory": 24}, "memory is not that of a plan", "total_bytes"),
    ],
)
def test_unknown_names(model: Any, wishes: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(FitCheckError) as raised:
        check(model, **{"gpu": "4090", **wishes})
    assert message in raised.value.message
    assert hint in raised.value.hint


def test_an_unknown_model_names_the_nearest_three() -> None:
    with pytest.raises(FitCheckError) as raised:
        check("llama-3.1-8c")
    assert raised.value.hint.startswith("did you mean ")
    names = raised.value.hint.removeprefix("did you mean ").partition("?")[0]
    found = names.replace(" or ", ", ").split(", ")
    assert len(found) == 3
    assert all(catalog.find_model(name).id == name for name in found)


def test_an_architecture_that_is_not_covered() -> None:
    with pytest.raises(FitCheckError, match="the estimate does not cover") as raised:
        check("databricks/dbrx-base", gpu="4090", method="sft")
    assert "dbrx" in raised.value.message


# --- values as they are typed ---


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("batch", "8", 8),
        ("batch", "1_000", 1000),
        ("context", "32k", 32_768),
        ("context", "0.5k", 512),
        ("context", "1M", 2**20),
        ("ram", "64gib", 64 * 2**30),
        ("ram", "64 GB", 64 * 10**9),
        ("ram", "1.5 TiB", 3 * 2**39),
        ("ram", "68719476736", 2**36),
        ("gpus", "1", 1),
        ("checkpointing", "on", True),
        ("checkpointing", "off", False),
        ("rollout_memory", "0.4", 0.4),
        ("offload", "reference,reward", ("reference", "reward")),
        ("offload", "optimizer", ("optimizer",)),
        ("offload", "none", ()),
        ("offload", "", ()),
        ("lora_targets", "attention", "attention"),
        ("lora_targets", "q_proj", ("q_proj",)),
        ("lora_targets", "q_proj, v_proj", ("q_proj", "v_proj")),
        ("tuning", "lora", "lora"),
    ],
)
def test_parse(name: str, text: str, value: object) -> None:
    assert parse(name, text) == value


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("batch", "abc", "512 or 32k"),
        ("batch", "", "512 or 32k"),
        ("batch", "2.5", "a whole number"),
        ("batch", "1e99", "512 or 32k"),
        ("batch", "0x10", "512 or 32k"),
        ("batch", "inf", "512 or 32k"),
        ("batch", "8 apples", "512 or 32k"),
        ("batch", "٣", "512 or 32k"),
        ("batch", "9" * 5000, "512 or 32k"),
        ("context", "0.3k", "a whole number"),
        ("ram", "lots", "64gib"),
        ("gpus", "two", "such as 1"),
        ("checkpointing", "yes", "on, off"),
        ("rollout_memory", "half", "0.3"),
    ],
)
def test_what_cannot_be_parsed(name: str, text: str, hint: str) -> None:
    with pytest.raises(FitCheckError) as raised:
        parse(name, text)
    assert raised.value.message.startswith(f"--{name.replace('_', '-')} cannot be '")
    assert len(raised.value.message) < 80
    assert hint in raised.value.hint


def test_large_numbers_are_exact() -> None:
    assert parse("ram", "123456789012345678") == 123_456_789_012_345_678
    with pytest.raises(FitCheckError, match="--batch cannot be 1000000000000$"):
        check(gpu="4090", batch=parse("batch", "1000000000000"))


# --- plans that were stored: untrusted ---


def stored(**changes: Any) -> dict[str, Any]:
    plan = resolve("qwen2.5-7b", gpu="4090", method="ppo", tuning="lora").to_json()
    return {**json.loads(json.dumps(plan)), **changes}


def test_a_stored_plan_is_the_same_plan() -> None:
    plan = resolve(
        *("qwen2.5-7b",),
        **{"gpu": "a100 40", "tuning": "lora", "lora_targets": "q_proj,v_proj", "ram": 2**36},
        **{"offload": "reward", "reward_model": "Skywork/Skywork-Reward-V2-Llama-3.2-1B"},
    )
    back = plan_from(json.loads(json.dumps(plan.to_json())))
    assert back == plan
    assert back.memory == plan.memory


def test_a_live_cards_memory_is_kept() -> None:
    gpu = catalog.find_gpu("4090")
    memory = gpu.usable_memory(24 * 2**30, 500 * 2**20, 3 * 2**30)
    plan = resolve("qwen2.5-7b", gpu=gpu, memory=memory)
    assert plan_from(plan.to_json()).memory == memory


@pytest.mark.parametrize(
    "values",
    [
        None, [], "plan", 3, {}, {"model": None}, {"model": ["a"]}, {"model": {}},
        stored(model="no-such-model"),
        stored(gpu="no-such-card"),
        stored(gpu=["4090"]),
        stored(surprise=1),
        stored(given=["batch"]),
        stored(method=None, tuning=3),
        stored(method=["ppo"]),
        stored(batch="8"),
        stored(batch=1e99),
        stored(batch=[8]),
        stored(tuning={"a": 1}),
        stored(lora_targets={"q_proj": 1}),
        stored(lora_targets=[["q_proj"]]),
        stored(lora_targets=[1]),
        stored(lora_targets=5),
        stored(offload=5),
        stored(offload=[5]),
        stored(offload={"reward": True}),
        stored(checkpointing="on"),
        stored(reward_model=5),
        stored(reward_model={"id": "x"}),
        stored(critic=["reward"]),
        stored(ram="64gib"),
        stored(ram=1.5e10),
        stored(gpus="1"),
        stored(gpus=1.0),
        stored(memory=24),
        stored(memory={}),
        stored(memory={**stored()["memory"], "total_bytes": "24"}),
        stored(memory={**stored()["memory"], "total_bytes": -1}),
        stored(memory={**stored()["memory"], "total_bytes": 2**70}),
        stored(memory={**stored()["memory"], "estimated": 1}),
        stored(memory={**stored()["memory"], "extra": 1}),
    ],
    ids=lambda values: str(values)[-60:],
)  # fmt: skip
def test_what_is_no_plan(values: Any) -> None:
    with pytest.raises(FitCheckError) as raised:
        plan_from(values)
    assert raised.value.message
    assert raised.value.hint


# --- damage and odd machines ---


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"models": [3]}', b'{"models": [{"id": "a/b-8b"}]}', None],
)
def test_a_damaged_catalog(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    if content is not None:
        (tmp_path / "models/index.json").write_bytes(content)
    monkeypatch.setattr(files, "ROOT", str(tmp_path))
    catalog.read.cache_clear()
    try:
        with pytest.raises(FitCheckError) as raised:
            check("a/b-8b", gpu="4090")
        assert raised.value.hint
    finally:
        catalog.read.cache_clear()


def test_a_machine_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver, no readable /proc or /sys: an empty pretended card, and it says so."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    for name in ("open", "read_text", "read_bytes", "iterdir"):
        monkeypatch.setattr(Path, name, refuse)
    closed = System(platform="linux", run=refuse, nvml=refuse, psutil=refuse)
    found = DETECT(closed)
    monkeypatch.setattr(machine, "detect", lambda: found)
    monkeypatch.setattr(machine, "best", BEST)
    assert found.accelerators == ()
    fields, said = answer.this_machine()
    assert fields["gpu"].name == PRETENDED
    assert "no GPU was found here" in said


def test_the_freest_card_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = catalog.find_gpu("3090")
    usable = gpu.usable_memory(24 * 2**30, 300 * 2**20, 2**30)

    class Card:
        name, card = "NVIDIA GeForce RTX 3090", gpu

    class Found:
        ram, accelerators = None, (Card, Card)

    Card.usable = usable  # type: ignore[attr-defined]
    monkeypatch.setattr(machine, "detect", lambda: Found)
    monkeypatch.setattr(machine, "best", lambda found: Card)
    report = check("qwen2.5-0.5b", method="inference")
    assert report.usable_bytes == usable.usable_bytes
    assert report.plan.ram is None
    assert "the freest of 2 cards" in report.notes[0]


def test_every_knob_parses_something() -> None:
    texts = {"int": "1", "flag": "on", "share": "0.5"}
    for name, knob in KNOBS.items():
        choices = knob["choices"] or (texts[knob["kind"]],)
        assert parse(name, choices[0]) is not None
