"""The tape: lifetimes worked by hand, and Llama's layer by the formula of its code."""

from __future__ import annotations

from typing import Any

import pytest

from fitcheck import catalog
from fitcheck.activations import Shape, training_cost, update_stages
from fitcheck.decoder import covered
from fitcheck.flows import FLOWS
from fitcheck.kernels import Call, Card, attention_backward, attention_forward, reduction
from fitcheck.model import Model
from fitcheck.ops import Setting
from fitcheck.tape import PARTS, SAME, Buffer, Tape

KIB = 1024
BF16 = {"compute": 2, "weight": 2, "stream": 2, "autocast": False}
MIXED = {"compute": 2, "weight": 4, "stream": 4, "autocast": True}
FP32 = {"compute": 4, "weight": 4, "stream": 4, "autocast": False}


def how(regime: dict[str, Any], **changes: Any) -> Setting:
    default = {"trains": True, "kernel": "flash", "masked": False}
    return Setting(**{**regime, **default, **changes})


# --- buffers and nodes, by hand ---


def test_a_buffer_lives_as_long_as_it_is_referred_to() -> None:
    tape = Tape(grad=False)
    a = tape.new(KIB, 2)
    b = tape.op("double", [a], 2 * KIB, 2)
    assert (tape.live, tape.peak) == (3 * KIB, 3 * KIB)
    del a
    assert (tape.live, tape.peak) == (2 * KIB, 3 * KIB)
    del b
    assert tape.live == 0


def test_sizes_are_blocks_of_512_bytes() -> None:
    tape = Tape(grad=False)
    x = tape.new(1, 1)
    assert tape.live == 512
    y = tape.new(513, 1)
    assert tape.live == 512 + 1024
    del x, y


def test_a_view_costs_nothing_and_keeps_its_base() -> None:
    tape = Tape(grad=False)
    base = tape.new(4 * KIB, 2)
    part = tape.view(base, KIB)
    del base
    assert tape.live == 4 * KIB
    del part
    assert tape.live == 0


def test_what_is_saved_stays_until_backward_has_used_it() -> None:
    tape = Tape(grad=True)
    x = tape.new(KIB, 2, grad=True)
    y = tape.op("silu", [x], KIB, 2, saved=[x])
    end = y.edge
    del x, y
    assert tape.live == KIB  # x, by silu
    tape.backward(end)
    assert tape.live == 0
    assert tape.peak == 3 * KIB  # x, the gradient of y, that of x


def test_without_a_gradient_nothing_is_saved() -> None:
    tape = Tape(grad=True)
    x = tape.new(KIB, 2)
    y = tape.op("silu", [x], KIB, 2, saved=[x])
    assert y.edge is None
    del x
    assert tape.live == KIB


def test_adding_shares_the_gradient() -> None:
    tape = Tape(grad=True)
    x, y = tape.new(KIB, 2, grad=True), tape.new(KIB, 2, grad=True)
    end = tape.op("add", [x, y], KIB, 2, shares=SAME).edge
    del x, y
    tape.peak = tape.live
    tape.backward(end)
    assert tape.peak == KIB  # one gradient for the sum and both of its terms


def test_a_second_gradient_is_added_in_place() -> None:
    """x is used twice: the second gradient stands beside the first for a moment only."""
    tape = Tape(grad=True)
    x = tape.new(KIB, 2, grad=True)
    a, b = tape.op("a", [x], KIB, 2), tape.op("b", [x], KIB, 2)
    end = tape.op("add", [a, b], KIB, 2, shares=SAME).edge
    del x, a, b
    tape.peak = tape.live
    tape.backward(end)
    assert tape.peak == 3 * KIB  # the sum's, one of x, the next one of x


def test_slices_scatter_their_gradients_and_splits_join_them() -> None:
    def peak(split: bool) -> int:
        tape = Tape(grad=True)
        x = tape.new(4 * KIB, 2, grad=True)
        sizes = [2 * KIB, 2 * KIB]
        a, b = tape.split(x, sizes) if split else [tape.view(x, size) for size in sizes]
        end = tape.op("sum", [a, b], 2 * KIB, 2, shares=SAME).edge
        del x, a, b
        tape.peak = tape.live
        tape.backward(end)
        return tape.peak

    assert peak(split=True) == 2 * KIB + 4 * KIB  # one gradient for both parts, then x's
    assert peak(split=False) == 2 * KIB + 4 * KIB + 4 * KIB  # each slice makes one of x's shape


