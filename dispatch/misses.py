"""Which calls the table could not serve well, how often, and the sweep that would measure them.

``Misses.note`` is for serving: a look into a dict. ``export`` writes a config that ``dks-profile run`` takes.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import torch

from dks.dispatch import forks, pool
from dks.dispatch.bins import quantiles
from dks.dispatch.problem import MAX_DIM, Problem
from dks.dispatch.reasons import LISTED
from dks.dispatch.table import Group, Match, Table, find

MOST_KEPT = 4096  # distinct shapes; beyond that a call is counted and its shape forgotten
MOST_EXPORTED = 200  # problems of one exported sweep: more take hours, and are past what a config may hold
MOST_EDGES = 16  # new sizes of one dim of one weight; more fall in bins of about the same traffic

Sizes = tuple[int, ...]
_Key = tuple[Sizes, int, str]
Note = Callable[[Sizes, int, str], None]


@dataclass(frozen=True, slots=True)
class Missed:
    """A kind of call, and how often it came.

    Attributes:
        problem: traits and static dims; its dynamic dims mean nothing.
        sizes: the dynamic dims, in the operator's order.
        align: bytes that divided every pointer and row stride.
        reason: one of ``reasons.LISTED``.
    """

    problem: Problem
    sizes: Sizes
    align: int
    reason: str
    calls: int


class Misses:
    """Counts of calls by shape and reason. Bounded: past ``most`` shapes, new ones are counted together.

    Threads lose no count: ``next`` on an ``itertools.count`` is atomic, and only a new shape takes the lock.
    """

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most = most
        self._counts: dict[tuple[Problem, _Key], count[int]] = {}
        self._others = count()
        self.after_fork()
        forks.enroll(self)

    def after_fork(self) -> None:
        """See ``forks``: what the lock guards is changed in one step."""
        self._lock = threading.Lock()

    def of(self, problem: Problem) -> Note:
        """``note`` for this problem: (dynamic sizes, alignment, reason)."""
        return partial(self.note, problem)

    def note(self, problem: Problem, sizes: Sizes, align: int, reason: str) -> None:
        """Count one call of ``problem``'s traits and static dims; its own sizes may be any.

        A reason that measuring more would not change is left out.
        """
        if reason in LISTED:
            key = (sizes, align, reason)
            next(self._counts.get((problem, key)) or self._counter(problem, key))

    def _counter(self, problem: Problem, key: _Key) -> count[int]:
        if len(self._counts) >= self._most:  # nothing is ever taken out, so this needs no lock
            return self._counts.get((problem, key), self._others)
        with self._lock:
            if len(self._counts) >= self._most:
                return self._counts.get((problem, key), self._others)
            return self._counts.setdefault((problem, key), count())

    def snapshot(self) -> list[Missed]:
        """What was noted so far, the most frequent first; equal ones in an order of their own."""
        found = [Missed(problem, *key, _seen(n)) for (problem, key), n in self._counts.copy().items()]
        return sorted(found, key=lambda m: (-m.calls, m.problem.id, m.sizes, m.align, m.reason))

    @property
    def kept(self) -> int:
        """Distinct shapes so far."""
        return len(self._counts)

    @property
    def others(self) -> int:
        """Calls whose shapes were too many to keep."""
        return _seen(self._others)


def _seen(counter: count[int]) -> int:
    return int(repr(counter)[len("count(") : -1])  # the only way to read one without advancing it


Shape = tuple[Sizes, int]
"""Dynamic sizes and alignment of a problem to measure."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to measure: each problem's sizes and alignment, with its calls and their reasons.

    Attributes:
        shapes: by problem (traits and static dims), in the order of their calls.
        left: lines on what is not in it, and why.
    """

    shapes: Mapping[Problem, Mapping[Shape, Counter[str]]]
    left: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many problems it measures."""
        return sum(map(len, self.shapes.values()))


def plan(misses: Iterable[Missed], table: Table, others: int = 0, most: int = MOST_EXPORTED) -> Sweep:
    """What to measure so that ``table``, with it, serves these calls by evidence of their own.

    A size inside the table's bins is measured at its bin's upper edge, so that a new alignment or cell fits the
    grid there is; a size past them as it came. Where one dim has more than ``MOST_EDGES`` of those, they fall
    in bins of about the same traffic. Calls that the table serves well by now are left out.

    Args:
        others: calls whose shapes are not known.
        most: problems to measure; the most frequent ones are.
    """
    kinds: dict[Problem, dict[Shape, Counter[str]]] = {}
    left: Counter[str] = Counter()
    for miss in misses:
        group = _group(table, miss.problem)
        if (why := _unmeasurable(miss)) or (why := _served(table, group, miss)):
            left[why] += miss.calls
            continue
        shape = (_snapped(group, miss.sizes), miss.align)
        kinds.setdefault(miss.problem, {}).setdefault(shape, Counter())[miss.reason] += miss.calls
    thinned = {problem: _thinned(_group(table, problem), shapes) for problem, shapes in kinds.items()}
    ranked = sorted(
        ((sum(reasons.values()), problem, shape) for problem, shapes in thinned.items()
         for shape, reasons in shapes.items()),
        key=lambda found: (-found[0], found[1].id, found[2]),
    )  # fmt: skip
    kept: dict[Problem, dict[Shape, Counter[str]]] = {}
    for _, problem, shape in ranked[:most]:
        kept.setdefault(problem, {})[shape] = thinned[problem][shape]
    left[f"of shapes less frequent than the first {most}"] += sum(calls for calls, *_ in ranked[most:])
    left["of shapes beyond those that were kept"] += others
    return Sweep(kept, tuple(f"{calls} calls {why}" for why, calls in sorted(left.items()) if calls))


