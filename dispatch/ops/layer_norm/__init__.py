"""layer_norm over the last dim: x (..., n) -> (..., n), with weight (n,) and bias (n,)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dks.dispatch.kernel import DTYPES, Inputs, Operator, aligned, draw_activations
from dks.dispatch.ops.layer_norm.serve import LayerNormServer
from dks.dispatch.problem import Problem, alignment

EPS = 1e-5  # of the sweep's inputs; no kernel here is faster for another value


def make_inputs(problem: Problem, generator: torch.Generator, draw: str) -> Inputs:
    """x (m, n) around a mean that is not zero; weight and bias (n,) or None."""
    dtype = DTYPES[problem.trait("dtype")]
    m, n = problem.dim("m"), problem.dim("n")
    affine = problem.trait("affine") == "yes"
    weight = (torch.randn((n,), generator=generator) * 0.1 + 1.0).to(dtype) if affine else None
    bias = torch.randn((n,), generator=generator).to(dtype) if affine else None
    x = draw_activations((m, n), generator, draw, mean=0.5).to(dtype)  # last: the same parameters for every m
    return Inputs(static=(weight, bias, EPS), dynamic=(aligned(x, problem.align),))


def reference(problem: Problem, inputs: Inputs) -> torch.Tensor:
    """The same in float64."""
    weight, bias, eps = inputs.static
    (x,) = inputs.dynamic
    wide = [None if t is None else t.double() for t in (weight, bias)]
    return F.layer_norm(x.double(), (problem.dim("n"),), wide[0], wide[1], eps)


def max_align(problem: Problem) -> int:
    """Rows are n elements apart."""
    return alignment(problem.dim("n") * DTYPES[problem.trait("dtype")].itemsize)


OPERATOR = Operator(
    name="layer_norm",
    dims=("m", "n"),
    dynamic=("m",),
    traits={"dtype": ("float32", "bfloat16", "float16"), "affine": ("yes", "no")},
    default="torch.layer_norm",
    make_inputs=make_inputs,
    reference=reference,
    max_align=max_align,
    key_bytes=lambda problem: 2 * problem.dim("n") * DTYPES[problem.trait("dtype")].itemsize,
    server=LayerNormServer,
)
