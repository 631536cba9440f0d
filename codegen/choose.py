"""The choice of one bin. A pure function of its measurements.

A challenger replaces the framework's own kernel only where it is inside the error budget, its ratio's
confidence interval lies above a tie, it saves more than dispatching costs, and four of five processes that
measured it confirm it. Ties go to the default, then to the simplest kernel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dks.codegen.admission import admits, instability, is_timed, saved_ns, simplicity
from dks.codegen.compare import Comparisons
from dks.codegen.lut import Evidence
from dks.codegen.policy import Policy
from dks.dispatch import pool
from dks.dispatch.evidence import Measurement
from dks.dispatch.intervals import Interval
from dks.dispatch.problem import Problem

MOST = 0.8  # of the processes must find a challenger faster: all of up to four, all but one of up to nine
FAR = 1.25
"""A lead beyond this is no tie, and its interval need not be computed: two processes that differ by 40 % would
still leave it above 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """An admitted candidate that was measured beside the default.

    Attributes:
        value: default / this in the objective's terms.
        barred: what rules it out of this bin whatever its times are; empty where nothing does.
        unconfirmed: why its times do not yet prove anything; empty where they may.
    """

    row: Measurement
    value: float
    barred: str
    unconfirmed: str

    @property
    def objection(self) -> str:
        """Why it may not win, however far ahead; empty where it may."""
        return self.barred or self.unconfirmed


def choose(
    problem: Problem,
    form: str,
    rows: Sequence[Measurement],
    policy: Policy,
    barred: Mapping[str, str] | None = None,
    compared: Comparisons | None = None,
) -> Evidence:
    """The rule of one problem: winner, runner-up, and why.

    Args:
        rows: every candidate's measurement of ``problem``, in any order.
        barred: candidates that failed elsewhere in the bin, with the reason; none of them wins.
        compared: ratios that were computed before, such as for the other form.
    """
    default_id = pool.operators()[problem.op].default
    default = next((row for row in rows if row.candidate == default_id), None)
    if default is None or not is_timed(default):
        why = "was not measured" if default is None else f"{default.status}: {default.reason}"
        return Evidence(default_id, problem.id, form, f"the default serves: it {why}")
    bout = Bout(default, policy, compared or Comparisons(policy.objective))
    field = bout.field(problem, form, rows, barred or {})
    passed_over: list[str] = []
    while lead := next((c for c in field if bout.is_ahead(c)), None):
        tied = [c for c in field if c is lead or (bout.is_close(lead, c) and bout.is_ahead(c))]
        winner = lead if lead.objection else min(tied, key=lambda c: simplicity(c.row))
        if not winner.objection:
            return bout.rule(problem, form, winner, tied, field, passed_over)
        passed_over.append(f"{bout.words(winner)} is passed over: {winner.objection}")
        field = [c for c in field if c is not winner]
    return bout.default_rule(problem, form, field, passed_over)


def costs(
    problem: Problem,
    form: str,
    rows: Sequence[Measurement],
    policy: Policy,
    barred: Mapping[str, str] | None = None,
    compared: Comparisons | None = None,
) -> dict[str, float]:
    """What a call costs by each candidate that may serve: the default, and every other that ``choose`` would
    let win if it were the only one.

    Args: as those of ``choose``.

    Returns:
        Candidate to nanoseconds (joules where the objective is energy), each the default's divided by its ratio;
        empty where the default was not timed, or its joules not measured.
    """
    default_id = pool.operators()[problem.op].default
    default = next((row for row in rows if row.candidate == default_id), None)
    if default is None or not is_timed(default):
        return {}
    compared = compared or Comparisons(policy.objective)
    bout, spent = Bout(default, policy, compared), compared.spent(default)
    if not spent:
        return {}
    winners = [c for c in bout.field(problem, form, rows, barred or {}) if not c.objection and bout.is_ahead(c)]
    return {default_id: spent, **{c.row.candidate: spent / c.value for c in winners}}


