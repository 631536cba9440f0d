"""Interleaved timing: candidates in randomised rounds, and the rule that says when it is enough.

Clock and randomness come from outside, so tests feed the rule with numbers.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from dks.dispatch.intervals import paired_ratio

Clock = Callable[[], int]
"""Monotonic nanoseconds."""


LOOK = 5
"""Intervals are looked at every so many rounds: each costs a sort."""

FIRST_LOOK = 6
"""Rounds that every candidate takes part in: the fewest that give a median an interval, so that a policy which
rules the fastest out still finds evidence for the others."""

Level = tuple[int, int]
"""What a candidate asks of its caller: precision class (0 is exact) and whether its weight must be packed."""


def covers(one: Level, other: Level) -> bool:
    """Whether the one could serve wherever the other may: as precise, and asking for no more preparation."""
    return one[0] <= other[0] and one[1] <= other[1]


@dataclass(frozen=True, slots=True)
class StoppingRule:
    """When to stop timing a problem, and which candidates still deserve samples.

    Attributes:
        min_rounds: rounds before the answer can be trusted at all; six give a median an interval.
        max_rounds: rounds at most.
        seconds: time for the rounds of one problem; min_rounds are finished even so.
        precision: enough is known once every contender's ratio interval is narrower than +- this share,
            and two candidates closer than it are not told apart.
        trailing: a candidate gets no more samples once its interval lies wholly behind one that could serve
            in its stead, or its fastest sample is this many times slower than that one's median.
        racing: False keeps every candidate to the end.
    """

    min_rounds: int = 10
    max_rounds: int = 100
    seconds: float = 1.0
    precision: float = 0.02
    trailing: float = 1.5
    racing: bool = True

    def contenders(
        self, samples: Mapping[str, Sequence[int]], default: str, levels: Mapping[str, Level]
    ) -> list[str]:
        """The candidates that the next round measures, in the order of ``samples``; the default always."""
        rounds = len(samples[default])
        active = [name for name, times in samples.items() if len(times) == rounds]
        if not self.racing:
            return active
        if rounds != FIRST_LOOK and (rounds < FIRST_LOOK or rounds % LOOK):
            return active
        return [n for n in active if n == default or not self._hopeless(n, active, samples, levels)]

    def _hopeless(
        self, name: str, active: Sequence[str], samples: Mapping[str, Sequence[int]], levels: Mapping[str, Level]
    ) -> bool:
        # Only what could serve in its stead makes a candidate hopeless: a faster int8 kernel says nothing
        # where the budget asks for float32, nor a packed one where nothing is prepared.
        rivals = [other for other in active if other != name and covers(levels[other], levels[name])]
        if not rivals:
            return False
        best = min(rivals, key=lambda other: median(samples[other]))
        if min(samples[name]) > self.trailing * median(samples[best]):
            return True
        return paired_ratio(samples[best], samples[name]).high < 1.0 - self.precision

    def done(
        self,
        samples: Mapping[str, Sequence[int]],
        default: str,
        levels: Mapping[str, Level],
        elapsed_s: float,
    ) -> bool:
        """Whether to stop after these rounds."""
        rounds = len(samples[default])
        if rounds < self.min_rounds:
            return False
        if rounds >= self.max_rounds or elapsed_s >= self.seconds:
            return True
        if rounds % LOOK:
            return False
        contenders = self.contenders(samples, default, levels)
        ratios = [paired_ratio(samples[default], samples[name]) for name in contenders if name != default]
        return all(r.high - r.low <= 2 * self.precision * r.value for r in ratios)


@dataclass
class Rounds:
    """Times a set of calls in randomised interleaved rounds.

    Attributes:
        rule: when to stop.
        rng: the order inside a round.
        clock: monotonic nanoseconds.
    """

    rule: StoppingRule
    rng: random.Random
    clock: Clock = time.perf_counter_ns

    def run(
        self,
        calls: Mapping[str, Sequence[Callable[[], object]]],
        default: str,
        levels: Mapping[str, Level],
    ) -> dict[str, list[int]]:
        """Nanoseconds of each call, one a round, by candidate.

        Args:
            calls: by candidate, the same call on several copies of its weights. Round r uses copy r modulo
                their number, so that no call finds its weights in the private cache.
            default: the candidate that is never dropped.
            levels: by candidate, what it asks of its caller.
        """
        samples: dict[str, list[int]] = {name: [] for name in calls}
        for copies in calls.values():
            for copy in copies:  # the first call on a fresh copy pays for more than its weights
                copy()
        start = self.clock()
        collecting = gc.isenabled()
        gc.disable()  # a collection inside a sample would be charged to whichever candidate it hits
        try:
            while not self.rule.done(samples, default, levels, (self.clock() - start) / 1e9):
                self._round(calls, samples, self.rule.contenders(samples, default, levels))
        finally:
            if collecting:
                gc.enable()
        return samples

    def _round(
        self,
        calls: Mapping[str, Sequence[Callable[[], object]]],
        samples: dict[str, list[int]],
        order: list[str],
    ) -> None:
        self.rng.shuffle(order)
        clock = self.clock
        for name in order:
            times = samples[name]
            call = calls[name][len(times) % len(calls[name])]
            before = clock()
            result = call()
            after = clock()
            del result  # freed outside the timed span, as a caller would later
            times.append(after - before)
