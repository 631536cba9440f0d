"""Kernels on this machine: checked, then timed in the state of caches that the config declares.

This runs in a worker process. What a kernel does to the process is the business of ``worker`` and ``isolation``.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dks.dispatch import pool
from dks.dispatch.kernel import Inputs, Launch, Output, parts, source_digest
from dks.dispatch.problem import Candidate, Precision, Problem
from dks.profiler.check import Checker
from dks.profiler.device import Device, Host, moved
from dks.profiler.findings import Finding, Round, rounds_from_json, rounds_to_json
from dks.profiler.interference import Watch, default_sources
from dks.profiler.timing import Entrants, ImpossibleTime, StoppingRule, race
from dks.profiler.trial import describe, is_out_of_memory

MAX_COPIES = 8
ENERGY_S = 0.3  # of repeated calls, for one reading of an energy counter


@dataclass(frozen=True, slots=True)
class Job:
    """One visit of a process to a problem.

    Attributes:
        names: candidate ids that may be timed, the framework's own among them.
        rounds: what earlier visits brought.
        until: ``time.monotonic`` at which to stop whatever is known; None is never.
        before, after: the model's neighbouring operators, in the order they run, for the pipeline state.
        recheck: whether outputs are compared once more with the reference after timing.
    """

    problem: Problem
    names: tuple[str, ...]
    rule: StoppingRule
    process: int
    rounds: tuple[Round, ...] = ()
    until: float | None = None
    before: tuple[Problem, ...] = ()
    after: tuple[Problem, ...] = ()
    recheck: bool = True

    def to_json(self) -> dict[str, Any]:
        """As it goes to a worker."""
        data = {name: getattr(self, name) for name in ("names", "process", "until", "recheck")}
        data |= {"problem": self.problem.id, "rule": asdict(self.rule), "rounds": rounds_to_json(self.rounds)}
        data |= {name: [p.id for p in getattr(self, name)] for name in ("before", "after")}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """The inverse of ``to_json``."""
        return cls(
            problem=Problem.parse(data["problem"]),
            names=tuple(data["names"]),
            rule=StoppingRule(**data["rule"]),
            process=data["process"],
            rounds=tuple(rounds_from_json(data["rounds"])),
            until=data["until"],
            before=tuple(map(Problem.parse, data["before"])),
            after=tuple(map(Problem.parse, data["after"])),
            recheck=data["recheck"],
        )


@dataclass
class Bound:
    """A kernel bound to one copy of the constant arguments, which no other candidate shares."""

    static: tuple[Any, ...]
    run: Launch


class Bench:
    """Checks and times problems one after the other, keeping the packed weights of the last weight shape.

    Args:
        seed: of inputs and of the order inside a round.
        cache: ``cold``, ``warm`` or ``pipeline``; see ``Measurement.cache``.
        in_flight: told the id of the candidate that is about to run, and "" when none is.
        device: where kernels run; the CPU where None.
    """

    def __init__(
        self,
        seed: int,
        cache: str,
        in_flight: Callable[[str], None] = lambda _: None,
        device: Device | None = None,
    ) -> None:
        self._device = device or Host()
        self._seed, self._cache, self._in_flight = seed, cache, in_flight
        self._rng = random.Random(seed)
        self._checker = Checker(seed, self._device.torch)
        self._watch = Watch(default_sources(torch.get_num_threads()))
        self._group: tuple[object, ...] = ()
        self._weights: list[tuple[Any, ...]] = []
        self._bound: dict[str, list[Bound]] = {}

    def check(self, problem: Problem, candidate: Candidate) -> tuple[Finding, bool]:
        """What is found of one candidate, and whether it left the process unfit for others.

        Nothing a kernel raises escapes.
        """
        verdict = self._checker.check(problem, candidate)
        finding = Finding(
            verdict.status,
            verdict.reason,
            dict(verdict.errors),
            verdict.stable,
            energy_note=self._device.no_energy() or "measured after timing, of finalists alone",
            digest=source_digest(pool.kernels()[candidate.kernel]),
        )
        finding.errors = {name: error for name, error in finding.errors.items() if math.isfinite(error)}
        if verdict.status == "ok":
            inputs = self._inputs(problem, 0)
            self._hold_weights(problem, inputs)
            try:
                run = self._bind(problem, candidate)[0].run
                finding.peak_bytes, finding.peak_note = self._device.peak_memory(lambda: run(*inputs.dynamic))
            except Exception as error:  # a kernel may raise anything
                finding.status, finding.reason = raised(error), describe(error)
        return finding, verdict.poisoned

    def time(self, job: Job) -> Iterator[list[Round] | tuple[str, Finding]]:
        """Time a problem. Yields rounds as they come, and findings of candidates that did not stay right.

        The kernels must have passed ``check`` here or in another process.
        """
        problem = job.problem
        # Another order in each process: what stands beside a candidate is not the same twice.
        self._rng = random.Random(f"{self._seed} {job.process} {problem.id}")
        inputs = self._inputs(problem, 0)
        self._hold_weights(problem, inputs)
        try:
            kernels = _Kernels(self, job, inputs)
        except RaisedByKernel as error:
            yield (
                error.name,
                Finding(raised(error.error), f"while it was bound to be timed: {describe(error.error)}"),
            )
            return
        rounds = list(job.rounds)
        names = job.names

        def out_of_time() -> bool:
            return job.until is not None and time.monotonic() >= job.until

        gc.collect()
        gc.disable()  # a collection inside a sample would be charged to whichever candidate it hits
        try:
            yield from race(job.rule, kernels, rounds, entrants(problem, names), job.process, out_of_time)
        except ImpossibleTime as error:
            yield impossible(error)
            return
        except RaisedByKernel as error:
            yield error.name, Finding(raised(error.error), f"while it was timed: {describe(error.error)}")
            return
        finally:
            gc.enable()
        # Who was dropped on the way was checked before, and something else is chosen in its stead.
        new = len(rounds) > len(job.rounds)
        for name in [name for name in rounds[-1].ns if name in names] if new and job.recheck else ():
            self._in_flight(name)
            bound = self._bound[name][0]
            candidate = Candidate.parse(name)
            verdict = self._checker.recheck(problem, candidate, bound.run, bound.static, kernels.inputs[0])
            if verdict.status != "ok":
                yield name, Finding(verdict.status, verdict.reason, dict(verdict.errors), verdict.stable)
        self._in_flight("")

    def joules(self, problem: Problem, name: str) -> tuple[float | None, str]:
        """Joules of one call of a candidate, and why not if there are none."""
        if (why := self._device.no_energy()) is not None:
            return None, why
        inputs = self._inputs(problem, 0)
        self._hold_weights(problem, inputs)
        run = self._bind(problem, Candidate.parse(name))[0].run
        return self._device.joules(lambda: run(*inputs.dynamic), ENERGY_S)

    def _inputs(self, problem: Problem, copy: int) -> Inputs:
        generator = torch.Generator().manual_seed(self._seed + copy)
        made = pool.operator(problem.op).make_inputs(problem, generator, "normal")
        return Inputs(moved(made.static, self._device.torch), moved(made.dynamic, self._device.torch))

    def _hold_weights(self, problem: Problem, inputs: Inputs) -> None:
        """Keep the weights, and what is packed from them, while only the dynamic dims change."""
        operator = pool.operator(problem.op)
        statics = tuple((name, problem.dim(name)) for name in operator.static)
        key = (problem.op, problem.traits, statics, problem.align)
        if key != self._group:
            size = operator.key_bytes(problem)
            copies = 1 if self._cache == "warm" else _copies(size, self._device.beyond)
            self._group = key
            self._weights = [inputs.static] + [_clone(inputs.static) for _ in range(copies - 1)]
            self._bound = {}

    def _bind(self, problem: Problem, candidate: Candidate) -> list[Bound]:
        bound = self._bound.get(candidate.id)
        if bound is None:
            kernel = pool.kernels()[candidate.kernel]
            # Candidates that shared a weight would warm it for each other: each has copies of its own.
            own = [_clone(static) for static in self._weights]
            bound = [Bound(static, kernel.bind(problem, candidate.params, *static)) for static in own]
            self._bound[candidate.id] = bound
        return bound


class RaisedByKernel(Exception):
    """A candidate that was right when it was checked raised where it was to be timed."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(f"{name}: {error}")
        self.name, self.error = name, error