def test_parts_of_a_cat_get_views_of_its_gradient() -> None:
    tape = Tape(grad=True)
    x, y = tape.new(KIB, 2, grad=True), tape.new(3 * KIB, 2, grad=True)
    end = tape.op("cat", [x, y], 4 * KIB, 2, shares=PARTS).edge
    del x, y
    tape.peak = tape.live
    tape.backward(end)
    assert tape.peak == 4 * KIB


def test_weight_gradients_stay_unless_they_are_added_to_older_ones() -> None:
    for accumulate, left in ((False, 8 * KIB), (True, 0)):
        tape = Tape(grad=True, accumulate=accumulate)
        x = tape.new(KIB, 2, grad=True)
        end = tape.op("linear", [x], KIB, 2, saved=[x], weight=8 * KIB).edge
        del x
        tape.backward(end)
        assert tape.live == left
        assert tape.peak == 3 * KIB + 8 * KIB  # x, two gradients and the weight's


def test_hidden_bytes_count_while_an_operation_runs() -> None:
    tape = Tape(grad=True)
    x = tape.new(KIB, 2, grad=True)
    y = tape.op("kernel", [x], KIB, 2, during=5 * KIB, temporary=7 * KIB)
    assert (tape.live, tape.peak) == (2 * KIB, 7 * KIB)
    end = y.edge
    del x, y
    tape.peak = tape.live
    tape.backward(end)
    assert tape.peak == 9 * KIB


def test_explaining_names_what_is_alive_at_the_peak() -> None:
    tape = Tape(grad=False, explain=True)
    x = tape.new(KIB, 2, name="input")
    y = tape.op("wide", [x], 3 * KIB, 4)
    z = tape.op("narrow", [y], KIB, 2)
    assert dict(tape.at_peak) == {"input": KIB, "wide": 3 * KIB, "narrow": KIB}
    del x, y, z


def test_two_tapes_are_strangers() -> None:
    one, other = Tape(grad=False), Tape(grad=False)
    x = Buffer(one, KIB, 2, None, "x")
    assert (one.live, other.live) == (KIB, 0)
    del x


# --- Llama's layer: what modeling_llama.py saves for each token, by hand ---


def llama() -> Model:
    return catalog.find_model("meta-llama/Llama-3.1-8B")


def saved_per_token(model: Model, regime: str) -> int:
    """H: residual stream, Q and K: widths of queries and keys, F: the MLP's, N: heads.

    Two norms keep their input in fp32 and the normalized vector; each linear its input; flash
    attention q, k, v, its output and a log-sum a head. Under autocast each linear has a bf16 cast
    of its input of its own.
    """
    h, f, n = model.hidden_size, model.intermediate_size, model.num_attention_heads
    q, k = n * model.head_dim, model.num_key_value_heads * model.head_dim
    return {
        "bf16": 16 * h + 4 * q + 4 * k + 8 * f + 4 * n,
        "mixed": 26 * h + 4 * q + 4 * k + 8 * f + 4 * n,
        "fp32": 24 * h + 8 * q + 8 * k + 16 * f + 4 * n,
    }[regime]


@pytest.mark.parametrize(
    ("name", "regime"), [("bf16", BF16), ("mixed", MIXED), ("fp32", FP32)], ids=lambda x: str(x)[:5]
)
def test_llamas_layer_keeps_what_its_code_saves(name: str, regime: dict[str, Any]) -> None:
    """The rest are the norms' roots (4 B a token each), and autocast's casts of weights."""
    model, tokens = llama(), 2 * 1024
    # In fp32 grouped heads would take the math kernel; the formula is that of a fused one.
    cost = training_cost(model, how(regime), Shape(2, 1024), "layer")
    casts = 0
    if regime is MIXED:
        h, f = model.hidden_size, model.intermediate_size
        keys = model.num_key_value_heads * model.head_dim
        casts = 2 * (2 * h * h + 2 * h * keys + 3 * h * f)
    assert cost.kept == tokens * (saved_per_token(model, name) + 2 * 4) + casts


def test_eager_attention_keeps_its_weights_in_both_types() -> None:
    """fp32 softmax and its bf16 cast of every head: 6 bytes a pair of tokens."""
    model, length = llama(), 1024
    flash = training_cost(model, how(BF16), Shape(1, length), "layer").kept
    eager = training_cost(model, how(BF16, kernel="eager"), Shape(1, length), "layer").kept
    heads, keys = model.num_attention_heads, model.num_key_value_heads
    pairs = 6 * heads * length**2
    # K and V repeated for every head; neither log-sums nor the output beside o_proj's input
    repeated = 2 * 2 * length * (heads - keys) * model.head_dim
    assert eager - flash == pairs + repeated - 4 * heads * length


