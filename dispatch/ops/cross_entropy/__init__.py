"""cross_entropy: logits (m, n), targets (m,) int64, ignore_index -> losses (m,), of logits' dtype.

losses = log(sum(exp(logits))) - logits[target], and 0 where the target is ``ignore_index``. All other targets are
columns: the server sees to that, so a kernel may read where they point.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dks.dispatch.kernel import DTYPES, Inputs, Operator, aligned, draw_activations
from dks.dispatch.ops.cross_entropy.serve import IGNORE, CrossEntropyServer
from dks.dispatch.problem import Problem, alignment

IGNORED_EVERY = 16
"""Of so many rows the second one is ignored: enough for every check, and too few to make a sweep's rows cheap."""


def make_inputs(problem: Problem, generator: torch.Generator, draw: str) -> Inputs:
    """logits (m, n), unit normal; targets in all columns, some of them ignored.

    What is ignored is the framework's -100 or a column, as where a model's padding is a token like any other.
    """
    m, n = problem.dim("m"), problem.dim("n")
    logits = draw_activations((m, n), generator, draw).to(DTYPES[problem.trait("dtype")])
    targets = torch.randint(0, n, (m,), generator=generator)
    ignored = (IGNORE, n // 2)[int(torch.randint(0, 2, (), generator=generator))]
    targets[1::IGNORED_EVERY] = ignored
    return Inputs(static=(), dynamic=(aligned(logits, problem.align), targets, ignored))


def reference(_problem: Problem, inputs: Inputs) -> torch.Tensor:
    """The same in float64."""
    logits, targets, ignored = inputs.dynamic
    return F.cross_entropy(logits.double(), targets, ignore_index=ignored, reduction="none")


def max_align(problem: Problem) -> int:
    """Rows of logits are n elements apart; targets and losses are aligned to their own elements."""
    return alignment(problem.dim("n") * DTYPES[problem.trait("dtype")].itemsize)


OPERATOR = Operator(
    name="cross_entropy",
    dims=("m", "n"),
    dynamic=("m",),
    traits={"dtype": ("float32", "bfloat16", "float16")},
    default="torch.cross_entropy",
    make_inputs=make_inputs,
    reference=reference,
    max_align=max_align,
    key_bytes=lambda _: 0,
    server=CrossEntropyServer,
)
