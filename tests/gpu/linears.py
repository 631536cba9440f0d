"""Calls of ``linear`` with their right answers, for kernels that run on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dks.dispatch.ops.linear.epilogue import EPILOGUES

ROWS = (1, 100)  # less than any tile, and a ragged end


@dataclass(frozen=True)
class Case:
    """Tensors of one call; y is NaN until a kernel writes it. ``expected`` is in float64."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    residual: torch.Tensor | None
    x_scale: torch.Tensor | None
    weight_scale: torch.Tensor | None
    y: torch.Tensor
    expected: torch.Tensor


def case(dtype: str, epilogue: str, rows: int, align: int, device: str) -> Case:
    """y (rows, n) of x (rows, k), n and k and all addresses divisible by ``align`` bytes and no more."""
    generator = torch.Generator().manual_seed(7)
    kind: torch.dtype = getattr(torch, dtype)
    out = kind if kind.itemsize == 2 else torch.bfloat16
    n, k = 256 + align // out.itemsize, 512 + align // kind.itemsize

    def made(*shape: int, to: torch.dtype) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        values = (values * 40).clamp(-127, 127).round() if to == torch.int8 else values
        return _placed(values.to(to), align, device)

    x, weight, bias = made(rows, k, to=kind), made(n, k, to=kind), made(n, to=out)
    residual = made(rows, n, to=out) if epilogue == "add" else None
    x_scale = weight_scale = None
    scaled_x, scaled_weight = x.double(), weight.double()
    if kind.itemsize == 1:
        x_scale = torch.rand(rows, generator=generator).add(0.5).div(100).to(device)
        weight_scale = torch.rand(n, generator=generator).add(0.5).div(10).to(device)
        scaled_x, scaled_weight = scaled_x * x_scale[:, None], scaled_weight * weight_scale[:, None]
    sums = scaled_x @ scaled_weight.t() + bias.double()
    expected = EPILOGUES[epilogue](sums, *(() if residual is None else (residual.double(),)))
    y = _placed(torch.full((rows, n), float("nan")).to(out), align, device)
    return Case(x, weight, bias, residual, x_scale, weight_scale, y, expected)


def _placed(values: torch.Tensor, align: int, device: str) -> torch.Tensor:
    """A copy at an address that ``align`` divides and twice as much does not."""
    size = values.element_size()
    storage = torch.empty(values.numel() + 64 // size + align // size, dtype=values.dtype, device=device)
    start = ((align - storage.data_ptr()) % (2 * align)) // size
    placed = storage[start : start + values.numel()].view(values.shape)
    placed.copy_(values)
    return placed
