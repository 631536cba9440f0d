"""Cells: one problem in one error class, generated kernels beside their peers, interleaved in one process.

A cell is measured in two halves. In the first all candidates of the class run, and the fastest of each side is
picked; in the second the picked ones run again with their peers, and those rounds alone are judged: who was only
lucky in the first half is not flattered in the second.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from dks.dispatch import pool
from dks.dispatch.environment import private_cache_bytes
from dks.dispatch.intervals import Interval, geometric_mean, paired_ratio
from dks.dispatch.kernel import Inputs, Launch, relative_error
from dks.dispatch.problem import Candidate, Precision, Problem
from dks.dispatch.tiles import library

OURS = "tile."  # what the ids of generated kernels begin with
BEST = "best of torch"  # stands for the fastest candidate that is not generated
MAX_COPIES = 512
FAR = 2.0  # who is so many times slower than the best of its side after two rounds is not called again

Call = Callable[[], object]
Extra = Callable[[Inputs], Call]
"""From one copy of a problem's inputs to a call that is not in the pool."""


@dataclass(frozen=True, eq=False)
class Cell:
    """What is measured together.

    Attributes:
        precision: the class whose candidates take part.
        peers: candidate ids that are judged whatever their time; ``BEST`` among them where it is a peer.
        extras: further peers, by name.
        warm: whether every call reads the same weights and activations; else they rotate through copies beyond
            the private cache, each candidate's its own.
        make_inputs: (problem, generator, draw) -> Inputs; None means the operator's.
    """

    problem: Problem
    precision: Precision
    peers: tuple[str, ...]
    extras: Mapping[str, Extra] = field(default_factory=dict)
    warm: bool = False
    make_inputs: Callable[[Problem, torch.Generator, str], Inputs] | None = None

    def candidates(self) -> list[Candidate]:
        """Those of the class that take the problem on this machine."""
        kernels = pool.kernels()
        return [
            candidate
            for candidate in pool.candidates_for(self.problem.op)
            for kernel in [kernels[candidate.kernel]]
            if kernel.precision.get(self.problem.trait("dtype")) is self.precision
            and kernel.unavailable() is None
            and kernel.objection(self.problem) is None
            and kernel.suits(self.problem, candidate.params) is None
        ]

    def draw(self, seed: int) -> Inputs:
        """Its inputs, the same for each seed."""
        operator = pool.operator(self.problem.op)
        make = self.make_inputs or operator.make_inputs
        return make(self.problem, torch.Generator().manual_seed(seed), "normal")

    def __str__(self) -> str:
        dims = " ".join(f"{name}={size}" for name, size in self.problem.dims)
        place = " warm" if self.warm else ""
        return f"{self.problem.op} {self.problem.trait('dtype')} {self.precision.value} {dims}{place}"


@dataclass(frozen=True)
class Result:
    """One measured cell.

    Attributes:
        picked: what each role stands for: ``ours`` the fastest generated candidate, ``chosen`` the fastest of
            all, ``BEST`` the fastest other; a role that nobody has is missing.
        first: rounds in which they were picked, ns by name, in order; dropped candidates have fewer.
        judged: rounds by which they are judged, ns by name.
        lost: candidates that did not take part, and why.
    """

    cell: Cell
    picked: Mapping[str, str]
    first: Mapping[str, Sequence[int]]
    judged: Mapping[str, Sequence[int]]
    lost: Mapping[str, str]

    def ns(self, who: str) -> Sequence[int] | None:
        """The judged samples of a role, a candidate or an extra; None where it was not measured."""
        return self.judged.get(self.picked.get(who, who))

    def ratio(self, peer: str, side: str) -> Interval | None:
        """Time of ``peer`` / time of ``side``, above 1 the side is faster; None where one was not measured."""
        theirs, own = self.ns(peer), self.ns(side)
        if theirs is None or own is None:
            return None
        return Interval(1.0, 1.0, 1.0, len(own)) if theirs is own else paired_ratio(theirs, own)

    def us(self, who: str) -> float:
        """Median time in microseconds; NaN where it was not measured."""
        ns = self.ns(who)
        return median(ns) / 1e3 if ns else math.nan


@dataclass(frozen=True)
class Limits:
    """Rounds of one half: not fewer than ``least``, not more than ``most``, and no more after ``seconds``."""

    seconds: float
    least: int
    most: int


class Contestant:
    """Who is timed: its calls take turns, so that no call finds what the one before it read."""

    def __init__(self, runs: Sequence[Callable[..., object]], dynamic: Sequence[tuple[Any, ...]]) -> None:
        self._turns = itertools.cycle(range(max(len(runs), len(dynamic))))
        self._runs, self._dynamic = runs, dynamic

    def time(self) -> int:
        """Nanoseconds of the next call."""
        turn = next(self._turns)
        run, arguments = self._runs[turn % len(self._runs)], self._dynamic[turn % len(self._dynamic)]
        before = time.perf_counter_ns()
        result = run(*arguments)
        after = time.perf_counter_ns()
        del result  # freed outside the timed span
        return after - before

    def warm_up(self) -> None:
        """A call of each: the first one on a fresh copy pays for more than its weights."""
        for _ in range(max(len(self._runs), len(self._dynamic))):
            self.time()


def take_rounds(contestants: Mapping[str, Contestant], limits: Limits, rng: random.Random) -> dict[str, list[int]]:
    """Rounds in which each runs once, in random order: ns by name, the n-th of all from the same round."""
    ns: dict[str, list[int]] = {name: [] for name in contestants}
    names = list(contestants)
    start = time.monotonic()
    gc.collect()
    gc.disable()  # a collection would be charged to whoever runs
    try:
        for done in range(limits.most):
            if done >= limits.least and time.monotonic() - start >= limits.seconds:
                break
            rng.shuffle(names)
            for name in names:
                ns[name].append(contestants[name].time())
    finally:
        gc.enable()
    return ns


