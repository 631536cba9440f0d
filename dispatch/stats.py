"""Counters of what the dispatcher did."""

from __future__ import annotations

from collections import Counter
from itertools import count
from typing import Any

from dks.dispatch import native
from dks.dispatch.table import Match


class Counters:
    """Counts by operator and outcome; ``next`` on an ``itertools.count`` is atomic, so threads lose none."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], count[int]] = {}
        self._served: dict[str, Any] = {}

    def served(self, op: str) -> Any:
        """The compiled fast path's counts of an operator's hits. Only where there is a fast path."""
        assert native.module is not None
        return self._served.setdefault(op, native.module.Counts())

    def counter(self, op: str, outcome: str) -> count[int]:
        """The counter of one outcome; ``next()`` of it counts one."""
        return self._counts.setdefault((op, outcome), count())

    def add(self, op: str, outcome: str) -> None:
        """Count one outcome."""
        next(self.counter(op, outcome))

    # While torch.compile traces, this runs once at that time, as a fact about the trace.
    add._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def snapshot(self) -> dict[str, dict[str, int]]:
        """Outcome to count, by operator; outcomes that never came are left out."""
        found: Counter[tuple[str, str]] = Counter()
        for key, counter in self._counts.copy().items():
            found[key] += int(repr(counter)[len("count(") : -1])  # the only way to read one without advancing it
        for op, counts in self._served.copy().items():
            for match, seen in zip(Match, counts.read(), strict=True):
                found[op, match.name.lower()] += seen
        shown: dict[str, dict[str, int]] = {}
        for (op, outcome), seen in sorted(found.items()):
            if seen:
                shown.setdefault(op, {})[outcome] = seen
        return shown
