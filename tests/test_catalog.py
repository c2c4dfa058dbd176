"""The catalog's rows: sources, possible numbers, links; and how its files are read."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fitcheck import catalog, files
from fitcheck.errors import FitCheckError
from fitcheck.gpu import GIB, GPU
from fitcheck.names import CardName
from fitcheck.plan import KNOBS, METHODS, Plan
from fitcheck.records import RewardModel

DATA = Path(__file__).parent.parent / "catalog"
GPU_ROWS = [
    row
    for vendor in catalog.VENDORS
    for row in json.loads((DATA / f"gpus/{vendor}.json").read_text(encoding="utf-8"))["gpus"]
]
REWARDS = json.loads((DATA / "reward_models.json").read_text(encoding="utf-8"))["reward_models"]
PRICES = json.loads((DATA / "clouds.json").read_text(encoding="utf-8"))["prices"]
MODEL_IDS = {entry["id"] for entry in catalog.model_entries()}
# Encoders, whose sizes the catalog of language models does not have.
NOT_IN_CATALOG = {"google/flan-t5-large", "google/flan-t5-xl", "microsoft/deberta-v3-large"}


def name_of(row: dict[str, Any]) -> str:
    return str(row["id"])


# Rows


def test_every_file_is_known_and_every_id_unique() -> None:
    names = {path.name for path in (DATA / "gpus").iterdir()}
    assert names == {f"{vendor}.json" for vendor in catalog.VENDORS}
    ids = Counter(row["id"] for row in [*GPU_ROWS, *REWARDS])
    assert [name for name, times in ids.items() if times > 1] == []
    assert len(GPU_ROWS) >= 238
    assert len(REWARDS) >= 106


def test_every_row_says_where_it_is_from() -> None:
    for row in [*GPU_ROWS, *REWARDS, *catalog.rows("methods.json", "methods")]:
        assert row["sources"], row["id"]
        assert all(isinstance(source, str) and len(source) > 3 for source in row["sources"])
        assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", row["checked"]), row["id"]


@pytest.mark.parametrize("row", GPU_ROWS, ids=name_of)
def test_the_numbers_of_a_gpu_are_possible(row: dict[str, Any]) -> None:
    gpu = GPU.from_json(row)
    for field in fields(gpu):
        value = getattr(gpu, field.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert value > 0, field.name
    assert set(gpu.unverified) <= {field.name for field in fields(gpu)}
    assert gpu.total_verified <= (gpu.total_bytes is not None)
    assert ("total_bytes" in gpu.unverified) == (gpu.total_bytes is not None) - gpu.total_verified
    if gpu.total_bytes:  # ECC in GDDR takes a sixteenth; nothing adds memory
        assert 0.93 <= gpu.total_bytes / (gpu.memory_gib * GIB) <= 1.02
    assert (gpu.compute_capability is not None) == (gpu.vendor == "nvidia")
    assert (gpu.gfx is not None) == (gpu.vendor == "amd")
    assert gpu.unified_memory or gpu.segment not in ("apple", "unified", "jetson")
    assert gpu.memory_gib in gpu.memory_options_gib or not gpu.memory_options_gib
    assert gpu.bandwidth_gbs
    if gpu.bf16_dense_tflops and gpu.fp16_dense_tflops:  # as fast, or half of it on MI100
        assert gpu.bf16_dense_tflops <= 1.01 * gpu.fp16_dense_tflops
    if gpu.release:
        assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", gpu.release)


def test_compute_capability_75_does_not_mean_tensor_cores() -> None:
    assert not catalog.find_gpu("gtx 1650").tensor_cores
    assert catalog.find_gpu("t4").tensor_cores
    assert not catalog.find_gpu("t4").bf16_native


def test_the_ranks_of_namesakes_decide_every_plain_name() -> None:
    namesakes = defaultdict(list)
    for row in GPU_ROWS:
        namesakes[CardName.of(row["name"]).words].append(row)
    for rows in namesakes.values():
        ranks = [row.get("usual") for row in rows]
        if len(rows) == 1:
            assert ranks == [None], rows[0]["id"]
        else:
            assert ranks.count(1) == 1, [row["id"] for row in rows]
            assert ranks.count(None) <= 1, [row["id"] for row in rows]


def test_every_reward_model_stands_on_a_model() -> None:
    rewards = {row["id"] for row in REWARDS}
    for row in REWARDS:
        reward = RewardModel.from_json(row)
        assert reward.root_base_model in MODEL_IDS | NOT_IN_CATALOG, reward.id
        assert reward.base_model in MODEL_IDS | NOT_IN_CATALOG | rewards, reward.id
        assert reward.params > 0


@pytest.mark.parametrize(
    "row",
    [
        row
        for row in REWARDS
        if row["head"].startswith("sequence classifier (num_labels=1")
        and row["root_base_model"] in MODEL_IDS
    ],
    ids=name_of,
)
def test_a_reward_models_size_follows_from_its_base(row: dict[str, Any]) -> None:
    base = catalog.architecture(RewardModel.from_json(row))
    assert base.id == row["id"]
    own_vocabulary = {"nvidia/Qwen2.5-CascadeRL-RM-72B": -399 * 8192}.get(row["id"], 0)
    assert base.backbone_params + base.score_head_params + own_vocabulary == row["params"]


def test_a_reward_model_on_an_encoder_has_no_known_architecture() -> None:
    with pytest.raises(FitCheckError, match="deberta-v3-large, whose sizes are not in the catalog"):
        catalog.architecture(catalog.find_reward_model("deberta"))


def test_every_cloud_price_is_dated_and_for_a_known_gpu() -> None:
    cards = {row["id"] for row in GPU_ROWS}
    for price in PRICES:
        where = f"{price['cloud']} {price['instance']}"
        assert price["gpu_id"] in cards, where
        assert price["source"], where
        hourly = price["usd_per_gpu_hour"] * price["gpu_count"]
        assert hourly == pytest.approx(price["usd_per_hour"], rel=1e-3), where
        dated = re.fullmatch(r"20\d\d-\d\d(-\d\d)?", price["as_of"]) is not None
        assert dated == price["date_is_exact"], where


def test_the_catalog_loads_whole() -> None:
    assert len(catalog.gpus()) == len(GPU_ROWS)
    assert len(catalog.reward_models()) == len(REWARDS)
    assert len(catalog.clouds()) == len(PRICES)
    assert {model.id for model in catalog.models()} == MODEL_IDS


# Methods


def test_there_is_a_row_for_every_method() -> None:
    assert tuple(method.id for method in catalog.methods()) == METHODS


@pytest.mark.parametrize("method", catalog.methods(), ids=lambda method: method.id)
def test_a_methods_defaults_are_those_of_a_plan(method: Any) -> None:
    qwen, gpu = catalog.find_model("qwen3-0.6b"), catalog.find_gpu("4090")
    tunings = ("full",) if method.id == "inference" else ("full", "lora", "qlora")
    for tuning in tunings:
        knobs = {} if method.id == "inference" else {"tuning": tuning}
        plan = Plan(model=qwen, gpu=gpu, method=method.id, **knobs)
        for name, default in method.defaults.items():
            assert method.id in KNOBS[name]["methods"], name
            actual = getattr(plan, name)
            if name == "tuning" or (tuning == "full" and name.startswith(("lora_", "adapter_"))):
                continue
            if isinstance(default, dict):
                default = default[tuning]
            elif isinstance(default, str) and default.startswith("= "):
                default = getattr(plan, default[2:])
            assert actual == (tuple(default) if isinstance(default, list) else default), name


def test_who_trains_in_each_method() -> None:
    trained = {
        method.id: {role.role for role in method.roles if role.trained}
        for method in catalog.methods()
    }
    assert trained == {
        "ppo": {"policy", "critic"},
        "inference": set(),
        "sft": {"policy"},
        "reward": {"reward"},
        "dpo": {"policy"},
        "grpo": {"policy"},
    }


def test_every_method_cites_a_paper() -> None:
    for method in catalog.methods():
        assert method.description
        assert method.papers
        for paper in method.papers:
            assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
            assert 0 <= paper.year - 2000 - int(paper.arxiv[:2]) <= 1


def test_every_term_of_the_glossary_has_a_source() -> None:
    terms = catalog.rows("glossary.json", "terms")
    assert [row["term"] for row in terms] == sorted((row["term"] for row in terms), key=str.lower)
    assert all(row["meaning"] and row["source"] and row["checked"] for row in terms)


# Reading


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty catalog folder that takes the place of the real one."""
    monkeypatch.setattr(files, "ROOT", tmp_path)
    catalog.read.cache_clear()
    yield tmp_path
    catalog.read.cache_clear()


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The names of the files that are read from here on."""
    names: list[str] = []

    def spy(path: str, mode: str) -> Any:
        names.append(Path(path).relative_to(catalog.ROOT).as_posix())
        return Path(path).open(mode)

    monkeypatch.setattr(files, "open", spy, raising=False)
    catalog.read.cache_clear()
    yield names
    catalog.read.cache_clear()


def test_finding_a_model_reads_the_index_and_one_family(files_read: list[str]) -> None:
    catalog.find_model("qwen3-8b")
    assert files_read == ["models/index.json", "models/qwen3.json"]
    catalog.find_model("qwen3-0.6b")
    assert len(files_read) == 2


def test_finding_a_gpu_stops_at_its_vendor(files_read: list[str]) -> None:
    catalog.find_gpu("rtx 4090")
    assert files_read == ["gpus/nvidia.json"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{", "Expecting property name"),
        (b'"\xff"', "codec"),
        (b"[]", "not a JSON object"),
        (b'{"gpus": {}}', "no list of rows named 'gpus'"),
        (None, "No such file"),
    ],
)
def test_a_damaged_file_is_named(copied: Path, content: bytes | None, fault: str) -> None:
    if content is not None:
        (copied / "gpus").mkdir()
        (copied / "gpus/nvidia.json").write_bytes(content)
    with pytest.raises(FitCheckError, match=r"gpus.nvidia\.json is damaged") as raised:
        catalog.find_gpu("4090")
    assert fault in raised.value.message
    assert "reinstall" in raised.value.hint


def test_an_index_ahead_of_its_family_is_damage(copied: Path) -> None:
    (copied / "models").mkdir()
    entry = {"id": "a/b-1b", "family": "f", "file": "f.json", "params": 1}
    (copied / "models/index.json").write_text(json.dumps({"models": [entry]}))
    (copied / "models/f.json").write_text(json.dumps({"models": []}))
    with pytest.raises(FitCheckError, match="no model a/b-1b, which the index places there"):
        catalog.find_model("a/b-1b")


def test_a_malformed_row_is_named() -> None:
    with pytest.raises(FitCheckError, match="'x/y' is malformed"):
        RewardModel.from_json({"id": "x/y"})
    with pytest.raises(FitCheckError, match="'x/y' is malformed"):
        RewardModel.from_json({**REWARDS[0], "id": "x/y", "surprise": 1})
