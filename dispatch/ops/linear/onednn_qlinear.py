"""oneDNN's int8 linear with the activations quantised outside, one scale a call, and a fused activation."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.ops.linear.epilogue import ONEDNN_ATTR
from dks.dispatch.ops.linear.quantize import per_channel_int8
from dks.dispatch.problem import Precision, Problem

_TINY = 1e-30  # a scale of zero would divide zero by zero for an input of zeros


def bind(
    problem: Problem, params: tuple[tuple[str, int], ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> Run:
    """weight (n, k), bias (n,) or None -> run(x (..., k)) -> (..., n), of x's dtype."""
    n, k = problem.dim("n"), problem.dim("k")
    quantized, scale = per_channel_int8(weight)
    packed = torch.ops.onednn.qlinear_prepack(quantized, None)
    zeros = torch.zeros(n, dtype=torch.long)
    wide_bias = None if bias is None else bias.detach().float()
    post, algorithm = ONEDNN_ATTR[problem.trait("epilogue")]
    out_dtype = torch.float32 if problem.trait("dtype") == "float32" else torch.bfloat16
    qlinear = torch.ops.onednn.qlinear_pointwise.default

    def run(x: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, k).float()
        low, high = torch.aminmax(rows)
        # Zero stays representable, so a row of padding stays a row of zeros.
        lowest, highest = min(low.item(), 0.0), max(high.item(), 0.0)
        step = max((highest - lowest) / 255.0, _TINY)
        zero = min(255, max(0, round(-lowest / step)))
        q = torch.quantize_per_tensor(rows, step, zero, torch.quint8).int_repr()
        y = qlinear(q, step, zero, packed, scale, zeros, wide_bias, 1.0, 0, out_dtype, post, [], algorithm)
        return y.view(*x.shape[:-1], n)

    return run


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
