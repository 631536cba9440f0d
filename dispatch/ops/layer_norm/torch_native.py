"""``torch.native_layer_norm``: the same kernel without the composite operator around it."""

from __future__ import annotations

import torch

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
    native = torch.ops.aten.native_layer_norm.default
    return lambda x: native(x, shape, weight, bias, eps)[0]


KERNEL = Kernel(
    id="torch.native_layer_norm",
    op="layer_norm",
    precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16},
    bind=bind,
    rank=1,
)
