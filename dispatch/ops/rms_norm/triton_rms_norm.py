"""Triton kernels of rms_norm on a GPU, which add a residual in the same pass; see ``gpu/rows.py``."""

from __future__ import annotations

import torch

from dks.dispatch.gpu import call, rows
from dks.dispatch.gpu.call import Buffer, Recipe, bound, buffer, given, number, steps
from dks.dispatch.gpu.elements import EXACTNESS, class_of
from dks.dispatch.gpu.program import Program
from dks.dispatch.kernel import Kernel, Late, Launch, Params
from dks.dispatch.problem import Problem

EPSILON = torch.finfo(torch.float32).eps
"""Of a call that names none: torch takes float32's for 16-bit types too, since it computes in float32."""


def rms_norm(align: int, late: bool = False) -> Kernel:
    """The kernel ``triton.rms_norm``, of 16-byte alignment, or ``triton.rms_norm_scalar`` where ``align`` is 0.

    Args:
        late: for calls without preparation: ``triton.rms_norm_direct`` and ``triton.rms_norm_direct_scalar``.
    """

    def programs(problem: Problem, params: Params) -> tuple[Program, ...]:
        dtype = problem.trait("dtype")
        affine, adds = problem.trait("affine") == "yes", problem.trait("residual") == "yes"
        return rows.rms_norm(dtype, affine, adds, params, class_of(dtype, align))

    def values(problem: Problem, params: Params) -> dict[str, call.Value]:
        n, adds = problem.dim("n"), problem.trait("residual") == "yes"
        rows.expect_room(params, n)
        return {
            **{"x": given(0), "y": buffer(0), "m": call.rows(0), "n": n, "x_stride": n, "residual_stride": n},
            **{"residual": given(1) if adds else 0, "total": buffer(1) if adds else 0},
        }

    def recipe(problem: Problem, params: Params, more: dict[str, call.Value], constants: tuple[str, ...]) -> Recipe:
        count = 2 if problem.trait("residual") == "yes" else 1
        launched = steps(programs(problem, params), values(problem, params) | more)
        return Recipe((problem.trait("dtype"),) * count + constants, launched, (Buffer(),) * count)

    def bind(problem: Problem, params: Params, weight: torch.Tensor | None, eps: float | None) -> Launch:
        """weight (n,) of x's dtype, or None -> run(x (..., n)) -> (..., n), or run(x, r) -> (y, h).

        Raises:
            Missing: a program has no compiled form here.
            ValueError: no block of these parameters holds a row.
        """
        more: dict[str, call.Value] = {
            "weight": 0 if weight is None else weight.detach().contiguous(),
            "eps": EPSILON if eps is None else eps,
        }
        return bound(recipe(problem, params, more, ()), device=None if weight is None else weight.device)

    def unprepared(problem: Problem, params: Params) -> Launch:
        """run(x, weight, eps) or run(x, r, weight, eps); see ``bind``."""
        affine, first = problem.trait("affine") == "yes", 2 if problem.trait("residual") == "yes" else 1
        more: dict[str, call.Value] = {
            "weight": given(first) if affine else 0,
            "eps": number(first + 1, EPSILON),
        }
        return bound(recipe(problem, params, more, (problem.trait("dtype") if affine else "none", "number")))

    return Kernel(
        id="_".join(["triton.rms_norm", *(["direct"] if late else []), *([] if align else ["scalar"])]),
        op="rms_norm",
        precision=EXACTNESS,
        bind=Late(unprepared) if late else bind,
        # A form, since binding takes longer than a small call.
        form="" if late else "the address of the weight",
        form_bytes=lambda _: 0 if late else 8,
        reads_in_place=True,
        params=rows.PARAMS,
        programs=programs,
        sources=("rows.py",),
        align=align,
        suits=lambda problem, params: rows.suits(params, problem.dim("n")),
        rank=(20 if align else 21) + 2 * late,
        devices=("cuda",),
    )


KERNELS = (rms_norm(16), rms_norm(0), rms_norm(16, late=True), rms_norm(0, late=True))
