"""One problem, measured: every candidate checked against float64, then timed in interleaved rounds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from statistics import median

import torch

from dks.dispatch import pool
from dks.dispatch.environment import Environment, private_cache_bytes
from dks.dispatch.evidence import Measurement
from dks.dispatch.intervals import NOTHING, Interval, median_interval, paired_ratio
from dks.dispatch.kernel import Inputs, Kernel, Run, relative_error, source_digest
from dks.dispatch.problem import Candidate, Precision, Problem
from dks.profiler.timing import Level, Rounds

CACHE_STATE = "cold_weights"
ENERGY_NOTE = "no energy counter is read yet"
MAX_COPIES = 8
OUTLIER_SIZE = 64  # of each dynamic dim in the outlier check: enough rows to show the range of a whole tensor


@dataclass
class Checked:
    """What the correctness check found of one candidate."""

    status: str = "ok"
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    run: list[Run] = field(default_factory=list)

    def fail(self, status: str, reason: str) -> Checked:
        """Record why the candidate is out."""
        self.status, self.reason = status, reason.splitlines()[0][:300] if reason else status
        return self


class Bench:
    """Measures problems one after the other, keeping the packed weights of the last weight shape.

    Args:
        environment: stored with every row.
        rounds: how to time.
        seed: of the inputs.
    """

    def __init__(self, environment: Environment, rounds: Rounds, seed: int) -> None:
        self._environment = json.dumps(environment.to_dict(), sort_keys=True)
        self._rounds = rounds
        self._seed = seed
        self._weights_of: tuple[object, ...] = ()
        self._weights: list[tuple[object, ...]] = []
        self._bound: dict[Candidate, list[Run]] = {}
        self._outlier_errors: dict[Candidate, float] = {}

    def measure(self, problem: Problem, candidates: Sequence[Candidate], weight: float) -> list[Measurement]:
        """One row a candidate, in their order; the framework's own kernel must be among them.

        Nothing a kernel raises escapes: it becomes the status of its row.
        """
        operator = pool.operator(problem.op)
        inputs = self._inputs(problem, "normal")
        self._hold_weights(problem, inputs)
        reference = operator.reference(problem, Inputs(self._weights[0], inputs.dynamic))
        checked = {c: self._check(problem, c, inputs, reference) for c in candidates}
        del reference
        calls = {
            c.id: [_call(run, inputs.dynamic) for run in found.run]
            for c, found in checked.items()
            if found.status == "ok"
        }
        default = operator.default
        levels = {c.id: _level(c, problem.trait("dtype")) for c in candidates if c.id in calls}
        samples = self._rounds.run(calls, default, levels) if default in calls else {}
        for candidate, found in checked.items():
            if any(ns <= 0 for ns in samples.get(candidate.id, ())):
                found.fail("failed", "the clock returned a time of zero or less")
                samples.pop(candidate.id)
        own = samples.get(default, [])
        return [
            self._row(problem, candidate, found, weight, samples.get(candidate.id, []), own)
            for candidate, found in checked.items()
        ]

    def _inputs(self, problem: Problem, draw: str) -> Inputs:
        generator = torch.Generator().manual_seed(self._seed)
        return pool.operator(problem.op).make_inputs(problem, generator, draw)

    def _hold_weights(self, problem: Problem, inputs: Inputs) -> None:
        """Keep the weights, and what is packed from them, while only the dynamic dims change."""
        operator = pool.operator(problem.op)
        statics = tuple((name, problem.dim(name)) for name in operator.static)
        key = (problem.op, problem.traits, statics, problem.align)
        if key == self._weights_of:
            return
        size = operator.key_bytes(problem)
        beyond = 2 * (private_cache_bytes() or 2**21)
        copies = min(MAX_COPIES, max(1, -(-beyond // size))) if size else 1
        self._weights_of = key
        self._weights = [inputs.static] + [_clone(inputs.static) for _ in range(copies - 1)]
        self._bound, self._outlier_errors = {}, {}

    def _check(self, problem: Problem, candidate: Candidate, inputs: Inputs, reference: torch.Tensor) -> Checked:
        found = Checked()
        kernel = pool.kernels()[candidate.kernel]
        if (why := kernel.unavailable()) is not None:
            return found.fail("unavailable", why)
        if (why := kernel.objection(problem)) is not None:
            return found.fail("unsupported", why)
        try:
            found.run = self._bind(kernel, candidate, problem)
            error = relative_error(found.run[0](*inputs.dynamic), reference)
            found.errors["normal"] = error
            limit = kernel.precision[problem.trait("dtype")].limit
            # Written so that NaN fails: a comparison with it is false.
            if not error <= limit:
                return found.fail("wrong_result", f"error {error:.2e} on normal data, its class allows {limit:g}")
            found.errors["outliers"] = self._outlier_error(problem, candidate, found.run[0])
            if not math.isfinite(found.errors["outliers"]):
                return found.fail("wrong_result", "not finite on data with outliers")
        except Exception as error:  # a kernel may raise anything; its row says what
            return found.fail("failed", f"{type(error).__name__}: {error}")
        return found

    def _bind(self, kernel: Kernel, candidate: Candidate, problem: Problem) -> list[Run]:
        bound = self._bound.get(candidate)
        if bound is None:
            # Candidates that shared a weight would warm it for each other: each has copies of its own.
            own = [_clone(static) for static in self._weights]
            bound = [kernel.bind(problem, candidate.params, *static) for static in own]
            self._bound[candidate] = bound
        return bound

    def _outlier_error(self, problem: Problem, candidate: Candidate, run: Run) -> float:
        known = self._outlier_errors.get(candidate)
        if known is None:
            operator = pool.operator(problem.op)
            sizes = {name: OUTLIER_SIZE if name in operator.dynamic else size for name, size in problem.dims}
            small = Problem.of(problem.op, dict(problem.traits), sizes, problem.align)
            inputs = Inputs(self._weights[0], self._inputs(small, "outliers").dynamic)
            known = relative_error(run(*inputs.dynamic), operator.reference(small, inputs))
            self._outlier_errors[candidate] = known
        return known

    def _row(
        self,
        problem: Problem,
        candidate: Candidate,
        found: Checked,
        weight: float,
        samples: list[int],
        default_samples: list[int],
    ) -> Measurement:
        kernel = pool.kernels()[candidate.kernel]
        dtype = problem.trait("dtype")
        precision = kernel.precision.get(dtype)
        middle = median_interval(samples) if samples else NOTHING
        ratio = paired_ratio(default_samples, samples) if samples else NOTHING
        return Measurement(
            op=problem.op,
            problem=problem.id,
            candidate=candidate.id,
            precision=precision.value if precision else "none",
            weight=weight,
            status=found.status,
            reason=found.reason,
            samples_ns=samples,
            median_ns=median(samples) if samples else None,
            median_low_ns=_finite(middle, "low"),
            median_high_ns=_finite(middle, "high"),
            p99_ns=float(sorted(samples)[math.ceil(0.99 * len(samples)) - 1]) if samples else None,
            ratio=_finite(ratio, "value"),
            ratio_low=_finite(ratio, "low"),
            ratio_high=_finite(ratio, "high"),
            error=max(found.errors.values()) if found.errors else None,
            error_normal=found.errors.get("normal"),
            error_outliers=found.errors.get("outliers"),
            form_bytes=kernel.form_bytes(problem) if found.status == "ok" else 0,
            energy_j=None,
            energy_note=ENERGY_NOTE,
            cache=CACHE_STATE,
            kernel_digest=source_digest(kernel),
            environment=self._environment,
            measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )


def _level(candidate: Candidate, dtype: str) -> Level:
    kernel = pool.kernels()[candidate.kernel]
    return (list(Precision).index(kernel.precision[dtype]), int(bool(kernel.form)))


def _call(run: Run, dynamic: tuple[object, ...]) -> Callable[[], object]:
    return lambda: run(*dynamic)


def _clone(static: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in static)


def _finite(interval: Interval, end: str) -> float | None:
    value: float = getattr(interval, end)
    return value if math.isfinite(value) else None
