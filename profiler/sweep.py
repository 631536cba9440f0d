"""A sweep: what is still to be measured, in what order, by which process, within what budget.

It goes in passes. Each begins a fresh worker process, which visits every problem that needs a process more:
candidates that nothing is known of are checked, then whatever still contends is timed. The first pass so races
all candidates, the later ones confirm what is left of them. All decisions follow from what the run directory
holds, so a sweep that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Protocol

from dks.dispatch import pool
from dks.dispatch.errors import BadInput
from dks.dispatch.modes import EAGER
from dks.dispatch.problem import Candidate, Problem, short
from dks.profiler.bench import Job, entrants
from dks.profiler.compiling import compile_for
from dks.profiler.config import Sweep
from dks.profiler.counters import EnergyMeter
from dks.profiler.findings import FAULTS, UNREAD, Contest, Finding, Findings, Round, counted
from dks.profiler.grid import Asked, Grid, grids
from dks.profiler.isolation import Lost, OutOfTime, Process, Setting, environment_of
from dks.profiler.problems import Neighbours, kind_of
from dks.profiler.splitting import wide_bins
from dks.profiler.store import Store, opened
from dks.profiler.timing import StoppingRule, in_doubt

STRIKES = 3  # problems that a candidate may crash or hang on before it is excluded from the others
ATTEMPTS = 3  # checks of a candidate that may begin and never end, whatever ended the sweep, before it is excluded
SCREENING_SHARE = 0.6  # of the time left, to screen problems; the rest confirms what screening leaves
GRACE = 0.05  # of a budget: whatever runs longer than it is killed, and nothing is held against it
FINALISTS = 3  # beside the default, whose joules are read on a GPU
CLOSING_S = 0.02  # a problem, to put it into Parquet at the end: taken off the budget


class Measurer(Protocol):
    """A process that can measure; see ``isolation.Process``."""

    number: int
    busy_s: float
    hard_stop: float | None

    def check(self, problem: Problem, candidate: Candidate, mode: str) -> tuple[Finding, bool]:
        """As ``Bench.check``. Raises Lost."""

    def time(self, job: Job) -> Iterator[list[Round] | tuple[str, Finding]]:
        """As ``Bench.time``. Raises Lost."""

    def search(self, problem: Problem, candidate: Candidate) -> list[Candidate]:
        """The candidates that a kernel's search finds for a problem. Raises Lost."""

    def joules(self, problem: Problem, name: str, mode: str) -> tuple[float | None, str]:
        """As ``Bench.joules``. Raises Lost."""

    def close(self) -> None:
        """End it, and all that it started."""


