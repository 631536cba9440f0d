"""MKL's packed sgemm. A pack is tuned for a number of rows and works, more slowly, for any other.

Each value of ``rows`` is a candidate and one more copy of the weight; the bins that choose the same value
share it.
"""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.ops.linear import mkldnn_packed
from dks.dispatch.ops.linear.epilogue import fused_in_place
from dks.dispatch.problem import Precision, Problem


def bind(
    problem: Problem, params: tuple[tuple[str, int], ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> Run:
    """weight (n, k), bias (n,) or None, float32 -> run(x (..., k)[, residual (..., n)]) -> (..., n)."""
    k = problem.dim("k")
    weight = weight.detach().contiguous()
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, dict(params)["rows"])
    linear = torch.ops.mkl._mkl_linear.default
    # The last argument says for how many rows the weight is packed. The operator uses the pack only where
    # it equals the rows of x, so it is told that they do.
    return fused_in_place(lambda x: linear(x, packed, weight, bias, x.numel() // k), problem.trait("epilogue"))


def unavailable() -> str | None:
    """Why torch can't run it here, or None."""
    found: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if not found or mkldnn_packed.unavailable():
        return "this torch is built without MKL"
    return None if hasattr(torch.ops.mkl, "_mkl_linear") else "this torch has no packed MKL linear"


KERNEL = Kernel(
    id="mkl.linear_packed",
    op="linear",
    precision={"float32": Precision.EXACT},
    bind=bind,
    form="MKL packed layout for a number of rows",
    form_bytes=lambda p: p.dim("n") * p.dim("k") * 4,
    params=((("rows", 64),), (("rows", 512),), (("rows", 4096),)),
    unavailable=unavailable,
    rank=4,
)
