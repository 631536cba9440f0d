"""Triton kernels of rotary position embedding on a GPU; see ``gpu/rotary.py``."""

from __future__ import annotations

from dks.dispatch.gpu import rotary as family
from dks.dispatch.gpu.call import Buffer, Recipe, Value, bound, buffer, given, size, steps, stride
from dks.dispatch.gpu.elements import EXACTNESS, class_of
from dks.dispatch.gpu.program import Program
from dks.dispatch.kernel import Kernel, Launch, Params
from dks.dispatch.problem import Problem


def rotary(align: int) -> Kernel:
    """The kernel ``triton.rotary``, of 16-byte alignment, or the one for less, where ``align`` is 0."""

    def cache(problem: Problem) -> str:
        return "float32" if problem.trait("cache") == "float32" else problem.trait("dtype")

    def programs(problem: Problem, params: Params) -> tuple[Program, ...]:
        dtype = problem.trait("dtype")
        # Where nothing but elements is aligned, those of a wider cache are to its own size.
        return family.rotary(dtype, cache(problem), problem.dim("d"), params, class_of(dtype, align))

    def bind(problem: Problem, params: Params) -> Launch:
        """run(q (tokens, h, d), k (tokens, hkv, d), cos, sin (positions, d / 2), positions (tokens,) int64)
        -> (q_out, k_out), contiguous. Raises Missing where a program has no compiled form here.
        """
        values: dict[str, Value] = {
            **{name: given(i) for i, name in enumerate(("q", "k", "cos", "sin", "positions"))},
            **{"q_out": buffer(0), "k_out": buffer(1), "tokens": size(0, 0), "h": problem.dim("h")},
            **{"hkv": problem.dim("hkv"), "rows": size(2, 0), "cache_stride": stride(2, 0)},
            **{"q_token": stride(0, 0), "q_head": stride(0, 1), "k_token": stride(1, 0), "k_head": stride(1, 1)},
        }
        dtype = problem.trait("dtype")
        inputs = (dtype, dtype, cache(problem), cache(problem), "int64")
        return bound(Recipe(inputs, steps(programs(problem, params), values), (Buffer(0), Buffer(1))))

    def supports(problem: Problem) -> str | None:
        h, hkv = problem.dim("h"), problem.dim("hkv")
        return None if hkv <= h else f"takes no more key heads than query heads, not {hkv} and {h}"

    return Kernel(
        id="triton.rotary" if align else "triton.rotary_scalar",
        op="rotary",
        precision=EXACTNESS,
        bind=bind,
        params=family.PARAMS,
        programs=programs,
        sources=("rotary.py",),
        align=align,
        supports=supports,
        suits=lambda problem, params: family.unsuited(params, problem.dim("h")),
        rank=20 if align else 21,
        devices=("cuda",),
    )


KERNELS = (rotary(16), rotary(0))
