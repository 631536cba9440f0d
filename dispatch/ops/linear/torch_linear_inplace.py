"""``F.linear`` with the epilogue applied in place: the same arithmetic, one large allocation fewer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.ops.linear.epilogue import fused_in_place
from dks.dispatch.problem import Precision, Problem


def bind(
    problem: Problem, _params: tuple[tuple[str, int], ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> Run:
    """weight (n, k), bias (n,) or None -> run(x (..., k)[, residual (..., n)]) -> (..., n)."""
    return fused_in_place(lambda x: F.linear(x, weight, bias), problem.trait("epilogue"))


KERNEL = Kernel(
    id="torch.linear_inplace",
    op="linear",
    precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16},
    bind=bind,
    supports=lambda problem: "is torch.linear itself" if problem.trait("epilogue") == "none" else None,
    rank=1,
)
