"""Which bins are too wide: where what is best at the representative is not good inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dks.dispatch import pool
from dks.dispatch.intervals import block_ratio
from dks.dispatch.problem import Problem
from dks.profiler.bench import entrants
from dks.profiler.findings import Findings, counted, fastest
from dks.profiler.grid import Asked
from dks.profiler.timing import LOOKS, covers


def wide_bins(
    held_out: Mapping[Asked, Problem], known: Callable[[Problem], Findings], limit: float
) -> list[tuple[Problem, Problem]]:
    """(held-out shape, representative) of every bin to split.

    No policy is known here, so every precision class and both forms are asked: in each, the fastest candidate at
    the representative is compared with the fastest one inside, and the bin is too wide where the interval
    of their ratio lies wholly beyond ``limit``.
    """
    return [
        (asked.problem, corner)
        for asked, corner in held_out.items()
        if regret_low(corner, known(corner), known(asked.problem)) > limit
    ]


def regret_low(corner: Problem, at_corner: Findings, at_inner: Findings) -> float:
    """Over all levels, the largest low end of (time of the corner's best / time of the best inside) - 1."""
    names = [name for name in at_corner.ok() if name in at_inner.ok()]
    ask = entrants(corner, names).levels
    outer, inside = counted(at_corner.rounds, 0), counted(at_inner.rounds, 0)
    default = pool.operator(corner.op).default
    worst = 0.0
    for level in set(ask.values()):
        able = [name for name in names if covers(ask[name], level)]
        chosen, best = fastest(able, default, outer), fastest(able, default, inside)
        if chosen == best:
            continue
        processes: dict[int, list[tuple[float, float]]] = {}
        for each in inside:
            if chosen in each.ns and best in each.ns:
                processes.setdefault(each.process, []).append((each.ns[chosen], each.ns[best]))
        pairs = [pair for own in processes.values() for pair in own]
        low = block_ratio(list(processes.values())).low
        if LOOKS[0] <= len(pairs) < LOOKS[-1]:  # it was dropped at sight: what it showed is all there is
            low = min(slow / fast for slow, fast in pairs)
        worst = max(worst, low - 1.0)
    return worst