@dataclass(frozen=True, slots=True)
class Task:
    """One problem of a sweep in one execution mode."""

    problem: Problem
    role: str
    weight: float
    candidates: tuple[Candidate, ...]
    neighbours: Neighbours
    mode: str = EAGER

    @property
    def contest(self) -> Contest:
        """What its candidates are raced in."""
        return Contest(self.problem, self.mode)

    @property
    def default(self) -> str:
        """Id of the framework's own kernel."""
        return pool.operator(self.problem.op).default


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a sweep, for whoever shows progress.

    Attributes:
        done, total: problems of this pass, each mode of one by itself.
        process: number of the process that measured it.
        headline: the fastest candidate so far and its ratio to the default, in words.
    """

    done: int
    total: int
    process: int
    problem: Problem
    headline: str
    mode: str = EAGER


@dataclass
class Outcome:
    """What a sweep did.

    Attributes:
        measured: problems that something new was measured of, here and below each mode of one by itself.
        reused: problems that needed nothing.
        unfinished: problem id and what it lacks, where the budget ran out.
        winnerless: problems where candidates failed and nothing but the default is left.
        split: bins that were too wide, as the new representatives.
        notes: what was found in the run directory, in sentences.
        stale: files that were set aside.
        processes: workers started.
        seconds: wall time; ``idle_s`` of it no kernel was being prepared, checked or timed.
    """

    measured: int = 0
    reused: int = 0
    unfinished: list[tuple[str, str]] = field(default_factory=list)
    winnerless: list[str] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    processes: int = 0
    seconds: float = 0.0
    idle_s: float = 0.0


def run_sweep(  # noqa: PLR0913 - how a run reports is not what it does
    sweep: Sweep,
    folder: Path,
    *,
    budget_s: float | None = None,
    fresh: bool = False,
    whole: Sweep | None = None,
    notify: Callable[[Event], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
    start: Callable[[int, Setting], Measurer] = Process,
) -> Outcome:
    """Measure what ``folder`` does not hold yet; what is measured is on disk before the next thing begins.

    Args:
        budget_s: seconds for all of it. The heaviest traffic comes first, then what is least certain; what
            does not fit is listed as unfinished.
        fresh: forget what ``folder`` holds.
        whole: the sweep that ``sweep`` is a part of: files of problems that it does not have are set aside.
            None leaves them.
        say: told in a sentence what is done before measuring begins.
        start: what makes a process of a number; a recorded run can stand in for one.

    Raises:
        BadInput: ``folder`` can't be used, or is damaged; or every candidate of a problem ends in the same fault.
        OSError: the disk refuses.
    """
    began = time.monotonic()
    environment = environment_of(sweep.device)
    if sweep.threads is not None and sweep.device == "cpu":  # of the workers: no kernel runs in this process
        environment = replace(environment, threads=str(sweep.threads))
    settings = {"cache": sweep.measure.cache, "seed": sweep.measure.seed, "neighbours": _neighbours_digest(sweep)}
    with opened(folder, sweep.name, environment, settings, fresh=fresh) as store:
        m = sweep.measure
        setting = Setting(sweep.threads, m.seed, m.cache, m.timeout, folder, sweep.device)
        deadline = None if budget_s is None else began + budget_s

        def begin(number: int) -> Measurer:
            process = start(number, setting)
            process.hard_stop = None if budget_s is None else began + budget_s * (1 + GRACE)
            return process

        run = _Run(sweep, store, begin, deadline, notify, say)
        try:
            run.go()
        finally:
            run.close()
        if whole is not None:
            wanted = run.wanted() | _rest(sweep, whole, store)
            run.outcome.stale = store.set_aside(wanted)
            store.give_up(wanted)
        run.outcome.seconds = time.monotonic() - began
        run.outcome.idle_s = run.outcome.seconds - run.busy_s
        return run.outcome


def _neighbours_digest(sweep: Sweep) -> str:
    """What else the times of the pipeline state depend on; empty in the other states."""
    if sweep.measure.cache != "pipeline":
        return ""
    around = [
        sorted((repr(kind), repr(found)) for kind, found in part.neighbours.items()) for part in sweep.operators
    ]
    return hashlib.sha256(repr(around).encode()).hexdigest()[:16]


def _rest(sweep: Sweep, whole: Sweep, store: Store) -> set[Contest]:
    """Contests of the whole sweep's other operators: this part does not judge them."""
    ours = {part.op for part in sweep.operators}
    others = {part.op for part in whole.operators if part.op not in ours}
    return {contest for contest in store.contests() if contest.problem.op in others}