def _group(table: Table, problem: Problem) -> Group | None:
    """The table's first group of these traits and static dims: forms have the same grid, eager ones come first."""
    statics = tuple((name, problem.dim(name)) for name in pool.operator(problem.op).static)
    wanted = (problem.op, problem.traits, statics)
    return next((g for g in table.groups if (g.op, g.traits, g.statics) == wanted), None)


def _unmeasurable(miss: Missed) -> str:
    """Why no sweep takes it, as the rest of a line; empty where one does."""
    operator = pool.operator(miss.problem.op)
    for name, value in miss.problem.traits:
        if value not in operator.traits[name]:
            return f"with {name}={value}, which no sweep of {operator.name} takes"
    statics = {name: miss.problem.dim(name) for name in operator.static}
    if not all(1 <= size <= MAX_DIM for size in (*statics.values(), *miss.sizes)):
        return "with a size outside 1..2^40"
    if odd := operator.odd_dims(statics):
        return f"of {operator.name} with {statics}: {odd}"
    return ""


def _served(table: Table, group: Group | None, miss: Missed) -> str:
    code = -1 if group is None else find(group, table.rules, miss.sizes, miss.align)
    return "that the table serves by now" if code >= 0 and code & 3 != Match.NEAREST else ""


def _snapped(group: Group | None, sizes: Sizes) -> Sizes:
    if group is None:
        return sizes
    pairs = zip(group.edges, sizes, strict=True)
    return tuple(edges[bisect_left(edges, size)] if size <= edges[-1] else size for edges, size in pairs)


def _thinned(group: Group | None, shapes: Mapping[Shape, Counter[str]]) -> dict[Shape, Counter[str]]:
    """The same calls at fewer sizes: each dim's new sizes in at most ``MOST_EDGES`` bins, at their upper edges."""
    dims = len(next(iter(shapes))[0])
    edges = [_new_edges(group.edges[d] if group else (), d, shapes) for d in range(dims)]
    found: dict[Shape, Counter[str]] = {}
    for (sizes, align), reasons in shapes.items():
        moved = tuple(upper.get(size, size) for upper, size in zip(edges, sizes, strict=True))
        found.setdefault((moved, align), Counter()).update(reasons)
    return found


def _new_edges(known: Sequence[int], dim: int, shapes: Mapping[Shape, Counter[str]]) -> dict[int, int]:
    """Each new size of one dim to the upper edge of its bin."""
    calls: Counter[int] = Counter()
    for (sizes, _), reasons in shapes.items():
        if sizes[dim] not in known:
            calls[sizes[dim]] += sum(reasons.values())
    if len(calls) <= MOST_EDGES:
        return {size: size for size in calls}
    edges = quantiles(list(calls.items()), MOST_EDGES).edges
    return {size: edges[bisect_left(edges, size)] for size in calls}


def export(path: Path, sweep: Sweep, name: str, device: str = "cpu") -> int:
    """Write a sweep config, whole or not at all; returns how many problems it measures.

    Nothing is written where there are none: a config needs one.

    Args:
        name: of the table.
        device: kind of device that it is for.

    Raises:
        OSError: ``path`` can't be written; what was there is intact.
    """
    if sweep.size:
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text(render(sweep, name, device), encoding="utf-8", newline="\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return sweep.size


def render(sweep: Sweep, name: str, device: str = "cpu") -> str:
    """The config's text. YAML by hand: serving needs no library for it, and all names in it are identifiers."""
    calls = sum(sum(reasons.values()) for shapes in sweep.shapes.values() for reasons in shapes.values())
    lines = [
        f"# {calls} calls that dispatch table {_identifier(name)} served by the framework or by nearest evidence.",
        *(f"# Not in it: {line}." for line in sweep.left),
        "version: 1",
        f"name: {_identifier(name)}_misses",
        f"threads: {torch.get_num_threads()}" if device == "cpu" else f"device: {device}",
        "operators:",
    ]
    by_op: dict[str, list[Problem]] = {}
    for problem in sweep.shapes:
        by_op.setdefault(problem.op, []).append(problem)
    for op, problems in sorted(by_op.items()):
        lines += [f"  {op}:", "    problems:"]
        for problem in problems:
            lines += _entry(problem, sweep.shapes[problem])
    # No shape inside the bins: built together with the table's own run, those would be measured twice.
    return "\n".join([*lines, "measure: {held_out: false, split: null}"]) + "\n"


def _entry(problem: Problem, shapes: Mapping[Shape, Counter[str]]) -> list[str]:
    operator = pool.operator(problem.op)
    statics = ", ".join(f"{name}: {problem.dim(name)}" for name in operator.static)
    traits = ", ".join(f'{name}: "{value}"' for name, value in problem.traits)
    lines = [f"      - dims: {{{statics}}}", f"        traits: {{{traits}}}", "        sizes:"]
    for (sizes, align), reasons in shapes.items():
        dims = ", ".join(f"{name}: {size}" for name, size in zip(operator.dynamic, sizes, strict=True))
        why = ", ".join(sorted(reasons))
        weight = sum(reasons.values())
        lines.append(f"          - {{dims: {{{dims}}}, align: {align}, weight: {weight}}}  # {why}")
    return lines


def _identifier(name: str) -> str:
    """A package's name in the letters that a sweep's may have, with room for what comes behind it."""
    kept = "".join(c if c.isascii() and c.isalnum() else "_" for c in name.lower()).strip("_")[:50]
    return kept if kept[:1].isalpha() else f"table_{kept}".rstrip("_")
