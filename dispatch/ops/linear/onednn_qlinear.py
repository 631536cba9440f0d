"""oneDNN's int8 linear with the activations quantised outside, one scale a call, and a fused activation."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.ops.linear.epilogue import onednn_fused
from dks.dispatch.ops.linear.quantize import hush, onednn_saturates, per_channel_int8, value_range
from dks.dispatch.problem import Precision, Problem

_TINY = 1e-30  # a scale of zero would divide zero by zero for an input of zeros


def bind(
    problem: Problem, _params: tuple[tuple[str, int], ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> Run:
    """weight (n, k), bias (n,) or None -> run(x (..., k)[, residual (..., n)]) -> (..., n), of x's dtype."""
    n, k = problem.dim("n"), problem.dim("k")
    hush()
    quantized, scale = per_channel_int8(weight)
    packed = torch.ops.onednn.qlinear_prepack(quantized, None)
    zeros = torch.zeros(n, dtype=torch.long, device="cpu")
    wide_bias = None if bias is None else bias.detach().float()
    out_dtype = torch.float32 if problem.trait("dtype") == "float32" else torch.bfloat16
    qlinear = torch.ops.onednn.qlinear_pointwise.default

    def make(attr: str, algorithm: str) -> Run:
        def run(x: torch.Tensor) -> torch.Tensor:
            rows = x.view(-1, k).float()
            low, high = value_range(rows)
            step = max((high - low) / 255.0, _TINY)
            zero = min(255, max(0, round(-low / step)))
            q = torch.quantize_per_tensor(rows, step, zero, torch.quint8).int_repr()
            y: torch.Tensor = qlinear(
                q, step, zero, packed, scale, zeros, wide_bias, 1.0, 0, out_dtype, attr, [], algorithm
            )
            return y.view(*x.shape[:-1], n)

        return run

    return onednn_fused(make, problem.trait("epilogue"))


def unavailable() -> str | None:
    """Why torch can't run it here, or None."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return "this torch has no oneDNN qlinear"
    return onednn_saturates()


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