def test_padding_repeats_keys_and_values() -> None:
    model, length = llama(), 1024
    plain = training_cost(model, how(BF16), Shape(1, length), "layer").kept
    padded = how(BF16, kernel="efficient", masked=True)
    heads, keys = model.num_attention_heads, model.num_key_value_heads
    repeated = 2 * 2 * length * (heads - keys) * model.head_dim
    kept = training_cost(model, padded, Shape(1, length), "layer").kept
    assert kept - plain == repeated + 2 * length**2  # and the mask in bf16


def test_a_frozen_layer_keeps_no_inputs_of_its_linears() -> None:
    model, shape = llama(), Shape(1, 1024)
    full = training_cost(model, how(BF16), shape, "layer")
    frozen = training_cost(model, how(BF16, trains=False), shape, "layer")
    assert frozen.gradients == 0
    assert full.gradients == 2 * sum_of_layer(model)
    assert frozen.kept < full.kept


def sum_of_layer(model: Model) -> int:
    """Parameters of one layer."""
    outside = 2 * model.vocab_size * model.hidden_size + model.hidden_size
    return (model.params - outside) // model.num_layers


# --- what must hold of every architecture ---


def smallest() -> list[Model]:
    found: dict[str, Model] = {}
    for model in sorted((m for m in catalog.models() if m.is_verified), key=lambda m: m.params):
        if not covered(model) and model.model_type in FLOWS:
            found.setdefault(model.model_type, model)
    return list(found.values())


SMALLEST = smallest()


@pytest.mark.parametrize("regime", [BF16, MIXED], ids=["bf16", "mixed"])
@pytest.mark.parametrize("model", SMALLEST, ids=lambda model: model.model_type)
def test_more_tokens_never_cost_less(model: Model, regime: dict[str, Any]) -> None:
    """From where attention need not split its keys to fill the card, which takes workspace."""
    for setting in (how(regime), how(regime, kernel="efficient", masked=True)):
        for one, more in (((1, 1024), (1, 2000)), ((1, 2000), (2, 2000)), ((2, 2000), (3, 2048))):
            small = training_cost(model, setting, Shape(*one), "layer")
            large = training_cost(model, setting, Shape(*more), "layer")
            assert all(a <= b for a, b in zip(small, large, strict=True))


@pytest.mark.parametrize("model", SMALLEST, ids=lambda model: model.model_type)
def test_a_layer_ends_as_it_began(model: Model) -> None:
    """Backward frees everything that forward kept; the weights' gradients stay."""
    cost = training_cost(model, how(BF16), Shape(1, 128), "layer")
    first = training_cost(model, how(BF16), Shape(1, 128), "layer", first=True)
    assert 0 < cost.kept <= cost.training
    assert cost.kept < cost.backward
    assert first.kept <= cost.kept
    assert first.gradients == cost.gradients > 0


@pytest.mark.parametrize("model", SMALLEST, ids=lambda model: model.model_type)
def test_checkpointing_never_costs_more(model: Model) -> None:
    """Of the moments of an update, none is larger, when layers are run again in backward."""
    for regime in (BF16, MIXED):
        peaks = [
            max(
                stage.activations + stage.casts + stage.working + stage.gradients
                for stage in update_stages(model, how(regime), SHAPE, "lm_loss", on, True)
            )
            for on in (True, False)
        ]
        assert peaks[0] <= peaks[1]


SHAPE = Shape(2, 1024, 1024)


# --- the memory that kernels hide ---


def test_flash_attention_backward_by_hand() -> None:
    """fp32 dQ and dO x O for 2 x 32 heads x 1 024 tokens of 128; dK and dV for every head."""
    call = Call(rows=2, length=1024, reach=1024, heads=32, kv_heads=8, dim=128, out_dim=128, size=2)
    rows = 2 * 32 * 1024
    assert attention_backward("flash", call, Card()) == 4 * rows * (128 + 1) + 2 * rows * 128 * 2


def test_flash_attention_splits_keys_where_rows_do_not_fill_the_card() -> None:
    one = Call(rows=1, length=64, reach=4096, heads=8, kv_heads=8, dim=64, out_dim=64, size=2)
    assert attention_forward("flash", one, Card()) > 0
    assert attention_forward("flash", one._replace(rows=64), Card()) == 0


def test_sums_over_tokens_have_a_workspace_on_large_cards() -> None:
    """[4096 tokens, 4096]: 108 MiB on an A100; a narrow or short one needs none."""
    assert reduction(4096, 4096, Card()) // 2**20 == 108
    assert reduction(64, 4096, Card()) == 0
