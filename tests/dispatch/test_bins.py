"""Bins: every size falls in exactly one, and each scheme makes the edges that it promises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dks.dispatch.bins import MAX_BINS, Bins, explicit, multiples, powers_of_two, quantiles
from dks.dispatch.problem import MAX_DIM

EDGES = st.lists(st.integers(1, MAX_DIM), min_size=1, max_size=40, unique=True).map(sorted)
RANGES = st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)).map(sorted)
HISTOGRAMS = st.lists(st.tuples(st.integers(1, 500), st.integers(1, 1000)), min_size=1, max_size=60)


@given(EDGES, st.integers(1, MAX_DIM))
def test_every_value_falls_in_exactly_one_bin(edges: list[int], value: int) -> None:
    bins = explicit(edges)
    holding = [i for i in range(len(bins)) if bins.bounds(i)[0] <= value <= bins.bounds(i)[1]]
    assert holding == ([bins.index(value)] if value <= edges[-1] else [])
    assert (bins.index(value) == len(bins)) == (value > edges[-1])


@given(EDGES)
def test_an_edge_is_the_last_value_of_its_bin(edges: list[int]) -> None:
    bins = explicit(edges)
    for i, edge in enumerate(edges):
        assert bins.index(edge) == i
        assert bins.index(edge + 1) == i + 1
        assert edge == 1 or bins.index(edge - 1) == (i if edge - 1 >= bins.bounds(i)[0] else i - 1)


@given(EDGES, st.integers(1, MAX_DIM), st.integers(1, MAX_DIM))
def test_a_larger_value_is_never_in_an_earlier_bin(edges: list[int], one: int, other: int) -> None:
    bins = explicit(edges)
    assert bins.index(min(one, other)) <= bins.index(max(one, other))


@given(RANGES)
def test_powers_of_two_are_all_those_in_range_and_the_end(limits: list[int]) -> None:
    low, high = limits
    edges = powers_of_two(low, high).edges
    powers = [1 << e for e in range(20) if low <= 1 << e <= high]
    assert list(edges) == sorted({*powers, high})


@given(st.integers(1, 500), st.integers(1, 5000), st.integers(0, 5000))
def test_multiples_are_all_those_in_range_and_the_end(of: int, low: int, more: int) -> None:
    high = low + min(more, MAX_BINS * of // 2)
    edges = multiples(of, low, high).edges
    assert list(edges) == sorted({*(v for v in range(low, high + 1) if v % of == 0), high})


@given(HISTOGRAMS, st.integers(1, 20))
def test_quantiles_cover_what_was_seen_in_at_most_as_many_bins(
    histogram: list[tuple[int, float]], count: int
) -> None:
    bins = quantiles(histogram, count)
    seen = {value for value, _ in histogram}
    assert len(bins) <= count
    assert set(bins.edges) <= seen
    assert bins.edges[-1] == max(seen)


@given(st.integers(1, 12), st.data())
def test_quantile_bins_take_about_the_same_share(count: int, data: st.DataObject) -> None:
    """Where no value takes more than a share itself, a bin holds its own share and less than one more."""
    weights = data.draw(st.lists(st.integers(5, 10), min_size=2 * count, max_size=80))
    histogram = [(10 * i + 3, float(weight)) for i, weight in enumerate(weights)]
    bins = quantiles(histogram, count)
    held = [0.0] * len(bins)
    for value, weight in histogram:
        held[bins.index(value)] += weight
    assert len(bins) == count
    assert all(share < 2 * sum(weights) / count for share in held)


def test_one_value_that_takes_all_traffic_makes_one_bin() -> None:
    assert quantiles([(7, 3.0)], 5).edges == (7,)
    assert quantiles([(7, 3.0), (7, 1.0)], 5).edges == (7,)


@pytest.mark.parametrize(
    ("edges", "found"),
    [
        ((), "no edge"),
        ((0, 1), "0..1"),
        ((-3,), "-3..-3"),
        ((1, MAX_DIM + 1), str(MAX_DIM + 1)),
        ((1, 1), "1 before 1"),
        ((1, 5, 4), "5 before 4"),
        (tuple(range(1, MAX_BINS + 2)), f"{MAX_BINS + 1} edges"),
    ],
)
def test_bad_edges_are_named(edges: tuple[int, ...], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        Bins(edges)


@pytest.mark.parametrize(("low", "high"), [(0, 4), (-1, 4), (5, 4)])
def test_a_range_that_is_none_is_named(low: int, high: int) -> None:
    for make in (powers_of_two, lambda a, b: multiples(2, a, b)):
        with pytest.raises(ValueError, match=f"min={low} and max={high}"):
            make(low, high)


def test_multiples_refuse_no_step_and_too_many_bins() -> None:
    with pytest.raises(ValueError, match="of=0"):
        multiples(0, 1, 8)
    with pytest.raises(ValueError, match="larger 'of'"):
        multiples(1, 1, MAX_DIM)


@pytest.mark.parametrize(
    ("histogram", "count", "found"),
    [
        ([], 3, "empty histogram"),
        ([(1, 1.0)], 0, "bins=0"),
        ([(0, 1.0)], 3, "row 0,1.0"),
        ([(1, 0.0)], 3, "row 1,0.0"),
        ([(1, -1.0)], 3, "row 1,-1.0"),
        ([(1, float("nan"))], 3, "row 1,nan"),
    ],
)
def test_quantiles_refuse_a_bad_histogram(histogram: list[tuple[int, float]], count: int, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        quantiles(histogram, count)
