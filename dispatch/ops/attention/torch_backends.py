"""The backends that ``F.scaled_dot_product_attention`` picks from on a GPU, each by itself.

They are called as operators: PyTorch's own switches between them (``torch.nn.attention.sdpa_kernel``) are for the
whole process, and a request must not turn them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.problem import Precision, Problem

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool, float | None], torch.Tensor]
_aten = torch.ops.aten


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None) -> torch.Tensor:
    y: torch.Tensor = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[0]
    return y


def _efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None
) -> torch.Tensor:
    call = _aten._scaled_dot_product_efficient_attention
    y: torch.Tensor = call(q, k, v, None, False, 0.0, causal, scale=scale)[0]
    return y


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None) -> torch.Tensor:
    call = _aten._scaled_dot_product_cudnn_attention
    y: torch.Tensor = call(q, k, v, None, False, 0.0, causal, scale=scale)[0]
    return y


def backend(name: str, call: Call, *, groups: bool) -> Kernel:
    """The kernel ``torch.sdpa_<name>``.

    Args:
        groups: whether it takes fewer key heads than query heads.
    """

    def bind(problem: Problem, _params: tuple[tuple[str, int], ...]) -> Run:
        """run(q (b, h, q, d), k, v (b, hkv, kv, d), mask None, scale) -> (b, h, q, d)."""
        causal = problem.trait("causal") == "yes"
        gqa = problem.dim("h") != problem.dim("hkv")

        def run(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: torch.Tensor | None, scale: float | None
        ) -> torch.Tensor:
            if causal and q.shape[2] != k.shape[2]:
                # Some of them align the mask with the last key then, where the framework does with the first.
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
            return call(q, k, v, causal, scale)

        return run

    def supports(problem: Problem) -> str | None:
        if problem.trait("mask") != "none":
            return "is not measured with a mask"
        if problem.dim("d") % 8:
            return f"d={problem.dim('d')} is not divisible by 8"
        return (
            None if groups or problem.dim("h") == problem.dim("hkv") else "takes as many key heads as query heads"
        )

    return Kernel(
        id=f"torch.sdpa_{name}",
        op="attention",
        precision={"bfloat16": Precision.BF16, "float16": Precision.BF16},
        bind=bind,
        align=16,
        supports=supports,
        devices=("cuda",),
        rank=1,
    )


KERNELS = (
    backend("flash", _flash, groups=True),
    backend("efficient", _efficient, groups=False),
    backend("cudnn", _cudnn, groups=True),
)
