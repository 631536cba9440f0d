"""The framework's own path: ``F.scaled_dot_product_attention``, which picks its backend itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.problem import Precision, Problem


def bind(problem: Problem, _params: tuple[tuple[str, int], ...]) -> Run:
    """run(q (b, h, q, d), k, v (b, hkv, kv, d), mask, scale) -> (b, h, q, d)."""
    causal = problem.trait("causal") == "yes"
    gqa = problem.dim("h") != problem.dim("hkv")

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
        )

    return run


def supports(problem: Problem) -> str | None:
    """A mask or causality, as the framework has it."""
    both = problem.trait("causal") == "yes" and problem.trait("mask") != "none"
    return "takes a mask or causality, not both" if both else None


KERNEL = Kernel(
    id="torch.sdpa",
    op="attention",
    precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16, "float16": Precision.BF16},
    bind=bind,
    supports=supports,
    rank=0,
)
