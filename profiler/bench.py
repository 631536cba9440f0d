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
from functools import partial
from itertools import cycle
from typing import Any

import torch

from dks.dispatch import pool
from dks.dispatch.kernel import Inputs, Launch, Output, parts
from dks.dispatch.modes import EAGER, GRAPH, MODES
from dks.dispatch.problem import Candidate, Precision, Problem
from dks.dispatch.sources import source_digest
from dks.profiler.check import Checker, Verdict
from dks.profiler.device import Device, Host, Replay, Uncapturable, copied, moved
from dks.profiler.draws import tensors
from dks.profiler.findings import UNREAD, Finding, Round, rounds_from_json, rounds_to_json
from dks.profiler.interference import Watch
from dks.profiler.timing import Entrants, ImpossibleTime, StoppingRule, race
from dks.profiler.trial import describe, is_out_of_memory

LATE = 10  # replays in a row whose time the host had a part in


@dataclass(frozen=True, slots=True)
class Job:
    """One visit of a process to a problem.

    Attributes:
        names: candidate ids that may be timed, the framework's own among them.
        rounds: what earlier visits brought.
        until: ``time.monotonic`` at which to stop whatever is known; None is never.
        before, after: the model's neighbouring operators, in the order they run, for the pipeline state.
        mode: how the candidates' calls are executed.
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
    mode: str = EAGER

    def to_json(self) -> dict[str, Any]:
        """As it goes to a worker."""
        data = {name: getattr(self, name) for name in ("names", "process", "until", "recheck", "mode")}
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
            mode=data["mode"],
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
        self._watches = {mode: Watch(self._device.sources(mode)) for mode in MODES}
        self._group: tuple[object, ...] = ()
        self._weights: list[tuple[Any, ...]] = []
        self._shared = False
        self._bound: dict[str, list[Bound]] = {}
        self._drawn: tuple[Problem, Inputs] | None = None
        self._digests: dict[str, str] = {}
        self._right: tuple[Problem | None, dict[Candidate, Verdict]] = (None, {})

    def check(self, problem: Problem, candidate: Candidate, mode: str = EAGER) -> tuple[Finding, bool]:
        """What is found of one candidate, and whether it left the process unfit for others.

        Nothing a kernel raises escapes; what it left to be raised later is waited for, so that it is charged to it.
        """
        finding = Finding(
            energy_note=self._device.no_energy() or UNREAD,
            digest=self._digest(candidate.kernel),
        )
        try:
            verdict = self._judged(problem, candidate, mode)
            self._note(finding, verdict)
            if verdict.status == "ok":
                verdict = self._try_out(problem, candidate, mode, finding)
        except RaisedByKernel as error:
            charged = self._charged(error.error, "")
            finding.status, finding.reason = charged.status, charged.reason
            return finding, finding.status == "crashed" or isinstance(error.error, Uncapturable)
        except Exception as error:
            # Whatever came first to the device after the call that broke it; any other is a fault of ours.
            if not (why := self._device.lost(error)):
                raise
            finding.status, finding.reason = "crashed", why
            return finding, True
        return finding, verdict.poisoned or finding.status == "crashed"

    def _judged(self, problem: Problem, candidate: Candidate, mode: str) -> Verdict:
        """What the checks say; in a graph, which is compared by itself, what they said of its eager calls."""
        if self._right[0] != problem:
            self._right = (problem, {})
        known = self._right[1].get(candidate) if mode == GRAPH else None
        if known is not None:
            return known
        verdict = self._checker.check(problem, candidate)
        self._device.settle()
        if verdict.status == "ok":
            self._right[1][candidate] = verdict
        return verdict

    def _digest(self, kernel: str) -> str:
        """Of its sources, read once."""
        if kernel not in self._digests:
            self._digests[kernel] = source_digest(pool.kernels()[kernel])
        return self._digests[kernel]

    def _charged(self, error: Exception, where: str) -> Finding:
        """What is found of a candidate that raised."""
        if why := self._device.lost(error):
            return Finding("crashed", where + why)
        return Finding("out_of_memory" if is_out_of_memory(error) else "failed", where + describe(error))

    def _try_out(self, problem: Problem, candidate: Candidate, mode: str, finding: Finding) -> Verdict:
        """Run a candidate that is right as it will be timed: once, for its memory, and in a graph where it is meant
        for one. What it raises comes as RaisedByKernel."""
        inputs = self._inputs(problem)
        self._hold_weights(problem, inputs)
        verdict = Verdict()
        try:
            bound = self._bind(problem, candidate)[0]
            found = self._device.peak_memory(lambda: bound.run(*inputs.dynamic))
            finding.peak_bytes, finding.peak_note = found
            run = self._device.captured(bound.run, inputs.dynamic) if mode == GRAPH else None
        except Exception as error:  # a kernel may raise anything
            raise RaisedByKernel(candidate.id, error) from error
        if run is not None:  # a replay must read what its inputs hold by then
            verdict = self._checker.recheck(problem, candidate, run, bound.static, inputs.dynamic)
            self._device.settle()
            self._note(finding, verdict)
        return verdict

    def _note(self, finding: Finding, verdict: Verdict) -> None:
        finding.status, finding.reason = verdict.status, verdict.reason
        finding.errors |= {name: error for name, error in verdict.errors.items() if math.isfinite(error)}
        finding.declines_rows |= verdict.declines_rows
        finding.stable = verdict.stable if finding.stable is None else finding.stable and verdict.stable

    def time(self, job: Job) -> Iterator[list[Round] | tuple[str, Finding]]:
        """Time a problem. Yields rounds as they come, and findings of candidates that did not stay right.

        The kernels must have passed ``check`` here or in another process.
        """
        problem = job.problem
        # Another order in each process: what stands beside a candidate is not the same twice.
        self._rng = random.Random(f"{self._seed} {job.process} {problem.id}")
        inputs = self._inputs(problem)
        self._hold_weights(problem, inputs)
        try:
            kernels = _Kernels(self, job, inputs)
        except RaisedByKernel as error:
            yield error.name, self._charged(error.error, "while it was bound to be timed: ")
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
            yield error.name, self._charged(error.error, "while it was timed: ")
            return
        finally:
            gc.enable()
        # Who was dropped on the way was checked before, and something else is chosen in its stead.
        new = len(rounds) > len(job.rounds)
        for name in [name for name in rounds[-1].ns if name in names] if new and job.recheck else ():
            self._in_flight(name)
            bound = self._bound[name][0]
            candidate = Candidate.parse(name)
            run = kernels.graph(name) or bound.run
            try:
                verdict = self._checker.recheck(problem, candidate, run, bound.static, kernels.inputs[0])
                self._device.settle()
            except Exception as error:
                if not (why := self._device.lost(error)):
                    raise
                verdict = Verdict().fail("crashed", why)
            if verdict.status != "ok":
                yield name, Finding(verdict.status, verdict.reason, dict(verdict.errors), stable=verdict.stable)
            if verdict.status == "crashed":
                return
        self._in_flight("")

    def joules(self, problem: Problem, name: str, mode: str = EAGER) -> tuple[float | None, str]:
        """Joules of one call of a candidate, whose copies take turns, and why not if there are none."""
        if (why := self._device.no_energy()) is not None:
            return None, why
        inputs = self._inputs(problem)
        self._hold_weights(problem, inputs)
        calls: list[Callable[[], object]] = []
        for bound in self._bind(problem, Candidate.parse(name)):
            if mode == GRAPH:
                calls.append(self._device.captured(bound.run, inputs.dynamic, False).again)
            else:
                calls.append(partial(bound.run, *inputs.dynamic))
        turns = cycle(calls)

        def call() -> object:
            return next(turns)()

        return self._device.joules(call, self._device.energy_s)

    def _inputs(self, problem: Problem) -> Inputs:
        """Inputs of a problem, whose dynamic ones the caller may change."""
        # Drawing a weight and moving it takes longer than checking a candidate: once for all of them.
        if self._drawn is None or self._drawn[0] != problem:
            self._drawn = None  # frees the last ones first
            self._drawn = (problem, self._draw(problem, 0))
        kept = self._drawn[1]
        return Inputs(kept.static, copied(kept.dynamic))

    def _another(self, problem: Problem, copy: int) -> tuple[Any, ...]:
        """Dynamic inputs like those of ``_inputs`` at other addresses."""
        kept = self._inputs(problem)
        # Beside a weight, which would be drawn too, there are activations alone: their values take no other time.
        return kept.dynamic if tensors(kept.static) else self._draw(problem, copy).dynamic

    def _draw(self, problem: Problem, copy: int) -> Inputs:
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
            copies = 1 if self._cache == "warm" else self._device.copies(size)
            self._group = key
            self._shared = copies == 1 and self._cache == "cold" and self._device.shares
            self._weights = [inputs.static] + [_clone(inputs.static) for _ in range(copies - 1)]
            self._bound = {}

    def _bind(self, problem: Problem, candidate: Candidate) -> list[Bound]:
        bound = self._bound.get(candidate.id)
        if bound is None:
            kernel = pool.kernels()[candidate.kernel]
            # Candidates that shared a weight would warm it for each other: each has copies of its own.
            own = self._weights if self._shared else [_clone(static) for static in self._weights]
            bound = [Bound(static, kernel.bind(problem, candidate.params, *static)) for static in own]
            self._bound[candidate.id] = bound
        return bound


class RaisedByKernel(Exception):
    """A candidate that was right when it was checked raised where it was to be timed."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(f"{name}: {error}")
        self.name, self.error = name, error


