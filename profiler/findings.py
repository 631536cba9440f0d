"""What is known of one problem in one mode: a finding a candidate, and the rounds that they were timed in together.

Everything else follows from these: what is still to be measured, and the rows that pass to the code generator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from statistics import median
from typing import Any

from dks.dispatch import pool
from dks.dispatch.evidence import Measurement, clean_samples, ratio
from dks.dispatch.intervals import Interval, median_interval
from dks.dispatch.modes import EAGER
from dks.dispatch.problem import Candidate, Problem

FAULTS = ("crashed", "timeout", "out_of_memory", "failed")
"""How a candidate that was tried can end without an answer; a wrong answer is a status of its own."""

UNREAD = "read after timing, of finalists alone, where it is asked for"
"""Why a finding has no energy yet."""

UNTIMED = "the candidate was not timed"
"""Why a row has no memory and no energy."""


@dataclass(frozen=True, slots=True)
class Contest:
    """What candidates are raced in: a problem, with its calls executed in one mode."""

    problem: Problem
    mode: str = EAGER

    @property
    def id(self) -> str:
        """The problem's, and the mode where it is not eager."""
        return self.problem.id if self.mode == EAGER else f"{self.problem.id} in {self.mode} mode"

    @property
    def slug(self) -> str:
        """``id`` in the letters that are safe in a file's name."""
        return self.problem.slug if self.mode == EAGER else f"{self.problem.slug}.{self.mode}"


@dataclass
class Finding:
    """What was found of one candidate, apart from its times; the fields of ``Measurement`` of the same names.

    Attributes:
        errors: relative error of the worst row by draw: ``normal``, ``outliers`` and ``rows``.
        digest: of the kernel's source; toolchain: what compiled it, empty where nothing is compiled.
    """

    status: str = "ok"
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    declines_rows: bool = False
    stable: bool | None = None
    peak_bytes: int | None = None
    peak_note: str = ""
    energy_j: float | None = None
    energy_note: str = ""
    digest: str = ""
    toolchain: str = ""
    measured_at: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))


@dataclass
class Round:
    """One round: candidates timed right after each other, in random order, in one process.

    Attributes:
        number: unique in its contest, ascending.
        process: number of the process, unique in a run directory.
        ns: nanoseconds by candidate id.
        disturbed: what interference was noticed, in words; empty if none.
    """

    number: int
    process: int
    ns: dict[str, int]
    disturbed: str = ""


@dataclass
class Findings:
    """All that is known of one contest."""

    found: dict[str, Finding] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)

    def add(self, rounds: Iterable[Round]) -> None:
        """Append rounds; one that is there already, by its number, is not doubled."""
        known = {each.number for each in self.rounds}
        self.rounds += [each for each in rounds if each.number not in known]

    def forget(self, candidate: str, default: str) -> None:
        """Drop a candidate whose evidence no longer holds; without the default's times no pair is left."""
        self.found.pop(candidate, None)
        if candidate == default:
            self.rounds.clear()
        for each in self.rounds:
            each.ns.pop(candidate, None)

    @property
    def next_round(self) -> int:
        """The number of the next round."""
        return self.rounds[-1].number + 1 if self.rounds else 0

    def ok(self) -> list[str]:
        """Candidates that may be timed."""
        return [name for name, finding in self.found.items() if finding.status == "ok"]


def counted(rounds: Sequence[Round], allowance: int) -> list[Round]:
    """The undisturbed rounds; all of them once as many again, and ``allowance`` more, were disturbed: on a
    machine that is always busy there is nothing better to wait for."""
    clean = [each for each in rounds if not each.disturbed]
    return clean if len(rounds) - len(clean) < len(clean) + allowance else list(rounds)


def fastest(names: Sequence[str], default: str, rounds: Sequence[Round]) -> str:
    """By the median ratio to the default over shared rounds; the default where nothing is faster."""
    ratios = {}
    for name in names:
        both = [each.ns[default] / each.ns[name] for each in rounds if name in each.ns and default in each.ns]
        if both:
            ratios[name] = median(both)
    return max(ratios, key=lambda name: (ratios[name], name == default)) if ratios else default


def rounds_to_json(rounds: Iterable[Round]) -> list[Mapping[str, Any]]:
    """As journal and worker pass rounds on."""
    return [asdict(each) for each in rounds]


def rounds_from_json(data: Iterable[Mapping[str, Any]]) -> list[Round]:
    """The inverse of ``rounds_to_json``. Raises TypeError or KeyError for anything else."""
    return [Round(**each) for each in data]


