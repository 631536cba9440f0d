"""bf16 activations computed in float32, for machines without bf16 arithmetic: cast, oneDNN, cast back."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.ops.linear import mkldnn_packed
from dks.dispatch.problem import Precision, Problem


def bind(
    problem: Problem, _params: tuple[tuple[str, int], ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> Run:
    """weight (n, k), bias (n,) or None -> run(x (..., k)[, residual (..., n)]) -> (..., n), all bf16."""
    return mkldnn_packed.bind_cast(problem, torch.float32, weight, bias)


KERNEL = Kernel(
    id="mkldnn.linear_packed_float32",
    op="linear",
    precision={"bfloat16": Precision.BF16},
    bind=bind,
    form="oneDNN blocked layout, float32",
    form_bytes=lambda p: p.dim("n") * p.dim("k") * 4,
    unavailable=mkldnn_packed.unavailable,
    rank=5,
)
