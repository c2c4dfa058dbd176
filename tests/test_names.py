"""Finding models, reward models and GPUs by the names that people and drivers give them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fitcheck import catalog
from fitcheck.errors import FitCheckError
from fitcheck.gpu import GIB, MIB
from fitcheck.names import CardName, card_names, squeeze

GPU_ROWS = list(catalog.gpu_rows())
MODEL_IDS = {entry["id"] for entry in catalog.model_entries()}


def name_of(row: dict[str, Any]) -> str:
    return str(row["id"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("rtx4060ti-16gb", "RTX 4060 Ti 16 GB"),
        ("NVIDIA A100-SXM4-80GB", "nvidia a100 sxm 80g"),
        ("4090 Notebook", "4090 Laptop GPU"),
        ("Intel(R) Arc(TM) A770 Graphics", "intel arc a770"),
        ("Apple M3 Max (40-core GPU)", "apple m3 max 40 cores"),
    ],
)
def test_spellings_of_one_card_compare_equal(one: str, other: str) -> None:
    assert CardName.of(one) == CardName.of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("4070 ti", "4070"), ("4090", "4090 laptop"), ("gb200", "b200"), ("a10", "a10g")],
)
def test_different_cards_do_not(one: str, other: str) -> None:
    assert CardName.of(one).words != CardName.of(other).words


def test_separators_are_no_part_of_a_name() -> None:
    assert squeeze("Llama-3.1_8B") == squeeze("llama 3.1:8b")


def test_every_model_is_found_by_its_id_and_name() -> None:
    for entry in catalog.model_entries():
        assert catalog.find_model(entry["id"].upper()).id == entry["id"]
        assert catalog.find_model(entry["id"].partition("/")[2]).id == entry["id"]


@pytest.mark.parametrize(
    ("text", "identity"),
    [
        ("llama 3.1 8b", "meta-llama/Llama-3.1-8B"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("Llama_3_1_8B", "meta-llama/Llama-3.1-8B"),
        ("llama3.1:8b", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("Llama 3.1 8B instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("llama 3.1 8b chat", "meta-llama/Llama-3.1-8B-Instruct"),
        ("llama 3 8b", "meta-llama/Meta-Llama-3-8B"),
        ("llama 2 7b", "meta-llama/Llama-2-7b-hf"),
        ("llama 3.3 70b", "meta-llama/Llama-3.3-70B-Instruct"),  # there is no base
        ("qwen3-8b", "Qwen/Qwen3-8B"),
        ("qwen 3 8b base", "Qwen/Qwen3-8B-Base"),
        ("qwen3 30b", "Qwen/Qwen3-30B-A3B"),
        ("qwen2.5 coder 7b", "Qwen/Qwen2.5-Coder-7B-Instruct"),
        ("qwq", "Qwen/QwQ-32B"),
        ("gemma 3 4b", "google/gemma-3-4b-pt"),
        ("gemma 2 9b instruct", "google/gemma-2-9b-it"),
        ("google gemma 2 9b", "google/gemma-2-9b"),
        ("mistral 7b", "mistralai/Mistral-7B-v0.3"),  # the newest of three
        ("mixtral 8x7b", "mistralai/Mixtral-8x7B-v0.1"),
        ("mistral nemo", "mistralai/Mistral-Nemo-Base-2407"),
        ("olmo 2 7b", "allenai/OLMo-2-1124-7B"),
        ("tulu 3 8b", "allenai/Llama-3.1-Tulu-3-8B"),
        ("r1 distill qwen 7b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
        ("deepseek r1", "deepseek-ai/DeepSeek-R1"),
        ("phi 1.5", "microsoft/phi-1_5"),
        ("phi-4 mini", "microsoft/Phi-4-mini-instruct"),
        ("gpt-2", "openai-community/gpt2"),
        ("gpt neo 1.3b", "EleutherAI/gpt-neo-1.3B"),
        ("pythia 1b", "EleutherAI/pythia-1b"),
        ("tinyllama", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"),
        ("SmolLM2 135M", "HuggingFaceTB/SmolLM2-135M"),
        ("opt 1.3b", "facebook/opt-1.3b"),
        ("opt 13b", "facebook/opt-13b"),
    ],
)
def test_a_model_by_a_loose_name(text: str, identity: str) -> None:
    assert catalog.find_model(text).id == identity


@pytest.mark.parametrize(
    ("text", "identity"),
    [
        ("skywork reward v2 llama 3.1 8b", "Skywork/Skywork-Reward-V2-Llama-3.1-8B"),
        ("skywork v2 qwen3 0.6b", "Skywork/Skywork-Reward-V2-Qwen3-0.6B"),
        ("armorm", "RLHFlow/ArmoRM-Llama3-8B-v0.1"),
        ("tulu 3 8b rm", "allenai/Llama-3.1-Tulu-3-8B-RM"),
        ("pythia 1b tldr", "trl-lib/pythia-1b-deduped-tldr-rm"),
    ],
)
def test_a_reward_model_by_a_loose_name(text: str, identity: str) -> None:
    assert catalog.find_reward_model(text).id == identity


@pytest.mark.parametrize("text", ["llama", "gemma", "qwen 7b", "llama 8b", "8b", "instruct", "gpt"])
def test_a_vague_name_is_refused(text: str) -> None:
    with pytest.raises(FitCheckError, match="could be any of") as raised:
        catalog.find_model(text)
    assert f"`fitcheck models {text}`" in raised.value.hint
    named = [identity for identity in MODEL_IDS if f"{identity}" in raised.value.hint]
    assert len(named) >= 2


def test_a_vague_reward_model_is_refused() -> None:
    with pytest.raises(FitCheckError, match="could be any of 2 reward models"):
        catalog.find_reward_model("skywork v2 8b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lama 3.1 8b", "meta-llama/Llama-3.1-8B"),
        ("qwen33 8b", "Qwen/Qwen3-32B"),
        ("", "openai-community/gpt2"),
        ("zzz", None),
    ],
)
def test_an_unknown_model_names_the_nearest_three(text: str, expected: str | None) -> None:
    with pytest.raises(FitCheckError, match="no model in the catalog is called") as raised:
        catalog.find_model(text)
    near = re.fullmatch(r"did you mean (.+), (.+) or (.+)\? .*", raised.value.hint)
    assert near
    assert set(near.groups()) <= MODEL_IDS
    assert len(set(near.groups())) == 3
    assert expected is None or expected in near.groups()


@pytest.mark.parametrize(
    ("text", "identity"),
    [
        ("4090", "nvidia-geforce-rtx-4090"),
        ("rtx 4090", "nvidia-geforce-rtx-4090"),
        ("RTX4090 24GB", "nvidia-geforce-rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("4090d", "nvidia-geforce-rtx-4090-d"),
        ("4090 laptop", "nvidia-geforce-rtx-4090-laptop-gpu"),
        ("4090 mobile", "nvidia-geforce-rtx-4090-laptop-gpu"),
        ("RTX 5090 Laptop GPU", "nvidia-geforce-rtx-5090-laptop-gpu"),
        ("3060", "nvidia-geforce-rtx-3060-12gb"),
        ("3060 12gb", "nvidia-geforce-rtx-3060-12gb"),
        ("3060 12", "nvidia-geforce-rtx-3060-12gb"),
        ("rtx 3060 8 GB", "nvidia-geforce-rtx-3060-8gb"),
        ("4060 ti 16gb", "nvidia-geforce-rtx-4060-ti-16gb"),
        ("4060ti", "nvidia-geforce-rtx-4060-ti-8gb"),
        ("4060", "nvidia-geforce-rtx-4060"),
        ("4070 ti super", "nvidia-geforce-rtx-4070-ti-super"),
        ("4070 ti", "nvidia-geforce-rtx-4070-ti"),
        ("1660 super", "nvidia-geforce-gtx-1660-super"),
        ("h100", "nvidia-h100-sxm5-80gb"),
        ("h100 80", "nvidia-h100-sxm5-80gb"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-sxm5-80gb"),
        ("h100 pcie", "nvidia-h100-pcie-80gb"),
        ("h100 nvl", "nvidia-h100-nvl-94gb"),
        ("h100 94gb", "nvidia-h100-nvl-94gb"),
        ("a100", "nvidia-a100-sxm4-80gb"),
        ("a100 40", "nvidia-a100-sxm4-40gb"),
        ("A100-SXM4-80GB", "nvidia-a100-sxm4-80gb"),
        ("NVIDIA A100 80GB PCIe", "nvidia-a100-pcie-80gb"),
        ("h200", "nvidia-h200-sxm-141gb"),
        ("b200 192gb", "nvidia-b200"),  # as it is sold; its driver shows less
        ("gb200", "nvidia-gb200"),
        ("gh200", "nvidia-gh200-96gb"),
        ("v100", "tesla-v100-sxm2-16gb"),
        ("v100 32gb", "tesla-v100-sxm2-32gb"),
        ("t4", "tesla-t4"),
        ("l40s", "nvidia-l40s"),
        ("a6000", "nvidia-rtx-a6000"),
        ("rtx 6000 ada", "nvidia-rtx-6000-ada-generation"),
        ("rtx pro 6000", "nvidia-rtx-pro-6000-blackwell-workstation-edition"),
        ("pro 6000 max-q", "nvidia-rtx-pro-6000-blackwell-max-q-workstation-edition"),
        ("dgx spark", "nvidia-gb10-dgx-spark"),
        ("jetson agx orin 64gb", "nvidia-jetson-agx-orin-64gb"),
        ("mi300x", "amd-instinct-mi300x"),
        ("7900 xtx", "amd-radeon-rx-7900-xtx"),
        ("7900xtx", "amd-radeon-rx-7900-xtx"),
        ("w7800 48", "amd-radeon-pro-w7800-48gb"),
        ("strix halo", "amd-radeon-8060s-ryzen-ai-max-395-strix-halo"),
        ("arc a770", "intel-arc-a770-16gb"),
        ("gaudi 3", "intel-gaudi-3-128gb"),
        ("m1", "apple-m1-8-core-gpu"),
        ("m3 max", "apple-m3-max-40-core-gpu"),
        ("m3 max 30-core", "apple-m3-max-30-core-gpu"),
        ("m3 max 40", "apple-m3-max-40-core-gpu"),
        ("m3 max 64gb", "apple-m3-max-40-core-gpu-64gb"),
        ("m3 max 36", "apple-m3-max-30-core-gpu-36gb"),
        ("4090 48gb", "nvidia-geforce-rtx-4090-48gb"),
    ],
)
def test_a_gpu_by_a_loose_name(text: str, identity: str) -> None:
    gpu = catalog.find_gpu(text)
    assert gpu.id == identity
    assert catalog.find_gpu(gpu.id).memory_gib == gpu.memory_gib  # an id means its card for ever


@pytest.mark.parametrize("row", GPU_ROWS, ids=name_of)
def test_every_name_of_a_card_finds_it_or_a_namesake(row: dict[str, Any]) -> None:
    assert catalog.find_gpu(row["id"]).id == row["id"]
    assert catalog.find_gpu(row["name"]).id == row["id"]
    for alias in row.get("aliases", ()):
        sharing = {other["id"] for other in GPU_ROWS if alias in card_names(other)}
        try:
            gpu = catalog.find_gpu(alias)
        except FitCheckError as error:
            assert len(sharing) > 1, alias
            assert "could be any of" in error.message
            continue
        assert gpu.id in sharing
        if len(sharing) > 1:
            assert gpu.assumed
        elif not gpu.memory_options_gib:
            assert gpu.assumed == ""


def test_a_live_total_tells_namesakes_apart() -> None:
    for row in GPU_ROWS:
        if row["vendor"] == "apple":
            continue  # chips with more or fewer cores, and the same memory
        total = row.get("total_bytes") or int(row["memory_gib"] * GIB)
        for alias in card_names(row):
            gpu = catalog.find_gpu(alias, total)
            assert gpu.id == row["id"], alias
            assert gpu.total_bytes == total
            assert gpu.total_verified
            assert gpu.assumed == ""


def test_a_modded_card_keeps_its_rates_and_gets_its_memory() -> None:
    stock, modded = (
        catalog.find_gpu("3090"),
        catalog.find_gpu("NVIDIA GeForce RTX 3090", 49140 * MIB),
    )
    assert (modded.memory_gib, modded.total_bytes) == (48, 49140 * MIB)
    assert modded.name == "NVIDIA GeForce RTX 3090 48GB"
    assert modded.bandwidth_gbs == stock.bandwidth_gbs


def test_a_pretended_size_forgets_the_total_of_another() -> None:
    assert catalog.find_gpu("4090").total_bytes == 24564 * MIB
    modded = catalog.find_gpu("4090 48gb")
    assert modded.total_bytes is None
    assert "memory" in modded.doubt


def test_a_mac_is_told_by_its_ram() -> None:
    mac = catalog.find_gpu("Apple M3 Max", 64 * GIB)
    assert mac.name == "Apple M3 Max (40-core GPU) 64GB"
    assert catalog.find_gpu("Apple M3 Max", 36 * GIB).gpu_cores == 30


def test_what_was_assumed_is_said() -> None:
    assert catalog.find_gpu("3060").name == "NVIDIA GeForce RTX 3060 12GB"
    assert catalog.find_gpu("3060").assumed == (
        "'3060' can be NVIDIA GeForce RTX 3060 12GB or NVIDIA GeForce RTX 3060 8GB"
    )
    assert "NVIDIA H100 NVL 94GB" in catalog.find_gpu("h100").assumed
    assert "36 or 96 GB" in catalog.find_gpu("m3 max").assumed
    assert catalog.find_gpu("4090").assumed == ""


def test_a_desktop_name_never_means_a_laptop_nor_the_reverse() -> None:
    names = [row["name"] for row in GPU_ROWS if row["segment"] == "geforce"]
    assert names
    for name in names:
        assert not catalog.find_gpu(name).laptop
        try:
            assert catalog.find_gpu(f"{name} laptop").laptop
        except FitCheckError:
            continue  # no laptop has that card


@pytest.mark.parametrize("text", ["4050", "3050 4gb", "a770 laptop", "3090 laptop"])
def test_what_exists_only_as_the_other_kind_is_not_found(text: str) -> None:
    with pytest.raises(FitCheckError):
        catalog.find_gpu(text)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("4050", "NVIDIA GeForce RTX 4050 Laptop GPU"),
        ("gtx 4090", "NVIDIA GeForce RTX 4090"),
        ("rtx 9999", "RTX"),
        ("", ""),
    ],
)
def test_an_unknown_gpu_names_the_nearest_three(text: str, near: str) -> None:
    with pytest.raises(FitCheckError, match="no GPU in the catalog is called") as raised:
        catalog.find_gpu(text)
    names = re.fullmatch(r"did you mean (.+), (.+) or (.+)\? .*", raised.value.hint)
    assert names
    assert near in raised.value.hint
    assert set(names.groups()) <= {row["name"] for row in GPU_ROWS}


@pytest.mark.parametrize("text", ["rtx 6000", "orin", "pro"])
def test_different_cards_of_one_name_are_refused(text: str) -> None:
    with pytest.raises(FitCheckError, match="could be any of"):
        catalog.find_gpu(text)


def test_a_size_that_was_never_made_names_those_that_were() -> None:
    with pytest.raises(FitCheckError, match="the catalog has no '4090 32gb'") as raised:
        catalog.find_gpu("4090 32gb")
    assert raised.value.hint == "there is NVIDIA GeForce RTX 4090 (24 or 48 GB)"
