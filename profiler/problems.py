"""From what a config says of one operator to the problems that are measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from dks.dispatch.bins import Bins, explicit
from dks.dispatch.kernel import DTYPES, Operator
from dks.dispatch.pool import operator
from dks.dispatch.problem import MAX_DIM, Problem
from dks.profiler.document import read_text, shown

MAX_PROBLEMS = 100_000  # of one sweep; at a second each, more than a day
MAX_WEIGHT = 1e15  # of one row of a histogram, so that sums stay exact enough

Histogram = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class WeightedProblem:
    """A problem, and how much it counts: calls of one model pass times its bins' share of the traffic."""

    problem: Problem
    weight: float


@dataclass(frozen=True, slots=True)
class Axis:
    """One dynamic dim: its bins, and the share of the traffic in each (sums to 1)."""

    bins: Bins
    shares: tuple[float, ...]

    @classmethod
    def of(cls, bins: Bins, histogram: Histogram = ()) -> Axis:
        """Share the traffic out; the same share for each bin where none was recorded."""
        if not histogram:
            return cls(bins, (1 / len(bins),) * len(bins))
        found = [0.0] * len(bins)
        for value, weight in histogram:
            # A size past the last edge is served by the last bin's evidence, so its weight belongs there.
            found[min(bins.index(value), len(bins) - 1)] += weight
        total = math.fsum(found)
        return cls(bins, tuple(weight / total for weight in found))


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An operator that the model runs beside another one.

    Attributes:
        traits: what is left out is the first value; the dtype is that of the problem beside it.
        dims: sizes, or names of the other problem's dims whose product is the size; what is left out is the
            size that the other problem's dim of that name has.
    """

    op: str
    traits: Mapping[str, str]
    dims: Mapping[str, int | tuple[str, ...]]

    def beside(self, problem: Problem) -> Problem:
        """The neighbour of one problem."""
        op = operator(self.op)
        traits = {name: values[0] for name, values in op.traits.items()}
        traits |= {"dtype": problem.trait("dtype"), **self.traits}
        dims = {}
        for name in op.dims:
            size = self.dims.get(name, (name,))
            dims[name] = size if isinstance(size, int) else math.prod(problem.dim(each) for each in size)
        return Problem.of(self.op, traits, dims, op.max_align(Problem.of(self.op, traits, dims)))


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What runs around a problem in the model, in order."""

    before: tuple[Neighbour, ...] = ()
    after: tuple[Neighbour, ...] = ()


Kind = tuple[tuple[tuple[str, str], ...], tuple[tuple[str, int], ...]]
"""Traits and static dims of a problem."""


def kind_of(problem: Problem) -> Kind:
    """Traits and static dims."""
    return (problem.traits, tuple((name, problem.dim(name)) for name in operator(problem.op).static))


