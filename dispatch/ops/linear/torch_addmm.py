"""``torch.addmm`` on a weight that is transposed once, so that the GEMM reads it along its rows.

Without a bias, a residual is what it adds to.
"""

from __future__ import annotations

import torch

from dks.dispatch.kernel import DTYPES, Kernel, Run
from dks.dispatch.ops.linear.epilogue import fused_in_place
from dks.dispatch.problem import Precision, Problem


def bind(
    problem: Problem, _params: tuple[tuple[str, int], ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> Run:
    """weight (n, k), bias (n,) or None -> run(x (..., k)[, residual (..., n)]) -> (..., n)."""
    k, n = problem.dim("k"), problem.dim("n")
    transposed = weight.detach().t().contiguous()

    def onto_residual(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return torch.addmm(residual.view(-1, n), x.view(-1, k), transposed).view(residual.shape)

    def run(x: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, k)
        y = torch.mm(rows, transposed) if bias is None else torch.addmm(bias, rows, transposed)
        return y.view(*x.shape[:-1], n)

    epilogue = problem.trait("epilogue")
    return onto_residual if epilogue == "add" and bias is None else fused_in_place(run, epilogue)


KERNEL = Kernel(
    id="torch.addmm",
    op="linear",
    precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16},
    bind=bind,
    form="weight transposed, (k, n)",
    form_bytes=lambda p: p.dim("n") * p.dim("k") * DTYPES[p.trait("dtype")].itemsize,
    rank=2,
)
