"""softmax over the last dim: x (..., n) -> (..., n). Both sizes come with a request: the width of scores does."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import DTYPES, Inputs, Operator, aligned, draw_activations
from dks.dispatch.ops.softmax.serve import SoftmaxServer
from dks.dispatch.problem import MAX_ALIGNMENT, Problem


def make_inputs(problem: Problem, generator: torch.Generator, draw: str) -> Inputs:
    """x (m, n), unit normal as scaled attention scores are."""
    x = draw_activations((problem.dim("m"), problem.dim("n")), generator, draw)
    return Inputs(static=(), dynamic=(aligned(x.to(DTYPES[problem.trait("dtype")]), problem.align),))


def reference(_problem: Problem, inputs: Inputs) -> torch.Tensor:
    """The same in float64."""
    (x,) = inputs.dynamic
    return torch.softmax(x.double(), dim=-1)


OPERATOR = Operator(
    name="softmax",
    dims=("m", "n"),
    dynamic=("m", "n"),
    traits={"dtype": ("float32", "bfloat16", "float16")},
    default="torch.softmax",
    make_inputs=make_inputs,
    reference=reference,
    # The class is that of the address: rows follow one another, and no kernel may count on their distance n.
    max_align=lambda _: MAX_ALIGNMENT,
    key_bytes=lambda _: 0,
    server=SoftmaxServer,
)