class CellBench:
    """Measures cells one after the other; what is packed stays while only the dynamic dims change."""

    def __init__(self, seed: int) -> None:
        self._seed, self._rng = seed, random.Random(seed)
        self._group: tuple[object, ...] = ()
        self._bound: dict[str, list[Launch]] = {}
        self._beyond = 2 * (private_cache_bytes() or 2**21)

    @torch.no_grad()
    def measure(self, cell: Cell, first: Limits, judged: Limits) -> Result:
        """Pick in one half and judge in the other. What a candidate raises is a reason to leave it out."""
        inputs = cell.draw(self._seed)
        self._hold(cell)
        size = _bytes(inputs.dynamic) + pool.operator(cell.problem.op).key_bytes(cell.problem)
        copies = self._copies(cell, size)
        contestants, lost = self._entrants(cell, inputs, copies)

        quick = take_rounds(contestants, Limits(0.0, 2, 2), self._rng)
        near = {name: contestants[name] for name in _near(quick)}
        more = take_rounds(near, first, self._rng)
        samples = {name: ns + more.get(name, []) for name, ns in quick.items()}
        picked = pick({name: samples[name] for name in near})

        wanted = [*picked.values(), *(peer for peer in cell.peers if peer in contestants)]
        second = {name: contestants[name] for name in dict.fromkeys(wanted)}
        for name, extra in cell.extras.items():
            calls = [extra(Inputs(clone(inputs.static), clone(inputs.dynamic))) for _ in range(copies)]
            second[name] = Contestant(calls, [()])
            second[name].warm_up()
        return Result(cell, picked, samples, take_rounds(second, judged, self._rng), lost)

    def _entrants(self, cell: Cell, inputs: Inputs, copies: int) -> tuple[dict[str, Contestant], dict[str, str]]:
        """The candidates that are right, ready to be timed, and why the others are not."""
        reference = pool.operator(cell.problem.op).reference(cell.problem, inputs)
        contestants, lost = {}, {}
        for candidate in cell.candidates():
            try:
                runs = self._bind(cell, candidate, inputs)
                error = relative_error(runs[0](*inputs.dynamic), reference)
                if not error <= cell.precision.limit:
                    raise ValueError(f"error {error:.1e}, its class has at most {cell.precision.limit:.0e}")
                contestant = Contestant(runs, [clone(inputs.dynamic) for _ in range(copies)])
                contestant.warm_up()
            except Exception as error:  # a kernel may raise anything
                lost[candidate.id] = f"{type(error).__name__}: {str(error)[:200]}"
            else:
                contestants[candidate.id] = contestant
        return contestants, lost

    def _hold(self, cell: Cell) -> None:
        """Forget what was bound to other weights."""
        problem = cell.problem
        statics = tuple((name, problem.dim(name)) for name in pool.operator(problem.op).static)
        group = (problem.op, problem.traits, statics, problem.align, cell.warm)
        if group != self._group:
            self._group, self._bound = group, {}

    def _bind(self, cell: Cell, candidate: Candidate, inputs: Inputs) -> list[Launch]:
        if candidate.id not in self._bound:
            kernel = pool.kernels()[candidate.kernel]
            if kernel.unit is not None and (why := library.lack(kernel.unit(cell.problem, candidate.params))):
                raise library.Missing(why)
            copies = self._copies(cell, pool.operator(cell.problem.op).key_bytes(cell.problem))
            self._bound[candidate.id] = [
                kernel.bind(cell.problem, candidate.params, *clone(inputs.static)) for _ in range(copies)
            ]
        return self._bound[candidate.id]

    def _copies(self, cell: Cell, size: int) -> int:
        """How many copies of ``size`` bytes go beyond the private cache."""
        return 1 if cell.warm or size == 0 else min(MAX_COPIES, -(-self._beyond // size))


def pick(samples: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Who was fastest, by role: of the generated ones, of the others, and of all."""
    sides = {"ours": [n for n in samples if n.startswith(OURS)], "chosen": list(samples)}
    sides[BEST] = [name for name in samples if name not in sides["ours"]]
    return {role: min(names, key=lambda name: median(samples[name])) for role, names in sides.items() if names}


def _near(samples: Mapping[str, Sequence[int]]) -> list[str]:
    """Those that are not far behind the best of their side."""
    best = {True: math.inf, False: math.inf}
    for name, ns in samples.items():
        side = name.startswith(OURS)
        best[side] = min(best[side], *ns)
    return [name for name, ns in samples.items() if min(ns) <= FAR * best[name.startswith(OURS)]]


def geomean(ratios: Sequence[Interval]) -> Interval:
    """Geometric mean over cells; as the cells' errors have nothing to do with each other, the half-widths of their
    logarithms add up as squares."""
    n = len(ratios)
    value = math.log(geometric_mean([ratio.value for ratio in ratios]))
    if any(ratio.low <= 0 or math.isinf(ratio.high) for ratio in ratios):
        return Interval(math.exp(value), -math.inf, math.inf, sum(ratio.n for ratio in ratios))
    below = math.sqrt(sum(math.log(ratio.value / ratio.low) ** 2 for ratio in ratios)) / n
    above = math.sqrt(sum(math.log(ratio.high / ratio.value) ** 2 for ratio in ratios)) / n
    return Interval(math.exp(value), math.exp(value - below), math.exp(value + above), sum(r.n for r in ratios))


def clone(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the tensors among some arguments."""
    return tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in values)


def _bytes(values: tuple[Any, ...]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