class _Kernels:
    """The sampler of one job: real calls, in the declared state of caches."""

    def __init__(self, bench: Bench, job: Job, inputs: Inputs) -> None:
        self._bench, self._in_flight = bench, bench._in_flight
        self._watch = bench._watch
        size = sum(t.nbytes for t in inputs.dynamic if isinstance(t, torch.Tensor))
        weights = pool.operator(job.problem.op).key_bytes(job.problem)
        copies = 1 if bench._cache == "warm" else _copies(size + weights, bench._device.beyond)
        self.inputs = [inputs.dynamic]
        self.inputs += [bench._inputs(job.problem, copy).dynamic for copy in range(1, copies)]
        # Too small to fill the cache by rotating: it is emptied between calls instead.
        self._flush = bench._cache == "cold" and copies * (size + weights) < bench._device.beyond
        self._neighbours = _Neighbours(bench, job.before, job.after)
        self._runs: dict[str, list[Launch]] = {}
        self._turn = 0
        for name in job.names:
            self._in_flight(name)
            try:
                self._runs[name] = [bound.run for bound in bench._bind(job.problem, Candidate.parse(name))]
                for run in self._runs[name]:  # the first call on a fresh copy pays for more than its weights
                    run(*self.inputs[0])
            except Exception as error:  # a kernel may raise anything
                raise RaisedByKernel(name, error) from error
        self._in_flight("")

    def round(self, names: Sequence[str]) -> dict[str, int]:
        """Nanoseconds of one call of each, in random order."""
        order = list(names)
        self._bench._rng.shuffle(order)
        return {name: self._call(name) for name in order}

    def _call(self, name: str) -> int:
        self._in_flight(name)
        self._turn += 1
        runs = self._runs[name]
        run = runs[self._turn % len(runs)]
        dynamic = self.inputs[self._turn % len(self.inputs)]
        _touch(dynamic, self._turn)
        if self._flush:
            self._bench._device.empty_cache(self._turn)
        try:
            ns = self._neighbours.timed(run, dynamic)
        except Exception as error:
            raise RaisedByKernel(name, error) from error
        self._in_flight("")
        return ns

    def watch(self) -> None:
        """Begin to look for interference."""
        self._watch.start()

    def disturbed(self) -> str:
        """What interfered since ``watch``."""
        return "; ".join(self._watch.stop())


