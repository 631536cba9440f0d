"""Measuring real kernels on small problems, and kernels made to fail."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from dks.profiler.measure import Bench

from dks.dispatch import pool
from dks.dispatch.environment import Environment
from dks.dispatch.evidence import Measurement
from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.problem import Candidate, Precision, Problem
from dks.profiler.timing import Rounds, StoppingRule

PROBLEM = Problem.of("linear", {"dtype": "float32", "bias": "yes", "epilogue": "none"}, {"m": 8, "n": 64, "k": 64})


def bench() -> Bench:
    return Bench(Environment.current(), Rounds(StoppingRule(6, 6, 1.0), random.Random(0)), seed=0)


def measure(problem: Problem, *ids: str) -> dict[str, Measurement]:
    rows = bench().measure(problem, [Candidate.parse(id) for id in ids], 1.0)
    return {row.candidate: row for row in rows}


@pytest.fixture
def fault() -> Iterator[Callable[[str, Callable[..., Run]], str]]:
    """Adds a kernel of one's own to the pool for one test; returns its id."""
    added = []

    def add(name: str, bind: Callable[..., Run], **more: object) -> str:
        kernel = Kernel(f"fault.{name}", "linear", {"float32": Precision.EXACT}, bind, **more)  # type: ignore[arg-type]
        pool.kernels()[kernel.id] = kernel
        added.append(kernel.id)
        return kernel.id

    yield add
    for id in added:
        del pool.kernels()[id]


def test_every_candidate_gets_a_row_with_samples_and_an_error() -> None:
    rows = measure(PROBLEM, *(c.id for c in pool.candidates_for("linear")))
    assert len(rows) == len(pool.candidates_for("linear"))
    default = rows["torch.linear"]
    assert default.status == "ok" and len(default.samples_ns) == 6 and default.ratio == 1.0
    assert default.error is not None and default.error < 1e-5
    assert rows["torch.weight_int8"].status == "unsupported"  # takes bf16 alone
    quantized = rows["quantized.dynamic_onednn"]
    if quantized.status == "ok":
        assert quantized.error_outliers is not None and quantized.error_normal is not None
        assert quantized.error == max(quantized.error_outliers, quantized.error_normal)
        assert quantized.error_outliers > 1e-2, "outliers must cost an int8 kernel its 1e-2 budget"


def test_the_error_on_outliers_does_not_depend_on_which_size_came_first() -> None:
    errors = set()
    for sizes in ((1, 8), (8,)):
        made = bench()
        for m in sizes:
            problem = Problem.of("linear", dict(PROBLEM.traits), {**dict(PROBLEM.dims), "m": m})
            rows = made.measure(problem, pool.candidates_for("linear"), 1.0)
        errors.add(next(row.error_outliers for row in rows if row.candidate == "torch.linear"))
    assert len(errors) == 1


def wrong(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
    return lambda x: torch.nn.functional.linear(x, weight)  # forgets the bias


def stale(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
    return lambda x: torch.full((x.shape[0], weight.shape[0]), float("nan"))


def raises(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
    def run(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such\ninstruction")

    return run


def wrong_shape(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
    return lambda x: torch.nn.functional.linear(x, weight, bias)[:-1]


@pytest.mark.parametrize(
    ("bind", "status", "reason"),
    [
        (wrong, "wrong_result", "error"),
        (stale, "wrong_result", "nan"),
        (wrong_shape, "wrong_result", "inf"),
        (raises, "failed", "RuntimeError: no such"),
    ],
)
def test_a_faulty_kernel_is_a_status_and_is_not_timed(
    fault: Callable[..., str], bind: Callable[..., Run], status: str, reason: str
) -> None:
    id = fault("it", bind)
    rows = measure(PROBLEM, "torch.linear", id)
    assert (rows[id].status, rows[id].samples_ns) == (status, [])
    assert reason in rows[id].reason and "\n" not in rows[id].reason
    assert rows["torch.linear"].status == "ok", "its neighbours are unaffected"


def test_unavailable_says_why(fault: Callable[..., str]) -> None:
    id = fault("absent", wrong, unavailable=lambda: "needs a machine of tomorrow")
    row = measure(PROBLEM, "torch.linear", id)[id]
    assert (row.status, row.reason) == ("unavailable", "needs a machine of tomorrow")


def test_a_time_of_zero_is_no_time() -> None:
    frozen = Bench(
        Environment.current(), Rounds(StoppingRule(6, 6, 1.0), random.Random(0), clock=lambda: 5), seed=0
    )
    (row,) = frozen.measure(PROBLEM, [Candidate("torch.linear")], 1.0)
    assert row.status == "failed" and "clock" in row.reason and row.median_ns is None


def test_the_problem_s_alignment_reaches_the_kernel(fault: Callable[..., str]) -> None:
    seen: list[int] = []

    def spy(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
        def run(x: torch.Tensor) -> torch.Tensor:
            seen.append(x.data_ptr() % 64)
            return torch.nn.functional.linear(x, weight, bias)

        return run

    id = fault("spy", spy)
    for align in (64, 16, 4):
        seen.clear()
        problem = Problem.of("linear", dict(PROBLEM.traits), dict(PROBLEM.dims), align)
        measure(problem, "torch.linear", id)
        assert seen and all(address % align == 0 for address in seen)
        assert align == 64 or all(address % (2 * align) for address in seen), "and no better than it says"


def test_candidates_do_not_share_weights(fault: Callable[..., str]) -> None:
    addresses: dict[str, set[int]] = {"one": set(), "two": set()}

    def keeper(name: str) -> Callable[..., Run]:
        def bind(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
            addresses[name].add(weight.data_ptr())
            return lambda x: torch.nn.functional.linear(x, weight, bias)

        return bind

    ids = [fault(name, keeper(name)) for name in addresses]
    measure(PROBLEM, "torch.linear", *ids)
    assert not addresses["one"] & addresses["two"]
    assert len(addresses["one"]) > 1, "a small weight rotates through several copies"
