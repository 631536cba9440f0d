"""oneDNN's packed bf16 linear for float32 activations: cast, multiply in bf16, cast back."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.ops.linear import mkldnn_packed
from dks.dispatch.problem import Precision, Problem


def bind(
    problem: Problem, params: tuple[tuple[str, int], ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> Run:
    """weight (n, k), bias (n,) or None, float32 -> run(x (..., k) float32) -> (..., n) float32."""
    half = mkldnn_packed.bind(problem, params, weight.bfloat16(), None if bias is None else bias.bfloat16())
    return lambda x: half(x.bfloat16()).float()


KERNEL = Kernel(
    id="mkldnn.linear_packed_bf16",
    op="linear",
    precision={"float32": Precision.BF16},
    bind=bind,
    form="oneDNN blocked layout, bf16",
    form_bytes=lambda p: p.dim("n") * p.dim("k") * 2,
    unavailable=mkldnn_packed.unavailable,
    rank=5,
)
