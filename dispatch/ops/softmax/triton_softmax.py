"""Triton kernels of softmax on a GPU; see ``gpu/rows.py``.

The width of a row comes with a call, and with it the alignment of rows: a call takes the program that it is meant
for, and where that can't hold the row or read it in vectors, the next one.
"""

from __future__ import annotations

from dks.dispatch.gpu import call, rows
from dks.dispatch.gpu.call import Buffer, Recipe, bound, buffer, given, size, steps
from dks.dispatch.gpu.elements import EXACTNESS, class_of
from dks.dispatch.gpu.program import Program
from dks.dispatch.kernel import Kernel, Params, Run
from dks.dispatch.problem import Problem

VALUES = {"x": given(0), "y": buffer(0), "m": call.rows(0), "n": size(0, -1), "x_stride": size(0, -1)}


def softmax(align: int) -> Kernel:
    """The kernel ``triton.softmax``, whose inputs lie at 16 bytes, or the one for less, where ``align`` is 0."""

    def forms(problem: Problem, params: Params) -> list[tuple[Program, int]]:
        """Programs, and the widest rows that they take; 0 where they take any."""
        dtype = problem.trait("dtype")
        aligns = dict.fromkeys((class_of(dtype, align), class_of(dtype, 0)))
        found = []
        # What holds a row in vectors, what holds it, what loops over it in vectors, what loops.
        for each in dict.fromkeys((params, rows.LOOP)):
            p = dict(each)
            found += [(rows.softmax(dtype, each, a)[0], 0 if p["loop"] else p["block"]) for a in aligns]
        return found

    def bind(problem: Problem, params: Params) -> Run:
        """run(x (..., n)) -> (..., n). Raises Missing where a program has no compiled form here."""
        recipes = [
            Recipe(
                (problem.trait("dtype"),),
                steps((program,), VALUES),
                (Buffer(),),
                ((size(0, -1), most),) if most else (),
            )
            for program, most in forms(problem, params)
        ]
        return bound(*recipes)  # type: ignore[return-value]

    return Kernel(
        id="triton.softmax" if align else "triton.softmax_scalar",
        op="softmax",
        precision=EXACTNESS,
        bind=bind,
        params=rows.PARAMS,
        programs=lambda problem, params: tuple(program for program, _ in forms(problem, params)),
        sources=("rows.py",),
        align=align,
        suits=lambda problem, params: rows.suits(params, problem.dim("n")),
        rank=20 if align else 21,
        devices=("cuda",),
    )


KERNELS = (softmax(16), softmax(0))