class _Run:
    """One run of a sweep."""

    def __init__(
        self,
        sweep: Sweep,
        store: Store,
        start: Callable[[int], Measurer],
        deadline: float | None,
        notify: Callable[[Event], None],
        say: Callable[[str], None],
    ) -> None:
        self.outcome = Outcome(notes=store.notes)
        self.busy_s = 0.0
        self._sweep, self._store, self._start, self._notify, self._say = sweep, store, start, notify, say
        self._deadline = deadline
        self._process: Measurer | None = None
        self._next = store.next_process()
        s = sweep.measure
        self._rule = StoppingRule(s.min_rounds, s.max_rounds, s.seconds, s.precision, racing=s.racing)
        self._grids = [(part, grid) for part in sweep.operators for grid in grids(part)]
        for problem in store.split_problems():
            for part, grid in self._grids:
                if part.op == problem.op and grid.holds(problem):
                    grid.adopt(problem)
        self._touched: set[Contest] = set()
        self._visits: dict[Contest, int] = {}
        self._screened = False
        # On a GPU it takes ten seconds a finalist, so it has to be asked for; its worker says what it can't read.
        self._energy = s.energy if s.energy is not None else sweep.device == "cpu"
        if sweep.device == "cpu" and EnergyMeter().unavailable() is not None:
            self._energy = False
        self._tasks = self._enumerate()

    def wanted(self) -> set[Contest]:
        """All that belongs to the sweep, with held-out shapes of bins that were split since."""
        tasks = {task.contest for task in self._tasks}
        if not self._sweep.measure.held_out:
            return tasks
        known = {c for c in self._store.contests() if any(grid.holds(c.problem) for _, grid in self._grids)}
        known = {c for c in known if c.mode in self._sweep.measure.modes}
        return tasks | {c for c in known if self._store.role(c) in ("", "held_out")}

    def go(self) -> None:
        """Pass after pass, until nothing is missing or time is up."""
        while not self._late():
            todo = self._todo()
            if todo:
                self._pass(*todo)
            elif not self._split():
                break
        self.outcome.unfinished = [(t.contest.id, lack) for t in self._tasks if (lack := self._lack(t))]
        lacking = {id for id, _ in self.outcome.unfinished}
        self.outcome.measured = len(self._touched)
        self.outcome.reused = sum(
            task.contest not in self._touched and task.contest.id not in lacking for task in self._tasks
        )
        bins = [task for task in self._tasks if task.role != "held_out"]
        self.outcome.winnerless = [task.contest.id for task in bins if self._winnerless(task)]

    def close(self) -> None:
        """End the process, and put all that is known into Parquet."""
        self._end_process()
        for task in [*self._tasks, *self._outgrown()]:
            self._store.compact(task.contest, task.role, task.weight, self._candidates(task))
        self._store.retire_journal()

    def _outgrown(self) -> list[Task]:
        """Held-out shapes of bins that were split since: evidence as good as the others'."""
        known = self.wanted() - {task.contest for task in self._tasks}
        return [
            Task(contest.problem, "held_out", 0.0, part.candidates, Neighbours(), contest.mode)
            for contest in sorted(known, key=lambda each: each.id)
            for part in self._sweep.operators
            if part.op == contest.problem.op
        ]

    def _enumerate(self) -> list[Task]:
        found = []
        for part, grid in self._grids:
            asked: list[Asked] = grid.corners()
            asked += list(grid.held_out()) if self._sweep.measure.held_out else []
            for each in asked:
                neighbours = part.neighbours.get(kind_of(each.problem), Neighbours())
                if self._sweep.measure.cache != "pipeline":
                    neighbours = Neighbours()
                # One after the other in one process: what is right at once need not be checked again for a graph.
                found += [
                    Task(each.problem, each.role, each.weight, part.candidates, neighbours, mode)
                    for mode in self._sweep.measure.modes
                ]
        self._store.plan({task.contest: (task.role, task.weight) for task in found})
        pairs = ((task.problem, each) for task in found for each in task.candidates)
        compile_for(pairs, self._say, environment_of(self._sweep.device))
        return found

    # What is missing

    def _todo(self) -> tuple[list[Task], float | None] | None:
        """The problems of the next pass, and when it must end; None where nothing is lacking.

        Without a budget all that lack something come as they are. Within one, screening what was never timed
        and confirming what was take turns: the heaviest traffic is screened first, for a share of the time that
        is left, and then what matters most is confirmed first.
        """
        most = max(self._sweep.measure.processes, self._sweep.measure.max_processes) + STRIKES
        todo = [t for t in self._tasks if self._visits.get(t.contest, 0) < most and self._lack(t)]
        if self._deadline is None or not todo:
            return (todo, None) if todo else None
        seen = [t for t in todo if self._store.findings(t.contest).rounds]
        matter = {t.contest: self._matter(t) for t in todo}
        heaviest: dict[object, float] = {}
        for task in todo:
            for key in (kind_of(task.problem), task.problem):
                heaviest[key] = max(heaviest.get(key, 0.0), matter[task.contest])
        if seen and self._screened:
            self._screened = False
            if self._sweep.device == "cpu":
                return sorted(seen, key=lambda t: -matter[t.contest]), self._end()
            # Timing is short there: to draw and bind a weight again for each problem would take most of the time.
            seen.sort(key=lambda t: (-heaviest[kind_of(t.problem)], -heaviest[t.problem], t.problem.id))
            return seen, self._end()
        self._screened = True
        # Problems of one weight stay together, since it is packed once for all of them.
        unseen = [t for t in todo if t not in seen] or seen
        unseen.sort(key=lambda t: (t.role == "held_out", -heaviest[kind_of(t.problem)], -t.weight))
        now = time.monotonic()
        return unseen, now + SCREENING_SHARE * (self._end() - now)

    def _lack(self, task: Task) -> str:
        """What is still to be measured of a problem, in words; empty if nothing is."""
        return self._untimed(task) or (f"{n} energies unread" if (n := len(self._unread(task))) else "")

    def _unread(self, task: Task) -> list[str]:
        """Finalists on a GPU whose joules were never asked for."""
        if not self._energy or self._sweep.device == "cpu" or not (names := self._names(task)):
            return []
        findings = self._store.findings(task.contest)
        contenders = self._rule.contenders(findings.rounds, entrants(task.problem, names))
        finals = finalists(findings.rounds, contenders, task.default)
        return [name for name in finals if findings.found[name].energy_note == UNREAD]

    def _untimed(self, task: Task) -> str:
        """What is still to be checked and timed of it."""
        findings = self._store.findings(task.contest)
        candidates = self._candidates(task)
        unchecked = [c for c in candidates if c.id not in findings.found]
        if unchecked:
            return "not measured" if len(unchecked) == len(candidates) else f"{len(unchecked)} unchecked"
        names = self._names(task)
        if not names:
            return ""
        contenders = self._rule.contenders(findings.rounds, entrants(task.problem, names))
        # The default needs no confirmation where it has no rival left: nothing is chosen in its place.
        settings = self._sweep.measure
        wanted = settings.processes if len(contenders) > 1 else 1
        done = self._done(task, findings, names)
        if done < wanted:
            return f"timed in {done} of {wanted} processes"
        most = settings.max_processes
        if 1 < wanted <= done < most and in_doubt(findings.rounds, contenders, task.default, settings.precision):
            return f"in doubt after {done} processes, of at most {most}"
        return ""

    def _done(self, task: Task, findings: Findings, names: list[str]) -> int:
        able = entrants(task.problem, names)
        processes = {each.process for each in findings.rounds}
        return sum(self._rule.done(findings.rounds, able, p) for p in processes)

    def _names(self, task: Task) -> list[str]:
        """Candidates that may be timed; none where the default can't be."""
        findings = self._store.findings(task.contest)
        names = [
            c.id for c in self._candidates(task) if c.id in findings.found and findings.found[c.id].status == "ok"
        ]
        return names if task.default in names else []

    def _matter(self, task: Task) -> float:
        """Traffic weight x what is not known of the gain, in ns: the widest spread of a contender's ratio."""
        rounds = counted(self._store.findings(task.contest).rounds, 0)
        names = self._names(task)
        names = self._rule.contenders(rounds, entrants(task.problem, names)) if names else []
        times = {n: {r.number: r.ns[n] for r in rounds if n in r.ns} for n in names}
        own = times.get(task.default)
        if not own:
            return task.weight
        spread = 0.0
        for name in names:
            ratios = sorted(own[r] / ns for r, ns in times[name].items() if r in own)
            if name != task.default and ratios:
                quarter = len(ratios) // 4
                spread = max(spread, (ratios[-1 - quarter] - ratios[quarter]) / len(ratios) ** 0.5)
        return task.weight * median(own.values()) * spread

    def _winnerless(self, task: Task) -> bool:
        found = self._store.findings(task.contest).found
        failed = any(finding.status in (*FAULTS, "wrong_result") for finding in found.values())
        others = [name for name, finding in found.items() if finding.status == "ok" and name != task.default]
        return failed and not others

    # A pass

    def _pass(self, todo: list[Task], end: float | None) -> None:
        """Visit each problem once with a process that has not seen it, until the end."""
        self._end_process()
        for done, task in enumerate(todo, 1):
            if end is not None and time.monotonic() >= end and done > 1:
                return
            self._touched.add(task.contest)
            self._visits[task.contest] = self._visits.get(task.contest, 0) + 1
            try:
                if self._check(task):
                    self._time(task, self._until(todo[done - 1 :], end))
            except OutOfTime:
                self._end_process()
                return
            number = self._process.number if self._process else self._next
            self._notify(Event(done, len(todo), number, task.problem, self._headline(task), task.mode))

    def _until(self, left: list[Task], end: float | None) -> float | None:
        """When the visit to the first of ``left`` must end: half of the time is shared alike, half by traffic.
        What matters most has come first, so nobody waits for more than twice its share."""
        if end is None:
            return None
        now = time.monotonic()
        weights = sum(task.weight for task in left)
        share = 0.5 / len(left) + (0.5 * left[0].weight / weights if weights else 0.0)
        least = self._sweep.measure.seconds  # what it would take without a budget is never too much
        return min(self._end(), now + max(min(least, end - now), (end - now) * min(1.0, 2 * share)))

    def _end(self) -> float:
        assert self._deadline is not None
        return self._deadline - CLOSING_S * len(self._touched)

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._end()

    def _check(self, task: Task) -> bool:
        """Check every candidate that nothing is known of; False where time ran out first.

        Raises:
            BadInput: every candidate that was tried ends in the same fault.
        """
        findings = self._store.findings(task.contest)
        tried = False
        if self._sweep.device != "cpu":  # of the hundreds there most are not meant for a problem
            new = [each for each in task.candidates if each.id not in findings.found and not _searches(each)]
            if unmeant := {each.id: found for each in new if (found := _unmeant(task, each))}:
                self._store.found_all(task.contest, unmeant)
        for candidate in self._unchecked(task):
            if self._late():
                return False
            tried = True
            finding = self._excluded(task, candidate) or self._try(task, candidate)
            self._store.found(task.contest, candidate.id, finding)
        if tried:
            _refuse_broken(task, findings)
        return True

    def _candidates(self, task: Task) -> list[Candidate]:
        """A problem's candidates, with those that a search has found for it."""
        found = (Candidate.parse(name) for name in self._store.findings(task.contest).found)
        return list(dict.fromkeys((*task.candidates, *(each for each in found if _searches(each) and each.params))))

    def _unchecked(self, task: Task) -> Iterator[Candidate]:
        """Those that nothing is known of. What stands for a search comes after all that it finds, so that a sweep
        that ends between them searches again."""
        known = self._store.findings(task.contest).found
        for candidate in self._candidates(task):
            if candidate.id in known:
                continue
            if _searches(candidate) and not candidate.params:
                try:
                    searched = self._worker().search(task.problem, candidate)
                except Lost as lost:
                    self._end_process()
                    self._store.found(task.contest, candidate.id, Finding(lost.status, f"searching: {lost.reason}"))
                    continue
                yield from (each for each in searched if each.id not in known)
            yield candidate

    def _excluded(self, task: Task, candidate: Candidate) -> Finding | None:
        begun = self._store.attempts.get((task.contest, candidate.id), 0)
        if begun >= ATTEMPTS:
            return Finding("excluded", f"its check began {begun} times and never ended; --fresh tries it again")
        struck = self._store.struck(candidate, task.mode)
        if len(struck) >= STRIKES:
            how = "crashed, hung or ran out of memory" if task.mode == EAGER else "failed"
            reason = f"it {how} on {len(struck)} problems, such as {struck[0]}"
            return Finding("excluded", reason)
        return None

    def _try(self, task: Task, candidate: Candidate) -> Finding:
        finding = Finding()
        for _ in range(2):
            worker = self._worker()  # one that does not start is no attempt
            self._store.attempt(task.contest, candidate.id)
            try:
                finding, poisoned = worker.check(task.problem, candidate, task.mode)
            except OutOfTime:
                self._store.withdraw(task.contest, candidate.id)
                raise
            except Lost as lost:
                self._end_process()
                finding, poisoned = Finding(lost.status, lost.reason), False
            if poisoned or _fatal(finding):
                self._end_process()
            if finding.status != "out_of_memory":
                break
            self._end_process()  # perhaps others had left too little: once more, in a fresh process
        return finding

    def _time(self, task: Task, until: float | None) -> None:
        unnamed = False
        while names := self._names(task):
            job = Job(
                problem=task.problem,
                names=tuple(names),
                rule=self._rule,
                process=self._worker().number,
                rounds=tuple(self._store.findings(task.contest).rounds),
                until=until,
                mode=task.mode,
                before=tuple(each.beside(task.problem) for each in task.neighbours.before),
                after=tuple(each.beside(task.problem) for each in task.neighbours.after),
            )
            lost = False
            try:
                for found in self._worker().time(job):
                    if isinstance(found, list):
                        self._store.add(task.contest, found)
                    else:
                        self._reject(task, *found)
                        lost |= _of_device(found[1])
                if lost:  # the device's error stays with the process: the others go on in another one
                    self._end_process()
                    continue
                if self._energy and (self._sweep.device == "cpu" or not self._untimed(task)):
                    self._read_energy(task)
                return
            except Lost as lost:
                self._end_process()
                if lost.candidate in names:
                    self._reject(task, lost.candidate, Finding(lost.status, f"while it was timed: {lost.reason}"))
                elif unnamed:
                    raise BadInput(
                        f"{task.contest.id}: found that its process died twice with no candidate running "
                        f"({lost.reason}), expected only kernels to fail; what was measured is kept"
                    ) from None
                unnamed = lost.candidate not in names

    def _read_energy(self, task: Task) -> None:
        """Read the joules of what still contends, once; on a GPU of the fastest few of them."""
        findings, names = self._store.findings(task.contest), self._names(task)
        wanted = self._unread(task)
        if self._sweep.device == "cpu":
            wanted = self._rule.contenders(findings.rounds, entrants(task.problem, names))
        for name in wanted:
            known = findings.found[name]
            if known.energy_j is None and not self._late():
                joules, note = self._worker().joules(task.problem, name, task.mode)
                self._store.found(task.contest, name, replace(known, energy_j=joules, energy_note=note))

    def _reject(self, task: Task, name: str, finding: Finding) -> None:
        """Replace what was known of a candidate that did not stay right."""
        self._store.found(task.contest, name, finding)

    def _worker(self) -> Measurer:
        if self._process is None:
            self._process = self._start(self._next)
            self._next += 1
            self.outcome.processes += 1
        return self._process

    def _end_process(self) -> None:
        if self._process is not None:
            self.busy_s += self._process.busy_s
            self._process.close()
            self._process = None

    def _headline(self, task: Task) -> str:
        rounds = counted(self._store.findings(task.contest).rounds, 0)
        ratios = {
            name: median([r.ns[task.default] / r.ns[name] for r in both])
            for name in self._names(task)
            if (both := [r for r in rounds if name in r.ns and task.default in r.ns])
        }
        if not ratios:
            return "no candidate could be timed"
        best = max(ratios, key=lambda name: ratios[name])
        us = median([r.ns[best] for r in rounds if best in r.ns]) / 1e3
        return f"{short(best)} {ratios[best]:.2f}x ({us:.0f} us)"

    def _split(self) -> bool:
        """Split the bins that are too wide; whether there are any, and so more to measure."""
        limit = self._sweep.measure.split
        if limit is None or not self._sweep.measure.held_out:
            return False
        split = [inner.id for _, grid in self._grids for inner in self._split_grid(grid, limit)]
        self.outcome.split += split
        self._tasks = self._enumerate()
        return bool(split)

    def _split_grid(self, grid: Grid, limit: float) -> list[Problem]:
        # A bin has the same edges in every mode: it is split where it is too wide in one.
        wide: dict[tuple[Problem, Problem], None] = {}
        for mode in self._sweep.measure.modes:

            def known(problem: Problem, mode: str = mode) -> Findings:
                return self._store.findings(Contest(problem, mode))

            wide |= dict.fromkeys(wide_bins(grid.held_out(), known, limit))
        return [inner for inner, corner in wide if grid.split(corner, inner)]