@dataclass(frozen=True, slots=True)
class Sized:
    """One combination of dynamic sizes, by dim; ``align`` None is each of the operator's alignments."""

    dims: Mapping[str, int]
    align: int | None
    weight: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry under ``problems``: static dims, the values of every trait, calls of one model pass.

    Attributes:
        sizes: what is measured in place of the bins' every combination; empty where those are.
    """

    dims: Mapping[str, int]
    traits: Mapping[str, tuple[str, ...]]
    count: int
    neighbours: Neighbours = Neighbours()
    sizes: tuple[Sized, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """All problems of one operator, before any of them is built.

    Attributes:
        axes: one for each dynamic dim; those that only ``sizes`` name have none.
        tie: dims that take the size of another one.
        alignments: bytes; each is lowered to what a problem's strides allow.
    """

    op: Operator
    entries: tuple[Entry, ...]
    axes: Mapping[str, Axis]
    tie: Mapping[str, str]
    alignments: tuple[int, ...]

    @property
    def size(self) -> int:
        """Upper bound of ``len(self.problems())``, without building one."""
        total = 0
        for entry in self.entries:
            cells = len(entry.sizes) or math.prod(len(self.axes[dim].bins) for dim in self._free)
            total += math.prod(len(values) for values in entry.traits.values()) * cells
        return total * len(self.alignments)

    def bins(self) -> dict[str, Bins]:
        """By dynamic dim, its bins: the config's, or the sizes it names."""
        named = [sized for entry in self.entries for sized in entry.sizes]
        return {
            dim: self.axes[dim].bins if dim in self.axes else explicit(sorted({s.dims[dim] for s in named}))
            for dim in self.op.dynamic
        }

    @property
    def _free(self) -> tuple[str, ...]:
        return tuple(dim for dim in self.op.dynamic if dim not in self.tie)

    def problems(self) -> tuple[WeightedProblem, ...]:
        """One problem for each entry, traits, bins and alignment; a bin is measured at its upper edge.

        Grouped by static dims and traits, so that weights are packed once for a group; dynamic dims ascend
        within it. A problem that several entries name comes once, with the sum of their weights.
        """
        weights: dict[Problem, float] = {}
        for entry in self.entries:
            for values in product(*entry.traits.values()):
                traits = dict(zip(entry.traits, values, strict=True))
                for sized in entry.sizes or self._cells():
                    alignments = self.alignments if sized.align is None else (sized.align,)
                    for problem in self._aligned(traits, {**entry.dims, **sized.dims}, alignments):
                        weights[problem] = weights.get(problem, 0.0) + entry.count * sized.weight
        return tuple(WeightedProblem(problem, weight) for problem, weight in weights.items())

    def neighbours(self) -> dict[Kind, Neighbours]:
        """What the entries say of each kind of problem; the first entry that names one counts."""
        found: dict[Kind, Neighbours] = {}
        for entry in self.entries:
            statics = tuple((name, entry.dims[name]) for name in self.op.static)
            for values in product(*entry.traits.values()):
                traits = tuple(sorted(zip(entry.traits, values, strict=True)))
                found.setdefault((traits, statics), entry.neighbours)
        return found

    def _cells(self) -> Iterator[Sized]:
        axes = [list(zip(self.axes[d].bins.edges, self.axes[d].shares, strict=True)) for d in self._free]
        for cell in product(*axes):
            sizes = dict(zip(self._free, (edge for edge, _ in cell), strict=True))
            for dim, source in self.tie.items():
                sizes[dim] = sizes[source]
            yield Sized(sizes, None, math.prod(share for _, share in cell))

    def _aligned(
        self, traits: Mapping[str, str], sizes: Mapping[str, int], alignments: tuple[int, ...]
    ) -> list[Problem]:
        dims = {name: sizes[name] for name in self.op.dims}
        best = self.op.max_align(Problem.of(self.op.name, traits, dims))
        least = DTYPES[traits["dtype"]].itemsize
        kept = dict.fromkeys(max(min(align, best), least) for align in alignments)
        return [Problem.of(self.op.name, traits, dims, align) for align in kept]


def read_histogram(path: Path) -> Histogram:
    """Recorded traffic: CSV with the header ``value,weight``, sizes from 1 to 2^40, weights above 0.

    Raises:
        ValueError: it is none; the message is "found X, expected Y", with the line.
    """
    lines = read_text(path).splitlines()
    if not lines or lines[0].strip() != "value,weight":
        raise ValueError(f"found {shown(lines[0] if lines else None)} in line 1, expected value,weight")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        value, _, weight = line.strip().partition(",")
        try:
            row = (int(value), float(weight))
        except ValueError:
            row = (0, 0.0)
        if not (1 <= row[0] <= MAX_DIM and 0 < row[1] <= MAX_WEIGHT):
            raise ValueError(
                f"found {shown(line)} in line {number}, expected a whole number from 1 to 2^40 and a weight "
                f"above 0 and up to {MAX_WEIGHT:g}"
            )
        rows.append(row)
    if not rows:
        raise ValueError("found a header alone, expected value,weight rows")
    return tuple(rows)
