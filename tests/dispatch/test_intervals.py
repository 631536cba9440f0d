"""Intervals against what they promise: coverage, and what too few samples say."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from dks.dispatch.intervals import (
    PROCESS_SPREAD,
    Interval,
    block_ratio,
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


def of(*ratios: float) -> list[tuple[float, float]]:
    """Pairs of one process with these ratios."""
    return [(ratio, 1.0) for ratio in ratios]


def width(interval: Interval) -> float:
    return math.log(interval.high / interval.low)


def test_a_block_ratio_is_the_geometric_mean_of_the_processes_medians() -> None:
    one, two = of(1.0, 2.0, 9.0), of(7.9, 8.0, 8.1, 8.0, 8.0)
    interval = block_ratio([one, two])
    assert interval.value == pytest.approx(4.0) and interval.n == 8, "a process counts alike, however long"
    assert interval.low * interval.high == pytest.approx(16.0)
    assert block_ratio([one, [], two]) == interval, "an empty process is none"
    inverse = block_ratio([[(ours, peer) for peer, ours in pairs] for pairs in (one, two)])
    assert inverse.value == pytest.approx(1 / 4.0)


def test_a_block_ratio_of_fewer_than_six_pairs_is_open() -> None:
    few = block_ratio([of(1.0, 1.0), of(4.0, 4.0, 4.0)])
    assert few.value == pytest.approx(2.0)
    assert (few.low, few.high, few.n) == (-math.inf, math.inf, 5)
    six = block_ratio([of(1.0, 1.0, 1.0), of(4.0, 4.0, 4.0)])
    assert 0.0 < six.low < 2.0 < six.high < math.inf
    assert math.isnan(block_ratio([]).value) and block_ratio([[]]).n == 0


def test_processes_that_differ_widen_a_block_ratio() -> None:
    widths = [width(block_ratio([of(*[1.0] * 10), of(*[1.0 + apart] * 10)])) for apart in (0.0, 0.02, 0.1, 0.5)]
    assert all(narrow < wide for narrow, wide in pairwise(widths))
    assert widths[-1] > 5 * widths[0]


def test_noise_inside_a_process_widens_a_block_ratio_and_more_so_where_neighbours_share_it() -> None:
    rng = random.Random(8)
    runs = [rng.lognormvariate(0, 0.3) for _ in range(16)]
    together = [ratio for ratio in runs for _ in range(4)]
    apart = [*runs, *runs, *runs, *runs]
    steady, noisy, drifting = (width(block_ratio([of(*one)] * 2)) for one in ([1.0] * 64, apart, together))
    assert steady * 1.2 < noisy and noisy * 1.2 < drifting


def test_more_processes_narrow_a_block_ratio() -> None:
    widths = [width(block_ratio([of(*[1.0] * 10)] * count)) for count in (1, 2, 3, 6, 12)]
    assert all(wide > narrow for wide, narrow in pairwise(widths))
    assert widths[0] > 2 * 1.96 * PROCESS_SPREAD, "one process shows no spread, and some is expected"


def test_more_rounds_do_not_stand_in_for_processes() -> None:
    few, many = (width(block_ratio([of(*[1.0] * rounds)] * 2)) for rounds in (10, 1000))
    assert few == pytest.approx(many)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_block_ratio_covers_the_truth(processes: int) -> None:
    """Processes differ by 2 %, and inside each, four rounds in a row share a disturbance."""
    rng = random.Random(processes)

    def measured() -> list[tuple[float, float]]:
        middle = math.log(1.25) + rng.gauss(0, 0.02)
        drift = [rng.gauss(0, 0.03) for _ in range(6)]
        return of(*(math.exp(middle + drift[i // 4] + rng.gauss(0, 0.03)) for i in range(24)))

    intervals = [block_ratio([measured() for _ in range(processes)], draws=100) for _ in range(400)]
    assert sum(one.low <= 1.25 <= one.high for one in intervals) / len(intervals) >= 0.93
    assert max(map(width, intervals)) < 0.35, "and says something"


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