def all_costs(
    problem: Problem,
    form: str,
    rows: Sequence[Measurement],
    policy: Policy,
    barred: Mapping[str, str] | None = None,
    compared: Comparisons | None = None,
) -> dict[str, float]:
    """As ``costs``, of every candidate that is admitted and not barred, those behind the default too."""
    default_id = pool.operators()[problem.op].default
    default = next((row for row in rows if row.candidate == default_id), None)
    if default is None or not is_timed(default):
        return {}
    compared = compared or Comparisons(policy.objective)
    bout, spent = Bout(default, policy, compared), compared.spent(default)
    if not spent:
        return {}
    field = [c for c in bout.field(problem, form, rows, barred or {}) if not c.barred]
    return {default_id: spent, **{c.row.candidate: spent / c.value for c in field}}


def only(
    problem: Problem,
    form: str,
    rows: Sequence[Measurement],
    policy: Policy,
    candidate: str,
    compared: Comparisons | None = None,
) -> Evidence:
    """The rule of one problem for a candidate that was chosen for another reason than its times here."""
    default_id = pool.operators()[problem.op].default
    default = next((row for row in rows if row.candidate == default_id), None)
    if default is None or not is_timed(default):
        return choose(problem, form, rows, policy)
    bout = Bout(default, policy, compared or Comparisons(policy.objective))
    field = bout.field(problem, form, rows, {})
    winner = next((c for c in field if c.row.candidate == candidate), None)
    if winner is None:
        return bout.default_rule(problem, form, field, [])
    return bout.rule(problem, form, winner, [winner], field, [])


