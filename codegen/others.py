"""Why every other candidate of a bin was not chosen: what ``explain`` tells beside the choice itself.

A pure function of the bin's measurements. It decides nothing: ``choose`` has, and this only puts it in words, few
enough of them that a table of hundreds of bins stays small.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from dks.codegen.admission import exclusion, is_timed
from dks.codegen.choose import Bout, Contender
from dks.codegen.compare import Comparisons
from dks.codegen.lut import Evidence, Other
from dks.codegen.policy import Policy
from dks.dispatch import pool
from dks.dispatch.evidence import Measurement
from dks.dispatch.problem import Candidate, Problem


def others(
    rule: Evidence,
    rows: Sequence[Measurement],
    policy: Policy,
    barred: Mapping[str, str] | None = None,
    compared: Comparisons | None = None,
    kept: Collection[str] | None = None,
) -> tuple[Other, ...]:
    """Every measured candidate but the choice and the default, by the reason that it was not chosen.

    Args:
        rows, policy, barred, compared: as ``choose`` had them.
        kept: the candidates that ``max_kernels`` left to this operator, form and dtype; None where all.

    Returns:
        What came nearest to being chosen first.
    """
    problem = Problem.parse(rule.problem)
    default_id = pool.operator(problem.op).default
    default = next((row for row in rows if row.candidate == default_id), None)
    bout = None
    if default is not None and is_timed(default):
        bout = Bout(default, policy, compared or Comparisons(policy.objective))
    contenders = {c.row.candidate: c for c in bout.field(problem, rule.form, rows, barred or {})} if bout else {}
    found: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row.candidate in (rule.candidate, default_id):
            continue
        contender = contenders.get(row.candidate)
        if bout is not None and contender is not None:
            verdict = _contending(bout, contender, contenders.get(rule.candidate), rule, policy, kept)
        else:
            verdict = _excluded(problem, rule.form, row, policy)
        found[verdict][Candidate.parse(row.candidate).kernel] += 1
    return tuple(Other(reason, dict(sorted(kernels.items()))) for (_, reason), kernels in sorted(found.items()))


def _contending(
    bout: Bout,
    contender: Contender,
    chosen: Contender | None,
    rule: Evidence,
    policy: Policy,
    kept: Collection[str] | None,
) -> tuple[int, str]:
    """(nearness, reason) of a candidate that was measured beside the default; the nearest is 0."""
    if contender.barred:
        return 4, f"barred: {contender.barred}"
    if not bout.is_ahead(contender):
        return _behind(bout, contender, policy)
    if contender.unconfirmed:
        return 1, contender.unconfirmed
    level = chosen.value if chosen else 1.0
    if kept is not None and contender.row.candidate not in kept and contender.value >= level:
        return 0, f"not behind the choice, but one kernel too many: at most {policy.max_kernels}"
    if contender.row.candidate in rule.tied or contender.value > level:
        return 2, "as fast as the choice, and less simple"
    return 3, "ahead of the default, behind the choice"


def _behind(bout: Bout, contender: Contender, policy: Policy) -> tuple[int, str]:
    if bout.is_even(contender):
        return 6, "no clear lead over the default"
    if contender.value > 1.0 + policy.tie:
        return 5, "ahead of the default by less than dispatching costs"
    if bout.was_dropped(contender):
        return 8, "slower than the default: racing dropped it in the first process"
    return 7, "slower than the default"


def _excluded(problem: Problem, form: str, row: Measurement, policy: Policy) -> tuple[int, str]:
    if row.status == "ok":
        unread = policy.objective == "energy" and row.energy_j is None
        said = "its joules were not read" if unread else "it shares no round with the default"
        return 9, exclusion(policy, problem, form, row) or f"not comparable: {said}"
    return (10 if row.status != "unavailable" else 11), f"{row.status}: {row.reason}" if row.reason else row.status
