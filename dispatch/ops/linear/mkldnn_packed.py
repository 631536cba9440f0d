"""oneDNN on a weight reordered once into its blocked layout, with bias and epilogue fused."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.ops.linear.epilogue import fused_in_place, onednn_fused
from dks.dispatch.problem import Precision, Problem

# The layout barely depends on the rows it is asked for; one that suits most of them serves all bins.
PACK_ROWS = 64


def bind(
    problem: Problem, _params: tuple[tuple[str, int], ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> Run:
    """weight (n, k), bias (n,) or None -> run(x (..., k)[, residual (..., n)]) -> (..., n)."""
    return _bind(problem.trait("epilogue"), weight, bias)


def bind_cast(problem: Problem, dtype: torch.dtype, weight: torch.Tensor, bias: torch.Tensor | None) -> Run:
    """The same computed in ``dtype``: x is cast to it, and the output back.

    A residual is added after that, in its own dtype: it is neither rounded nor read once more for a cast.
    """
    epilogue = problem.trait("epilogue")
    fused, after = ("none", epilogue) if epilogue == "add" else (epilogue, "none")
    run = _bind(fused, weight.to(dtype), None if bias is None else bias.to(dtype))
    own = weight.dtype
    return fused_in_place(lambda x: run(x.to(dtype)).to(own), after)


def _bind(epilogue: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Run:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACK_ROWS)
    linear = torch.ops.mkldnn._linear_pointwise.default
    binary = torch.ops.mkldnn._linear_pointwise.binary
    if epilogue == "add":
        return lambda x, residual: binary(x, residual, packed, bias, "add")

    def make(attr: str, algorithm: str) -> Run:
        return lambda x: linear(x, packed, bias, attr, [], algorithm)

    return onednn_fused(make, epilogue)


def unavailable() -> str | None:
    """Why torch can't run it here, or None."""
    found: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return None if found else "this torch is built without oneDNN"


def lacks_bf16() -> str | None:
    """Why oneDNN computes nothing in bf16 here, or None."""
    if (why := unavailable()) is not None:
        return why
    return None if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "oneDNN computes no bf16 on this CPU"


KERNEL = Kernel(
    id="mkldnn.linear_packed",
    op="linear",
    precision={"float32": Precision.EXACT},
    bind=bind,
    form="oneDNN blocked layout",
    form_bytes=lambda p: p.dim("n") * p.dim("k") * 4,
    unavailable=unavailable,
    rank=3,
)