class Bout:
    """The default against its challengers."""

    def __init__(self, default: Measurement, policy: Policy, compared: Comparisons) -> None:
        self._default, self._policy, self._compared = default, policy, compared

    def field(
        self, problem: Problem, form: str, rows: Sequence[Measurement], barred: Mapping[str, str]
    ) -> list[Contender]:
        """The contenders, the best first."""
        found = []
        for row in rows:
            if row.candidate == self._default.candidate or not admits(self._policy, problem, form, row):
                continue
            value = self._compared.value(self._default, row)
            if math.isnan(value):  # they share no round
                continue
            out = barred.get(row.candidate) or instability(self._policy, row)
            found.append(Contender(row, value, out, self._unconfirmed(row)))
        return sorted(found, key=lambda c: (-c.value, simplicity(c.row)))

    def _unconfirmed(self, row: Measurement) -> str:
        measured, wanted = len(self._compared.pairs(self._default, row)), self._policy.min_processes
        if measured < wanted:
            return f"not confirmed: measured in {measured} process{'es' * (measured != 1)}, expected {wanted}"
        faster = self._compared.faster_in(self._default, row)
        return "" if faster >= math.ceil(MOST * measured) else f"faster in {faster} of {measured} processes only"

    def _ratio(self, contender: Contender) -> Interval:
        return self._compared.ratio(self._default, contender.row)

    def is_ahead(self, contender: Contender) -> bool:
        """Whether it beats the default by more than a tie and more than dispatching costs."""
        least = 1.0 + self._policy.tie
        # An interval reaches down from its value: where the value falls short, it need not be computed.
        return (
            contender.value > least
            and saved_ns(self._default, contender.row) > self._policy.overhead_ns
            and self._ratio(contender).low > least
        )

    def is_close(self, lead: Contender, other: Contender) -> bool:
        """Whether ``other`` is tied with the leader."""
        behind = self._compared.value(other.row, lead.row)
        if behind <= 1.0 + self._policy.tie:
            return True
        return behind <= FAR and self._compared.ratio(other.row, lead.row).low <= 1.0

    def is_even(self, contender: Contender) -> bool:
        """Whether neither it nor the default is clearly better."""
        least = 1.0 + self._policy.tie
        if contender.value > least:
            return self._ratio(contender).low <= least
        if contender.value * least >= 1.0:
            return True
        return contender.value * FAR >= 1.0 and self._ratio(contender).high >= 1.0

    def was_dropped(self, contender: Contender) -> bool:
        """Whether racing took it out after one process: the default went on."""
        return len(set(contender.row.processes)) == 1 < len(set(self._default.processes))

    def words(self, contender: Contender) -> str:
        """Its id and its ratio."""
        ratio = self._ratio(contender)
        return f"{contender.row.candidate} at {ratio.value:.3f}x [{ratio.low:.3f}, {ratio.high:.3f}]"

    def rule(
        self,
        problem: Problem,
        form: str,
        winner: Contender,
        tied: Sequence[Contender],
        field: Sequence[Contender],
        passed_over: Sequence[str],
    ) -> Evidence:
        """A challenger's rule; ``tied`` begins with the fastest, which the winner is tied with."""
        reason = f"faster than the default: {self.words(winner)}"
        if winner is not tied[0]:
            reason += f"; tied with {tied[0].row.candidate}, and simpler"
        made = Evidence(
            candidate=winner.row.candidate,
            problem=problem.id,
            form=form,
            reason="; ".join([reason, *passed_over]),
            processes=len(self._compared.pairs(self._default, winner.row)),
            tied=_ids([c.row for c in tied if not c.objection]),
        )
        others = [c for c in field if c is not winner]
        return self._with_numbers(made, winner.row, self._ratio(winner), others)

    def default_rule(
        self, problem: Problem, form: str, field: Sequence[Contender], passed_over: Sequence[str]
    ) -> Evidence:
        """The default's rule: why no challenger replaces it."""
        row, free = self._default, [c for c in field if not c.barred]
        tied = [c.row for c in free if self.is_even(c)]
        made = Evidence(
            candidate=row.candidate,
            problem=problem.id,
            form=form,
            reason="; ".join([self._why_default(free[0] if free else None, passed_over), *passed_over]),
            processes=len(set(row.processes)),
            tied=_ids([row, *tied]),
        )
        return self._with_numbers(made, row, Interval(1.0, 1.0, 1.0, len(row.samples_ns)), field)

    def _why_default(self, best: Contender | None, passed_over: Sequence[str]) -> str:
        if passed_over:
            return "the default serves"
        if best is None:
            return f"the default serves: no other candidate is inside error {self._policy.max_error:g}"
        if self.is_even(best):
            doubt = f"; {best.unconfirmed}" if best.unconfirmed and best.value > 1.0 + self._policy.tie else ""
            return f"a tie goes to the default: the best other is {self.words(best)}{doubt}"
        if best.value < 1.0:
            return f"the default is ahead: the best other is {self.words(best)}"
        saved = saved_ns(self._default, best.row) / 1e3
        return (
            f"the default serves: {self.words(best)} saves {saved:.1f} us, and dispatching costs "
            f"{self._policy.overhead_ns / 1e3:.1f} us"
        )

    def _with_numbers(
        self, made: Evidence, row: Measurement, ratio: Interval, others: Sequence[Contender]
    ) -> Evidence:
        runner_up = next((c.row for c in others if not c.barred), None)
        return dataclasses.replace(
            made,
            median_us=_us(row.median_ns),
            default_us=_us(self._default.median_ns),
            ratio=_ci(ratio),
            rounds=ratio.n,
            error=row.error,
            form_bytes=row.form_bytes,
            weight=row.weight,
            runner_up=runner_up.candidate if runner_up else None,
            margin=_ci(self._compared.ratio(runner_up, row)) if runner_up else None,
        )


def _ids(tied: Sequence[Measurement]) -> tuple[str, ...]:
    """The tied candidates, the simplest first; none where only one is left."""
    return tuple(row.candidate for row in sorted(tied, key=simplicity)) if len(tied) > 1 else ()


def _us(ns: float | None) -> float | None:
    return None if ns is None else round(ns / 1e3, 3)


def _ci(interval: Interval) -> list[float | None]:
    ends = (interval.value, interval.low, interval.high)
    return [round(end, 4) if math.isfinite(end) else None for end in ends]
