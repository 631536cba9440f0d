"""A saved run as a simulator: what would racing have cost, and what would it have chosen? No device is needed.

Meant for runs that were measured with ``racing: false``, where every round has every candidate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from dks.dispatch import pool
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement
from dks.dispatch.intervals import CONFIDENCE, Interval, block_ratio
from dks.dispatch.problem import Problem
from dks.profiler.bench import entrants
from dks.profiler.findings import Findings, Round, counted, fastest, from_rows
from dks.profiler.timing import Entrants, StoppingRule, covers, race


@dataclass(frozen=True)
class Replayed:
    """What a rule would have done with a recorded run.

    Attributes:
        problems: that could be replayed, each mode of one by itself.
        kernel_s: kernel seconds with racing, and without it, under the same rule.
        saved: how many times fewer racing takes, with a 95 % interval by a bootstrap over problems.
        regret: geometric mean of (time of what racing chose / time of the best on the whole record) - 1 over
            problems and levels, with its 95 % interval; worst: the largest.
        cells: problems x levels behind ``regret``; same: where both chose the same.
        width: median half-width of the chosen candidate's ratio to the default, with racing and without.
    """

    problems: int
    kernel_s: tuple[float, float]
    saved: Interval
    regret: Interval
    worst: float
    cells: int
    same: int
    width: tuple[float, float]


class Recorded:
    """Gives the rounds of one recorded process, one after the other."""

    def __init__(self, rounds: Sequence[Round]) -> None:
        self._rounds = iter(rounds)
        self._next = next(self._rounds, None)
        self._taken: list[str] = []

    def over(self) -> bool:
        """Whether the record has no further round."""
        return self._next is None

    def round(self, names: Sequence[str]) -> dict[str, int]:
        """Recorded nanoseconds of these candidates."""
        assert self._next is not None, "over() says when there is none"
        given = self._next
        self._next = next(self._rounds, None)
        return {name: given.ns[name] for name in names}

    def watch(self) -> None:
        """Interference was looked for when the run was recorded."""

    def disturbed(self) -> str:
        """None: disturbed rounds are not replayed."""
        return ""


def replay(rows: Iterable[Measurement], rule: StoppingRule) -> Replayed:
    """Replay every problem of a run under ``rule``, with racing and without.

    Raises:
        BadInput: no problem has rounds with all of its candidates in them.
    """
    by_contest: dict[tuple[str, str], list[Measurement]] = {}
    for row in rows:
        by_contest.setdefault((row.problem, row.mode), []).append(row)
    spent: list[tuple[float, ...]] = []
    widths: tuple[list[float], list[float]] = ([], [])
    regrets: list[float] = []
    same = problems = 0
    for (id, _), measured in by_contest.items():
        problem, findings = Problem.parse(id), from_rows(measured)
        names, record = _whole(problem, findings)
        if len(record) < rule.min_rounds or len(names) < 2:
            continue
        problems += 1
        able = entrants(problem, names)
        ask, default = able.levels, able.default
        runs = [_simulate(replace(rule, racing=racing), record, able) for racing in (True, False)]
        spent.append(tuple(sum(sum(each.ns.values()) for each in run) / 1e9 for run in runs))
        for level in sorted(set(ask.values())):
            fit = [name for name in names if covers(ask[name], level)]
            chosen = [fastest(fit, default, run) for run in runs]
            best = fastest(fit, default, record)
            regrets.append(math.log(median(each.ns[chosen[0]] / each.ns[best] for each in record)))
            same += chosen[0] == chosen[1]
            for name, run, known in zip(chosen, runs, widths, strict=True):
                known.extend(_half_width(name, default, run))
    if not regrets:
        raise BadInput(
            f"replay: found no problem with {rule.min_rounds} rounds that have all of its candidates, expected a "
            "run measured with racing: false; see docs/configs.md"
        )
    return Replayed(
        problems=problems,
        kernel_s=(sum(racing for racing, _ in spent), sum(exhaustive for _, exhaustive in spent)),
        saved=_ratio_of_sums(spent),
        regret=_geomean(regrets),
        worst=math.exp(max(regrets)) - 1,
        cells=len(regrets),
        same=same,
        width=(median(widths[0] or [math.nan]), median(widths[1] or [math.nan])),
    )


def _whole(problem: Problem, findings: Findings) -> tuple[list[str], list[Round]]:
    """The candidates that were timed, and the undisturbed rounds that have all of them."""
    names = [name for name in findings.ok() if any(name in each.ns for each in findings.rounds)]
    if pool.operator(problem.op).default not in names:
        return [], []
    return names, [each for each in counted(findings.rounds, 0) if all(name in each.ns for name in names)]


def _simulate(rule: StoppingRule, record: Sequence[Round], able: Entrants) -> list[Round]:
    """The rounds a sweep would have taken: its processes are the recorded ones, in turn."""
    rounds: list[Round] = []
    for process in dict.fromkeys(each.process for each in record):
        left = rule.contenders(rounds, able)
        if rounds and len(left) < 2:
            break
        recorded = Recorded([each for each in record if each.process == process])
        for _ in race(rule, recorded, rounds, able, process, recorded.over):
            pass
    return rounds


def _half_width(name: str, default: str, rounds: Sequence[Round]) -> list[float]:
    processes: dict[int, list[tuple[float, float]]] = {}
    for each in rounds:
        if name in each.ns:
            processes.setdefault(each.process, []).append((each.ns[default], each.ns[name]))
    ratio = block_ratio(list(processes.values()))
    return [] if name == default or not math.isfinite(ratio.high) else [(ratio.high - ratio.low) / 2 / ratio.value]


def _ratio_of_sums(spent: Sequence[tuple[float, ...]], draws: int = 2000) -> Interval:
    values = np.asarray(spent)
    drawn = values[np.random.default_rng(0).integers(len(values), size=(draws, len(values)))].sum(axis=1)
    low, high = np.quantile(drawn[:, 1] / drawn[:, 0], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    total = values.sum(axis=0)
    return Interval(float(total[1] / total[0]), float(low), float(high), len(values))


def _geomean(logs: Sequence[float], draws: int = 2000) -> Interval:
    """exp(mean) - 1, with a bootstrap interval over cells."""
    values = np.asarray(logs)
    drawn = np.random.default_rng(0).choice(values, size=(draws, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    mean, low, high = (math.expm1(float(value)) for value in (values.mean(), low, high))
    return Interval(mean, low, high, len(logs))
