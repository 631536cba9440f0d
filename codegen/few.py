"""At most so many kernels an operator: who may be chosen where more are ahead than a package should carry.

Each chosen kernel costs code to ship and trust, and mostly a packed copy of every weight that it serves. Of many
that are nearly equal, such as the tiles of one template, a few lose next to nothing: this picks them. A pure
function of the rows, and it makes no rule: ``choose`` does that again, among those that were picked.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dks.codegen.certificate import percent
from dks.codegen.lut import Evidence, Few
from dks.dispatch import pool
from dks.dispatch.problem import Candidate, Problem

Costs = Mapping[str, float]
"""By candidate, what one call costs: the default, and whatever may replace it; see ``choose.costs``."""


@dataclass(frozen=True, slots=True)
class Bin:
    """One measured problem: its traffic, and what each candidate costs there, the default always among them."""

    weight: float
    costs: Costs


def keep_few(
    rules: Sequence[Evidence],
    costs: Callable[[Problem, str], Costs],
    again: Callable[[Problem, str, Collection[str]], Evidence],
    limit: int | None,
) -> tuple[tuple[Evidence, ...], tuple[Few, ...]]:
    """The rules with at most ``limit`` distinct candidates for an operator, form and activation dtype.

    The default is always one of them: it serves where the lookup misses. A rule whose candidate stays is kept
    as it is, and an operator that needs no more than the limit is left alone.

    Args:
        rules: the choices without a limit.
        costs: of a problem and form.
        again: the choice for a problem and form among the candidates that are named.
        limit: None is no limit.

    Returns:
        The rules in the same order, and what the limit changed: one entry for each operator, form and dtype
        with more candidates than it.
    """
    scopes: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for index, rule in enumerate(rules):
        problem = Problem.parse(rule.problem)
        scopes[problem.op, rule.form, problem.trait("dtype")].append(index)
    made, found = list(rules), []
    for scope, indices in sorted(scopes.items()):
        default = pool.operator(scope[0]).default
        before = {rules[index].candidate for index in indices} | {default}
        if limit is None or len(before) <= limit:
            continue
        bins = {i: _bin(rules[i], costs(Problem.parse(rules[i].problem), scope[1])) for i in indices}
        picked = pick([bin for bin in bins.values() if bin.costs], default, limit)
        for index in indices:
            old = rules[index]
            if old.candidate not in picked:
                new = again(Problem.parse(old.problem), scope[1], picked)
                made[index] = replace(new, reason=_reason(old, new, bins[index].costs, limit, scope))
        found.append(_few(scope, before, indices, rules, made, bins))
    return tuple(made), tuple(found)


def pick(bins: Sequence[Bin], default: str, limit: int) -> tuple[str, ...]:
    """The candidates, ``default`` first, with which the bins together cost least when each takes its cheapest.

    Greedy: from the default alone, the one that saves most is added until ``limit`` are there or none saves
    anything. As a call's least cost has diminishing returns, that alone is within 1 - 1/e of the best possible
    saving [Nemhauser, Wolsey, Fisher 1978]. Then one pass of swaps, since an early pick may have become idle.
    Equal costs go to the simplest kernel, then to the first id. Bins without traffic decide between sets that
    are equal otherwise.
    """
    names = sorted({name for bin in bins for name in bin.costs} - {default}, key=_simplicity)
    picked = [default]
    while len(picked) < limit:
        best = min(names, key=lambda name: _total(bins, [*picked, name]), default=None)
        if best is None or _total(bins, [*picked, best]) >= _total(bins, picked):
            break
        picked.append(best)
    for place in range(1, len(picked)):
        others = picked[:place] + picked[place + 1 :]
        best = min(names, key=lambda name: _total(bins, [*others, name]))
        if _total(bins, [*others, best]) < _total(bins, picked):
            picked[place] = best
    return tuple(picked)


def _total(bins: Iterable[Bin], names: Collection[str]) -> tuple[float, float]:
    """What the bins cost with ``names``: weighted by traffic, and not. The order of bins changes no bit of it."""
    least = [(bin.weight, min(bin.costs[name] for name in names if name in bin.costs)) for bin in bins]
    return math.fsum(weight * cost for weight, cost in least), math.fsum(cost for _, cost in least)


def _simplicity(candidate: str) -> tuple[int, str]:
    return pool.kernels()[Candidate.parse(candidate).kernel].rank, candidate


def _bin(rule: Evidence, costs: Costs) -> Bin:
    """What is ahead of the rule's choice was tied with it, and less simple: it counts as equal."""
    if not costs:  # the default was not measured: nothing may replace it, and there is nothing to save
        return Bin(rule.weight, costs)
    return Bin(rule.weight, {name: max(cost, costs[rule.candidate]) for name, cost in costs.items()})


def _reason(old: Evidence, new: Evidence, costs: Costs, limit: int, scope: tuple[str, str, str]) -> str:
    op, form, dtype = scope
    lost = costs[new.candidate] / costs[old.candidate] - 1.0
    kernels = "1 kernel serves" if limit == 1 else f"{limit} kernels serve"
    how = f"was ahead by {percent(lost)}" if lost > 0.0 else "was tied and is simpler"
    # A default without a rival says that none may serve, but this one may: it was not picked.
    alone = new.candidate == pool.operator(op).default and new.runner_up is None
    kept = "the default serves" if alone else new.reason
    return f"{kept}; {old.candidate} {how}, but at most {kernels} {op} {form} with {dtype}"


def _few(
    scope: tuple[str, str, str],
    before: Collection[str],
    indices: Sequence[int],
    rules: Sequence[Evidence],
    made: Sequence[Evidence],
    bins: Mapping[int, Bin],
) -> Few:
    """What the limit costs: regret against the choices without it."""
    costs = {
        i: (bins[i].weight, bins[i].costs[made[i].candidate], bins[i].costs[rules[i].candidate])
        for i in indices
        if bins[i].costs
    }
    now = math.fsum(weight * new for weight, new, _ in costs.values())
    free = math.fsum(weight * old for weight, _, old in costs.values())
    worst = max(costs, key=lambda i: costs[i][1] / costs[i][2])
    return Few(
        *scope,
        before=tuple(sorted(before)),
        after=tuple(sorted({made[i].candidate for i in indices} | {pool.operator(scope[0]).default})),
        changed=sum(made[i].candidate != rules[i].candidate for i in indices),
        weighted=round(now / free - 1.0, 6) if free > 0.0 else None,
        worst=round(costs[worst][1] / costs[worst][2] - 1.0, 6),
        worst_problem=rules[worst].problem,
    )