class _Kernels:
    """The sampler of one job: real calls, in the declared state of caches and mode of execution."""

    def __init__(self, bench: Bench, job: Job, inputs: Inputs) -> None:
        self._bench, self._in_flight = bench, bench._in_flight
        self._watch = bench._watches[job.mode]
        device = bench._device
        size = sum(t.nbytes for t in inputs.dynamic if isinstance(t, torch.Tensor))
        size += pool.operator(job.problem.op).key_bytes(job.problem)
        copies = 1 if bench._cache == "warm" else device.copies(size)
        self.inputs = [inputs.dynamic]
        self.inputs += [bench._another(job.problem, copy) for copy in range(1, copies)]
        # Too small to fill the cache by rotating, or too large to have copies: it is emptied between calls instead.
        self._flush = bench._cache == "cold" and (bench._shared or copies * size < device.beyond)
        self._neighbours = _Neighbours(bench, job.before, job.after)
        self._runs: dict[str, list[Launch]] = {}
        self._graphs: dict[str, list[Replay]] = {}
        self._turn = 0
        self._job = job
        # Who is out of the race is not bound again; a window that turns out to be disturbed may bring some back.
        self._prepare(job.rule.contenders(job.rounds, entrants(job.problem, job.names)))

    def _prepare(self, names: Sequence[str]) -> None:
        """Bind, and run or capture once, those that were not yet."""
        for name in [name for name in names if name not in self._runs]:
            self._in_flight(name)
            try:
                runs = [bound.run for bound in self._bench._bind(self._job.problem, Candidate.parse(name))]
                for run in runs:  # the first call on a fresh copy pays for more than its weights
                    run(*self.inputs[0])
                self._bench._device.settle()
                if self._job.mode == GRAPH:
                    self._graphs[name] = self._captured(runs)
            except Exception as error:  # a kernel may raise anything
                raise RaisedByKernel(name, error) from error
            self._runs[name] = runs
        self._in_flight("")

    def _captured(self, runs: Sequence[Launch]) -> list[Replay]:
        """A graph for each copy of weights and inputs: it is bound to their addresses."""
        turns = range(max(len(runs), len(self.inputs)))
        calls = [self._neighbours.around(runs[t % len(runs)], self.inputs[t % len(self.inputs)]) for t in turns]
        # Of large outputs one each, which is compared, is all that there is room for.
        return [
            self._bench._device.captured(call, args, t == 0) for t, (call, args) in zip(turns, calls, strict=True)
        ]

    def graph(self, name: str) -> Replay | None:
        """What was timed of a candidate, on the first inputs, where it ran as a graph."""
        return self._graphs[name][0] if name in self._graphs and not self._neighbours.any else None

    def round(self, names: Sequence[str]) -> dict[str, int]:
        """Nanoseconds of one call of each, in random order."""
        self._prepare(names)
        order = list(names)
        self._bench._rng.shuffle(order)
        return {name: self._call(name) for name in order}

    def _call(self, name: str) -> int:
        self._in_flight(name)
        try:
            ns = self._replay(name) if name in self._graphs else self._run(name)
        except Exception as error:
            raise RaisedByKernel(name, error) from error
        self._in_flight("")
        return ns

    def _run(self, name: str) -> int:
        self._turn += 1
        runs, dynamic = self._runs[name], self._prepared(self._turn)
        return self._bench._device.timed(*self._neighbours.around(runs[self._turn % len(runs)], dynamic))

    def _replay(self, name: str) -> int:
        graphs = self._graphs[name]
        for _ in range(LATE):
            self._turn += 1
            copy = self._turn % len(graphs)
            self._prepared(copy)
            if (ns := self._bench._device.replayed(graphs[copy])) is not None:
                return ns
        raise RuntimeError(f"the host launched {LATE} replays in a row too late to time the device alone")

    def _prepared(self, copy: int) -> tuple[Any, ...]:
        """The inputs of a copy, changed, with caches in the declared state."""
        dynamic = self.inputs[copy % len(self.inputs)]
        _touch(dynamic, self._turn)
        if self._flush:
            self._bench._device.empty_cache(self._turn)
        return dynamic

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
        self._before = [self._default(bench, problem) for problem in before]
        self._after = [self._default(bench, problem) for problem in after]

    def _default(self, bench: Bench, problem: Problem) -> tuple[Launch, tuple[Any, ...]]:
        kernel = pool.kernels()[pool.operator(problem.op).default]
        inputs = bench._draw(problem, 1)
        return kernel.bind(problem, (), *inputs.static), inputs.dynamic

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return bool(self._before or self._after)

    def around(self, run: Launch, dynamic: tuple[Any, ...]) -> tuple[Callable[..., Output], tuple[Any, ...]]:
        """The call that is timed, with its arguments: the candidate's, with its neighbours where it has any."""
        return (self._flow, (run, dynamic)) if self.any else (run, dynamic)

    def _flow(self, run: Launch, dynamic: tuple[Any, ...]) -> Output:
        flowing: Output | None = None
        for neighbour, own in self._before:
            flowing = neighbour(*_fed(own, flowing))
        flowing = run(*_fed(dynamic, flowing))
        for neighbour, own in self._after:
            flowing = neighbour(*_fed(own, flowing))
        return flowing


def _fed(dynamic: tuple[Any, ...], flowing: Output | None) -> tuple[Any, ...]:
    if flowing is None:
        return dynamic
    first, given = dynamic[0], parts(flowing)[0]
    if given.numel() != first.numel() or given.dtype != first.dtype:
        return dynamic
    return (given.reshape(first.shape), *dynamic[1:])


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


def _touch(dynamic: tuple[Any, ...], turn: int) -> None:
    """Change one element of the activations, so that no call can be answered from an earlier one."""
    first: torch.Tensor = dynamic[0]
    first[(0,) * first.dim()] = 1.0 + turn % 97 / 64


def _clone(static: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in static)
