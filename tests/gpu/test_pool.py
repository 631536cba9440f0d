"""The pool's GPU kernels as they are bound: right against float64, on CPU tensors, by the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dks.dispatch import pool
from dks.dispatch.gpu import library
from dks.dispatch.kernel import Kernel, relative_error, source_digest
from dks.dispatch.problem import Problem
from tests.gpu.interpreting import Plan

LINEAR = [kernel for kernel in pool.kernels_for("linear", "cuda") if kernel.programs and not kernel.configuration]


@pytest.fixture(autouse=True)
def interpreting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(library, "_locate", Plan)
    yield


def check(kernel: Kernel, problem: Problem, step: int = 1) -> int:
    """Run some of its parameter sets; how many were meant for the problem."""
    operator, ran = pool.operator(problem.op), 0
    assert kernel.objection(problem) is None
    inputs = operator.make_inputs(problem, torch.Generator().manual_seed(3), "normal")
    expected = operator.reference(problem, inputs)
    limit = kernel.precision[problem.trait("dtype")].limit
    for params in kernel.params[::step]:
        run = kernel.bind(problem, params, *inputs.static)
        assert relative_error(run(*inputs.dynamic), expected) < limit, (kernel.id, params)
        ran += 1
    return ran


@pytest.mark.parametrize("kernel", LINEAR, ids=lambda kernel: kernel.id)
def test_linear(kernel: Kernel) -> None:
    align = kernel.alignment_for("bfloat16")
    n, k = (24, 80) if align == 16 else (23, 75)
    for m, epilogue, bias in ((3, "add", "no"), (19, "silu", "yes")):
        traits = {"dtype": "bfloat16", "bias": bias, "epilogue": epilogue}
        assert check(kernel, Problem.of("linear", traits, {"m": m, "n": n, "k": k}, align), step=6)


def test_a_kernels_digest_is_that_of_its_triton_source_too(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pool.kernels()["triton.matmul"]
    before = source_digest(kernel)
    from dks.dispatch.gpu import program

    monkeypatch.setattr(program, "source_of", lambda name: name)
    assert source_digest(kernel) != before
