"""``F.scaled_dot_product_attention`` in the other dtype: bf16 or float32, whichever is faster here."""

from __future__ import annotations

import math

import torch

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.ops.attention import torch_sdpa
from dks.dispatch.problem import Precision, Problem


def bind(problem: Problem, params: tuple[tuple[str, int], ...]) -> Run:
    """run(q (b, h, q, d), k, v (b, hkv, kv, d), mask, scale) -> (b, h, q, d), of q's dtype."""
    sdpa = torch_sdpa.bind(problem, params)
    other = torch.bfloat16 if problem.trait("dtype") == "float32" else torch.float32

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> torch.Tensor:
        if mask is not None and mask.dtype != torch.bool:
            if other is torch.bfloat16:
                # Float32's lowest number would round to -inf; a row of -inf sees no key at all.
                mask = torch.where(mask == -math.inf, mask, mask.clamp(min=torch.finfo(other).min))
            mask = mask.to(other)
        return sdpa(q.to(other), k.to(other), v.to(other), mask, scale).to(q.dtype)

    return run


KERNEL = Kernel(
    id="torch.sdpa_cast",
    op="attention",
    precision={"float32": Precision.BF16, "bfloat16": Precision.BF16},
    bind=bind,
    supports=torch_sdpa.supports,
    rank=2,
)
