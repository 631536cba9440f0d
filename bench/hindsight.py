"""The oracle: for each call of a run, the fastest measured kernel inside the budget, known in hindsight.

It is a dispatch table like any other, with every size that occurs as a bin of its own, chosen by the smallest
median without regard to ties or to the framework's default.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dks.dispatch import pool
from dks.dispatch.bins import Bins
from dks.dispatch.evidence import Measurement, read_run
from dks.dispatch.generation import Generation
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.runtime import Runtime
from dks.dispatch.served import DTYPE_NAMES
from dks.dispatch.table import Group, Rule, Table
from dks.profiler.config import OperatorSweep, Sweep, WeightedProblem, load
from dks.profiler.sweep import Event, run_sweep

WIDEST = 1e-2  # both budgets of the demo share one run directory, so both measure the same candidates


def oracle_runtime(
    config: Path,
    profile: Path,
    folder: Path,
    shapes: Sequence[Sequence[int]],
    masked: Sequence[bool],
    dtype: torch.dtype,
    max_error: float,
) -> Runtime:
    """Measure the config's operators on the shapes of a run, and serve the fastest of each.

    Args:
        config: the sweep whose weights are taken.
        profile: its run directory; a candidate takes part if it was inside the widest budget there.
        folder: run directory of the oracle; what it holds already is not measured again.
        shapes: (texts, tokens) of each request; masked: whether it is padded.
        dtype: of the activations.
        max_error: the budget.
    """
    name = DTYPE_NAMES[dtype]
    inside = {
        row.candidate
        for row in read_run(profile)
        if row.status == "ok" and (row.error or 0.0) <= WIDEST and Problem.parse(row.problem).trait("dtype") == name
    }
    sweep = at_shapes(load(config), shapes, masked, name, inside)

    def say(event: Event) -> None:
        if event.done % 10 == 0 or event.done == event.total:
            print(f"[{event.done}/{event.total}] {event.problem.id}", flush=True)

    run_sweep(sweep, folder, notify=say, say=print)
    wanted = {weighted.problem.id for part in sweep.operators for weighted in part.problems}
    rows = [row for row in read_run(folder) if row.problem in wanted]
    table = oracle_table(rows, max_error)
    return Runtime(f"oracle_{name}", Generation(table))


def at_shapes(
    sweep: Sweep, shapes: Sequence[Sequence[int]], masked: Sequence[bool], dtype: str, candidates: Collection[str]
) -> Sweep:
    """The sweep's problems at other dynamic sizes: those of a run, each once."""
    points = sorted({(*shape, mask) for shape, mask in zip(shapes, masked, strict=True)})
    parts = []
    for part in sweep.operators:
        problems: dict[Problem, None] = {}
        kinds = {
            (p.problem.traits, tuple((n, p.problem.dim(n)) for n in pool.operator(part.op).static)): p.problem
            for p in part.problems
            if p.problem.trait("dtype") == dtype
        }
        for kind, (batch, tokens, mask) in itertools.product(kinds.values(), points):
            if kind.op == "attention" and (kind.trait("mask") == "none") == mask:
                continue
            sizes = {"m": batch * tokens, "b": batch, "q": tokens, "kv": tokens}
            dims = {name: sizes.get(name, size) for name, size in kind.dims}
            problems[Problem.of(kind.op, dict(kind.traits), dims, kind.align)] = None
        inside = tuple(
            c for c in part.candidates if c.id in candidates or c.kernel == pool.operator(part.op).default
        )
        weighted = tuple(WeightedProblem(problem, 1.0) for problem in problems)
        parts.append(OperatorSweep(op=part.op, problems=weighted, candidates=inside, bins=_bins(part.op, problems)))
    # The smallest of several medians is all that is asked here, not an interval that excludes a tie.
    measure = replace(sweep.measure, min_rounds=10, max_rounds=40, seconds=0.8, processes=1, held_out=False)
    return replace(sweep, name=f"{sweep.name}_hindsight", operators=tuple(parts), measure=measure)


def _bins(op: str, problems: Iterable[Problem]) -> dict[str, Bins]:
    dynamic = pool.operator(op).dynamic
    return {name: Bins(tuple(sorted({problem.dim(name) for problem in problems}))) for name in dynamic}


Key = tuple[str, tuple[tuple[str, str], ...], tuple[tuple[str, int], ...]]
"""An operator, its traits and its static dims."""


def oracle_table(rows: Iterable[Measurement], max_error: float) -> Table:
    """The smallest median inside the budget for every measured problem."""
    best: dict[Problem, Measurement] = {}
    for row in rows:
        if row.status != "ok" or row.median_ns is None or (row.error or 0.0) > max_error:
            continue
        problem = Problem.parse(row.problem)
        held = best.get(problem)
        if held is None or row.median_ns < (held.median_ns or 0.0):
            best[problem] = row
    grouped: dict[Key, dict[tuple[int, ...], Measurement]] = defaultdict(dict)
    aligns = {}
    for problem, row in best.items():
        operator = pool.operator(problem.op)
        statics = tuple((name, problem.dim(name)) for name in operator.static)
        key: Key = (problem.op, problem.traits, statics)
        grouped[key][tuple(problem.dim(name) for name in operator.dynamic)] = row
        aligns[key] = problem.align
    rules: list[Rule] = []
    groups: list[Group] = []
    for key, cells in grouped.items():
        op, traits, statics = key
        edges = tuple(tuple(sorted({sizes[i] for sizes in cells})) for i in range(len(next(iter(cells)))))
        indices = []
        for sizes in itertools.product(*edges):
            winner = cells.get(sizes)
            indices.append(-1 if winner is None else len(rules))
            if winner is not None:
                kernel = pool.kernels()[Candidate.parse(winner.candidate).kernel]
                rules.append(Rule(winner.candidate, kernel.alignment_for(dict(traits)["dtype"])))
        form = "prepared" if any(k.form for k in pool.kernels_for(op)) else "direct"
        groups.append(Group(op, form, traits, statics, edges, {aligns[key]: tuple(indices)}))
    return Table(tuple(rules), tuple(groups))
