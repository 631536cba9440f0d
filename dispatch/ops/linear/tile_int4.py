"""Generated kernels with int4 weights in groups along k, multiplied in float: for a few rows, bound by memory."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Params, Run
from dks.dispatch.ops.linear import panels
from dks.dispatch.ops.linear.quantize import check_finite
from dks.dispatch.problem import Precision, Problem
from dks.dispatch.tiles import threads
from dks.dispatch.tiles.isa import ELEMENTS, ISAS, VECTORS
from dks.dispatch.tiles.unit import Unit

HEADER = "gemm_int4.hpp"
_ROWS = 4  # more are not bound by reading the weights
_MOST_ROWS = 2 * _ROWS
_VECTORS = {"avx2": (2, 8), "avx512": (4, 16)}  # of a panel, floats of each
_GROUPS = (32, 128)
_AHEAD = 16


def grouped_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise (n, k) weights symmetrically.

    Returns:
        (numbers 0..15 (n, k filled up to groups), float32 scales (n, groups)): a weight is about
        (number - 8) * scale.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    wide = torch.nn.functional.pad(weight.detach().float(), (0, -weight.shape[1] % group))
    grouped = wide.view(weight.shape[0], -1, group)
    largest = grouped.abs().amax(dim=2)
    check_finite(largest)
    scale = largest.clamp_min(1e-30) / 7.0
    numbers = torch.round(grouped / scale[..., None]).clamp_(-8, 7) + 8
    return numbers.view(wide.shape).to(torch.uint8), scale


def pack_int4(weight: torch.Tensor, panel: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and scales of (n, k) weights in panels, as ``gemm_int4.hpp`` reads them."""
    k = weight.shape[1]
    numbers, scale = grouped_int4(weight, group)
    pairs = numbers[:, : k + k % 2].view(weight.shape[0], -1, 2)
    return panels.pack(pairs[..., 0] | pairs[..., 1] << 4, panel), panels.pack(scale, panel)


def int4_kernel(isa: str) -> Kernel:
    """The kernel ``tile.w4_<isa>``."""
    vectors, width = _VECTORS[isa]
    panel = vectors * width

    def unit(problem: Problem, params: Params) -> Unit:
        group, dtype = dict(params)["group"], problem.trait("dtype")
        constants = f"{VECTORS[isa]}, {ELEMENTS[dtype]}, {_ROWS}, {vectors}, {group}, {_AHEAD}"
        symbol = f"dks_linear_w4_{isa}_{dtype}_group{group}"
        return Unit(symbol, isa, "linear", HEADER, f"dks::Int4Gemm<{constants}>")

    def bind(problem: Problem, params: Params, weight: torch.Tensor, bias: torch.Tensor | None) -> Run:
        """weight (n, k), bias (n,) or None -> run(x (..., k)) -> (..., n), of x's dtype."""
        group = dict(params)["group"]
        packed, scale = panels.shared(weight, ("w4", panel, group), lambda: pack_int4(weight, panel, group))
        return panels.bound(problem, params, unit(problem, params), packed, bias, scale=scale)

    def suits(problem: Problem, params: Params) -> str | None:
        if problem.dim("m") > _MOST_ROWS:
            return f"more than {_MOST_ROWS} rows are not bound by reading the weights"
        return panels.threads_objection(problem, params, _ROWS, panel)

    return Kernel(
        id=f"tile.w4_{isa}",
        op="linear",
        precision={"float32": Precision.INT4, "bfloat16": Precision.INT4},
        bind=bind,
        form="int4 panels, a scale a group, multiplied as fp32",
        form_bytes=lambda p: panels.packed_bytes(p, panel, 1) * 5 // 8 + 4 * p.dim("n"),
        params=tuple((("group", group), *use) for group in _GROUPS for use in threads.uses(by_rows=False)),
        unit=unit,
        header=HEADER,
        batch_invariant=lambda _: True,  # one order over k, whatever the tile's rows
        suits=suits,
        unavailable=ISAS[isa].unavailable,
        rank=7,
    )


KERNELS = (int4_kernel("avx512"), int4_kernel("avx2"))