def finalists(rounds: Sequence[Round], names: Sequence[str], default: str) -> list[str]:
    """The default, and of the others the ``FINALISTS`` with the best median ratio to it, the best first."""
    good = counted(rounds, 0)
    ratios = {
        name: median(both)
        for name in names
        if name != default
        and (both := [r.ns[default] / r.ns[name] for r in good if {name, default} <= r.ns.keys()])
    }
    return [default, *sorted(ratios, key=lambda name: (-ratios[name], name))[:FINALISTS]]


def _unmeant(task: Task, candidate: Candidate) -> Finding | None:
    """What a worker would find of a candidate that is not for a problem; None where it has to be asked."""
    kernel = pool.kernels()[candidate.kernel]
    try:
        # Not whether it is unavailable: that may open the device, which is for workers alone.
        if (why := kernel.objection(task.problem)) is not None:
            return Finding("unsupported", why.partition("\n")[0][:300])
        if (why := kernel.suits(task.problem, candidate.params)) is not None:
            return Finding("unsuited", why.partition("\n")[0][:300])
    except Exception:  # a kernel of somebody's own may raise anything: it does so in a worker
        return None
    return None


def _fatal(finding: Finding) -> bool:
    """Whether an exception may have left the process or its device unfit: any that Python itself does not raise
    for a wrong argument, nor our launcher for a call that it does not take or the driver refused."""
    python = ("NotImplementedError", "TypeError", "ValueError", "RuntimeError")
    ordinary = (*python, "LaunchFailed", "Declined", "declined", "Misaligned", "Missing")
    return _of_device(finding) or (finding.status == "failed" and not finding.reason.startswith(ordinary))


