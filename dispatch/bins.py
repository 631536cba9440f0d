"""Bins over a dynamic dimension, and the named schemes that make them.

A ``Bins`` is its upper edges: bin i holds edges[i-1] < value <= edges[i], the first one starts at 1. The
upper edge is also the bin's representative, the size that is measured.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dks.dispatch.problem import MAX_DIM

MAX_BINS = 4096  # a finer table is a mistake in the config: nobody measures that many sizes


@dataclass(frozen=True, slots=True)
class Bins:
    """Strictly increasing upper edges of one dynamic dim, in elements."""

    edges: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.edges:
            raise ValueError("bins: found no edge, expected at least one")
        if len(self.edges) > MAX_BINS:
            raise ValueError(f"bins: found {len(self.edges)} edges, expected at most {MAX_BINS}")
        if self.edges[0] < 1 or self.edges[-1] > MAX_DIM:
            raise ValueError(f"bins: found edges {self.edges[0]}..{self.edges[-1]}, expected 1..2^40")
        for low, high in zip(self.edges, self.edges[1:], strict=False):
            if low >= high:
                raise ValueError(f"bins: found {low} before {high}, expected strictly increasing edges")

    def index(self, value: int) -> int:
        """The bin that holds ``value`` (>= 1); ``len(self)`` where it lies beyond the last edge."""
        return bisect_left(self.edges, value)

    def bounds(self, index: int) -> tuple[int, int]:
        """Smallest and largest value of bin ``index``, both inside it."""
        return (self.edges[index - 1] + 1 if index else 1, self.edges[index])

    def __len__(self) -> int:
        return len(self.edges)


def powers_of_two(low: int, high: int) -> Bins:
    """Edges at every power of two in low..high; ``high`` closes the last bin if it is not one itself."""
    _check_range(low, high)
    edges = [1 << e for e in range(high.bit_length()) if low <= (1 << e) <= high]
    return Bins(tuple(edges if edges and edges[-1] == high else [*edges, high]))


def multiples(of: int, low: int, high: int) -> Bins:
    """Edges at every multiple of ``of`` in low..high; ``high`` closes the last bin if it is none itself."""
    _check_range(low, high)
    if of < 1:
        raise ValueError(f"multiples: found of={of}, expected at least 1")
    if (high - low) // of > MAX_BINS:
        raise ValueError(f"multiples: found more than {MAX_BINS} bins; expected a larger 'of'")
    edges = list(range(-(-low // of) * of, high + 1, of))
    return Bins(tuple(edges if edges and edges[-1] == high else [*edges, high]))


def explicit(edges: Iterable[int]) -> Bins:
    """The edges as given."""
    return Bins(tuple(edges))


def quantiles(histogram: Sequence[tuple[int, float]], count: int) -> Bins:
    """At most ``count`` bins that each take about the same share of recorded traffic.

    Args:
        histogram: (value, weight) pairs; values >= 1 in any order, weights > 0.
        count: number of bins wanted; fewer come back where one value takes several shares.

    The last edge is the largest value seen, so that all recorded traffic hits the table.
    """
    if count < 1:
        raise ValueError(f"quantiles: found bins={count}, expected at least 1")
    if not histogram:
        raise ValueError("quantiles: found an empty histogram, expected value,weight rows")
    for value, weight in histogram:
        if value < 1 or not weight > 0:
            raise ValueError(f"quantiles: found the row {value},{weight}, expected value >= 1 and weight > 0")
    merged: dict[int, float] = {}
    for value, weight in histogram:
        merged[value] = merged.get(value, 0.0) + weight
    total = math.fsum(merged.values())
    if not math.isfinite(total):
        raise ValueError(f"quantiles: found a total weight of {total}, expected a finite one")
    edges: list[int] = []
    seen, shares = 0.0, 0
    for value in sorted(merged):
        seen += merged[value]
        reached = math.floor(seen / total * count + 1e-9)
        if reached > shares:
            edges.append(value)
            shares = reached
    # The last share ends at the largest value, whatever rounding made of the sum.
    edges[-1:] = [max(merged)]
    return Bins(tuple(edges))


def _check_range(low: int, high: int) -> None:
    if not 1 <= low <= high:
        raise ValueError(f"bins: found min={low} and max={high}, expected 1 <= min <= max")
