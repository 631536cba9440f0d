"""Correctness before speed: is a candidate right, on fresh inputs, at all sizes, and does it behave?

What is compared is always a new answer with a float64 reference of the very numbers that were passed. The
checks run in the process that will time the candidate; crashes and hangs are the matter of whoever runs it.

What can't be seen from here: work on another thread that outlasts the check and then touches nothing that is
compared; a read outside an input whose values are not used (used ones are NaN, which shows); a kernel that
waits for its inputs to look like something that is never drawn here; and a fault that shows less often than
about once in ten calls.

Sizes of zero are not drawn: the lookup answers them ``ZERO_SIZED`` and each server sends those calls to the
framework, so no kernel ever sees one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dks.dispatch import pool
from dks.dispatch.gpu import library as programs
from dks.dispatch.gpu.cutlass import library as cutlass_library
from dks.dispatch.gpu.library import Unsuited
from dks.dispatch.kernel import Inputs, Kernel, Launch, Params, parts
from dks.dispatch.problem import Candidate, Precision, Problem
from dks.dispatch.tiles import library
from dks.dispatch.tiles.library import Missing
from dks.profiler.cases import Cases, Group, always_one
from dks.profiler.draws import HOST, Lent, tensors
from dks.profiler.gaps import gap
from dks.profiler.process_state import ProcessState
from dks.profiler.trial import (
    Case,
    Draw,
    Rejected,
    Trial,
    describe,
    equal,
    expect_untouched,
    is_out_of_memory,
    rejected,
)

REPEATED_NUMEL = 2**20  # of an output: larger ones are computed once before timing, and once after it
REPEATS = 8  # calls with changing inputs at a small and a medium size, for faults that come and go


@dataclass
class Verdict:
    """What the checks found of one candidate.

    Attributes:
        status: ok, wrong_result, failed, out_of_memory, unsupported, unsuited, unavailable or
            not_compiled.
        reason: one line of at most 300 characters; empty where all is well.
        errors: of the worst row: ``normal`` at the problem's size, ``outliers`` with dynamic dims of 64, ``rows``
            with dynamic dims of 33, unless it was declined.
        declines_rows: whether rows of very different sizes were declined.
        stable: whether repeated calls on the same inputs agreed in every bit; None where it was not seen.
        poisoned: the process itself was changed; it must not be used any more.
    """

    status: str = "ok"
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    declines_rows: bool = False
    stable: bool | None = None
    poisoned: bool = False

    def fail(self, status: str, reason: str) -> Verdict:
        """Record why the candidate is out."""
        self.status, self.reason = status, next(iter(reason.splitlines()), status)[:300]
        return self


class Checker:
    """Checks candidates; keeps inputs and references of the last weight and the last problem.

    Make it when the process is set up: what it finds is what kernels must leave alone.

    Args:
        seed: of all inputs. The weights are those that ``make_inputs`` draws first from this seed.
        device: where kernels run.
    """

    def __init__(self, seed: int, device: torch.device = HOST) -> None:
        self._state = ProcessState()
        self._cases = Cases(seed, device)
        self._group = Group(())
        self._known: dict[Candidate, tuple[Verdict, Launch | None]] = {}

    def check(self, problem: Problem, candidate: Candidate) -> Verdict:
        """Whether ``candidate`` is right on ``problem``, on small sizes of the same weight, and beside its own.

        Never raises for what a kernel does, except KeyboardInterrupt.

        Raises:
            KeyError: no such operator or kernel.
        """
        kernel = pool.kernels()[candidate.kernel]
        self._state.refresh()
        verdict = Verdict()
        try:
            _expect_meant(kernel, problem, candidate)
        except Rejected as found:
            return verdict.fail(found.status, found.reason)
        except Exception as error:  # a kernel may raise anything
            return verdict.fail("failed", describe(error))
        return self._judged(verdict, lambda: self._check(problem, kernel, candidate, verdict))

    def recheck(
        self,
        problem: Problem,
        candidate: Candidate,
        run: Launch,
        static: tuple[Any, ...],
        dynamic: tuple[Any, ...],
    ) -> Verdict:
        """Whether ``run``, which has been timed, is still right when its inputs change in place.

        Args:
            problem: what was timed.
            candidate: which one.
            run: the callable that was timed.
            static: the constant arguments it is bound to. Where they are those of ``Checker``'s seed, the
                reference is shared by all candidates of the problem.
            dynamic: the tensors it was timed on. Their activations get other values, which stay.
        """
        verdict = Verdict()
        if changed := self._state.restore():
            verdict.poisoned = True
            return verdict.fail("wrong_result", f"changed the process while it was timed: {changed}")
        return self._judged(verdict, lambda: self._recheck(problem, candidate, run, static, dynamic))

    def _judged(self, verdict: Verdict, checks: Callable[[], bool | None]) -> Verdict:
        try:
            verdict.stable = checks()
        except Rejected as found:
            verdict.fail(found.status, _joined(self._cases.mend(), found.reason))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            verdict.fail("out_of_memory", f"while checking: {describe(error)}")
        if changed := self._state.restore():
            verdict.poisoned = True
            verdict.fail("wrong_result", f"changed the process: {changed}")
        return verdict

    # -- the checks, in their order ------------------------------------------------------------------------

    def _check(self, problem: Problem, kernel: Kernel, candidate: Candidate, verdict: Verdict) -> bool | None:
        group = self._cases.enter(problem)
        if group is not self._group:
            self._group, self._known = group, {}
        if candidate not in self._known:
            self._known[candidate] = self._on_the_weight(problem, kernel, candidate)
        known, run = self._known[candidate]
        verdict.errors.update(known.errors)
        verdict.declines_rows = known.declines_rows
        if run is None:
            raise Rejected(known.status, known.reason)
        stable = self._at_own_size(problem, kernel, run, verdict.errors)
        return known.stable and stable

    def _on_the_weight(
        self, problem: Problem, kernel: Kernel, candidate: Candidate
    ) -> tuple[Verdict, Launch | None]:
        verdict = Verdict()
        try:
            run = self._bind(problem, kernel, candidate)
            verdict.stable = self._battery(problem, kernel, candidate.params, run, verdict)
        except Rejected as found:
            return verdict.fail(found.status, _joined(self._cases.mend(), found.reason)), None
        return verdict, run

    def _bind(self, problem: Problem, kernel: Kernel, candidate: Candidate) -> Launch:
        slots, static = self._cases.placed_static(problem, kernel)
        try:
            run = kernel.bind(problem, candidate.params, *static)
        except BaseException as error:
            rejected(error, " in bind")
        expect_untouched(slots, "in bind")
        return run

    def _battery(self, problem: Problem, kernel: Kernel, params: Params, run: Launch, verdict: Verdict) -> bool:
        """What needs no more than the weight: small sizes, addresses, repetitions, extreme values."""
        trial = self._trial(problem, kernel, run)
        ones, stable = always_one(problem, kernel), True
        small = self._cases.named(problem, "small", ones)
        for case in small:
            for draw in (*case.draws, case.draws[0]):
                trial.call(case, draw)
        trial.settle()
        lowest = kernel.alignment_for(problem.trait("dtype"))
        if lowest < problem.align and kernel.objection(replace(problem, align=lowest)) is None:
            # A kernel may be chosen for calls that are less aligned than the measured one.
            for case in self._cases.named(problem, "low", ones, lowest):
                for draw in case.draws:
                    trial.call(case, draw)
        for case in (small[2], small[4]):
            for i in range(REPEATS):
                trial.call(case, case.draws[i % len(case.draws)])
            same = [trial.call(case, case.draws[0]) for _ in range(3)]
            stable &= all(equal(same[0], ys) for ys in same[1:])
            trial.settle()
        for case in self._cases.named(problem, "extreme", ones):
            for draw in case.draws:
                trial.call(case, draw)
        self._beside_others(problem, kernel, trial, verdict)
        if kernel.batch_invariant(params):
            self._expect_batch_invariant(problem, trial, run)
        trial.settle()
        trial.finish()
        return stable

    def _expect_batch_invariant(self, problem: Problem, trial: Trial, run: Launch) -> None:
        """That rows by themselves have the bits that they have in a batch, as the kernel declares."""
        case, alone = self._cases.batch(problem)
        together = trial.call(case, case.draws[0])
        for rows in alone:
            try:
                found = parts(run(*rows.args))
            except BaseException as error:
                rejected(error, f" on rows {rows.first}..{rows.end} of a batch alone")
            if not all(map(torch.equal, found, (part[rows.first : rows.end] for part in together))):
                which = f"rows {rows.first}..{rows.end} of a batch"
                raise Rejected("wrong_result", f"declares batch invariance, but {which} have other bits alone")

    def _beside_others(self, problem: Problem, kernel: Kernel, trial: Trial, verdict: Verdict) -> None:
        """What large values do to small ones, of their own row and of others."""
        ones = always_one(problem, kernel)
        (outliers,) = self._cases.named(problem, "outliers", ones)
        # What outliers cost a kernel that quantises is recorded; whether that is too much, a policy says.
        quantises = kernel.precision[problem.trait("dtype")] in (Precision.INT8, Precision.INT4)
        ys = trial.call(outliers, outliers.draws[0], judge=not quantises)
        found = [gap(y, right).row for y, right in zip(ys, outliers.draws[0].reference, strict=True)]
        if not all(map(math.isfinite, found)):
            raise Rejected("wrong_result", "not finite on data with outliers")
        verdict.errors["outliers"] = max(found)
        # What a row's neighbours cost it must stay inside the class, or the call is declined.
        (unlike,) = self._cases.named(problem, "rows", ones)
        (draw,) = unlike.draws
        ys = trial.call(unlike, draw, judge=False)
        verdict.declines_rows = draw.kind in trial.declined
        if not verdict.declines_rows:
            verdict.errors["rows"] = trial.judge(unlike, draw, ys)

    def _at_own_size(self, problem: Problem, kernel: Kernel, run: Launch, errors: dict[str, float]) -> bool:
        trial = self._trial(problem, kernel, run)
        own, *near = self._cases.at_own_size(problem)
        ys = trial.call(own, own.draws[0], judge=False)
        errors["normal"] = trial.judge(own, own.draws[0], ys, strict_total=True)
        stable = True
        if ys[0].numel() <= REPEATED_NUMEL:
            again = trial.call(own, own.draws[0], judge=False)
            stable = equal(ys, again)
            if not stable:
                trial.judge(own, own.draws[0], again)
        trial.settle()
        for case in near:
            trial.call(case, case.draws[0])
            trial.settle()
        trial.finish()
        return stable

    def _recheck(
        self, problem: Problem, candidate: Candidate, run: Launch, static: tuple[Any, ...], dynamic: tuple[Any, ...]
    ) -> bool:
        kernel = pool.kernels()[candidate.kernel]
        group = self._cases.enter(problem)
        values, reference = self._cases.fresh_values(problem)
        for t, value in zip(tensors(dynamic), values, strict=True):
            t.data.copy_(value)  # not through the tensor itself: its version must not tell
        ours = zip(tensors(static), tensors(group.static), strict=True)
        if not all(torch.equal(t, own) for t, own in ours):
            reference = parts(pool.operator(problem.op).reference(problem, Inputs(static, dynamic)))
        lent = [Lent(t) for t in (*tensors(dynamic), *tensors(static))]
        trial = Trial(run, kernel.precision[problem.trait("dtype")], problem.trait("dtype"), group.least, lent)
        (own, *_) = self._cases.at_own_size(problem)
        fresh = Draw("after timing", [], reference, own.draws[0].allowed)
        case = Case(problem, [], dynamic, [fresh])
        ys, again = (trial.call(case, fresh) for _ in range(2))
        trial.settle()
        trial.finish()
        return equal(ys, again)

    def _trial(self, problem: Problem, kernel: Kernel, run: Launch) -> Trial:
        static, _ = self._cases.placed_static(problem, kernel)
        dtype = problem.trait("dtype")
        return Trial(run, kernel.precision[dtype], dtype, self._group.least, static)


def _expect_meant(kernel: Kernel, problem: Problem, candidate: Candidate) -> None:
    """Raise Rejected where a candidate is not for a problem or this machine, or has no compiled form here."""
    if (why := kernel.unavailable()) is not None:
        raise Rejected("unavailable", why)
    if (why := kernel.objection(problem)) is not None:
        raise Rejected("unsupported", why)
    if (why := kernel.suits(problem, candidate.params)) is not None:
        raise Rejected("unsuited", why)
    lack = None
    try:
        if kernel.unit is not None:
            lack = library.lack(kernel.unit(problem, candidate.params))
        if kernel.programs is not None:
            programs.plan([(each, {}) for each in kernel.programs(problem, candidate.params)])
        if kernel.configuration is not None:
            lack = cutlass_library.lack(kernel.configuration(problem, candidate.params))
    except Unsuited as error:
        raise Rejected("unsuited", str(error)) from None
    except Missing as error:
        lack = str(error)
    if lack is not None:
        raise Rejected("not_compiled", lack)


def _joined(*parts: str) -> str:
    return "; ".join(filter(None, parts))
