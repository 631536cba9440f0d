"""The framework's own path: ``F.silu`` and a product."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.problem import Precision, Problem


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """x (..., 2n) -> (..., n), in the framework's operators; differentiable."""
    gate, values = x.chunk(2, -1)
    return F.silu(gate) * values


def bind(_problem: Problem, _params: tuple[tuple[str, int], ...]) -> Run:
    """run(x (..., 2n)) -> (..., n)."""
    return silu_and_mul


KERNEL = Kernel(
    id="torch.silu_and_mul",
    op="silu_and_mul",
    precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16, "float16": Precision.BF16},
    bind=bind,
    rank=0,
)
