"""oneDNN on a weight reordered once into its blocked layout, with bias and activation fused."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import DTYPES, Kernel, Run
from dks.dispatch.ops.linear.epilogue import ONEDNN_ATTR
from dks.dispatch.problem import Precision, Problem

# The layout barely depends on the rows it is asked for; one that suits most of them serves all bins.
PACK_ROWS = 64


def bind(
    problem: Problem, params: tuple[tuple[str, int], ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> Run:
    """weight (n, k), bias (n,) or None -> run(x (..., k)) -> (..., n)."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACK_ROWS)
    attr, algorithm = ONEDNN_ATTR[problem.trait("epilogue")]
    linear = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: linear(x, packed, bias, attr, [], algorithm)


def unavailable() -> str | None:
    """Why torch can't run it here, or None."""
    return None if torch.backends.mkldnn.is_available() else "this torch is built without oneDNN"


KERNEL = Kernel(
    id="mkldnn.linear_packed",
    op="linear",
    precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16},
    bind=bind,
    form="oneDNN blocked layout",
    form_bytes=lambda p: p.dim("n") * p.dim("k") * DTYPES[p.trait("dtype")].itemsize,
    unavailable=unavailable,
    rank=3,
)
