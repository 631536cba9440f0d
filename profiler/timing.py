"""Interleaved timing: candidates in randomised rounds, and the rule that says when it is enough.

Nothing here touches a device: rounds come from a sampler, which is a set of kernels, a recorded run, or a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from dks.dispatch.intervals import block_ratio, paired_ratio
from dks.profiler.findings import Round, counted, fastest

LOOKS = (2, 4, 6)
"""Rounds after which candidates are compared, at first; then every ``LOOK`` rounds. Six are the fewest that give
a median an interval: before, only a candidate that is far behind in every round is dropped."""

LOOK = 5

FAR = 2.0
"""Before there is an interval: the fastest sample of a candidate that is dropped is this many times slower than
the slowest of one that could serve in its stead."""

SURE = 0.05
"""A candidate that is faster than the default by more than this share, with confidence, needs no closer look."""

WINDOW_S = 0.1
"""Interference is looked for, and rounds are handed over to be kept, at least so often."""

Level = tuple[int, int]
"""What a candidate asks of its caller: precision class (0 is exact) and whether its weight must be packed."""


def covers(one: Level, other: Level) -> bool:
    """Whether the one could serve wherever the other may: as precise, and asking for no more preparation."""
    return one[0] <= other[0] and one[1] <= other[1]


@dataclass(frozen=True, slots=True)
class Entrants:
    """The candidates of one problem that may be timed.

    Attributes:
        names: candidate ids, ``default`` among them.
        default: the framework's own, which is never dropped.
        levels: what each asks of its caller.
    """

    names: tuple[str, ...]
    default: str
    levels: Mapping[str, Level]


@dataclass(frozen=True, slots=True)
class StoppingRule:
    """When to stop timing a problem in one process, and which candidates still deserve samples.

    Attributes:
        min_rounds: rounds before the answer can be trusted at all; six give a median an interval.
        max_rounds: rounds at most.
        seconds: kernel time of a problem in one process; min_rounds are finished even so.
        precision: enough is known once every contender's ratio to the default is known to +- this share, or is
            surely a gain; what can't be better by more than this share is not worth telling apart.
        trailing: a candidate gets no more samples once one that could serve in its stead is surely no worse, by
            ``precision``, or its fastest sample is this many times slower than that one's median.
        racing: False keeps every candidate to the end, until the ratios of all are known to +- ``precision``.
    """

    min_rounds: int = 10
    max_rounds: int = 100
    seconds: float = 1.0
    precision: float = 0.02
    trailing: float = 1.5
    racing: bool = True

    def contenders(self, rounds: Sequence[Round], entrants: Entrants) -> list[str]:
        """Those that the next round measures, in their order; the default always.

        A candidate that was dropped stays dropped; one that no round has seen yet takes part.

        Args:
            rounds: all that are known, of any process.
        """
        if not self.racing or not rounds:
            return list(entrants.names)
        names, default = entrants.names, entrants.default
        good = counted(rounds, self.min_rounds)
        # Who was dropped while a window was disturbed, is not: that window no longer counts.
        last = (good or rounds)[-1].ns
        active = [n for n in names if n == default or n in last or _new(n, rounds)]
        if not self._is_look(len(good)):
            return active
        samples = {name: {r.number: r.ns[name] for r in good if name in r.ns} for name in active}
        return [n for n in active if n == default or not self._hopeless(n, active, samples, entrants.levels)]

    def _is_look(self, rounds: int) -> bool:
        return rounds in LOOKS or (rounds > LOOKS[-1] and rounds % LOOK == 0)

    def _hopeless(
        self,
        name: str,
        active: Sequence[str],
        samples: Mapping[str, Mapping[int, int]],
        levels: Mapping[str, Level],
    ) -> bool:
        # Only what could serve in its stead makes a candidate hopeless: a faster int8 kernel says nothing
        # where the budget asks for float32, nor a packed one where nothing is prepared.
        own = samples[name]
        rivals = [
            (theirs, [own[r] for r in shared])
            for other in active
            if other != name and covers(levels[other], levels[name])
            for shared in [own.keys() & samples[other].keys()]
            if len(shared) >= LOOKS[0]
            for theirs in [[samples[other][r] for r in shared]]
        ]
        if not rivals:
            return False
        best, mine = min(rivals, key=lambda rival: median(rival[0]))
        if len(mine) < LOOKS[-1]:
            return min(mine) > FAR * max(best)
        return min(mine) > self.trailing * median(best) or paired_ratio(best, mine).high < 1.0 + self.precision

    def done(self, rounds: Sequence[Round], entrants: Entrants, process: int) -> bool:
        """Whether process ``process`` has timed this problem enough."""
        own = counted([each for each in rounds if each.process == process], self.min_rounds)
        if len(own) < self.min_rounds:
            return False
        # Kernel time, not the clock's: evidence alone decides, so a resumed or replayed sweep decides alike.
        if len(own) >= self.max_rounds or sum(sum(each.ns.values()) for each in own) >= self.seconds * 1e9:
            return True
        if len(own) % LOOK:
            return False
        default = entrants.default
        for name in self.contenders(rounds, entrants):
            pairs = [(each.ns[default], each.ns[name]) for each in own if name in each.ns and default in each.ns]
            ratio = paired_ratio(*zip(*pairs, strict=True)) if pairs else None
            if ratio is not None and self.racing and ratio.low > 1.0 + SURE:
                continue
            if name != default and (ratio is None or ratio.high - ratio.low > 2 * self.precision * ratio.value):
                return False
        return True


def _new(name: str, rounds: Sequence[Round]) -> bool:
    return sum(name in each.ns for each in rounds) < LOOKS[0]


def in_doubt(rounds: Sequence[Round], names: Sequence[str], default: str, margin: float) -> bool:
    """Whether more processes could change a choice: a contender's lead on the default, or the fastest one's lead on
    a contender, is neither surely more than ``margin`` nor surely less."""
    good = counted(rounds, 0)
    best = fastest(names, default, good)
    pairs = {(default, name) for name in names} | {(name, best) for name in names}
    return any(_open(good, slow, fast, margin) for slow, fast in pairs if slow != fast)


def _open(rounds: Sequence[Round], slow: str, fast: str, margin: float) -> bool:
    processes: dict[int, list[tuple[float, float]]] = {}
    for each in rounds:
        if slow in each.ns and fast in each.ns:
            processes.setdefault(each.process, []).append((each.ns[slow], each.ns[fast]))
    lead = block_ratio(list(processes.values()))
    return lead.low <= 1.0 + margin < lead.high


class Sampler(Protocol):
    """Whatever can time a round."""

    def round(self, names: Sequence[str]) -> dict[str, int]:
        """Nanoseconds of one call of each."""

    def watch(self) -> None:
        """Begin to look for interference."""

    def disturbed(self) -> str:
        """What interfered since ``watch``, in words; empty if nothing was noticed."""


class ImpossibleTime(Exception):
    """A clock that stood still or ran backwards; the argument is the candidate it was asked for."""


def race(
    rule: StoppingRule,
    sampler: Sampler,
    rounds: list[Round],
    entrants: Entrants,
    process: int,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Iterator[list[Round]]:
    """Time one problem in one process until the rule is content; appends to ``rounds``.

    Yields:
        the new rounds, some at a time, marked where interference was noticed while they were taken.

    Raises:
        ImpossibleTime: a time is zero, negative or NaN. The rounds since the last yield are lost.
    """
    window: list[Round] = []
    sampler.watch()
    while not (finished := rule.done(rounds, entrants, process) or out_of_time()) or window:
        spent = sum(sum(each.ns.values()) for each in window)
        if window and (finished or spent >= WINDOW_S * 1e9):
            reason = sampler.disturbed()
            for each in window:
                each.disturbed = reason
            yield window
            window = []
            sampler.watch()
            continue  # what was marked doesn't count: the rule may ask for more
        number = rounds[-1].number + 1 if rounds else 0
        taking = rule.contenders(rounds, entrants)
        ns = sampler.round(taking)
        for name, time in ns.items():
            if not time > 0:
                raise ImpossibleTime(name)
        window.append(Round(number, process, ns))
        rounds.append(window[-1])
