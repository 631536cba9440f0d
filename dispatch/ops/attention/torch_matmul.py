"""Two batched GEMMs with a softmax between them; it can win where the keys are few."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.problem import Precision, Problem


def bind(problem: Problem, _params: tuple[tuple[str, int], ...]) -> Run:
    """run(q (b, h, q, d), k, v (b, h, kv, d), mask, scale) -> (b, h, q, d)."""
    default_scale = problem.dim("d") ** -0.5

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: torch.Tensor | None, scale: float | None
    ) -> torch.Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)).mul_(default_scale if scale is None else scale)
        return torch.matmul(torch.softmax(scores, dim=-1), v)

    return run


def supports(problem: Problem) -> str | None:
    """No mask (a row that sees no key would be NaN where the framework answers zero), no shared key heads."""
    if problem.trait("causal") == "yes" or problem.trait("mask") != "none":
        return "has no masked form"
    return None if problem.dim("h") == problem.dim("hkv") else "needs as many key heads as query heads"


KERNEL = Kernel(
    id="torch.matmul_attention",
    op="attention",
    precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16},
    bind=bind,
    supports=supports,
    rank=1,
)
