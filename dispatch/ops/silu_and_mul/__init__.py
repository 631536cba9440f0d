"""silu_and_mul: x (..., 2n) -> (..., n) = silu(x[..., :n]) * x[..., n:].

The activation of a gated feed-forward (Shazeer, GLU Variants Improve Transformer, 2020), with gate and values side
by side as one linear makes them; the layout is vLLM's.
"""

from __future__ import annotations

import torch

from dks.dispatch.kernel import DTYPES, Inputs, Operator, aligned, draw_activations
from dks.dispatch.ops.silu_and_mul.serve import SiluAndMulServer
from dks.dispatch.problem import Problem, alignment


def make_inputs(problem: Problem, generator: torch.Generator, draw: str) -> Inputs:
    """x (m, 2n), unit normal."""
    x = draw_activations((problem.dim("m"), 2 * problem.dim("n")), generator, draw, power=0.5)
    return Inputs(static=(), dynamic=(aligned(x.to(DTYPES[problem.trait("dtype")]), problem.align),))


def reference(_problem: Problem, inputs: Inputs) -> torch.Tensor:
    """The same in float64."""
    gate, values = inputs.dynamic[0].double().chunk(2, -1)
    y: torch.Tensor = gate / (1.0 + torch.exp(-gate)) * values
    return y


def max_align(problem: Problem) -> int:
    """Values begin n elements after the gate, and rows of the output are n elements apart."""
    return alignment(problem.dim("n") * DTYPES[problem.trait("dtype")].itemsize)


OPERATOR = Operator(
    name="silu_and_mul",
    dims=("m", "n"),
    dynamic=("m",),
    traits={"dtype": ("float32", "bfloat16", "float16")},
    default="torch.silu_and_mul",
    make_inputs=make_inputs,
    reference=reference,
    max_align=max_align,
    key_bytes=lambda _: 0,
    server=SiluAndMulServer,
)
