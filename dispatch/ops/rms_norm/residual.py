"""The addition in front of a norm, for kernels that do not fuse it."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Launch, Run
from dks.dispatch.problem import Problem


def with_residual(problem: Problem, norm: Run) -> Launch:
    """``norm`` (x (..., n) -> y (..., n)), or run(x, r) -> (y, h) of h = x + r where the problem has a residual."""
    if problem.trait("residual") == "no":
        return norm

    def run(x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x + r
        return norm(h), h

    return run
