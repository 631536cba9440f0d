"""Intervals against what they promise: coverage, and what too few samples say."""

from __future__ import annotations

import math
import random

import pytest

from dks.dispatch.intervals import (
    geomean_ratio,
    geometric_mean,
    median_interval,
    median_rank,
    paired_ratio,
    ratio_of_means,
)


@pytest.mark.parametrize(("n", "rank"), [(5, 0), (6, 1), (10, 2), (20, 6), (50, 18), (100, 40)])
def test_ranks_are_those_of_the_sign_test(n: int, rank: int) -> None:
    """Tabulated for 95 %, e.g. Conover, Practical Nonparametric Statistics, 1999, table A3."""
    assert median_rank(n) == rank


def test_fewer_than_six_samples_say_nothing() -> None:
    interval = median_interval([1.0] * 5)
    assert (interval.value, interval.low, interval.high) == (1.0, -math.inf, math.inf)
    assert math.isnan(median_interval([]).value)


@pytest.mark.parametrize("n", [10, 40])
def test_the_median_s_interval_covers_it_as_often_as_it_says(n: int) -> None:
    rng = random.Random(n)
    inside = 0
    for _ in range(2000):
        interval = median_interval([rng.lognormvariate(0, 1) for _ in range(n)])
        inside += interval.low <= 1.0 <= interval.high
    assert 0.94 <= inside / 2000 <= 0.995


def test_pairs_cancel_what_slows_both() -> None:
    rng = random.Random(2)
    machine = [rng.lognormvariate(0, 1) for _ in range(50)]
    ratio = paired_ratio([2.0 * m for m in machine], machine)
    assert ratio.value == pytest.approx(2.0) and ratio.high - ratio.low < 1e-9


def test_pairs_are_the_rounds_both_took_part_in() -> None:
    assert paired_ratio([4, 4, 4, 4, 4, 4, 4, 4], [2, 2]).n == 2


def test_the_ratio_of_means_covers_the_truth() -> None:
    rng = random.Random(4)
    inside = 0
    for _ in range(1000):
        peer = [rng.uniform(1, 3) for _ in range(40)]
        ours = [p / 1.25 * rng.uniform(0.8, 1.2) for p in peer]
        interval = ratio_of_means(peer, ours)
        inside += interval.low <= 1.25 <= interval.high
    assert inside / 1000 >= 0.92


def test_the_geometric_mean_of_pairs_covers_the_truth() -> None:
    rng = random.Random(6)
    inside = 0
    for _ in range(1000):
        ours = [rng.lognormvariate(0, 1) for _ in range(40)]
        interval = geomean_ratio([1.25 * o * rng.lognormvariate(0, 0.2) for o in ours], ours)
        inside += interval.low <= 1.25 <= interval.high
    assert inside / 1000 >= 0.92
    assert math.isinf(geomean_ratio([1.0] * 5, [1.0] * 5).high)


def test_geometric_mean() -> None:
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert math.isnan(geometric_mean([]))
