"""Ratios between the candidates of one problem, in the objective's terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from statistics import fmean, median

from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement, paired
from dks.dispatch.intervals import NOTHING, Interval, block_ratio, ratio_of_means

Pairs = Sequence[Sequence[tuple[int, int]]]
"""(peer's, ours) nanoseconds of shared rounds, one sequence a process; see ``evidence.paired``."""


def point(pairs: Pairs, objective: str) -> float:
    """Peer / ours without its interval, some hundred times cheaper: the value that ``block_ratio`` has, and
    ``ratio_of_means`` for throughput. NaN for no pairs."""
    if not pairs:
        return math.nan
    if objective == "throughput":
        flat = list(chain.from_iterable(pairs))
        return sum(peer for peer, _ in flat) / sum(ours for _, ours in flat)
    return math.exp(fmean(median(math.log(peer / ours) for peer, ours in one) for one in pairs))


class Comparisons:
    """Compares candidates of one problem. Each ratio is computed once, however many forms ask for it.

    In the ratios, above 1 means that ``ours`` is better than ``peer``.
    """

    def __init__(self, objective: str) -> None:
        self._objective = objective
        self._pairs: dict[tuple[str, str], Pairs] = {}
        self._intervals: dict[tuple[str, str], Interval] = {}

    def spent(self, row: Measurement) -> float:
        """What one call of a timed candidate costs in the objective's terms: joules, or mean or median
        nanoseconds; 0 where that was not measured."""
        if self._objective == "energy":
            return row.energy_j or 0.0
        return fmean(row.samples_ns) if self._objective == "throughput" else row.median_ns or 0.0

    def pairs(self, peer: Measurement, ours: Measurement) -> Pairs:
        """The rounds both took part in, by process."""
        key = (peer.candidate, ours.candidate)
        if key not in self._pairs:
            self._pairs[key] = paired(peer, ours)
        return self._pairs[key]

    def value(self, peer: Measurement, ours: Measurement) -> float:
        """The ratio alone; NaN where they share no round, or the joules of ``ours`` were not read: it was dropped
        before they were.

        Raises:
            BadInput: the objective is energy, and the joules of ``peer`` were not measured.
        """
        if self._objective == "energy":
            return _joules(peer, ours)
        return point(self.pairs(peer, ours), self._objective)

    def ratio(self, peer: Measurement, ours: Measurement) -> Interval:
        """The ratio with its interval; joules have none. Raises as ``value`` does."""
        key = (peer.candidate, ours.candidate)
        if key not in self._intervals:
            self._intervals[key] = self._ratio(peer, ours)
        return self._intervals[key]

    def _ratio(self, peer: Measurement, ours: Measurement) -> Interval:
        if self._objective == "energy":
            value = _joules(peer, ours)
            return Interval(value, value, value, len(ours.samples_ns))
        pairs = self.pairs(peer, ours)
        if not pairs:
            return NOTHING
        if self._objective == "throughput":
            return ratio_of_means(*zip(*chain.from_iterable(pairs), strict=True))
        return block_ratio(pairs)

    def faster_in(self, peer: Measurement, ours: Measurement) -> int:
        """In how many of the shared processes ``ours`` was better. Joules are one number a candidate: all."""
        pairs = self.pairs(peer, ours)
        if self._objective == "energy":
            return len(pairs)
        return sum(point([one], self._objective) > 1.0 for one in pairs)


def _joules(peer: Measurement, ours: Measurement) -> float:
    if peer.energy_j is None:
        raise BadInput(
            f"objective energy: found no measured joules of {peer.candidate} ({peer.energy_note}), expected the "
            "default's at least; on a GPU, measure with energy: true"
        )
    return peer.energy_j / ours.energy_j if ours.energy_j else math.nan
