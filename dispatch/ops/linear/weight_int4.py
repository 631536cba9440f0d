"""Weight-only int4 for bf16 activations, asymmetric in groups along k; best at one row of a large weight."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.ops.linear.epilogue import fused_in_place
from dks.dispatch.ops.linear.quantize import check_finite
from dks.dispatch.problem import Precision, Problem


def bind(
    problem: Problem, params: tuple[tuple[str, int], ...], weight: torch.Tensor, bias: torch.Tensor | None
) -> Run:
    """weight (n, k), bias (n,) or None -> run(x (..., k)[, residual (..., n)]) -> (..., n), all bf16."""
    n, k = problem.dim("n"), problem.dim("k")
    group = dict(params)["group"]
    grouped = weight.detach().float().view(n, k // group, group)
    low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    check_finite(low + high)
    scale = ((high - low) / 15.0).clamp_min(1e-8)
    # The operator computes (q - 8) * scale + zero.
    q = torch.round((grouped - low[..., None]) / scale[..., None]).clamp_(0, 15).to(torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(q.view(n, k), 1)
    scale_and_zero = torch.stack((scale, low + 8.0 * scale), dim=2).transpose(0, 1).contiguous().bfloat16()

    def run(x: torch.Tensor) -> torch.Tensor:
        y = torch._weight_int4pack_mm_for_cpu(x.view(-1, k), packed, group, scale_and_zero)
        if bias is not None:
            y.add_(bias)
        return y.view(*x.shape[:-1], n)

    return fused_in_place(run, problem.trait("epilogue"))


def supports(problem: Problem) -> str | None:
    """Whole groups along k, whole blocks of output channels."""
    if problem.dim("k") % 128 or problem.dim("n") % 64:
        return "needs k to be a multiple of 128 and n of 64"
    return None


KERNEL = Kernel(
    id="torch.weight_int4",
    op="linear",
    precision={"bfloat16": Precision.INT4},
    bind=bind,
    form="int4 weight in groups, bf16 scale and zero",
    form_bytes=lambda p: p.dim("n") * p.dim("k") // 2 + p.dim("n") * p.dim("k") // 8,
    params=((("group", 32),), (("group", 128),)),
    supports=supports,
    rank=7,
)
