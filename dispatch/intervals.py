"""Medians and paired ratios with confidence intervals, without any assumption about the noise.

The interval of a median comes from order statistics: with n independent samples, the number below the true
median is Binomial(n, 1/2), so the l-th smallest and l-th largest samples enclose it with a known probability
(David and Nagaraja, Order Statistics, 2003, section 7.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, its 95 % confidence interval, and the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


NOTHING = Interval(math.nan, -math.inf, math.inf, 0)


@lru_cache(maxsize=4096)
def median_rank(n: int) -> int:
    """Rank l (from 1) so that the l-th smallest and l-th largest of n enclose the median; 0: n is too small."""
    tail = 0.0
    for rank in range(n // 2 + 1):
        tail += math.exp(math.lgamma(n + 1) - math.lgamma(rank + 1) - math.lgamma(n - rank + 1) - n * math.log(2))
        if tail > (1 - CONFIDENCE) / 2:
            return rank
    return 0


def median_interval(samples: Sequence[float]) -> Interval:
    """The median of ``samples``; fewer than six say nothing about it, and the interval is the whole line."""
    n = len(samples)
    if n == 0:
        return NOTHING
    rank = median_rank(n)
    if rank == 0:
        return Interval(median(samples), -math.inf, math.inf, n)
    ordered = sorted(samples)
    return Interval(median(ordered), ordered[rank - 1], ordered[n - rank], n)


def paired_ratio(peer: Sequence[float], ours: Sequence[float]) -> Interval:
    """Median of peer[i] / ours[i] over the rounds both took part in; above 1, ours is faster.

    Samples of one round were taken close together, so what slowed the machine slowed both.
    """
    return median_interval([p / o for p, o in zip(peer, ours, strict=False)])


def block_ratio(processes: Sequence[Sequence[tuple[float, float]]], draws: int = 400) -> Interval:
    """Peer / ours from (peer, ours) pairs, one sequence a process, in the order they were taken; above 1, ours
    is faster.

    The value is the geometric mean, over processes, of the median ratio inside each. The interval comes from
    a bootstrap in two stages: processes, then blocks of consecutive pairs inside each, since neighbours in time
    resemble each other (Kuensch 1989; circular blocks of n^(1/3) pairs, Politis and Romano 1992). A bootstrap
    over few clusters is too narrow by (P - 1) / P in the variance between them, so the spread is widened by its
    root (Davison and Hinkley, Bootstrap Methods, 1997, section 3.8). Fewer than six pairs leave it open.

    Args:
        draws: bootstrap draws; the random numbers are the same each time.
    """
    import numpy as np  # in serving, nothing of this module is needed, nor numpy

    logs = [np.log([peer / ours for peer, ours in pairs]) for pairs in processes if pairs]
    n = sum(map(len, logs))
    if n == 0:
        return NOTHING
    value = float(np.mean([np.median(one) for one in logs]))
    if n < 6:
        return Interval(math.exp(value), -math.inf, math.inf, n)
    rng = np.random.default_rng(0)
    medians = []
    for one in logs:
        length = max(1, round(len(one) ** (1 / 3)))
        starts = rng.integers(len(one), size=(draws, -(-len(one) // length)))
        index = (starts[:, :, None] + np.arange(length)).reshape(draws, -1)[:, : len(one)] % len(one)
        medians.append(np.median(one[index], axis=1))
    among = rng.integers(len(logs), size=(draws, len(logs)))
    drawn = np.stack(medians)[among, np.arange(draws)[:, None]].mean(axis=1)
    if len(logs) > 1:
        drawn = value + (drawn - value) * math.sqrt(len(logs) / (len(logs) - 1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(math.exp(value), math.exp(min(low, value)), math.exp(max(high, value)), n)


def ratio_of_means(peer: Sequence[float], ours: Sequence[float]) -> Interval:
    """Sum of peer / sum of ours over shared rounds, with a normal interval by the delta method on pairs."""
    pairs = list(zip(peer, ours, strict=False))
    n = len(pairs)
    if n == 0:
        return NOTHING
    total_peer, total_ours = (sum(values) for values in zip(*pairs, strict=True))
    ratio = total_peer / total_ours
    if n < 6:
        return Interval(ratio, -math.inf, math.inf, n)
    residual = sum((p - ratio * o) ** 2 for p, o in pairs) / (n - 1)
    half = 1.959964 * math.sqrt(residual * n) / total_ours
    return Interval(ratio, ratio - half, ratio + half, n)


def geomean_ratio(peer: Sequence[float], ours: Sequence[float]) -> Interval:
    """Geometric mean of peer[i] / ours[i] with a normal interval on the logarithms: every pair counts alike,
    however long it took."""
    logs = [math.log(p / o) for p, o in zip(peer, ours, strict=False)]
    n = len(logs)
    if n == 0:
        return NOTHING
    middle = math.fsum(logs) / n
    if n < 6:
        return Interval(math.exp(middle), -math.inf, math.inf, n)
    half = 1.959964 * math.sqrt(sum((x - middle) ** 2 for x in logs) / (n - 1) / n)
    return Interval(math.exp(middle), math.exp(middle - half), math.exp(middle + half), n)


def geometric_mean(values: Sequence[float]) -> float:
    """exp(mean(log)); NaN for no values."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan
