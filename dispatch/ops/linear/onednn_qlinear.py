"""oneDNN's int8 linear with the activations quantised outside, one scale a row."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import DTYPES, Kernel, Run
from dks.dispatch.ops.linear.epilogue import fused_in_place
from dks.dispatch.ops.linear.quantize import activation_levels, by_rows, hush, per_channel_int8
from dks.dispatch.problem import Precision, Problem


def bind(
    problem: Problem, _params: tuple[tuple[str, int], ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> Run:
    """weight (n, k), bias (n,) or None -> run(x (..., k)[, residual (..., n)]) -> (..., n), of x's dtype."""
    n, k = problem.dim("n"), problem.dim("k")
    hush()
    quantized, scale = per_channel_int8(weight)
    packed = torch.ops.onednn.qlinear_prepack(quantized, None)
    zeros = torch.zeros(n, dtype=torch.long, device="cpu")
    qlinear = torch.ops.onednn.qlinear_pointwise.default
    most = activation_levels() // 2
    step, zero = 1.0 / most, most + 1

    def product(rows: torch.Tensor) -> torch.Tensor:
        q = torch.quantize_per_tensor(rows, step, zero, torch.quint8).int_repr()
        y: torch.Tensor = qlinear(q, step, zero, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        return y

    return fused_in_place(by_rows(product, bias, DTYPES[problem.trait("dtype")], n, k), problem.trait("epilogue"))


def unavailable() -> str | None:
    """Why torch can't run it here, or None."""
    return None if hasattr(torch.ops.onednn, "qlinear_pointwise") else "this torch has no oneDNN qlinear"


KERNEL = Kernel(
    id="onednn.qlinear",
    op="linear",
    precision={"float32": Precision.INT8, "bfloat16": Precision.INT8},
    bind=bind,
    form="int8 weight in oneDNN's layout, a scale a channel",
    form_bytes=lambda p: p.dim("n") * (p.dim("k") + 12),
    unavailable=unavailable,
    rank=7,
)
