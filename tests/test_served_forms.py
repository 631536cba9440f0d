"""What serves is what was checked and timed: the same function, for every kernel of the pool and every form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dks.codegen.admission import exclusion
from dks.codegen.admission import forms as forms_of
from dks.codegen.policy import Policy
from dks.dispatch import pool
from dks.dispatch.generation import Generation
from dks.dispatch.kernel import DTYPES, Inputs, Kernel, Late
from dks.dispatch.modes import MODES, eager_form
from dks.dispatch.problem import Problem
from dks.dispatch.runtime import Runtime
from dks.dispatch.served import Question, Server
from dks.dispatch.table import Group, Rule, Table
from dks.profiler.bench import Bench
from tests.codegen.rows import row

KERNELS = list(pool.kernels().values())
STATICS = ("first constant", "second constant")
DYNAMIC = ("x",)


def problem_of(kernel: Kernel) -> Problem:
    operator, dtype = pool.operator(kernel.op), next(iter(kernel.precision))
    traits = {name: values[0] for name, values in operator.traits.items()} | {"dtype": dtype}
    return Problem.of(kernel.op, traits, dict.fromkeys(operator.dims, 64), max(64, DTYPES[dtype].itemsize))


def admitted(kernel: Kernel) -> Iterator[str]:
    """The forms that codegen lets a kernel serve."""
    problem = problem_of(kernel)
    made = dataclasses.replace(row(kernel.candidates()[0].id, 10.0, problem), error=0.0, form_bytes=0)
    for mode in MODES:
        for form in forms_of(kernel.op, mode):
            if not exclusion(Policy(), problem, form, made).startswith("packs its weight"):
                yield form


class Told:
    """Stands for a kernel: notes each function that somebody made of it and called, and with what."""

    def __init__(self, kernel: Kernel) -> None:
        self.calls: list[tuple[object, ...]] = []
        late = isinstance(kernel.bind, Late)
        self.kernel = dataclasses.replace(kernel, bind=Late(self.launch) if late else self.bind)

    def bind(self, problem: Problem, params: object, *static: object) -> Callable[..., torch.Tensor]:
        return self._noting("bind", problem, params, static)

    def launch(self, problem: Problem, params: object) -> Callable[..., torch.Tensor]:
        return self._noting("launch", problem, params, ())

    def _noting(self, how: str, problem: Problem, params: object, static: tuple[object, ...]) -> Callable[..., Any]:
        def run(*arguments: object) -> torch.Tensor:
            self.calls.append((how, problem.traits, params, (*arguments, *static)))
            return torch.zeros(1)

        return run


def measured(told: Told, monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What a sweep calls, where it checks and where it times."""
    problem, candidate = problem_of(told.kernel), told.kernel.candidates()[0]
    bench = Bench(0, "warm")
    monkeypatch.setattr(bench, "_drawn", (problem, Inputs(STATICS, DYNAMIC)))
    bench._weights, told.calls = [STATICS], []
    bench._bind(problem, candidate)[0].run(*DYNAMIC)
    return told.calls


def served(told: Told, form: str) -> list[tuple[object, ...]]:
    """What a call of this form runs."""
    problem, candidate = problem_of(told.kernel), told.kernel.candidates()[0]
    operator = pool.operator(problem.op)
    statics = tuple((name, problem.dim(name)) for name in operator.static)
    edges = tuple((64,) for _ in operator.dynamic)
    group = Group(problem.op, eager_form(form), problem.traits, statics, edges, {64: (0,)})
    runtime = Runtime("t", Generation(Table((Rule(candidate.id, 1),), (group,))))
    told.calls = []
    if eager_form(form) == "prepared":  # as prepared.py binds
        told.kernel.bind(problem, candidate.params, *STATICS)(*DYNAMIC)
        return told.calls
    question = Question(problem.op, "direct", dict(problem.traits), dict(statics))
    dispatch = _of(runtime, problem.op).direct((form,), lambda: question, len(STATICS))
    dispatch.kernels[candidate.id](*DYNAMIC, *STATICS)
    return told.calls


def _of(runtime: Runtime, op: str) -> Server:
    server = Server(runtime)
    server.op = op
    return server


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.id)
def test_each_form_that_may_be_chosen_runs_what_was_swept(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(kernel)
    monkeypatch.setitem(pool.kernels(), kernel.id, told.kernel)
    known = measured(told, monkeypatch)
    assert len(known) == 1
    found = [*admitted(kernel)]
    assert found
    for form in found:
        assert served(told, form) == known, form


def test_a_kernel_makes_its_launches_in_one_place_alone() -> None:
    """Another field that makes something to be launched would serve unmeasured: sweeps know ``bind``."""
    launching = {f.name for f in dataclasses.fields(Kernel) if "Launch" in str(f.type) or "Run" in str(f.type)}
    assert launching == {"bind"}
    late = [kernel for kernel in KERNELS if kernel.unprepared is not None]
    assert late and all(not kernel.form for kernel in late)
