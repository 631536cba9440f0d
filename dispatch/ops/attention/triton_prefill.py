"""Triton kernels of attention on a GPU, without a matrix of scores; see ``gpu/attention.py``."""

from __future__ import annotations

from dks.dispatch.gpu import attention
from dks.dispatch.gpu.call import (
    Buffer,
    Recipe,
    Value,
    bound,
    buffer,
    buffer_stride,
    given,
    number,
    size,
    steps,
    stride,
)
from dks.dispatch.gpu.elements import EXACTNESS, class_of
from dks.dispatch.gpu.program import Program
from dks.dispatch.kernel import Kernel, Params, Run
from dks.dispatch.problem import Problem


def prefill(align: int) -> Kernel:
    """The kernel ``triton.prefill``, of 16-byte alignment, or the one for less, where ``align`` is 0."""

    def programs(problem: Problem, params: Params) -> tuple[Program, ...]:
        dtype, causal = problem.trait("dtype"), problem.trait("causal") == "yes"
        return attention.prefill(dtype, causal, problem.dim("d"), params, class_of(dtype, align))

    def bind(problem: Problem, params: Params) -> Run:
        """run(q (b, h, q, d), k, v (b, hkv, kv, d), None, scale) -> (b, h, q, d), laid out as ``layout`` says.

        The strides of their last dims are 1. Raises Missing where a program has no compiled form here.
        """
        dtype, d = problem.trait("dtype"), problem.dim("d")
        values: dict[str, Value] = {
            **{"q": given(0), "k": given(1), "v": given(2), "y": buffer(0)},
            **{"b": size(0, 0), "h": problem.dim("h"), "hkv": problem.dim("hkv")},
            # Causal as the framework is: row i sees the keys up to i, however many there are.
            **{"rows": size(0, 2), "kv": size(1, 2), "diagonal": 0, "scale": number(4, d**-0.5)},
            **{f"{name}_{dim}": stride(i, j) for i, name in enumerate("qkv") for j, dim in enumerate("bhs")},
            **{f"y_{dim}": buffer_stride(0, j) for j, dim in enumerate("bhs")},
        }
        output = Buffer(swapped=problem.trait("layout") == "bshd")
        inputs = (dtype, dtype, dtype, "none", "number")
        return bound(Recipe(inputs, steps(programs(problem, params), values), (output,)))  # type: ignore[return-value]

    def supports(problem: Problem) -> str | None:
        if problem.trait("mask") != "none":
            return "takes no mask"
        return attention.objection(problem.dim("d"))

    return Kernel(
        id="triton.prefill" if align else "triton.prefill_scalar",
        op="attention",
        precision=EXACTNESS,
        bind=bind,
        params=attention.PARAMS if align else attention.SCALAR_PARAMS,
        programs=programs,
        sources=("attention.py",),
        align=align,
        supports=supports,
        suits=lambda problem, params: attention.unsuited(params, problem.dim("q")),
        rank=20 if align else 21,
        devices=("cuda",),
    )


KERNELS = (prefill(16), prefill(0))
