"""Triton kernels of layer_norm on a GPU; see ``gpu/rows.py``."""

from __future__ import annotations

import torch

from dks.dispatch.gpu import call, rows
from dks.dispatch.gpu.call import Buffer, Recipe, bound, buffer, given, number, steps
from dks.dispatch.gpu.elements import EXACTNESS, class_of
from dks.dispatch.gpu.program import Program
from dks.dispatch.kernel import Kernel, Late, Params, Run
from dks.dispatch.problem import Problem


def layer_norm(align: int, late: bool = False) -> Kernel:
    """The kernel ``triton.layer_norm``, of 16-byte alignment, or ``triton.layer_norm_scalar`` where ``align`` is 0.

    Args:
        late: for calls without preparation: ``triton.layer_norm_direct`` and ``triton.layer_norm_direct_scalar``.
    """

    def programs(problem: Problem, params: Params) -> tuple[Program, ...]:
        dtype, affine = problem.trait("dtype"), problem.trait("affine") == "yes"
        return rows.layer_norm(dtype, affine, affine, params, class_of(dtype, align))

    def recipe(problem: Problem, params: Params, more: dict[str, call.Value], constants: tuple[str, ...]) -> Recipe:
        n = problem.dim("n")
        rows.expect_room(params, n)
        values: dict[str, call.Value] = {"x": given(0), "y": buffer(0), "m": call.rows(0), "n": n, "x_stride": n}
        return Recipe(
            (problem.trait("dtype"), *constants), steps(programs(problem, params), values | more), (Buffer(),)
        )

    def bind(
        problem: Problem, params: Params, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> Run:
        """weight and bias (n,) of x's dtype, or both None -> run(x (..., n)) -> (..., n).

        Raises:
            Missing: a program has no compiled form here.
            ValueError: no block of these parameters holds a row.
        """
        more: dict[str, call.Value] = {
            "weight": 0 if weight is None else weight.detach().contiguous(),
            "bias": 0 if bias is None else bias.detach().contiguous(),
            "eps": eps,
        }
        device = None if weight is None else weight.device
        return bound(recipe(problem, params, more, ()), device=device)  # type: ignore[return-value]

    def unprepared(problem: Problem, params: Params) -> Run:
        """run(x, weight, bias, eps); see ``bind``."""
        affine = problem.trait("affine") == "yes"
        constants = (problem.trait("dtype") if affine else "none",) * 2
        more: dict[str, call.Value] = {
            "weight": given(1) if affine else 0,
            "bias": given(2) if affine else 0,
            "eps": number(3, 1e-5),
        }
        return bound(recipe(problem, params, more, (*constants, "number")))  # type: ignore[return-value]

    return Kernel(
        id="_".join(["triton.layer_norm", *(["direct"] if late else []), *([] if align else ["scalar"])]),
        op="layer_norm",
        precision=EXACTNESS,
        bind=Late(unprepared) if late else bind,
        # A form, since binding takes longer than a small call.
        form="" if late else "the addresses of weight and bias",
        form_bytes=lambda _: 0 if late else 16,
        reads_in_place=True,
        params=rows.PARAMS,
        programs=programs,
        sources=("rows.py",),
        align=align,
        suits=lambda problem, params: rows.suits(params, problem.dim("n")),
        rank=(20 if align else 21) + 2 * late,
        devices=("cuda",),
    )


KERNELS = (layer_norm(16), layer_norm(0), layer_norm(16, late=True), layer_norm(0, late=True))