def _of_device(finding: Finding) -> bool:
    """Whether it is an error of a device, which may stay with the process."""
    words = ("CUDA", "cuBLAS", "HIP", "device-side", "illegal")
    refused = "LaunchFailed: " in finding.reason  # what stays has another name, and is a crash
    return finding.status == "crashed" or (
        finding.status == "failed" and not refused and any(word in finding.reason for word in words)
    )


def _searches(candidate: Candidate) -> bool:
    return pool.kernels()[candidate.kernel].search is not None


def _refuse_broken(task: Task, findings: Findings) -> None:
    """Stop where nothing works: then it is not the kernels.

    Raises:
        BadInput: see ``_Run._check``.
    """
    # What no graph can hold is no fault of the device.
    faults = FAULTS if task.mode == EAGER else tuple(each for each in FAULTS if each != "failed")
    idle = ("unsupported", "unsuited", "unavailable", "not_compiled", "excluded")
    tried = [f for c in task.candidates if (f := findings.found[c.id]).status not in idle]
    statuses = {finding.status for finding in tried}
    if len(tried) > 1 and len(statuses) == 1 and statuses <= set(faults):
        raise BadInput(
            f"{task.contest.id}: found the same fault on all {len(tried)} candidates, the framework's own among "
            f"them ({tried[0].status}: {tried[0].reason}), expected a kernel that works: the device or its "
            "libraries are broken; what was measured is kept; repair it and run again with --fresh"
        )
