"""Triton kernels of silu_and_mul on a GPU; see ``gpu/rows.py``."""

from __future__ import annotations

from dks.dispatch.gpu import call, rows
from dks.dispatch.gpu.call import Buffer, Recipe, bound, buffer, given, steps
from dks.dispatch.gpu.elements import EXACTNESS, class_of
from dks.dispatch.gpu.program import Program
from dks.dispatch.kernel import Kernel, Params, Run
from dks.dispatch.problem import Problem


def silu_and_mul(align: int) -> Kernel:
    """The kernel ``triton.silu_and_mul``, of 16-byte alignment, or the one for less, where ``align`` is 0."""

    def programs(problem: Problem, params: Params) -> tuple[Program, ...]:
        dtype = problem.trait("dtype")
        return rows.silu_and_mul(dtype, params, class_of(dtype, align))

    def bind(problem: Problem, params: Params) -> Run:
        """run(x (..., 2n)) -> (..., n). Raises Missing where a program has no compiled form here."""
        n = problem.dim("n")
        values: dict[str, call.Value] = {
            "x": given(0),
            "y": buffer(0),
            "m": call.rows(0),
            "n": n,
            "x_stride": 2 * n,
        }
        recipe = Recipe((problem.trait("dtype"),), steps(programs(problem, params), values), (Buffer(last=n),))
        return bound(recipe)  # type: ignore[return-value]

    return Kernel(
        id="triton.silu_and_mul" if align else "triton.silu_and_mul_scalar",
        op="silu_and_mul",
        precision=EXACTNESS,
        bind=bind,
        params=rows.SILU_PARAMS,
        programs=programs,
        sources=("rows.py",),
        align=align,
        suits=lambda problem, params: rows.silu_unsuited(params, problem.dim("n")),
        rank=20 if align else 21,
        devices=("cuda",),
    )


KERNELS = (silu_and_mul(16), silu_and_mul(0))
