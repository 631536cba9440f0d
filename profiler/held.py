"""What a run directory holds, put together from its Parquet files and its journal. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dks.dispatch.evidence import Measurement
from dks.dispatch.modes import EAGER
from dks.dispatch.problem import Problem
from dks.profiler.findings import Contest, Finding, Findings, from_rows, rounds_from_json


class Held:
    """Findings and rounds by contest.

    Attributes:
        known: all that is known of a contest.
        headers: role and weight of each contest that has a Parquet file.
        dirty: contests of which the journal may know more than Parquet.
        attempts: checks that were begun and never ended, by contest and candidate id.
    """

    def __init__(self) -> None:
        self.known: dict[Contest, Findings] = {}
        self.headers: dict[Contest, tuple[str, float]] = {}
        self.dirty: set[Contest] = set()
        self.attempts: dict[tuple[Contest, str], int] = {}

    def take(self, rows: Sequence[Measurement]) -> dict[Contest, list[Measurement]]:
        """Know the rows of one Parquet file, and return them by contest: one as a sweep writes it, all of a run
        where they were put together, as under ``luts/``."""
        contests: dict[Contest, list[Measurement]] = {}
        for row in rows:
            contests.setdefault(Contest(Problem.parse(row.problem), row.mode), []).append(row)
        for contest, its_rows in contests.items():
            self.known[contest] = from_rows(its_rows)
            self.headers[contest] = (its_rows[0].role, its_rows[0].weight)
        return contests

    def apply(self, record: Mapping[str, Any]) -> None:
        """Know one record of the journal. Rounds that are known already do not count twice.

        Raises:
            KeyError, TypeError, ValueError: it is none of this version.
        """
        # Versions that knew no modes wrote none.
        contest = Contest(Problem.parse(record["problem"]), record.get("mode", EAGER))
        if record["do"] == "rounds":
            self._of(contest).add(rounds_from_json(record["rounds"]))
            self.dirty.add(contest)
            return
        if record["do"] == "reset":
            self.known[contest] = Findings()
            self.dirty.add(contest)
            return
        key = (contest, record["candidate"])
        if record["do"] == "attempt":
            self.attempts[key] = self.attempts.get(key, 0) + 1
        elif record["do"] == "withdraw":
            self.drop_attempt(key)
        else:
            self.attempts.pop(key, None)
            self._of(contest).found[key[1]] = Finding(**record["finding"])
            self.dirty.add(contest)

    def drop_attempt(self, key: tuple[Contest, str]) -> None:
        """Forget that a check was begun, once."""
        left = self.attempts.pop(key, 0) - 1
        if left > 0:
            self.attempts[key] = left

    def _of(self, contest: Contest) -> Findings:
        return self.known.setdefault(contest, Findings())
