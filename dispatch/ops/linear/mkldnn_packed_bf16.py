"""oneDNN's packed bf16 linear; float32 activations are cast, and the output is cast back."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.ops.linear import mkldnn_packed
from dks.dispatch.problem import Precision, Problem


def bind(
    problem: Problem, _params: tuple[tuple[str, int], ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> Run:
    """weight (n, k), bias (n,) or None -> run(x (..., k)[, residual (..., n)]) -> (..., n), of its dtype."""
    if problem.trait("dtype") == "bfloat16":
        return mkldnn_packed.bind(problem, _params, weight, bias)
    return mkldnn_packed.bind_cast(problem, torch.bfloat16, weight, bias)


KERNEL = Kernel(
    id="mkldnn.linear_packed_bf16",
    op="linear",
    precision={"float32": Precision.BF16, "bfloat16": Precision.BF16},
    bind=bind,
    form="oneDNN blocked layout, bf16",
    form_bytes=lambda p: p.dim("n") * p.dim("k") * 2,
    unavailable=mkldnn_packed.lacks_bf16,
    rank=5,
)
