"""Triton kernels of cross-entropy on a GPU, without a matrix of probabilities; see ``gpu/cross_entropy.py``."""

from __future__ import annotations

from dks.dispatch.gpu import cross_entropy as family
from dks.dispatch.gpu.call import Buffer, Recipe, Value, bound, buffer, given, number, size, steps
from dks.dispatch.gpu.elements import EXACTNESS, class_of
from dks.dispatch.gpu.program import Program
from dks.dispatch.kernel import Kernel, Params, Run
from dks.dispatch.problem import Problem

_IGNORED = -100  # of a call that does not say, as in the framework


def cross_entropy(align: int) -> Kernel:
    """The kernel ``triton.cross_entropy``, of 16-byte alignment, or the one for less, where ``align`` is 0."""

    def programs(problem: Problem, params: Params) -> tuple[Program, ...]:
        dtype = problem.trait("dtype")
        return family.cross_entropy(dtype, params, class_of(dtype, align))

    def bind(problem: Problem, params: Params) -> Run:
        """run(logits (m, n), targets (m,) int64, ignored) -> losses (m,). Raises Missing where a program has no
        compiled form here."""
        n, dtype = problem.dim("n"), problem.trait("dtype")
        values: dict[str, Value] = {
            **{"logits": given(0), "targets": given(1), "losses": buffer(0), "ignored": number(2, _IGNORED)},
            **{"m": size(0, 0), "n": n, "stride": n},
        }
        recipe = Recipe((dtype, "int64", "number"), steps(programs(problem, params), values), (Buffer(last=0),))
        return bound(recipe)  # type: ignore[return-value]

    return Kernel(
        id="triton.cross_entropy" if align else "triton.cross_entropy_scalar",
        op="cross_entropy",
        precision=EXACTNESS,
        bind=bind,
        params=family.PARAMS,
        programs=programs,
        sources=("cross_entropy.py",),
        align=align,
        suits=lambda problem, params: family.unsuited(params, problem.dim("n")),
        rank=20 if align else 21,
        devices=("cuda",),
    )


KERNELS = (cross_entropy(16), cross_entropy(0))
