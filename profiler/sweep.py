"""A sweep over a run directory: what is left to measure, in what order, within what budget."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dks.dispatch import pool
from dks.dispatch.environment import Environment
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement, read_plan, read_rows, write_rows
from dks.dispatch.kernel import source_digest
from dks.dispatch.problem import Candidate, Problem
from dks.profiler.config import Sweep
from dks.profiler.measure import Bench
from dks.profiler.timing import Rounds, StoppingRule

RUN_FILE = "_run.json"
LOCK_FILE = "_lock"


@dataclass(frozen=True, slots=True)
class Task:
    """One problem of a sweep, and the file its rows go to."""

    problem: Problem
    candidates: tuple[Candidate, ...]
    weight: float
    path: Path
    plan: str


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a sweep, for whoever shows progress."""

    done: int
    total: int
    task: Task
    rows: list[Measurement]
    reused: bool


@dataclass
class Outcome:
    """What a sweep did.

    Attributes:
        measured: problems measured now.
        reused: problems whose rows were there already.
        unfinished: problems left out because the budget ran out.
        winnerless: problems where candidates failed and nothing but the default is left.
    """

    measured: int = 0
    reused: int = 0
    unfinished: list[str] = field(default_factory=list)
    winnerless: list[str] = field(default_factory=list)


def tasks_of(sweep: Sweep, folder: Path, environment: Environment) -> list[Task]:
    """The problems of a sweep with their files. A task's plan changes with all that its rows depend on."""
    tasks = []
    digests = {id: source_digest(kernel) for id, kernel in pool.kernels().items()}
    settings = json.dumps([environment.to_dict(), dataclasses.asdict(sweep.measure)], sort_keys=True)
    for part in sweep.operators:
        known = "".join(f"{c.id}={digests[c.kernel]};" for c in part.candidates)
        for weighted in part.problems:
            text = f"{weighted.problem.id}|{weighted.weight}|{known}|{settings}"
            plan = hashlib.sha256(text.encode()).hexdigest()[:16]
            path = folder / f"{weighted.problem.slug}.parquet"
            tasks.append(Task(weighted.problem, part.candidates, weighted.weight, path, plan))
    return tasks


def run_sweep(
    sweep: Sweep,
    folder: Path,
    *,
    budget_s: float | None = None,
    fresh: bool = False,
    notify: Callable[[Event], None] = lambda _: None,
) -> Outcome:
    """Measure what ``folder`` does not hold yet; a problem's rows are on disk before the next one begins.

    Args:
        budget_s: seconds for all of it. What is left is shared among the problems left; the ones that
            don't fit are listed as unfinished.
        fresh: forget what ``folder`` holds.

    Raises:
        BadInput: ``folder`` is in use, is not a run directory, or was measured in another environment.
        OSError: the disk refuses.
    """
    if sweep.threads is not None:
        torch.set_num_threads(sweep.threads)
    environment = Environment.current(sweep.device)
    with _locked(folder):
        _refuse_strangers(folder)
        if fresh:
            _forget(folder)
        _claim(folder, sweep, environment)
        return _run(sweep, tasks_of(sweep, folder, environment), environment, budget_s, notify)


def _run(
    sweep: Sweep,
    tasks: list[Task],
    environment: Environment,
    budget_s: float | None,
    notify: Callable[[Event], None],
) -> Outcome:
    outcome = Outcome()
    settings = sweep.measure
    rounds = Rounds(StoppingRule(), random.Random(settings.seed))
    bench = Bench(environment, rounds, settings.seed)
    todo = [task for task in tasks if read_plan(task.path) != task.plan]
    deadline = None if budget_s is None else time.monotonic() + budget_s
    left = len(todo)
    for done, task in enumerate(tasks, 1):
        if task not in todo:
            rows = read_rows(task.path)
            outcome.reused += 1
            notify(Event(done, len(tasks), task, rows, reused=True))
        elif deadline is not None and time.monotonic() >= deadline:
            outcome.unfinished.append(task.problem.id)
            continue
        else:
            share = settings.seconds if deadline is None else (deadline - time.monotonic()) / left
            rounds.rule = StoppingRule(
                settings.min_rounds, settings.max_rounds, min(settings.seconds, share), settings.precision
            )
            rows = bench.measure(task.problem, task.candidates, task.weight)
            write_rows(task.path, rows, task.plan)
            outcome.measured += 1
            left -= 1
            notify(Event(done, len(tasks), task, rows, reused=False))
        if _winnerless(task, rows):
            outcome.winnerless.append(task.problem.id)
    return outcome


def _winnerless(task: Task, rows: list[Measurement]) -> bool:
    default = pool.operator(task.problem.op).default
    failed = any(row.status in ("failed", "wrong_result") for row in rows)
    return failed and not any(row.samples_ns and row.candidate != default for row in rows)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run directory for this process. The kernel drops the lock with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise BadInput(f"{folder}: can't be written ({error.strerror}); choose another -o RUN_DIR") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"{folder}: found another sweep at work in it, expected to be alone; "
                "wait for it, or choose another -o RUN_DIR"
            ) from None
        yield


def _refuse_strangers(folder: Path) -> None:
    """Refuse a directory that holds anything and is no run directory."""
    strangers = [p.name for p in folder.iterdir() if not p.name.startswith("_")]
    if strangers and not (folder / RUN_FILE).exists():
        (folder / LOCK_FILE).unlink()
        raise BadInput(
            f"{folder}: found {strangers[0]!r} in it and no {RUN_FILE}, expected a run directory or an "
            "empty one; choose another -o RUN_DIR"
        )


def _claim(folder: Path, sweep: Sweep, environment: Environment) -> None:
    """Make ``folder`` the run directory of this config and environment, or refuse."""
    path = folder / RUN_FILE
    if not path.exists():
        ours = {"config": sweep.name, "environment": environment.to_dict()}
        path.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        config, theirs = held["config"], Environment.from_dict(held["environment"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BadInput(f"{path}: {error}; use --fresh, or measure into another -o RUN_DIR") from None
    if config != sweep.name:
        raise BadInput(
            f"{folder}: found results of config {config!r}, expected {sweep.name!r}: they would end in one "
            "table; use --fresh to drop them, or another -o RUN_DIR"
        )
    different = theirs.diff(environment)
    if different:
        raise BadInput(
            f"{folder}: found results of another environment ({'; '.join(different)}), expected this one: "
            "results are never mixed; use --fresh to drop them, or another -o RUN_DIR"
        )


def set_aside(sweep: Sweep, folder: Path) -> list[str]:
    """Rename the files of problems that the whole config no longer has, so that no table takes them.

    Returns:
        their new names, which begin with ``_stale-``.
    """
    wanted = {f"{w.problem.slug}.parquet" for part in sweep.operators for w in part.problems}
    stale = sorted(path for path in folder.glob("*.parquet") if path.name not in wanted and path.name[0] != "_")
    return [path.rename(folder / f"_stale-{path.name}").name for path in stale]


def _forget(folder: Path) -> None:
    """Drop what a sweep wrote here, and nothing else."""
    for path in folder.iterdir():
        ours = path.suffix == ".parquet" and read_plan(path) is not None
        if ours or path.name == RUN_FILE or path.name.startswith("_partial-"):
            path.unlink()
