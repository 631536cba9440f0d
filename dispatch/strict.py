"""Strict mode: a proof, at load, that no reachable entry of a table needs a search, a compilation or a download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dks.dispatch import pool
from dks.dispatch.gpu import library as programs
from dks.dispatch.gpu.cutlass import library as cutlass
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.table import Group, Table
from dks.dispatch.tiles import library

STRICT = "DKS_STRICT"
"""With this environment variable set to 1, a table that can't serve here, or can't serve all of its entries without
a search, raises instead of falling back."""


def needs(table: Table, dead: Mapping[str, str]) -> list[str]:
    """One line for each thing that some call through ``table`` could set off; none where the proof holds.

    It goes through every rule that a cell of some group names, which is all that a lookup can answer, and the
    default of every operator, which serves the rest: its kernel is there and available, says of itself that its
    library searches nothing (``Kernel.searches``), and the function, Triton programs or CUTLASS kernel that it runs
    are in a loaded library, from the same source. It trusts what kernels declare.

    Args:
        dead: candidates that may not run here, with the reason.
    """
    lines = []
    if any(each._locate is not each._nowhere for each in (library, programs, cutlass)):
        lines.append("this process compiles kernels when they are asked for, as profiling does")
    for operator in pool.operators().values():
        if why := pool.kernels()[operator.default].searches:
            lines.append(f"{operator.default}, the default of {operator.name}: {why}")
    for group in table.groups:
        for rule in sorted({rule for cells in group.cells.values() for rule in cells if rule >= 0}):
            id = table.rules[rule].candidate
            if found := dead.get(id) or _why_not(group, Candidate.parse(id)):
                lines.append(f"{id} ({', '.join(_key(group))}): {found}")
    return lines


def _why_not(group: Group, candidate: Candidate) -> str | None:
    kernel = pool.kernels().get(candidate.kernel)
    if kernel is None:
        return "this version has no such kernel"
    if kernel.op != group.op:
        return f"it computes {kernel.op}, not {group.op}"
    if (why := kernel.unavailable()) is not None or (why := kernel.searches):
        return why
    sizes = dict.fromkeys(pool.operator(group.op).dims, 1) | dict(group.statics)
    problem = Problem.of(group.op, dict(group.traits), sizes)
    if kernel.unit is not None:
        unit = kernel.unit(problem, candidate.params)
        if not any(library._has(shipped, unit) for shipped in library._shipped.values()):
            return f"no loaded library has {unit.symbol} made from this source"
    if kernel.programs is not None and not programs.ships(kernel.programs(problem, candidate.params)):
        return "no loaded library has its Triton programs made from this source"
    return None if kernel.configuration is None else cutlass.lack(kernel.configuration(problem, candidate.params))


def _key(group: Group) -> Iterator[str]:
    yield f"{group.op} {group.form}"
    yield from (f"{name}={value}" for name, value in (*group.traits, *group.statics))
