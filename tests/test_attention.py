"""Attention on meta tensors: the kernel that CUDA picks, and what that kernel makes."""

from __future__ import annotations

import json
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.nn import functional as F  # noqa: E402

from fitcheck.bench import attention  # noqa: E402
from fitcheck.bench.tracer import Tracer  # noqa: E402
from fitcheck.kernels import Card  # noqa: E402
from tests.record_cuda import DATA, kernel_grid  # noqa: E402

pytestmark = pytest.mark.oracle
RECORDED: dict[str, str] = json.loads(DATA.read_text())["kernels"]
BACKENDS = {"0": "math", "1": "flash", "2": "efficient", "3": "cudnn"}


def tensors(
    *shape: int, keys: int | None = None, groups: int | None = None, **options: Any
) -> tuple[Any, Any, Any]:
    """Query, key and value [batch, heads, tokens, D] on meta."""
    batch, heads, tokens, width = shape
    query = torch.empty(shape, device="meta", **options)
    shape = (batch, groups or heads, keys or tokens, width)
    return (
        query,
        torch.empty(shape, device="meta", **options),
        torch.empty(shape, device="meta", **options),
    )


@pytest.mark.parametrize("capability", RECORDED)
def test_kernel_is_the_one_that_pytorch_picks(capability: str) -> None:
    major, minor = map(int, capability.split("."))
    wrong = []
    for case, digit in zip(kernel_grid(), RECORDED[capability], strict=True):
        dtype, width, groups, tokens, keys, masked, causal, gradient = case
        query, key, value = tensors(
            *(2, 8, tokens, width),
            **{"keys": keys, "groups": groups, "dtype": dtype, "requires_grad": gradient},
        )
        chosen = attention.kernel((major, minor), query, key, value, masked, causal)
        if chosen != BACKENDS[digit]:
            wrong.append((case, chosen, BACKENDS[digit]))
    assert not wrong


def events_of(capability: tuple[int, int], call: Any) -> list[int]:
    """The sizes that a call allocates."""
    tracer = Tracer(Card(capability))
    with attention.as_on_cuda(capability), tracer:
        call()
    return [size for size, _ in tracer.events if size > 0]


def test_flash_makes_no_square_matrix() -> None:
    query, key, value = tensors(1, 8, 4096, 64, dtype=torch.bfloat16)
    sizes = events_of((8, 0), lambda: F.scaled_dot_product_attention(query, key, value))
    assert max(sizes) == query.nbytes  # the output; 8 x 4096 x 4096 x 2 would be 256 MiB
    assert 8 * 4096 * 4 in sizes  # log-sum-exp, fp32


def test_mask_of_booleans_becomes_one_of_numbers() -> None:
    query, key, value = tensors(2, 8, 128, 64, dtype=torch.bfloat16)
    mask = torch.empty(2, 1, 128, 128, dtype=torch.bool, device="meta")
    sizes = events_of((8, 0), lambda: F.scaled_dot_product_attention(query, key, value, mask))
    assert mask.numel() * 2 in sizes


def test_mask_of_an_odd_length_is_copied_once_more() -> None:
    query, key, value = tensors(2, 8, 100, 64, dtype=torch.bfloat16)
    mask = torch.empty(2, 1, 100, 100, dtype=torch.bool, device="meta")
    sizes = events_of((8, 0), lambda: F.scaled_dot_product_attention(query, key, value, mask))
    assert 2 * 100 * 104 * 2 in sizes


def test_grouped_heads_in_fp32_take_the_square_path() -> None:
    query, key, value = tensors(1, 8, 512, 64, groups=2)
    sizes = events_of(
        (8, 0), lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    )
    assert 8 * 512 * 512 * 4 in sizes


def test_only_meta_tensors_are_redirected() -> None:
    query = torch.randn(1, 2, 8, 4)
    want = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    with attention.as_on_cuda((8, 0)):
        assert torch.equal(
            F.scaled_dot_product_attention(query, query, query, is_causal=True), want
        )


def test_pytorch_is_as_before_afterwards() -> None:
    before = F.scaled_dot_product_attention, F.softmax
    with pytest.raises(ZeroDivisionError), attention.as_on_cuda((8, 0)):
        _ = 1 / 0
    assert (F.scaled_dot_product_attention, F.softmax) == before


def test_math_path_computes_attention() -> None:
    """Its code is our own: on real numbers it agrees with PyTorch."""
    query, key, value = torch.randn(3, 2, 4, 6, 8).unbind()
    key, value = key[:, :2], value[:, :2]
    ours = attention._math(query, key, value, None, 0.0, True, None, True)
    want = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert torch.allclose(ours, want, atol=1e-6)


def test_flash_attn_stand_in_has_no_word_flash_in_its_name() -> None:
    """transformers asks for the package of any implementation with that word in its name."""
    assert attention.implementation("sdpa") == "sdpa"
    assert "flash" not in attention.implementation("flash")
