"""linear: y = epilogue(x @ weight.T + bias), with x (..., k), weight (n, k), bias (n,) or none.

The epilogue ``add`` adds a residual (..., n), which comes with each call.
"""

from __future__ import annotations

import torch

from dks.dispatch.kernel import DTYPES, Inputs, Operator, aligned, draw_activations, draw_normal
from dks.dispatch.ops.linear.epilogue import EPILOGUES
from dks.dispatch.ops.linear.serve import LinearServer
from dks.dispatch.problem import Problem, alignment


def make_inputs(problem: Problem, generator: torch.Generator, draw: str) -> Inputs:
    """weight ~ N(0, 1/k), so that outputs have unit variance on normal data; x (m, k), residual (m, n)."""
    dtype = DTYPES[problem.trait("dtype")]
    m, n, k = (problem.dim(name) for name in ("m", "n", "k"))
    weight = draw_normal((n, k), generator, k**0.5, dtype)
    bias = torch.randn((n,), generator=generator).to(dtype) if problem.trait("bias") == "yes" else None
    x = draw_activations((m, k), generator, draw).to(dtype)  # last, so that the weight is the same for every m
    dynamic = [aligned(x, problem.align)]
    if problem.trait("epilogue") == "add":
        # Normal in every draw: outliers that no kernel quantises would hide what those of x cost.
        residual = draw_normal((m, n), generator).to(dtype)
        dynamic.append(aligned(residual, problem.align))
    return Inputs(static=(weight, bias), dynamic=tuple(dynamic))


def reference(problem: Problem, inputs: Inputs) -> torch.Tensor:
    """The same in float64, from the operands as they are (already rounded to their dtype)."""
    weight, bias = inputs.static
    x, *residual = (t.double() for t in inputs.dynamic)
    y = x @ weight.double().t()
    if bias is not None:
        y += bias.double()
    return EPILOGUES[problem.trait("epilogue")](y, *residual)


def max_align(problem: Problem) -> int:
    """Rows of x are k elements apart, rows of y and of a residual n elements apart."""
    size = DTYPES[problem.trait("dtype")].itemsize
    return alignment(problem.dim("k") * size, problem.dim("n") * size)


def key_bytes(problem: Problem) -> int:
    """Bytes of the weight."""
    return problem.dim("n") * problem.dim("k") * DTYPES[problem.trait("dtype")].itemsize


OPERATOR = Operator(
    name="linear",
    dims=("m", "n", "k"),
    dynamic=("m",),
    traits={"dtype": ("float32", "bfloat16", "float16"), "bias": ("yes", "no"), "epilogue": tuple(EPILOGUES)},
    default="torch.linear",
    make_inputs=make_inputs,
    reference=reference,
    max_align=max_align,
    key_bytes=key_bytes,
    server=LinearServer,
)
