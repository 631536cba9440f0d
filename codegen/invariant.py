"""Batch invariance: one candidate for all sizes of a layer, so that a row's bits do not depend on its batch.

Each group of the table (a layer in one form) gets the candidate that costs least over all of its bins, weighted by
traffic, among those that declare one order of sums for every batch (``Kernel.batch_invariant``) and that the checks
admitted in every bin. Its last bins reach to the largest size there is, so that no call falls to the framework for
its size. A pure function of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product

from dks.codegen.lut import Evidence, Invariant
from dks.dispatch import pool
from dks.dispatch.problem import MAX_DIM, Candidate, Problem
from dks.dispatch.table import Group

Costs = Mapping[str, float]
"""By candidate, what one call costs; see ``choose.all_costs``."""


def is_invariant(candidate: str) -> bool:
    """Whether a candidate declares that a row's bits depend on nothing but the row."""
    parsed = Candidate.parse(candidate)
    return pool.kernels()[parsed.kernel].batch_invariant(parsed.params)


def one_for_all(
    groups: Sequence[Group],
    rules: Sequence[Evidence],
    costs: Callable[[Problem, str], Costs],
    only: Callable[[Problem, str, str], Evidence],
) -> tuple[tuple[Group, ...], tuple[Evidence, ...], tuple[Invariant, ...]]:
    """The table with one candidate a group.

    A group without such a candidate is left out: its ``Invariant`` has none and says so, and the framework serves
    its calls, counted as such. A rule that names the framework's kernel would count them as served as promised.

    Args:
        groups, rules: as chosen bin by bin. No two groups share a rule.
        costs: of every admitted candidate of a problem in a form.
        only: the rule of a problem and form for a candidate that is named.

    Returns:
        The groups that are left, the rules in the same order, and what that costs: one entry a group given.
    """
    made, changed, found = list(rules), [], []
    for group in groups:
        indices = sorted({index for cells in group.cells.values() for index in cells if index >= 0})
        spent = {index: costs(Problem.parse(rules[index].problem), group.form) for index in indices}
        chosen = _cheapest(spent, rules)
        default = pool.operator(group.op).default
        for index in indices:
            old = rules[index]
            new = only(Problem.parse(old.problem), group.form, chosen or default)
            made[index] = replace(new, reason=_reason(chosen, old))
        changed += [_to_the_end(group)] if chosen else []
        found.append(_price(group, chosen, indices, rules, spent))
    return tuple(changed), tuple(made), tuple(found)


def _cheapest(spent: Mapping[int, Costs], rules: Sequence[Evidence]) -> str | None:
    """The candidate that was measured in all bins and costs least over them; ties go to the simplest."""
    names = set.intersection(*(set(costs) for costs in spent.values())) if spent else set()

    def cost(name: str) -> tuple[float, float, int, str]:
        each = [(rules[index].weight, costs[name]) for index, costs in spent.items()]
        rank = pool.kernels()[Candidate.parse(name).kernel].rank
        return math.fsum(w * c for w, c in each), math.fsum(c for _, c in each), rank, name

    return min(filter(is_invariant, names), key=cost, default=None)


def _reason(chosen: str | None, old: Evidence) -> str:
    if chosen is None:
        return "not batch-invariant: no candidate with one order of sums may serve every bin; the default serves"
    if chosen == old.candidate:
        return f"batch-invariant: one kernel for every size; here it is the choice anyway: {old.reason}"
    return (
        f"batch-invariant: one kernel for every size; by itself this bin would take {old.candidate}: {old.reason}"
    )


def _to_the_end(group: Group) -> Group:
    """The same with a last bin up to the largest size in each dim, and a rule in every cell."""
    edges = tuple(each if each[-1] == MAX_DIM else (*each, MAX_DIM) for each in group.edges)
    cells = {}
    for align, rules in group.cells.items():
        some = next((rule for rule in rules if rule >= 0), -1)
        longer = []
        for place in product(*(range(len(each)) for each in edges)):
            index = 0
            for at, old in zip(place, group.edges, strict=True):
                index = index * len(old) + min(at, len(old) - 1)
            longer.append(rules[index] if rules[index] >= 0 else some)
        cells[align] = tuple(longer)
    return replace(group, edges=edges, cells=cells)


def _price(
    group: Group,
    chosen: str | None,
    indices: Sequence[int],
    rules: Sequence[Evidence],
    spent: Mapping[int, Costs],
) -> Invariant:
    """What one candidate costs over the choice bin by bin."""
    name = chosen or pool.operator(group.op).default
    each = [
        (rules[index].weight, spent[index][name], spent[index][rules[index].candidate])
        for index in indices
        if name in spent[index] and rules[index].candidate in spent[index]
    ]
    return Invariant(
        op=group.op,
        form=group.form,
        traits=dict(group.traits),
        statics=dict(group.statics),
        candidate=chosen,
        bin_by_bin=tuple(sorted({rules[index].candidate for index in indices})),
        cost=math.fsum(weight * now for weight, now, _ in each),
        free_cost=math.fsum(weight * free for weight, _, free in each),
        worst=round(max((now / free - 1.0 for _, now, free in each), default=0.0), 6),
    )
