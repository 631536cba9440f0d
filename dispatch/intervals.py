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


PROCESS_SPREAD = 0.02
"""Standard deviation of a ratio between processes that is expected before any is seen: fresh memory lies elsewhere
in the caches. Between processes of one machine, medians differed by 2 to 7 %."""

PROCESS_PRIOR = 4
"""So many degrees of freedom that expectation is worth: as if five processes had shown it."""


def block_ratio(processes: Sequence[Sequence[tuple[float, float]]], draws: int = 200) -> Interval:
    """Peer / ours from (peer, ours) pairs, one sequence a process, in the order they were taken; above 1, ours
    is faster.

    The value is the geometric mean, over processes, of the median ratio inside each. How far a median may be off
    comes from a bootstrap over blocks of consecutive pairs, since neighbours in time resemble each other
    (Kuensch 1989; circular blocks of n^(1/3) pairs, Politis and Romano 1992). How far a process may be off comes
    from the variance between the processes; as few of them say little about it, it is drawn towards
    ``PROCESS_SPREAD`` (the moderated t of Smyth 2004: variance (d0 s0^2 + d s^2) / (d0 + d), Student's t with
    d0 + d degrees of freedom). Fewer than six pairs leave the interval open.

    Args:
        draws: of the bootstrap; the random numbers are the same each time.
    """
    # In serving, nothing of this module is needed, nor numpy and scipy.
    import numpy as np
    from scipy.special import stdtrit

    logs = [np.log([peer / ours for peer, ours in pairs]) for pairs in processes if pairs]
    n, count = sum(map(len, logs)), len(logs)
    if n == 0:
        return NOTHING
    medians = np.array([np.median(one) for one in logs])
    value = float(medians.mean())
    if n < 6:
        return Interval(math.exp(value), -math.inf, math.inf, n)
    rng = np.random.default_rng(0)
    within = 0.0
    for one in logs:
        length = max(1, round(len(one) ** (1 / 3)))
        starts = rng.integers(len(one), size=(draws, -(-len(one) // length)))
        index = (starts[:, :, None] + np.arange(length)).reshape(draws, -1)[:, : len(one)] % len(one)
        within += float(np.median(one[index], axis=1).var()) / count
    freedom = PROCESS_PRIOR + count - 1
    between = (PROCESS_PRIOR * PROCESS_SPREAD**2 + float(((medians - value) ** 2).sum())) / freedom
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt((between + within) / count)
    return Interval(math.exp(value), math.exp(value - half), math.exp(value + half), n)


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
