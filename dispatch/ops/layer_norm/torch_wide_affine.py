"""bf16 rows with the affine parameters kept in float32: torch then reads them without converting."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.ops.layer_norm import torch_native
from dks.dispatch.problem import Precision, Problem


def bind(
    problem: Problem,
    params: tuple[tuple[str, int], ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Run:
    """weight (n,), bias (n,), bf16 -> run(x (..., n) bf16) -> (..., n) bf16."""
    wide_weight, wide_bias = (None if t is None else t.detach().float() for t in (weight, bias))
    return torch_native.bind(problem, params, wide_weight, wide_bias, eps)


KERNEL = Kernel(
    id="torch.layer_norm_wide_affine",
    op="layer_norm",
    precision={"bfloat16": Precision.BF16},
    bind=bind,
    form="weight and bias in float32",
    form_bytes=lambda p: 8 * p.dim("n"),
    supports=lambda p: None if p.trait("affine") == "yes" else "has no weight to keep in float32",
    rank=2,
)
