"""``torch.addmm`` on a weight that is transposed once, so that the GEMM reads it along its rows."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import DTYPES, Kernel, Run
from dks.dispatch.ops.linear.epilogue import fused_in_place
from dks.dispatch.problem import Precision, Problem


def bind(
    problem: Problem, _params: tuple[tuple[str, int], ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> Run:
    """weight (n, k), bias (n,) or None -> run(x (..., k)) -> (..., n)."""
    k, n = problem.dim("k"), problem.dim("n")
    transposed = weight.detach().t().contiguous()

    def run(x: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, k)
        y = torch.mm(rows, transposed) if bias is None else torch.addmm(bias, rows, transposed)
        return y.view(*x.shape[:-1], n)

    return fused_in_place(run, problem.trait("epilogue"))


KERNEL = Kernel(
    id="torch.addmm",
    op="linear",
    precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16},
    bind=bind,
    form="weight transposed, (k, n)",
    form_bytes=lambda p: p.dim("n") * p.dim("k") * DTYPES[p.trait("dtype")].itemsize,
    rank=2,
)
