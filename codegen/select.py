"""Selection: from measurements to the rules of a table. A pure function of its input.

A challenger replaces the framework's own kernel only where it is inside the error budget, its ratio's
confidence interval lies above a tie, and it saves more than dispatching costs. Ties go to the default, then to
the simplest kernel.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dks.codegen.lut import Evidence, Lut
from dks.codegen.policy import Policy
from dks.dispatch import pool
from dks.dispatch.environment import Environment
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement, environment_of
from dks.dispatch.intervals import Interval, paired_ratio, ratio_of_means
from dks.dispatch.kernel import source_digest
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.table import Group

FORMS = ("prepared", "direct")


@dataclass(frozen=True, slots=True)
class Contender:
    """A measured candidate inside the policy's limits, against the default and in the objective's terms."""

    row: Measurement
    ratio: Interval

    @property
    def simplicity(self) -> tuple[int, int, str]:
        """Sorts the simplest first."""
        kernel = pool.kernels()[Candidate.parse(self.row.candidate).kernel]
        return (kernel.rank, self.row.form_bytes, self.row.candidate)


def select(rows: Iterable[Measurement], policy: Policy) -> Lut:
    """Choose a candidate for every measured problem.

    Raises:
        BadInput: rows of several environments, of kernels or operators that this version does not have, or
            the same problem measured twice.
    """
    by_problem = _by_problem(rows)
    environment = _one_environment(by_problem)
    grouped: dict[tuple[object, ...], dict[Problem, list[Measurement]]] = defaultdict(dict)
    for problem, measured in by_problem.items():
        operator = pool.operators()[problem.op]
        statics = tuple((name, problem.dim(name)) for name in operator.static)
        grouped[problem.op, problem.traits, statics][problem] = measured
    evidence: list[Evidence] = []
    groups = []
    for key in sorted(grouped, key=repr):
        for form in _forms(str(key[0])):
            groups.append(_group(key, form, grouped[key], policy, evidence))
    return Lut(environment, policy, tuple(evidence), tuple(groups), _expected(groups, evidence))


def _by_problem(rows: Iterable[Measurement]) -> dict[Problem, list[Measurement]]:
    by_problem: dict[Problem, list[Measurement]] = defaultdict(list)
    seen: set[tuple[str, str]] = set()
    kernels = pool.kernels()
    digests = {id: source_digest(kernel) for id, kernel in kernels.items()}
    for row in rows:
        if row.op not in pool.operators() or Candidate.parse(row.candidate).kernel not in kernels:
            raise BadInput(
                f"{row.problem}: found {row.op} by {row.candidate}, expected an operator and kernel of this "
                "version; measure again"
            )
        if (row.problem, row.candidate) in seen:
            raise BadInput(
                f"{row.problem}: found two measurements of {row.candidate}, expected one; give each problem's "
                "run once"
            )
        seen.add((row.problem, row.candidate))
        if row.kernel_digest != digests[Candidate.parse(row.candidate).kernel]:
            raise BadInput(
                f"{row.problem}: found {row.candidate} measured with another source than this version's, "
                "expected the same; run dks-profile again, which measures only what changed"
            )
        by_problem[Problem.parse(row.problem)].append(row)
    if not by_problem:
        raise BadInput("measurements: found none, expected at least one problem")
    return dict(by_problem)


def _one_environment(by_problem: dict[Problem, list[Measurement]]) -> Environment:
    texts = {row.environment: row for rows in by_problem.values() for row in rows}
    found = [environment_of(row) for row in texts.values()]
    for other in found[1:]:
        raise BadInput(
            f"measurements: found several environments ({'; '.join(found[0].diff(other))}), expected one; "
            "build one table for each"
        )
    return found[0]


def _forms(op: str) -> tuple[str, ...]:
    """``prepared`` is a choice of its own only where some kernel packs the weight."""
    return FORMS if any(kernel.form for kernel in pool.kernels_for(op)) else ("direct",)


def _group(
    key: tuple[object, ...],
    form: str,
    problems: dict[Problem, list[Measurement]],
    policy: Policy,
    evidence: list[Evidence],
) -> Group:
    op, traits, statics = key
    operator = pool.operators()[str(op)]
    edges = tuple(tuple(sorted({p.dim(name) for p in problems})) for name in operator.dynamic)
    by_cell = {(p.align, tuple(p.dim(name) for name in operator.dynamic)): p for p in problems}
    cells = {}
    for align in sorted({p.align for p in problems}, reverse=True):
        indices = []
        for sizes in itertools.product(*edges):
            problem = by_cell.get((align, sizes))
            if problem is None:
                indices.append(-1)
                continue
            evidence.append(choose(problem, form, problems[problem], policy))
            indices.append(len(evidence) - 1)
        cells[align] = tuple(indices)
    return Group(str(op), form, traits, statics, edges, cells)  # type: ignore[arg-type]


def choose(problem: Problem, form: str, rows: Sequence[Measurement], policy: Policy) -> Evidence:
    """The rule of one problem: winner, runner-up, and why."""
    default_id = pool.operators()[problem.op].default
    default = next((row for row in rows if row.candidate == default_id), None)
    if default is None or default.status != "ok" or not default.samples_ns:
        why = "was not measured" if default is None else f"{default.status}: {default.reason}"
        return _default_rule(problem, form, default_id, default, f"the default serves: it {why}", None)
    contenders = [
        Contender(row, _ratio(policy, default, row))
        for row in rows
        if row.candidate != default_id and _eligible(problem, form, row, policy)
    ]
    contenders.sort(key=lambda c: (-c.ratio.value, c.simplicity))
    if not contenders:
        reason = f"the default serves: no other candidate is inside error {policy.max_error:g}"
        return _default_rule(problem, form, default_id, default, reason, None)
    able = [c for c in contenders if _beats_default(c, default, policy)]
    if not able:
        reason = f"a tie goes to the default: the best other is {_words(contenders[0])}"
        return _default_rule(problem, form, default_id, default, reason, contenders[0])
    best = able[0]
    tied = [c for c in able if _tied(best, c, policy)]
    winner = min(tied, key=lambda c: c.simplicity)
    others = [c for c in contenders if c is not winner]
    runner_up = others[0] if others else None
    reason = f"faster than the default: {_words(winner)}"
    if winner is not best:
        reason += f"; tied with {best.row.candidate}, and simpler"
    return _rule(problem, form, winner.row, winner.ratio, reason, runner_up, default)


def _eligible(problem: Problem, form: str, row: Measurement, policy: Policy) -> bool:
    kernel = pool.kernels()[Candidate.parse(row.candidate).kernel]
    if row.status != "ok" or not row.samples_ns or row.error is None or row.error > policy.max_error:
        return False
    if form == "direct" and kernel.form:
        return False
    if policy.objective == "memory" and row.form_bytes:
        return False
    if policy.max_form_bytes is not None and row.form_bytes > policy.max_form_bytes:
        return False
    return kernel.objection(problem) is None


def _ratio(policy: Policy, default: Measurement, row: Measurement) -> Interval:
    if policy.objective == "energy":
        if default.energy_j is None or row.energy_j is None:
            note = default.energy_note or row.energy_note
            raise BadInput(f"objective energy: found no measured joules ({note}), expected them in every row")
        value = default.energy_j / row.energy_j
        return Interval(value, value, value, len(row.samples_ns))
    compare = ratio_of_means if policy.objective == "throughput" else paired_ratio
    return compare(default.samples_ns, row.samples_ns)


def _beats_default(contender: Contender, default: Measurement, policy: Policy) -> bool:
    saved = (default.median_ns or 0.0) - (contender.row.median_ns or 0.0)
    return contender.ratio.low > 1.0 + policy.tie and saved > policy.overhead_ns


def _tied(best: Contender, other: Contender, policy: Policy) -> bool:
    if policy.objective == "energy":
        return other.ratio.value * (1.0 + policy.tie) >= best.ratio.value
    against = paired_ratio(other.row.samples_ns, best.row.samples_ns)
    return against.low <= 1.0 or against.value <= 1.0 + policy.tie


def _words(contender: Contender) -> str:
    ratio = contender.ratio
    return f"{contender.row.candidate} at {ratio.value:.3f}x [{ratio.low:.3f}, {ratio.high:.3f}]"


def _default_rule(
    problem: Problem,
    form: str,
    default_id: str,
    row: Measurement | None,
    reason: str,
    runner_up: Contender | None,
) -> Evidence:
    if row is None or row.status != "ok":
        return Evidence(default_id, problem.id, form, reason)
    own = Interval(1.0, 1.0, 1.0, len(row.samples_ns))
    return _rule(problem, form, row, own, reason, runner_up, row)


def _rule(
    problem: Problem,
    form: str,
    row: Measurement,
    ratio: Interval,
    reason: str,
    runner_up: Contender | None,
    default: Measurement,
) -> Evidence:
    margin = paired_ratio(runner_up.row.samples_ns, row.samples_ns) if runner_up else None
    return Evidence(
        candidate=row.candidate,
        problem=problem.id,
        form=form,
        reason=reason,
        median_us=_us(row.median_ns),
        default_us=_us(default.median_ns),
        ratio=_ci(ratio),
        rounds=ratio.n,
        error=row.error,
        form_bytes=row.form_bytes,
        weight=row.weight,
        runner_up=runner_up.row.candidate if runner_up else None,
        margin=_ci(margin) if margin else None,
    )


def _us(ns: float | None) -> float | None:
    return None if ns is None else round(ns / 1e3, 3)


def _ci(interval: Interval) -> list[float | None]:
    ends = (interval.value, interval.low, interval.high)
    return [round(end, 4) if abs(end) < float("inf") else None for end in ends]


def _expected(groups: Sequence[Group], evidence: Sequence[Evidence]) -> dict[str, float]:
    """Expected microseconds of one model call by activation dtype: weight x chosen time, over the problems
    that were measured in every dtype. Says in which dtype a model that may run in either should run."""
    totals: dict[str, dict[tuple[object, ...], float]] = defaultdict(dict)
    for group in groups:
        traits = dict(group.traits)
        dtype = traits.pop("dtype")
        if group.form != _forms(group.op)[0]:
            continue
        for align, cells in group.cells.items():
            for position, index in enumerate(cells):
                rule = evidence[index] if index >= 0 else None
                if rule is None or rule.median_us is None or align != max(group.cells):
                    continue
                sizes = list(itertools.product(*group.edges))[position]
                key = (group.op, tuple(traits.items()), group.statics, sizes)
                totals[dtype][key] = rule.weight * rule.median_us
    shared = set.intersection(*(set(costs) for costs in totals.values())) if totals else set()
    return {d: round(sum(c for key, c in costs.items() if key in shared), 3) for d, costs in sorted(totals.items())}
