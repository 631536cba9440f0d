"""Which form of the lookup answers: the compiled one for every operator, equal to the one in Python."""

from __future__ import annotations

import itertools
import random
from math import prod

import pytest

from dks.dispatch import native, pool
from dks.dispatch.generation import Generation
from dks.dispatch.problem import Candidate
from dks.dispatch.runtime import MATCH_NAMES, MISS_NAMES, Runtime
from dks.dispatch.served import Dispatch
from dks.dispatch.table import Group, Rule, Table

OPERATORS = sorted(pool.operators())
ALIGNS = (1, 2, 4, 8, 16, 32, 64)
RULES = tuple(Rule(f"fake.kernel/i{i}", ALIGNS[i % 7]) for i in range(14))
HUGE = (2**40, 2**63, 2**70, -(2**70))


def table_of(op: str) -> Table:
    """One group: no rule in its first cell, one that needs 64 bytes in the second, and what comes in the others."""
    rng, operator = random.Random(op), pool.operator(op)
    edges = tuple(tuple(sorted(rng.sample(range(1, 40), 4))) for _ in operator.dynamic)
    cells = {}
    for align in (64, 16, 4):
        takes = [i for i, rule in enumerate(RULES) if rule.align <= align]
        others = prod(map(len, edges)) - 2
        cells[align] = (-1, 6 if align == 64 else -1, *(rng.choice([-1, *takes]) for _ in range(others)))
    traits = tuple(sorted((name, values[0]) for name, values in operator.traits.items()))
    return Table(RULES, (Group(op, "direct", traits, tuple((name, 8) for name in operator.static), edges, cells),))


def queries(group: Group) -> list[tuple[int, tuple[int, ...]]]:
    """Every alignment at every combination of an edge and its neighbours, and at sizes that no tensor has."""
    axes = [sorted({e + step for e in (0, *edges, 2 * edges[-1]) for step in (-1, 0, 1)}) for edges in group.edges]
    sizes = list(itertools.product(*axes))
    sizes += [tuple(rng) for huge in HUGE for rng in itertools.product((1, huge), repeat=len(axes))]
    chosen = random.Random(1).sample(sizes, min(len(sizes), 300))
    return [(align, each) for align in ALIGNS for each in chosen]


def answers(op: str, table: Table, *, compiled: bool) -> tuple[list[str], dict[str, int]]:
    """What ``Dispatch.serve`` ran for each query, and what it counted."""
    runtime = Runtime("t", Generation(table))
    if not compiled:
        runtime.serial = None
    group = table.groups[0]
    plan = runtime.generation.plan(op, group.form, dict(group.traits), dict(group.statics))
    dispatch = Dispatch(runtime, plan, lambda candidate: lambda: candidate.id)  # type: ignore[arg-type, return-value]
    assert (dispatch.native is not None) == compiled
    ran = [dispatch.serve(lambda: "framework", align, sizes) for align, sizes in queries(group)]  # type: ignore[type-var]
    return ran, runtime.counters.snapshot()[op]


def expected(table: Table) -> tuple[list[str], dict[str, int]]:
    ran, counted = [], dict.fromkeys((*MATCH_NAMES, *MISS_NAMES), 0)
    for align, sizes in queries(table.groups[0]):
        code = table.find(0, align, *sizes)
        ran.append("framework" if code < 0 else table.rules[code >> 2].candidate)
        counted[MISS_NAMES[-1 - code] if code < 0 else MATCH_NAMES[code & 3]] += 1
    return ran, {outcome: n for outcome, n in counted.items() if n}


@pytest.mark.parametrize("op", OPERATORS)
def test_both_forms_serve_alike(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of(op)
    wanted = expected(table)
    assert len(wanted[1]) == len(MATCH_NAMES) + len(MISS_NAMES), "every outcome is among the queries"
    assert Candidate.parse(RULES[0].candidate).kernel not in pool.kernels()
    assert answers(op, table, compiled=False) == wanted
    monkeypatch.setattr(Table, "find", lambda *_: pytest.fail("the lookup in Python was asked"))
    assert answers(op, table, compiled=True) == wanted


def test_stats_say_it_by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Runtime("t", Generation()).stats()["lookup"] == dict.fromkeys(pool.operators(), "compiled")
    early = Runtime("t", Generation())
    early.serial = None  # as of a runtime that was made before the extension was loaded
    why = "python: it was loaded before a package that brought the compiled fast path"
    assert early.stats()["lookup"] == dict.fromkeys(pool.operators(), why)
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "why", "no C++ compiler")
    runtime = Runtime("t", Generation())
    assert runtime.stats()["lookup"] == dict.fromkeys(pool.operators(), "python: no C++ compiler")
