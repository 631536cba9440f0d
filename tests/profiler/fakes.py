"""A machine made of numbers: a process that measures nothing and knows every time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence

from dks.dispatch import pool
from dks.dispatch.problem import Candidate, Problem
from dks.profiler.bench import Job, entrants, impossible
from dks.profiler.findings import Finding, Round
from dks.profiler.isolation import Lost, Setting
from dks.profiler.timing import ImpossibleTime, race

Time = Callable[[Problem, str], float]


def by_rank(problem: Problem, name: str) -> float:
    """Nanoseconds that grow with the problem and the kernel's rank; the third is the fastest."""
    names = [c.id for c in pool.candidates_for(problem.op, "cpu")]
    return 1e4 * problem.dims[0][1] * (1 + abs(names.index(name) - 2) / 4)


class FakeMachine:
    """Starts fake processes, and counts what they were asked.

    Args:
        times: nanoseconds of a candidate on a problem.
        noise: spread of each sample; process: spread of each candidate's time between processes.
        faults: candidate id to the finding of its check; or to a Lost that ends the process.
        graph_times, graph_faults: the same of graphs; as eager calls where None.
        watts: joules of a call are its nanoseconds times this; None where there is no counter.
        tick: told the seconds that each thing takes.
    """

    def __init__(
        self,
        times: Time = by_rank,
        *,
        noise: float = 0.01,
        process: float = 0.0,
        faults: dict[str, Finding | Lost] | None = None,
        timing_faults: dict[str, Lost] | None = None,
        tick: Callable[[float], None] = lambda _: None,
        seed: int = 0,
        graph_times: Time | None = None,
        graph_faults: dict[str, Finding | Lost] | None = None,
        watts: float | None = None,
    ) -> None:
        self.times, self.noise, self.process, self.tick = times, noise, process, tick
        self.faults, self.timing_faults = faults or {}, timing_faults or {}
        self.graph_times, self.watts = graph_times or times, watts
        self.graph_faults = self.faults if graph_faults is None else graph_faults
        self.crashes: dict[str, Finding] = {}
        self.read: list[tuple[str, str, str]] = []
        self.checked: list[tuple[str, str]] = []
        self.timed: list[tuple[str, int]] = []
        self.started = 0
        self.seed = seed
        self.sample: Callable[[float], int] = lambda ns: max(1, int(ns))

    def start(self, number: int, setting: Setting) -> FakeProcess:
        self.started += 1
        self.tick(2.0)
        return FakeProcess(self, number)


class FakeProcess:
    """One process of a FakeMachine."""

    def __init__(self, machine: FakeMachine, number: int) -> None:
        self.machine, self.number, self.busy_s = machine, number, 0.0
        self.hard_stop: float | None = None
        self.rng = random.Random(f"{machine.seed} {number}")

    def check(self, problem: Problem, candidate: Candidate, mode: str = "eager") -> tuple[Finding, bool]:
        self.machine.checked.append((problem.id, candidate.id))
        self.machine.tick(0.01)
        kernel = pool.kernels()[candidate.kernel]
        if (why := kernel.objection(problem)) is not None:
            return Finding("unsupported", why), False
        faults = self.machine.faults if mode == "eager" else self.machine.graph_faults
        fault = faults.get(
            candidate.id, Finding(errors={"normal": 1e-7, "outliers": 1e-7, "rows": 1e-7}, stable=True)
        )
        if isinstance(fault, Lost):
            raise fault
        return Finding(**vars(fault)), False

    def time(self, job: Job) -> Iterator[list[Round] | tuple[str, Finding]]:
        self.machine.timed.append((job.problem.id, self.number))
        for name in job.names:
            if name in self.machine.timing_faults:
                raise self.machine.timing_faults[name]
        for name, crash in self.machine.crashes.items():
            if name in job.names:
                yield name, crash
                return
        self.problem, self.mode = job.problem, job.mode
        able = entrants(job.problem, job.names)

        def late() -> bool:
            return job.until is not None and time.monotonic() >= job.until

        try:
            yield from race(job.rule, self, list(job.rounds), able, job.process, late)
        except ImpossibleTime as error:
            yield impossible(error)

    def joules(self, problem: Problem, name: str, mode: str = "eager") -> tuple[float | None, str]:
        self.machine.read.append((problem.id, name, mode))
        if self.machine.watts is None:
            return None, "numbers take no energy"
        return self.machine.watts * self.machine.times(problem, name), ""

    def close(self) -> None: ...

    def round(self, names: Sequence[str]) -> dict[str, int]:
        return {name: self._sample(name) for name in names}

    def _sample(self, name: str) -> int:
        of_process = random.Random(f"{self.machine.seed} {self.number} {self.problem.id} {name}")
        times = self.machine.times if self.mode == "eager" else self.machine.graph_times
        ns = times(self.problem, name) * of_process.lognormvariate(0, self.machine.process)
        ns *= self.rng.lognormvariate(0, self.machine.noise)
        self.machine.tick(ns / 1e9)
        return self.machine.sample(ns)

    def watch(self) -> None: ...

    def disturbed(self) -> str:
        return ""
