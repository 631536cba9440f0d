"""The framework's own path: ``F.rms_norm``, after ``x + r`` where there is a residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dks.dispatch.kernel import Kernel, Launch
from dks.dispatch.ops.rms_norm.residual import with_residual
from dks.dispatch.problem import Precision, Problem


def bind(
    problem: Problem, _params: tuple[tuple[str, int], ...], weight: torch.Tensor | None, eps: float | None
) -> Launch:
    """weight (n,) or None -> run(x (..., n)) -> (..., n); with a residual see ``with_residual``."""
    shape = (problem.dim("n"),)
    return with_residual(problem, lambda x: F.rms_norm(x, shape, weight, eps))


KERNEL = Kernel(
    id="torch.rms_norm",
    op="rms_norm",
    precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16, "float16": Precision.BF16},
    bind=bind,
    rank=0,
)
