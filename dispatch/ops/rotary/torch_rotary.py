"""The framework's own path: gathered rows of the caches, halves and products, in float32."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Launch
from dks.dispatch.problem import Precision, Problem


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator in the framework's own; differentiable. Tensors of float64 are turned in float64."""
    rows = [t.index_select(0, positions)[:, None] for t in (cos, sin)]

    def turned(x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        left, right = x.to(wide).chunk(2, -1)
        cosine, sine = (t.to(wide) for t in rows)
        return torch.cat((left * cosine - right * sine, right * cosine + left * sine), -1).to(x.dtype)

    return turned(q), turned(k)


def bind(_problem: Problem, _params: tuple[tuple[str, int], ...]) -> Launch:
    """run(q, k, cos, sin, positions) -> (q_out, k_out)."""
    return rotate


KERNEL = Kernel(
    id="torch.rotary",
    op="rotary",
    precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16, "float16": Precision.BF16},
    bind=bind,
    rank=0,
)
