"""The framework's own path: ``F.layer_norm``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.problem import Precision, Problem


def bind(
    problem: Problem,
    _params: tuple[tuple[str, int], ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Run:
    """weight (n,), bias (n,) or None -> run(x (..., n)) -> (..., n)."""
    shape = (problem.dim("n"),)
    return lambda x: F.layer_norm(x, shape, weight, bias, eps)


KERNEL = Kernel(
    id="torch.layer_norm",
    op="layer_norm",
    precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16, "float16": Precision.BF16},
    bind=bind,
    rank=0,
)
