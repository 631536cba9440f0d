"""Generated softmaxes (``tiles/rows.hpp``): more rows abreast for short rows, more vectors for long ones."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Declined, Kernel, Params, Run
from dks.dispatch.problem import Precision, Problem
from dks.dispatch.tiles import library, threads
from dks.dispatch.tiles.isa import ELEMENTS, ISAS, VECTORS
from dks.dispatch.tiles.unit import Unit

HEADER = "rows.hpp"
_SHAPES = ((2, 4), (1, 8), (8, 1))  # vectors in flight, rows beside each other
_WORK = 32  # multiply-adds that take as long as one element


def softmax(isa: str) -> Kernel:
    """The kernel ``tile.softmax_<isa>``."""

    def unit(problem: Problem, params: Params) -> Unit:
        dtype, p = problem.trait("dtype"), dict(params)
        template = f"dks::Softmax<{VECTORS[isa]}, {ELEMENTS[dtype]}, {p['unroll']}, {p['rows']}>"
        name = f"dks_softmax_{isa}_{dtype}_unroll{p['unroll']}_rows{p['rows']}"
        return Unit(name, isa, "softmax", HEADER, template)

    def bind(problem: Problem, params: Params) -> Run:
        """run(x (..., n)) -> (..., n). Raises Missing where there is no compiled form of it."""
        call, empty_like, count = library.function(unit(problem, params)), torch.empty_like, dict(params)["t"]

        def run(x: torch.Tensor) -> torch.Tensor:
            y, n = empty_like(x), x.shape[-1]
            if code := call(x.data_ptr(), y.data_ptr(), x.numel() // n, n, count):
                raise Declined(library.DECLINED[code])
            return y

        return run

    def suits(problem: Problem, params: Params) -> str | None:
        m, n = problem.dim("m"), problem.dim("n")
        return threads.objection(params, _WORK * m * n, -(-m // dict(params)["rows"]))

    return Kernel(
        id=f"tile.softmax_{isa}",
        op="softmax",
        precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16},
        bind=bind,
        params=tuple((("unroll", u), ("rows", r), ("t", t)) for u, r in _SHAPES for t in threads.COUNTS),
        unit=unit,
        header=HEADER,
        # Rows that are left over of a step are summed up in another order.
        batch_invariant=lambda params: dict(params)["rows"] == 1,
        suits=suits,
        unavailable=ISAS[isa].unavailable,
        rank=1,
    )


KERNELS = (softmax("avx512"), softmax("avx2"))
