"""Counters of what the dispatcher did."""

from __future__ import annotations

from itertools import count


class Counters:
    """Counts by operator and outcome; ``next`` on an ``itertools.count`` is atomic, so threads lose none."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], count[int]] = {}

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
        shown: dict[str, dict[str, int]] = {}
        for (op, outcome), counter in sorted(self._counts.copy().items()):
            seen = int(repr(counter)[len("count(") : -1])  # the only way to read one without advancing it
            if seen:
                shown.setdefault(op, {})[outcome] = seen
        return shown
