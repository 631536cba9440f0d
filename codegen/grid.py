"""The bins of one (operator, traits, static dims): which measured problem answers for which sizes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from dks.dispatch import pool
from dks.dispatch.problem import Problem
from dks.dispatch.table import NEAREST_REACH

Sizes = tuple[int, ...]
"""Of the dynamic dims, in the operator's order."""


def sizes_of(problem: Problem) -> Sizes:
    """The problem's dynamic dims."""
    return tuple(problem.dim(name) for name in pool.operator(problem.op).dynamic)


@dataclass(frozen=True)
class Grid:
    """Bins, and the problems that were measured for them.

    Attributes:
        edges: upper edges of the bins, one sequence a dynamic dim: those of the config and of every split.
        coarse: those of the config alone.
        measured: (alignment in bytes, sizes) to the problem that has them.
    """

    edges: tuple[Sizes, ...]
    coarse: tuple[Sizes, ...]
    measured: Mapping[tuple[int, Sizes], Problem]

    @classmethod
    def of(cls, roles: Mapping[Problem, str]) -> Grid:
        """The grid of problems with their roles, ``bin`` or ``split``; at least one."""
        bins = [problem for problem, role in roles.items() if role == "bin"]
        measured = {(problem.align, sizes_of(problem)): problem for problem in roles}
        dims = len(sizes_of(next(iter(roles))))
        return cls(_edges(roles, dims), _edges(bins, dims), measured)

    @property
    def alignments(self) -> list[int]:
        """The alignment classes in bytes, largest first."""
        return sorted({align for align, _ in self.measured}, reverse=True)

    def cells(self) -> Iterator[Sizes]:
        """The upper edges of every combination of bins, the last dim running fastest."""
        return product(*self.edges)

    def answer(self, align: int, cell: Sizes) -> Problem | None:
        """The problem whose rule stands in a cell: the cell's own, or else that of the bin it was split from.

        A split puts its edge across the whole grid. Where nothing was measured along it, the cell is still a
        part of the bin around it, whose evidence holds as it did before the split.
        """
        own = self.measured.get((align, cell))
        if own is not None:
            return own
        around = self._around(cell)
        covering = [
            (prod(sizes), sizes)
            for least, sizes in self.measured
            if least == align and self._around(sizes) == around and all(map(int.__ge__, sizes, cell))
        ]
        return self.measured[align, min(covering)[1]] if covering else None

    def bin_of(self, problem: Problem) -> Problem | None:
        """The problem that answers for another one's sizes at the same alignment, as the lookup finds it;
        None where the lookup misses."""
        cell = []
        for edges, size in zip(self.edges, sizes_of(problem), strict=True):
            if size > NEAREST_REACH * edges[-1]:
                return None
            cell.append(edges[min(bisect_left(edges, size), len(edges) - 1)])
        return self.answer(problem.align, tuple(cell))

    def _around(self, sizes: Sequence[int]) -> Sizes:
        """The upper edges, before any split, of the bins that hold ``sizes``."""
        return tuple(
            next((edge for edge in edges if edge >= size), size)
            for edges, size in zip(self.coarse, sizes, strict=True)
        )


def _edges(problems: Collection[Problem], dims: int) -> tuple[Sizes, ...]:
    found = {sizes_of(problem) for problem in problems}
    return tuple(tuple(sorted({sizes[dim] for sizes in found})) for dim in range(dims))
