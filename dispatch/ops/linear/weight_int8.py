"""Weight-only int8 for bf16 activations: bound by memory, so it shines at one row."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.ops.linear.epilogue import fused_in_place
from dks.dispatch.ops.linear.quantize import per_channel_int8
from dks.dispatch.problem import Precision, Problem


def bind(
    problem: Problem, _params: tuple[tuple[str, int], ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> Run:
    """weight (n, k), bias (n,) or None -> run(x (..., k)[, residual (..., n)]) -> (..., n), all bf16."""
    n, k = problem.dim("n"), problem.dim("k")
    quantized, scale = per_channel_int8(weight)
    scale = scale.bfloat16()

    def run(x: torch.Tensor) -> torch.Tensor:
        y = torch._weight_int8pack_mm(x.view(-1, k), quantized, scale)
        if bias is not None:
            y.add_(bias)
        return y.view(*x.shape[:-1], n)

    return fused_in_place(run, problem.trait("epilogue"))


def supports(problem: Problem) -> str | None:
    """The operator reads whole vectors past the end of ragged rows: it crashed at n=1001, k=257."""
    ragged = [name for name in ("n", "k") if problem.dim(name) % 32]
    return f"needs n and k to be multiples of 32, found {', '.join(ragged)} otherwise" if ragged else None


KERNEL = Kernel(
    id="torch.weight_int8",
    op="linear",
    precision={"bfloat16": Precision.INT8},
    bind=bind,
    form="int8 weight, a bf16 scale a channel",
    form_bytes=lambda p: p.dim("n") * (p.dim("k") + 2),
    align=32,  # its vector loads of bf16 are aligned ones: at 16 bytes it crashed
    supports=supports,
    rank=6,
)
