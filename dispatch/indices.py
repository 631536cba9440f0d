"""Tensors of integers that say where values are: positions, targets."""

from __future__ import annotations

import torch


def plain(t: torch.Tensor) -> torch.Tensor:
    """As int64 in one piece, at an address of whole elements: kernels see one form of them, for they are small."""
    if t.dtype is torch.int64 and t.is_contiguous() and t.data_ptr() % 8 == 0:
        return t
    return t.to(torch.int64, memory_format=torch.contiguous_format, copy=True)


def bounds(t: torch.Tensor) -> tuple[int, int]:
    """The lowest and the highest of at least one."""
    low, high = torch.aminmax(t)
    return int(low), int(high)
