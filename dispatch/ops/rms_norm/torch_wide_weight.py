"""bf16 rows with the weight kept in float32: the rows are widened, and then no call widens the weight."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Launch
from dks.dispatch.ops.rms_norm import torch_vector_norm
from dks.dispatch.problem import Precision, Problem


def bind(problem: Problem, params: tuple[tuple[str, int], ...], weight: torch.Tensor, eps: float | None) -> Launch:
    """weight (n,) bf16 -> run(x (..., n) bf16) -> (..., n) bf16; with a residual see ``with_residual``."""
    return torch_vector_norm.bind(problem, params, weight.detach().float(), eps)


KERNEL = Kernel(
    id="torch.rms_norm_wide_weight",
    op="rms_norm",
    precision={"bfloat16": Precision.BF16},
    bind=bind,
    form="weight in float32",
    form_bytes=lambda p: 4 * p.dim("n"),
    supports=lambda p: None if p.trait("affine") == "yes" else "has no weight to keep in float32",
    rank=2,
)
