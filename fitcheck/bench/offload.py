"""Weights that are kept in RAM while they are not in use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def to_ram(module: nn.Module) -> None:
    """Take the weights off the card. On meta a tensor of one element stands for each of them."""
    _move(module, lambda t: t.new_empty(1).expand(t.shape) if t.is_meta else t.to("cpu"))


def to_card(module: nn.Module, device: torch.device) -> None:
    """Bring them back."""
    _move(
        module,
        lambda t: (
            torch.empty(t.shape, dtype=t.dtype, device=t.device) if t.is_meta else t.to(device)
        ),
    )


def _move(module: nn.Module, moved: Callable[[Tensor], Tensor]) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = moved(tensor.data)
