"""rms_norm over the last dim: y = x / sqrt(mean(x^2) + eps) * weight, x (..., n) -> (..., n), weight (n,).

With the trait ``residual``, a call brings (x, r), both (..., n), and gets (y, h): h = x + r, rounded to the dtype,
and y of h. A model that normalises before each block needs h as the next residual (Zhang and Sennrich, Root Mean
Square Layer Normalization, 2019; the addition is fused as in vLLM's and FlashInfer's fused_add_rms_norm).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dks.dispatch.kernel import DTYPES, Inputs, Operator, Output, aligned, draw_activations
from dks.dispatch.ops.rms_norm.serve import RMSNormServer
from dks.dispatch.problem import Problem, alignment

EPS = 1e-5  # of the sweep's inputs; no kernel here is faster for another value


def make_inputs(problem: Problem, generator: torch.Generator, draw: str) -> Inputs:
    """x (m, n) around a mean that is not zero, r like it with ``residual``; weight (n,) or None."""
    dtype = DTYPES[problem.trait("dtype")]
    m, n = problem.dim("m"), problem.dim("n")
    weight = None
    if problem.trait("affine") == "yes":
        weight = (torch.randn((n,), generator=generator) * 0.1 + 1.0).to(dtype)
    count = 2 if problem.trait("residual") == "yes" else 1
    # Last: the same weight for every m.
    dynamic = [draw_activations((m, n), generator, draw, mean=0.5).to(dtype) for _ in range(count)]
    return Inputs(static=(weight, EPS), dynamic=tuple(aligned(t, problem.align) for t in dynamic))


def reference(problem: Problem, inputs: Inputs) -> Output:
    """The same in float64."""
    weight, eps = inputs.static
    h = torch.stack(inputs.dynamic).double().sum(dim=0)
    y = F.rms_norm(h, (problem.dim("n"),), None if weight is None else weight.double(), eps)
    return (y, h) if problem.trait("residual") == "yes" else y


def max_align(problem: Problem) -> int:
    """Rows are n elements apart."""
    return alignment(problem.dim("n") * DTYPES[problem.trait("dtype")].itemsize)


OPERATOR = Operator(
    name="rms_norm",
    dims=("m", "n"),
    dynamic=("m",),
    traits={"dtype": ("float32", "bfloat16", "float16"), "affine": ("yes", "no"), "residual": ("no", "yes")},
    default="torch.rms_norm",
    make_inputs=make_inputs,
    reference=reference,
    max_align=max_align,
    key_bytes=lambda problem: problem.dim("n") * DTYPES[problem.trait("dtype")].itemsize,
    server=RMSNormServer,
)
