"""The framework's own path: ``torch.softmax``."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.problem import Precision, Problem


def bind(_problem: Problem, _params: tuple[tuple[str, int], ...]) -> Run:
    """run(x (..., n)) -> (..., n)."""
    return lambda x: torch.softmax(x, -1)


KERNEL = Kernel(
    id="torch.softmax",
    op="softmax",
    precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16, "float16": Precision.BF16},
    bind=bind,
    rank=0,
)