class _Neighbours:
    """What runs around a candidate in the pipeline state: the framework's own kernels of other operators.

    An output, or the first tensor of one, becomes the first input of what follows where it has as many elements.
    """

    def __init__(self, bench: Bench, before: Sequence[Problem], after: Sequence[Problem]) -> None:
        self._device = bench._device
        self._before = [self._default(bench, problem) for problem in before]
        self._after = [self._default(bench, problem) for problem in after]

    def _default(self, bench: Bench, problem: Problem) -> tuple[Launch, tuple[Any, ...]]:
        kernel = pool.kernels()[pool.operator(problem.op).default]
        inputs = bench._inputs(problem, 1)
        return kernel.bind(problem, (), *inputs.static), inputs.dynamic

    def timed(self, run: Launch, dynamic: tuple[Any, ...]) -> int:
        """Nanoseconds of the candidate, with its neighbours where it has any."""
        if not self._before and not self._after:
            return self._device.timed(run, dynamic)
        return self._device.timed(self._flow, (run, dynamic))

    def _flow(self, run: Launch, dynamic: tuple[Any, ...]) -> None:
        flowing: Output | None = None
        for neighbour, own in self._before:
            flowing = neighbour(*_fed(own, flowing))
        flowing = run(*_fed(dynamic, flowing))
        for neighbour, own in self._after:
            flowing = neighbour(*_fed(own, flowing))


def _fed(dynamic: tuple[Any, ...], flowing: Output | None) -> tuple[Any, ...]:
    if flowing is None:
        return dynamic
    first, given = dynamic[0], parts(flowing)[0]
    if given.numel() != first.numel() or given.dtype != first.dtype:
        return dynamic
    return (given.reshape(first.shape), *dynamic[1:])


def raised(error: Exception) -> str:
    """The status of a candidate that raised."""
    return "out_of_memory" if is_out_of_memory(error) else "failed"


def impossible(error: ImpossibleTime) -> tuple[str, Finding]:
    """The candidate whose time can't be, and what is found of it."""
    return str(error), Finding("failed", "the clock returned a time of zero or less")


def entrants(problem: Problem, names: Sequence[str]) -> Entrants:
    """These candidates, with what each asks of its caller."""
    dtype = problem.trait("dtype")
    order = list(Precision)
    found = {name: pool.kernels()[Candidate.parse(name).kernel] for name in names}
    levels = {name: (order.index(k.precision[dtype]), int(bool(k.form))) for name, k in found.items()}
    return Entrants(tuple(names), pool.operator(problem.op).default, levels)


def _copies(size: int, beyond: int) -> int:
    return min(MAX_COPIES, max(1, -(-beyond // size))) if size else 1


def _touch(dynamic: tuple[Any, ...], turn: int) -> None:
    """Change one element of the activations, so that no call can be answered from an earlier one."""
    first: torch.Tensor = dynamic[0]
    first[(0,) * first.dim()] = 1.0 + turn % 97 / 64


def _clone(static: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in static)
