"""The root mean square as a vector norm: fewer passes over the rows than ``F.rms_norm`` makes on CPUs."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Launch
from dks.dispatch.ops.rms_norm.residual import with_residual
from dks.dispatch.problem import Precision, Problem

EPS = torch.finfo(torch.float32).eps  # what None means to the framework, for every dtype that it sums in float32


def bind(
    problem: Problem, _params: tuple[tuple[str, int], ...], weight: torch.Tensor | None, eps: float | None
) -> Launch:
    """weight (n,) or None -> run(x (..., n)) -> (..., n); with a residual see ``with_residual``.

    The weight may be wider than the activations.
    """
    n = problem.dim("n")
    small = EPS if eps is None else eps
    vector_norm = torch.linalg.vector_norm

    def norm(x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = vector_norm(wide, 2, -1, True).square_().div_(n).add_(small).rsqrt_()
        # Where nothing was widened, these are still the caller's rows.
        y = wide * scale if wide is x else wide.mul_(scale)
        if weight is not None:
            y.mul_(weight)
        return y.to(x.dtype)

    return with_residual(problem, norm)


KERNEL = Kernel(
    id="torch.rms_vector_norm",
    op="rms_norm",
    precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16},
    bind=bind,
    rank=1,
)