@dataclass(frozen=True, slots=True)
class Header:
    """What all rows of one contest share."""

    problem: Problem
    role: str
    weight: float
    cache: str
    environment: str
    mode: str = EAGER


def to_rows(header: Header, findings: Findings, candidates: Sequence[Candidate]) -> list[Measurement]:
    """One row for each candidate that something is known of, in their order."""
    rows = []
    for candidate in candidates:
        finding = findings.found.get(candidate.id)
        if finding is not None:
            rows.append(_row(header, candidate, finding, findings.rounds))
    default = next((r for r in rows if r.candidate == pool.operator(header.problem.op).default), None)
    return [_with_ratio(row, default) for row in rows]


def _row(header: Header, candidate: Candidate, finding: Finding, rounds: Sequence[Round]) -> Measurement:
    kernel = pool.kernels()[candidate.kernel]
    precision = kernel.precision.get(header.problem.trait("dtype"))
    # A candidate that failed after some rounds keeps none of its times: they belong to no answer.
    own = [each for each in rounds if candidate.id in each.ns] if finding.status == "ok" else []
    samples = [each.ns[candidate.id] for each in own]
    row = Measurement(
        op=header.problem.op,
        problem=header.problem.id,
        role=header.role,
        candidate=candidate.id,
        precision=precision.value if precision else "none",
        weight=header.weight,
        status=finding.status,
        reason=finding.reason,
        samples_ns=samples,
        rounds=[each.number for each in own],
        processes=[each.process for each in own],
        disturbed=[bool(each.disturbed) for each in own],
        median_ns=None,
        median_low_ns=None,
        median_high_ns=None,
        p99_ns=float(sorted(samples)[math.ceil(0.99 * len(samples)) - 1]) if samples else None,
        ratio=None,
        ratio_low=None,
        ratio_high=None,
        error=max(finding.errors.values()) if finding.errors else None,
        error_normal=finding.errors.get("normal"),
        error_outliers=finding.errors.get("outliers"),
        error_rows=finding.errors.get("rows"),
        declines_rows=finding.declines_rows,
        stable=finding.stable,
        form_bytes=kernel.form_bytes(header.problem) if finding.status == "ok" else 0,
        peak_bytes=finding.peak_bytes,
        peak_note=finding.peak_note or UNTIMED * (finding.peak_bytes is None),
        energy_j=finding.energy_j,
        energy_note=finding.energy_note or UNTIMED * (finding.energy_j is None),
        cache=header.cache,
        kernel_digest=finding.digest,
        environment=header.environment,
        measured_at=finding.measured_at,
        mode=header.mode,
        toolchain=finding.toolchain,
    )
    if samples:
        clean = clean_samples(row)
        middle = median_interval(clean)
        low, high = _finite(middle, "low"), _finite(middle, "high")
        row = replace(row, median_ns=float(median(clean)), median_low_ns=low, median_high_ns=high)
    return row


def _with_ratio(row: Measurement, default: Measurement | None) -> Measurement:
    if not row.samples_ns or default is None:
        return row
    against = Interval(1.0, 1.0, 1.0, len(row.samples_ns)) if row is default else ratio(default, row)
    low, high = _finite(against, "low"), _finite(against, "high")
    return replace(row, ratio=_finite(against, "value"), ratio_low=low, ratio_high=high)


def from_rows(rows: Iterable[Measurement]) -> Findings:
    """The inverse of ``to_rows``; of a disturbance only that there was one."""
    findings = Findings()
    rounds: dict[int, Round] = {}
    for row in rows:
        errors = {"normal": row.error_normal, "outliers": row.error_outliers, "rows": row.error_rows}
        findings.found[row.candidate] = Finding(
            status=row.status,
            reason=row.reason,
            errors={name: error for name, error in errors.items() if error is not None},
            declines_rows=row.declines_rows,
            stable=row.stable,
            peak_bytes=row.peak_bytes,
            peak_note=row.peak_note,
            energy_j=row.energy_j,
            energy_note=row.energy_note,
            digest=row.kernel_digest,
            toolchain=row.toolchain,
            measured_at=row.measured_at,
        )
        samples = zip(row.rounds, row.samples_ns, row.processes, row.disturbed, strict=True)
        for number, ns, process, disturbed in samples:
            held = rounds.setdefault(number, Round(number, process, {}, "noticed when it was measured" * disturbed))
            held.ns[row.candidate] = ns
    findings.add(rounds[number] for number in sorted(rounds))
    return findings


def _finite(interval: Interval, end: str) -> float | None:
    value: float = getattr(interval, end)
    return value if math.isfinite(value) else None
