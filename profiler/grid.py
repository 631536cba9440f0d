"""The bins of one weight shape: their representatives, the held-out shapes inside them, and splitting."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dks.dispatch import pool
from dks.dispatch.problem import Problem
from dks.profiler.config import OperatorSweep

MOST_EDGES = 2  # that splitting adds to a bin of the config

Key = tuple[object, ...]
"""Operator, traits, static dims and alignment: what a problem has besides its dynamic sizes."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A problem to measure: its role and weight as in ``Measurement``."""

    problem: Problem
    role: str
    weight: float


def key_of(problem: Problem) -> Key:
    """The grid that a problem belongs to."""
    statics = tuple((name, problem.dim(name)) for name in pool.operator(problem.op).static)
    return (problem.op, problem.traits, statics, problem.align)


class Grid:
    """Representatives and edges of one key; ``split`` adds to both.

    Args:
        corners: representatives, at the upper edges of their bins, with their weights.
        free: the dynamic dims that have edges of their own.
        tie: dims that take the size of a free one.
    """

    def __init__(self, corners: Mapping[Problem, float], free: Iterable[str], tie: Mapping[str, str]) -> None:
        self._free, self._tie = tuple(free), dict(tie)
        self._corners = {problem: Asked(problem, "bin", weight) for problem, weight in corners.items()}
        self._edges = {d: sorted({problem.dim(d) for problem in corners}) for d in self._free}
        self._given = {d: tuple(edges) for d, edges in self._edges.items()}

    def holds(self, problem: Problem) -> bool:
        """Whether a problem differs from these in dynamic sizes alone, and lies inside a bin."""
        if key_of(problem) != key_of(next(iter(self._corners))):
            return False
        return all(problem.dim(d) <= self._edges[d][-1] for d in self._free)

    def corners(self) -> list[Asked]:
        """The representatives, in the order they came."""
        return list(self._corners.values())

    def held_out(self) -> dict[Asked, Problem]:
        """A ragged shape inside each bin that has room for one, to its bin's representative."""
        found = {}
        for corner in self._corners.values():
            sizes = {d: _inside(*self._bounds(d, corner.problem.dim(d))) for d in self._free}
            inner = self._at(corner.problem, sizes)
            if inner != corner.problem and inner not in self._corners:
                found[Asked(inner, "held_out", corner.weight)] = corner.problem
        return found

    def split(self, corner: Problem, inner: Problem) -> bool:
        """Make a new edge at ``inner``, inside the bin of ``corner``; False where the bin is as narrow as can be.

        The dim whose bin is the widest, as a ratio, is split; every bin that has this edge is. A bin of the
        config takes ``MOST_EDGES`` new ones, shared among its dims: what is ragged stays so however narrow.
        """
        rooms = [d for d in self._free if self._may_split(d, inner.dim(d), corner.dim(d))]
        if not rooms:
            return False
        self._add(max(rooms, key=lambda d: corner.dim(d) / self._bounds(d, corner.dim(d))[0]), inner, corner)
        return True

    def _may_split(self, dim: str, edge: int, upper: int) -> bool:
        if edge not in range(self._bounds(dim, upper)[0], upper):
            return False
        given = self._given[dim]
        position = bisect_left(given, upper)
        low = given[position - 1] if position else 0
        added = sum(low < each < given[position] for each in self._edges[dim])
        return added < max(1, MOST_EDGES // len(self._free))

    def _add(self, dim: str, inner: Problem, corner: Problem) -> None:
        edge, upper = inner.dim(dim), corner.dim(dim)
        low = self._bounds(dim, upper)[0]
        share = (edge - low + 1) / (upper - low + 1)
        for old in [asked for asked in self._corners.values() if asked.problem.dim(dim) == upper]:
            new = self._at(old.problem, {**{d: old.problem.dim(d) for d in self._free}, dim: edge})
            self._corners[new] = Asked(new, "split", old.weight * share)
            self._corners[old.problem] = Asked(old.problem, old.role, old.weight * (1 - share))
        self._edges[dim] = sorted({*self._edges[dim], edge})

    def adopt(self, problem: Problem) -> None:
        """Split as an earlier session did: ``problem`` is a representative that it added."""
        for dim in self._free:
            size = problem.dim(dim)
            above = [edge for edge in self._edges[dim] if edge > size]
            if size not in self._edges[dim] and above:
                corners = [a.problem for a in self._corners.values() if a.problem.dim(dim) == above[0]]
                inner = {d: corners[0].dim(d) for d in self._free}
                self._add(dim, self._at(corners[0], {**inner, dim: size}), corners[0])

    def _bounds(self, dim: str, edge: int) -> tuple[int, int]:
        position = self._edges[dim].index(edge)
        return (self._edges[dim][position - 1] + 1 if position else 1, edge)

    def _at(self, problem: Problem, sizes: Mapping[str, int]) -> Problem:
        full = {**sizes, **{dim: sizes[source] for dim, source in self._tie.items()}}
        dims = {name: full.get(name, size) for name, size in problem.dims}
        return Problem.of(problem.op, dict(problem.traits), dims, problem.align)


def _inside(low: int, high: int) -> int:
    """An odd size near the bin's geometric middle; the edge itself where nothing else is in the bin."""
    middle = round(math.sqrt(low * high)) | 1
    return min(middle, high - 1) if low < high else high


def grids(part: OperatorSweep) -> list[Grid]:
    """The grids of one operator, in the order of its problems."""
    by_key: dict[Key, dict[Problem, float]] = {}
    for weighted in part.problems:
        by_key.setdefault(key_of(weighted.problem), {})[weighted.problem] = weighted.weight
    free = [dim for dim in pool.operator(part.op).dynamic if dim not in part.tie]
    return [Grid(corners, free, part.tie) for corners in by_key.values()]
