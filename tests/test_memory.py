"""Weights, gradients, optimizer states and the allocator's rounding, against numbers by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fitcheck import accuracy, catalog, memory, shards
from fitcheck.answer import plan_from
from fitcheck.errors import FitCheckError
from fitcheck.kernels import cublas_workspace
from fitcheck.memory import Role
from fitcheck.model import Model
from fitcheck.roles import roles

MIB = 2**20


@pytest.fixture(scope="module")
def llama() -> Model:
    return catalog.find_model("llama-3.1-8b")


def total(sizes: memory.Sizes) -> int:
    return memory.total(sizes)


# --- what stays ---


@pytest.mark.parametrize(
    ("weight", "master", "states"),
    [(4, False, 8), (2, False, 4), (2, True, 12)],
    ids=["bf16-mixed", "bf16", "bf16-master"],
)
def test_adamw_by_regime(llama: Model, weight: int, master: bool, states: int) -> None:
    """Mixed: 4 + 4 + 8 = 16 B a parameter; plain bf16 2 + 2 + 4; master 2 + 2 + 4 + 8."""
    role = Role("policy", llama, weight, "full")
    params = 8_030_261_248
    assert total(memory.weight_sizes(role)) == weight * params
    assert total(memory.gradient_sizes(role)) == weight * params
    assert total(memory.state_sizes(role, "adamw", master, paged=False)) == states * params


@pytest.mark.parametrize(
    ("optimizer", "per_parameter"),
    [
        ("adamw-fused", 8),
        ("lion", 4),  # bitsandbytes: fp32
        ("sgd", 0),
        # 1 + 1 B, and two fp32 scales a block of 256; norms (4 096 elements) too
        ("adamw-8bit", 2 + 2 * 4 / 256),
    ],
)
def test_optimizer_states(llama: Model, optimizer: str, per_parameter: float) -> None:
    role = Role("policy", llama, 4, "full")
    states = total(memory.state_sizes(role, optimizer, False, paged=False))
    assert states == per_parameter * llama.params


def test_small_tensors_keep_32_bit_states(llama: Model) -> None:
    """bitsandbytes' min_8bit_size is 4 096 elements: a narrower model's norms stay in fp32."""
    narrow = replace(llama, hidden_size=64, num_attention_heads=4, head_dim=16)
    role = Role("policy", narrow, 4, "full")
    states = memory.state_sizes(role, "adamw-8bit", False, paged=False)
    assert (4 * 64, llama.num_layers) in states  # input_layernorm, first moment


def test_adafactor_keeps_a_row_and_a_column(llama: Model) -> None:
    role = Role("policy", llama, 4, "full")
    states = total(memory.state_sizes(role, "adafactor", False, paged=False))
    h, kv, f, v, layers = 4096, 1024, 14336, 128_256, 32
    matrices = 2 * (h + h) + 2 * (kv + h) + 3 * (f + h)  # q, o; k, v; gate, up, down
    assert states == 4 * (layers * matrices + 2 * (v + h) + (2 * layers + 1) * h)


def test_muon_takes_the_matrices_of_the_blocks(llama: Model) -> None:
    role = Role("policy", llama, 2, "full")
    states = total(memory.state_sizes(role, "muon", False, paged=False))
    norms, tables = (2 * 32 + 1) * 4096, 2 * 128_256 * 4096
    assert states == 2 * (llama.params - norms - tables) + 4 * (norms + tables)


def test_paged_states_are_the_large_ones(llama: Model) -> None:
    """bitsandbytes pages states of 100 000 elements and more; norms stay on the card."""
    role = Role("policy", llama, 4, "full")
    optimizer = "paged-adamw-8bit"
    paged = total(memory.state_sizes(role, optimizer, False, paged=True))
    held = total(memory.state_sizes(role, optimizer, False, paged=False))
    norms = (2 * 32 + 1) * 4096
    assert held == pytest.approx(2.03125 * norms)
    assert paged + held == total(memory.state_sizes(role, "adamw-8bit", False, paged=False))


def test_lora_trains_rank_times_inputs_and_outputs(llama: Model) -> None:
    role = Role("policy", llama, 2, "lora", adapter=4, rank=16)
    sides = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    parameters = 16 * 32 * sides
    assert parameters == 41_943_040
    assert total(memory.adapter_sizes(role)) == 4 * parameters
    assert total(memory.gradient_sizes(role)) == 4 * parameters
    assert total(memory.state_sizes(role, "adamw", False, paged=False)) == 8 * parameters
    assert total(memory.weight_sizes(role)) == 2 * llama.params


@pytest.mark.parametrize(
    ("targets", "sides"),
    [
        ("attention", 2 * (4096 + 4096) + 2 * (4096 + 1024)),
        (("q_proj", "v_proj"), 4096 + 4096 + 4096 + 1024),
        (("down_proj",), 4096 + 14336),
    ],
)
def test_lora_targets(llama: Model, targets: str | tuple[str, ...], sides: int) -> None:
    role = Role("policy", llama, 2, "lora", adapter=2, rank=8, targets=targets)
    assert total(memory.adapter_sizes(role)) == 2 * 8 * 32 * sides


def test_the_score_head_replaces_the_lm_head(llama: Model) -> None:
    head = 128_256 * 4096
    reward = Role("reward", llama, 2, head="score")
    assert total(memory.weight_sizes(reward)) == 2 * (llama.params - head + 4096)
    value = Role("policy", llama, 2, head="value")
    assert total(memory.weight_sizes(value)) == 2 * (llama.params + 4096)
    frozen = Role("reward", llama, 2, head="score")
    assert memory.gradient_sizes(frozen) == []


def test_an_adapter_on_the_policys_base_holds_only_itself(llama: Model) -> None:
    role = Role("critic", llama, 2, "lora", head="score", base=False, adapter=4, rank=16)
    assert total(memory.weight_sizes(role)) == 4 * 4096
    assert total(memory.gradient_sizes(role)) == 4 * (41_943_040 + 4096)


def test_towers_have_weights_but_no_gradients() -> None:
    seeing = catalog.find_model("Qwen/Qwen2.5-VL-7B-Instruct")
    role = Role("policy", seeing, 2, "full")
    weights, gradients = total(memory.weight_sizes(role)), total(memory.gradient_sizes(role))
    assert seeing.params_vision_audio
    assert weights - gradients == 2 * seeing.params_vision_audio


def test_nf4_stores_half_a_byte_and_its_scales() -> None:
    """4 096 x 4 096: 8 MiB, a byte a block of 64, fp32 a block of 256 of these, mean, 16 values."""
    assert memory.stored_sizes((4096, 4096), 2, "nf4") == (8 * MIB, 2**18, 4 * 2**10, 4, 64)
    assert memory.stored_sizes((4096, 1024), 2, "int8") == (4 * MIB, 4 * 4096)
    assert memory.stored_sizes((4096, 1024), 2, "plain") == (8 * MIB,)


STEADY = [
    pytest.param(run, id=f"{run['id']}-{run['plan']['model']}")
    for _, run in accuracy.rows("runs")
    if "steady_bytes" in run["measured"]
]


@pytest.mark.parametrize("run", STEADY)
def test_what_stays_between_steps_as_measured(run: dict[str, object]) -> None:
    """torch.cuda.memory_allocated between two steps: weights, adapters, states, workspaces.

    FSDP's flat gradients are set to none at the next forward only (_flat_param.py,
    _reset_flat_param_grad_info_if_needed), so that of two cards each has its half of them too.
    """
    plan = plan_from(run["plan"])  # type: ignore[arg-type]
    role = roles(plan)["policy"]
    split = [*memory.adapter_sizes(role), *memory.state_sizes(role, plan.optimizer, False, False)]
    if plan.gpus > 1:
        split += memory.gradient_sizes(role)
    sizes = [
        *memory.weight_sizes(role, plan.gpus),
        *shards.split(split, plan.gpus, flat=False),
    ]
    predicted = total(sizes) + memory.rounding(sizes)[0] + 2 * cublas_workspace(plan.gpu)
    measured = run["measured"]["steady_bytes"]  # type: ignore[index]
    assert predicted == pytest.approx(measured, rel=0.002)


# --- the allocator ---


@pytest.mark.parametrize(
    ("size", "counted", "cached"),
    [
        (1, 511, 0),  # a block is 512 B at least
        (512, 0, 0),
        (513, 511, 0),
        (10 * MIB - 512, 0, 0),  # shares a segment of 20 MiB
        (10 * MIB, 0, 0),  # from here on a segment of its own, a multiple of 2 MiB
        (10 * MIB + 1, 511, 2 * MIB - 512),  # the rest is above 1 MiB: split off, reserved only
        (11 * MIB, MIB, 0),  # the rest of 1 MiB is not split off
        (11 * MIB - 512, 0, MIB + 512),
        (12 * MIB - 1, 1, 0),
    ],
)
def test_rounding(size: int, counted: int, cached: int) -> None:
    assert memory.rounding([(size, 1)]) == (counted, cached)
    assert memory.rounding([(size, 3)]) == (3 * counted, 3 * cached)


# --- the KV cache ---


def test_kv_cache_of_llama(llama: Model) -> None:
    """2 x 32 layers x 8 heads x 128 = 65 536 elements a token: 128 KiB in bf16."""
    assert memory.kv_cache(llama, 1, 1, 2) == 131_072
    assert memory.kv_cache(llama, 8, 32_768, 2) == 8 * 32_768 * 131_072
    assert memory.kv_cache(llama, 1, 32, memory.KV_BYTES["q8_0"]) == 65_536 * 34  # blocks of 32


def test_a_window_bounds_the_cache() -> None:
    gemma = catalog.find_model("gemma-2-9b")
    groups = gemma.kv_cache_groups
    assert groups is not None
    windows = {group.window for group in groups}
    assert windows == {None, 4096}
    short, long = (memory.kv_cache(gemma, 1, n, 2) for n in (4096, 8192))
    full = next(group for group in groups if group.window is None)
    assert long - short == 2 * 4096 * full.elems_per_token


def test_an_unknown_cache_is_an_error() -> None:
    unknown = next(m for m in catalog.models() if m.kv_cache_groups is None)
    with pytest.raises(FitCheckError, match="what .* caches for each token is not known"):
        memory.kv_cache(unknown, 1, 1, 2)


# --- while the optimizer steps ---


def test_step_temporaries(llama: Model) -> None:
    """foreach AdamW: a tensor of each parameter's size; fused: none; master: fp32 gradients too."""
    mixed, plain = Role("policy", llama, 4, "full"), Role("policy", llama, 2, "full")
    params = llama.params
    assert memory.step_temporary(mixed, "adamw", False)[0] == 4 * params
    assert memory.step_temporary(plain, "adamw", False)[0] == 2 * params
    assert memory.step_temporary(mixed, "adamw-fused", False)[0] == 0
    assert memory.step_temporary(plain, "adamw", True)[0] == 4 * params + 4 * params
    assert memory.step_temporary(plain, "adamw-fused", True)[0] == 4 * params
    assert memory.step_temporary(Role("reward", llama, 2), "adamw", False)[0] == 0


def test_reasons_name_the_numbers(llama: Model) -> None:
    role = Role("policy", llama, 2, "qlora", stored="nf4", adapter=4, rank=16)
    assert "6,979,321,856 in nf4" in memory.weights_why(role)
    assert "41,943,040 parameters x 4 B" in memory.trained_why(role)
    assert "41,943,040" in memory.states_why(role, "adamw", False)
    assert "32 full_attention layers x 10 tokens" in memory.kv_why(llama, 1, 10, 2)
