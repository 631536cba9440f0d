"""The framework's own path: ``F.linear`` and the epilogue after it. Every kernel is held against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.ops.linear.epilogue import EPILOGUES
from dks.dispatch.problem import Precision, Problem


def bind(
    problem: Problem, _params: tuple[tuple[str, int], ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> Run:
    """weight (n, k), bias (n,) or None -> run(x (..., k)[, residual (..., n)]) -> (..., n)."""
    epilogue = problem.trait("epilogue")
    if epilogue == "none":
        return lambda x: F.linear(x, weight, bias)
    if epilogue == "add":
        return lambda x, residual: F.linear(x, weight, bias) + residual
    apply = EPILOGUES[epilogue]
    return lambda x: apply(F.linear(x, weight, bias))


KERNEL = Kernel(
    id="torch.linear",
    op="linear",
    precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16, "float16": Precision.BF16},
    bind=bind,
    rank=0,
)
