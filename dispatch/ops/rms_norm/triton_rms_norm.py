"""Triton kernels of rms_norm on a GPU, which add a residual in the same pass; see ``gpu/rows.py``."""

from __future__ import annotations

import torch

from dks.dispatch.gpu import call, rows
from dks.dispatch.gpu.call import Buffer, Recipe, bound, buffer, given, steps
from dks.dispatch.gpu.elements import EXACTNESS, class_of
from dks.dispatch.gpu.program import Program
from dks.dispatch.kernel import Kernel, Launch, Params
from dks.dispatch.problem import Problem


def rms_norm(align: int) -> Kernel:
    """The kernel ``triton.rms_norm``, of 16-byte alignment, or ``triton.rms_norm_scalar``, where ``align`` is 0."""

    def programs(problem: Problem, params: Params) -> tuple[Program, ...]:
        dtype = problem.trait("dtype")
        affine, adds = problem.trait("affine") == "yes", problem.trait("residual") == "yes"
        return rows.rms_norm(dtype, affine, adds, params, class_of(dtype, align))

    def bind(problem: Problem, params: Params, weight: torch.Tensor | None, eps: float | None) -> Launch:
        """weight (n,) of x's dtype, or None -> run(x (..., n)) -> (..., n), or run(x, r) -> (y, h).

        Raises:
            Missing: a program has no compiled form here.
            ValueError: no block of these parameters holds a row.
        """
        n, dtype, adds = problem.dim("n"), problem.trait("dtype"), problem.trait("residual") == "yes"
        rows.expect_room(params, n)
        values: dict[str, call.Value] = {
            **{
                "x": given(0),
                "residual": given(1) if adds else 0,
                "y": buffer(0),
                "total": buffer(1) if adds else 0,
            },
            **{"weight": 0 if weight is None else weight.detach().contiguous()},
            **{"m": call.rows(0), "n": n, "x_stride": n, "residual_stride": n},
            # torch takes float32's epsilon for 16-bit types too: it computes in float32.
            **{"eps": torch.finfo(torch.float32).eps if eps is None else eps},
        }
        count = 2 if adds else 1
        recipe = Recipe((dtype,) * count, steps(programs(problem, params), values), (Buffer(),) * count)
        return bound(recipe, device=None if weight is None else weight.device)

    return Kernel(
        id="triton.rms_norm" if align else "triton.rms_norm_scalar",
        op="rms_norm",
        precision=EXACTNESS,
        bind=bind,
        form="the address of the weight",  # a form, since binding takes longer than a small call
        form_bytes=lambda _: 8,
        params=rows.PARAMS,
        programs=programs,
        sources=("rows.py",),
        align=align,
        suits=lambda problem, params: rows.suits(params, problem.dim("n")),
        rank=20 if align else 21,
        devices=("cuda",),
    )


KERNELS = (rms_norm(16), rms_norm(0))
