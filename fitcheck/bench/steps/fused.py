"""Log-probabilities without logits: the head and the loss in tiles, made again in backward.

The scheme of TRL's fused head (its kernels/chunked_logprob.py, 1.16): a tile of at most 4096 tokens
by 32768 words in the compute type, running statistics in fp32, gradients accumulated in fp32. A
Triton kernel, as TRL's, works on a tile in place; here blocks of 64 rows pass through fp32, unless
a dry run asks what the kernel would take.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TILE_TOKENS, TILE_WORDS, BLOCK_ROWS = 4096, 32768, 64


class FusedLogprobs(torch.autograd.Function):
    """Log-probabilities [N] of `ids` [N] under the head `hidden` [N, H] @ `weight` [V, H].T.

    Logits are scaled, then softly capped (Gemma 2) where `softcap` is not None. kernel: as TRL
    does it, with tiles as wide as they can be and, on meta, nothing beside them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        scale: float,
        softcap: float | None,
        dtype: torch.dtype,
        kernel: bool = False,
    ) -> Tensor:
        ctx.head = (scale, softcap, dtype, kernel)
        highest = hidden.new_full((len(ids),), -torch.inf, dtype=torch.float32)
        total = torch.zeros_like(highest)
        chosen = torch.zeros_like(highest)
        for rows, words, tile, _, _ in _tiles(hidden, weight, bias, dtype, kernel):
            for block, logits in _blocks(tile, rows, scale, softcap, kernel):
                top = torch.maximum(highest[block], logits.amax(1))
                total[block] *= (highest[block] - top).exp()
                highest[block] = top
                word, inside = _word_of(ids[block], words)
                chosen[block] += logits.gather(1, word[:, None])[:, 0] * inside
                total[block] += logits.sub_(top[:, None]).exp_().sum(1)
        log_total = highest + total.log()
        ctx.save_for_backward(hidden, weight, bias, ids, log_total)
        return chosen - log_total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, log_total = ctx.saved_tensors
        scale, softcap, dtype, kernel = ctx.head
        needs = ctx.needs_input_grad[:3]
        inputs = (hidden, weight, bias)
        sums = [
            torch.zeros_like(x, dtype=torch.float32) if need else None
            for x, need in zip(inputs, needs, strict=True)
        ]
        grad_hidden, grad_weight, grad_bias = sums
        for rows, words, tile, tokens, columns in _tiles(hidden, weight, bias, dtype, kernel):
            for block, logits in _blocks(tile, rows, scale, softcap, kernel):
                slope = scale if softcap is None else (1 - (logits / softcap) ** 2) * scale
                probability = logits.sub_(log_total[block, None]).exp_()
                word, inside = _word_of(ids[block], words)
                probability.scatter_add_(1, word[:, None], -inside[:, None].float())
                probability.mul_(-gradient[block, None].float()).mul_(slope)
                tile[block.start - rows.start : block.stop - rows.start] = probability
            if grad_hidden is not None:
                _add_product(grad_hidden[rows], tile, columns)
            if grad_weight is not None:
                _add_product(grad_weight[words], tile.t(), tokens)
            if grad_bias is not None:
                grad_bias[words] += tile.sum(0, dtype=torch.float32)
        results = [
            None if total is None else total.to(x.dtype)
            for x, total in zip(inputs, sums, strict=True)
        ]
        return (*results, None, None, None, None, None)


def _tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, kernel: bool
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """Each tile of logits in one buffer, with its rows, its words and the factors it is made of."""
    tokens, vocabulary = len(hidden), len(weight)
    size = (min(tokens, TILE_TOKENS), TILE_WORDS if kernel else min(vocabulary, TILE_WORDS))
    buffer = torch.empty(size, dtype=dtype, device=hidden.device)
    for i in range(0, tokens, TILE_TOKENS):
        rows = slice(i, min(i + TILE_TOKENS, tokens))
        part = hidden[rows].to(dtype)
        for j in range(0, vocabulary, TILE_WORDS):
            words = slice(j, min(j + TILE_WORDS, vocabulary))
            columns = weight[words].to(dtype)
            tile = buffer[: len(part), : len(columns)]
            torch.mm(part, columns.t(), out=tile)
            if bias is not None:
                tile += bias[words].to(dtype)
            yield rows, words, tile, part, columns


def _blocks(
    tile: Tensor, rows: slice, scale: float, softcap: float | None, kernel: bool
) -> Iterator[tuple[slice, Tensor]]:
    """A few rows of the tile at a time as final logits in fp32, with their places in the batch."""
    if kernel and tile.is_meta:
        return
    for i in range(0, len(tile), BLOCK_ROWS):
        logits = tile[i : i + BLOCK_ROWS].to(torch.float32, copy=True).mul_(scale)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        yield slice(rows.start + i, rows.start + i + len(logits)), logits


def _word_of(ids: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Each id's column in a tile of these words, and whether it has one."""
    local = ids - words.start
    inside = (local >= 0) & (local < words.stop - words.start)
    return local.clamp(0, words.stop - words.start - 1), inside


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in fp32; a card multiplies 16-bit factors into fp32 without copies of them."""
    if total.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif total.is_meta:
        total.add_(0)
    else:
        total.addmm_(a.float(), b.float())
