"""The framework's own path: ``F.cross_entropy``, without a reduction."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.problem import Precision, Problem


def losses(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """logits (m, n), targets (m,) -> (m,), in the framework's operator; differentiable."""
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")


def bind(_problem: Problem, _params: tuple[tuple[str, int], ...]) -> Run:
    """run(logits (m, n), targets (m,), ignore_index) -> (m,)."""
    return losses


KERNEL = Kernel(
    id="torch.cross_entropy",
    op="cross_entropy",
    precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16, "float16": Precision.BF16},
    bind=bind,
    rank=0,
)
