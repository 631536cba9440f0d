"""What the tests of several folders share: tables made by hand that send calls where a test wants them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from dks.dispatch import native, pool
from dks.dispatch.generation import Generation
from dks.dispatch.native import build as native_build
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import Group, Rule, Table
from dks.dispatch.tiles import build, library
from dks.dispatch.tiles.unit import Unit

# Triton reads it when it is first imported, by whatever test. What compiles does so in processes of its own.
os.environ["TRITON_INTERPRET"] = "1"

EDGES: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "linear": ((1, 8, 64),),
    "layer_norm": ((1, 8, 64),),
    "rms_norm": ((1, 8, 64),),
    "softmax": ((1, 8, 64), (1, 16, 64)),
    "attention": ((1, 4), (1, 16, 64), (1, 16, 64)),
    "paged_attention": ((1, 4), (1, 16, 64)),
    "silu_and_mul": ((1, 8, 64),),
    "rotary": ((1, 8, 64),),
    "cross_entropy": ((1, 8, 64),),
}

Route = Callable[..., Runtime]


def groups_for(op: str, candidate: Candidate, statics: Mapping[str, int], rule: int) -> list[Group]:
    """Groups of every trait and form that ``candidate`` takes at these static dims; all cells are ``rule``."""
    operator, kernel = pool.operator(op), pool.kernels()[candidate.kernel]
    edges = EDGES[op]
    cells = (rule,) * len(list(itertools.product(*edges)))
    groups = []
    for values in itertools.product(*operator.traits.values()):
        traits = dict(zip(operator.traits, values, strict=True))
        dims = {name: statics.get(name, 1) for name in operator.dims}
        if kernel.objection(Problem.of(op, traits, dims)) is not None:
            continue
        align = kernel.alignment_for(traits["dtype"])
        prepares = hasattr(operator.server, "prepare")
        forms = ("direct",) if not prepares else ("prepared",) if kernel.form else ("prepared", "direct")
        groups += [
            Group(op, form, tuple(sorted(traits.items())), tuple(statics.items()), edges, {align: cells})
            for form in forms
        ]
    return groups


@pytest.fixture
def route() -> Route:
    """route(op, (candidate id, ...), (statics, ...)) -> a Runtime that sends all such calls to the candidates.

    Each candidate gets the groups that those before it left.
    """

    def make(op: str, candidates: Sequence[str], shapes: Sequence[Mapping[str, int]], **options: object) -> Runtime:
        rules, groups = [], {}
        for text in candidates:
            candidate = Candidate.parse(text)
            kernel = pool.kernels()[candidate.kernel]
            rules.append(Rule(text, min(kernel.alignment_for(dtype) for dtype in kernel.precision)))
            for statics in shapes:
                for group in groups_for(op, candidate, statics, len(rules) - 1):
                    groups.setdefault(group.key, group)
        table = Table(tuple(rules), tuple(groups.values()))
        return Runtime("t", Generation(table, **options))  # type: ignore[arg-type]

    return make


def _compiled(unit: Unit) -> Path:
    """Where a generated kernel is; compiled by the first test that needs it."""
    build.build([unit])
    return build.locate(unit)


MANY = 1000
"""Tests of a run from which most generated kernels are needed: then they are compiled at once, on all cores."""


def _all_units() -> list[Unit]:
    found = []
    for kernel in pool.kernels().values():
        operator = pool.operator(kernel.op)
        for dtype in kernel.precision if kernel.unit is not None and kernel.unavailable() is None else ():
            traits = {name: values[0] for name, values in operator.traits.items()} | {"dtype": dtype}
            problem = Problem.of(kernel.op, traits, dict.fromkeys(operator.dims, 1))
            found += [kernel.unit(problem, params) for params in kernel.params]
    return list(dict.fromkeys(found))


@pytest.fixture(autouse=True, scope="session")
def _generated_kernels(request: pytest.FixtureRequest) -> None:
    library.look_in(_compiled)
    fast, why = native_build.cached()
    assert fast is not None, why
    assert not native.install(fast)
    if len(request.session.items) >= MANY:
        build.build(_all_units())


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
