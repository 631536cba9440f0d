"""Which measured candidates a policy admits, how simple they are, and what calls they may serve."""

from __future__ import annotations

from dks.codegen.policy import Policy
from dks.dispatch import pool
from dks.dispatch.evidence import Measurement, judged_by_rows
from dks.dispatch.kernel import Kernel
from dks.dispatch.modes import EAGER, eager_form, form_in
from dks.dispatch.problem import Candidate, Precision, Problem

FAILED = ("wrong_result", "failed", "crashed", "timeout", "out_of_memory", "excluded", "unsupported")
"""Statuses with which a candidate may not serve a bin; ``unavailable`` says nothing about the shape."""

QUANTISED = (Precision.INT8.value, Precision.INT4.value)
"""Classes of which an error of the whole output says nothing: one scale may serve large rows and small ones."""


def forms(op: str, mode: str = EAGER) -> tuple[str, ...]:
    """What a call of an operator may be in a mode, the form that a model calls it in first.

    ``prepared`` is a choice of its own only where some kernel packs the weight.
    """
    packs = any(kernel.form for kernel in pool.kernels_for(op))
    return tuple(form_in(mode, form) for form in (("prepared", "direct") if packs else ("direct",)))


def is_timed(row: Measurement | None) -> bool:
    """Whether a candidate ran and has samples."""
    return row is not None and row.status == "ok" and bool(row.samples_ns)


def exclusion(policy: Policy, problem: Problem, form: str, row: Measurement) -> str:
    """Why a policy keeps a candidate out of ``problem``, or it can't serve ``form``; empty where it may."""
    kernel = _kernel(row)
    if why := _error(policy, row):
        return why
    if eager_form(form) == "direct" and kernel.form:
        return "packs its weight: prepared calls alone"
    if policy.objective == "memory" and row.form_bytes:
        return "packs its weight, and the objective is memory"
    if policy.max_form_bytes is not None and row.form_bytes > policy.max_form_bytes:
        return f"packed weight above max_form_bytes of {policy.max_form_bytes}"
    return kernel.objection(problem) or ""


def _error(policy: Policy, row: Measurement) -> str:
    if not is_timed(row) or row.error is None:
        return "not timed, or its error is not known"
    if row.precision in QUANTISED and not judged_by_rows(row):
        return "its error is of whole outputs, as an older version measured it: run dks-profile run again"
    return f"error above the budget of {policy.max_error:g}" if row.error > policy.max_error else ""


def admits(policy: Policy, problem: Problem, form: str, row: Measurement) -> bool:
    """Whether a timed candidate is inside the policy's limits on ``problem`` and can serve ``form``."""
    return not exclusion(policy, problem, form, row)


def instability(policy: Policy, row: Measurement) -> str:
    """Why ``require_stable`` keeps a candidate out; empty where it does not."""
    if not policy.require_stable or row.stable is True:
        return ""
    return "not stable: the same call gave other bits" if row.stable is False else "not known to be stable"


def failure(policy: Policy, row: Measurement) -> str:
    """What a candidate did on a held-out shape that rules it out of the whole bin; empty where nothing did."""
    if row.status in FAILED:
        return f"{row.status} ({row.reason})" if row.reason else row.status
    if row.status == "ok" and (row.error or 0.0) > policy.max_error:
        return f"error {row.error:.2g}, above the budget of {policy.max_error:g}"
    return instability(policy, row) if row.stable is False else ""


def saved_ns(default: Measurement, row: Measurement) -> float:
    """Nanoseconds that a call is shorter by, in medians."""
    return (default.median_ns or 0.0) - (row.median_ns or 0.0)


def simplicity(row: Measurement) -> tuple[int, int, str]:
    """Sorts the simplest first."""
    return (_kernel(row).rank, row.form_bytes, row.candidate)


def _kernel(row: Measurement) -> Kernel:
    return pool.kernels()[Candidate.parse(row.candidate).kernel]
