"""kill -9 at any moment: what was acknowledged is there, once. ``DKS_SOAK=1`` makes a thousand kills of it."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from dks.dispatch.evidence import read_run
from dks.dispatch.problem import Problem
from dks.profiler.config import load
from dks.profiler.findings import Finding, Round
from dks.profiler.store import Store
from dks.profiler.sweep import run_sweep
from tests.profiler.fakes import FakeMachine

KILLS = 1000 if os.environ.get("DKS_SOAK") else 40

CONFIG = """
version: 1
name: killed
operators:
  linear:
    bins: {m: {scheme: explicit, edges: [1, 8, 64]}}
    problems:
      - {dims: {n: 32, k: 32}, traits: {dtype: float32, epilogue: gelu}}
    candidates: ["torch.*"]
measure: {min_rounds: 10, max_rounds: 20, processes: 2}
"""

Acknowledged = set[tuple[Any, ...]]


def child(config: Path, folder: Path, acknowledge: int, seed: int) -> None:
    """A sweep that says on a pipe what the run directory has taken, and is killed some time."""
    found, add = Store.found, Store.add

    def say(*words: Any) -> None:
        os.write(acknowledge, (json.dumps(words) + "\n").encode())

    def saying_found(self: Store, problem: Problem, candidate: str, finding: Finding) -> None:
        found(self, problem, candidate, finding)
        say("found", problem.id, candidate)

    def saying_add(self: Store, problem: Problem, rounds: list[Round]) -> None:
        add(self, problem, rounds)
        for each in rounds:
            for candidate, ns in each.ns.items():
                say("sample", problem.id, candidate, each.number, ns)

    Store.found, Store.add = saying_found, saying_add  # type: ignore[method-assign,assignment]
    machine = FakeMachine(seed=seed)
    run_sweep(load(config), folder, start=machine.start)


def run_and_kill(config: Path, folder: Path, after_s: float, seed: int) -> tuple[Acknowledged, bool]:
    """What one sweep was told is kept, and whether it came to its end before it was killed."""
    theirs, ours = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(theirs)
            child(config, folder, ours, seed)
            code = 0
        finally:
            os._exit(code)
    os.close(ours)
    time.sleep(after_s)
    os.kill(pid, signal.SIGKILL)
    with os.fdopen(theirs) as pipe:
        lines = pipe.read().splitlines(keepends=True)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL), f"the sweep failed by itself: {status}"
    return {tuple(json.loads(line)) for line in lines if line.endswith("\n")}, status == 0


def test_no_kill_loses_or_doubles_what_was_acknowledged(tmp_path: Path) -> None:
    config = tmp_path / "killed.yaml"
    config.write_text(CONFIG)
    rng = random.Random(7)
    kills = sweeps = 0
    longest = 0.05
    while kills < KILLS:
        folder = tmp_path / f"run{sweeps}"
        acknowledged: Acknowledged = set()
        finished = False
        while not finished:
            told, finished = run_and_kill(config, folder, rng.uniform(0, longest), kills)
            kills += not finished
            acknowledged |= told
            longest = min(1.0, longest * 1.05) if not finished and not told else max(0.02, longest * 0.98)
        rows = read_run(folder)
        kept = [("found", row.problem, row.candidate) for row in rows]
        kept += [
            ("sample", row.problem, row.candidate, number, ns)
            for row in rows
            for number, ns in zip(row.rounds, row.samples_ns, strict=True)
        ]
        assert len(kept) == len(set(kept)), "doubled"
        assert not acknowledged - set(kept), "lost"
        numbers = {(p, c, n) for kind, p, c, n, *_ in (k for k in kept if k[0] == "sample")}
        assert len(numbers) == sum(k[0] == "sample" for k in kept)
        sweeps += 1
    print(f"{kills} kills over {sweeps} sweeps: 0 lost, 0 doubled")
