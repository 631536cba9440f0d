"""Every generated kernel that this machine has, with a problem for it, for tests that take them all alike."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from dks.dispatch import pool
from dks.dispatch.kernel import Inputs, Kernel, Output, Params, parts, relative_error
from dks.dispatch.problem import Problem

DIMS: Mapping[str, Mapping[str, int]] = {
    "linear": {"m": 37, "n": 72, "k": 128},
    "layer_norm": {"m": 37, "n": 72},
    "rms_norm": {"m": 37, "n": 72},
    "softmax": {"m": 37, "n": 72},
    "attention": {"b": 3, "q": 1, "kv": 50, "h": 4, "hkv": 2, "d": 24},
    "paged_attention": {"b": 3, "kv": 50, "h": 4, "hkv": 2, "d": 24, "page": 16},
}

CASES = [
    pytest.param(kernel, dtype, id=f"{kernel.id}-{dtype}")
    for kernel in pool.kernels().values()
    if kernel.unit is not None and kernel.unavailable() is None
    for dtype in kernel.precision
]


def problem_for(kernel: Kernel, dtype: str, align: int | None = None, **traits: str) -> Problem:
    """A problem of ragged sizes that it takes."""
    operator, dims = pool.operator(kernel.op), DIMS[kernel.op]
    firsts = {name: values[0] for name, values in operator.traits.items()}
    made = Problem.of(kernel.op, {**firsts, "dtype": dtype, **traits}, dims, align or kernel.alignment_for(dtype))
    assert kernel.objection(made) is None, kernel.objection(made)
    return made


def inputs_for(problem: Problem) -> tuple[Inputs, Output]:
    """What goes in, and what is right."""
    operator = pool.operator(problem.op)
    inputs = operator.make_inputs(problem, torch.Generator().manual_seed(5), "normal")
    return inputs, operator.reference(problem, inputs)


def with_threads(kernel: Kernel, threads: int) -> Params:
    """Its first parameter set, with so many threads; the code is the same."""
    return tuple((name, threads if name == "t" else value) for name, value in kernel.params[0])


def assert_right(y: Output, wanted: Output, kernel: Kernel, problem: Problem) -> None:
    """Within the kernel's precision class."""
    error = relative_error(y, wanted)
    assert error <= kernel.precision[problem.trait("dtype")].limit, error


def same(a: Output, b: Output) -> bool:
    """Whether two outputs agree in every bit."""
    return all(torch.equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))
