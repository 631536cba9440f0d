"""``make bench-aa`` and ``make bench-agree``: does the sweep invent winners, and does it say the same twice?

``aa`` sweeps the framework's own kernel against copies of itself: every winner is false. ``agree`` sweeps the same
problems twice into two run directories and compares what each would choose, on the samples of both. Either can
be done while other processes keep the cores busy (``--busy 2``).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import rich

from bench.report import ROOT, Row, environment_lines, write_result
from dks.codegen.admission import forms
from dks.codegen.choose import choose
from dks.codegen.policy import Policy
from dks.dispatch import pool
from dks.dispatch.evidence import Measurement, paired, read_run
from dks.dispatch.intervals import Interval, block_ratio
from dks.dispatch.problem import Problem
from dks.profiler.config import Sweep, load
from dks.profiler.sweep import Event, run_sweep

WITHIN = 0.02  # choices closer than this agree
HOME = ROOT / "runs" / "trust"
BUDGETS = {"float32": 1e-5, "bfloat16": 1e-2}
SPIN = "while True: pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("aa", "agree"))
    parser.add_argument("--config", type=Path)
    parser.add_argument("--busy", type=int, default=0, help="processes that keep a core busy meanwhile [0]")
    options = parser.parse_args()
    rich.print("\n".join(environment_lines()))
    if options.what == "aa":
        os.environ[pool.MORE_KERNELS] = "bench.same"
        ok = false_winners(options.config or ROOT / "bench" / "aa.yaml", options.busy)
    else:
        ok = agreement(options.config or ROOT / "bench" / "agree.yaml", options.busy)
    sys.exit(0 if ok else 1)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep as many processes busy meanwhile."""
    neighbours = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def measured(sweep: Sweep, folder: Path) -> Mapping[Problem, list[Measurement]]:
    """A fresh sweep, without held-out shapes: every problem is a choice here. By problem, ``bin`` its role."""
    sweep = replace(sweep, measure=replace(sweep.measure, held_out=False))

    def say(event: Event) -> None:
        if event.done % 20 == 0 or event.done == event.total:
            print(f"process {event.process}: {event.done}/{event.total}", flush=True)

    outcome = run_sweep(sweep, folder, fresh=True, notify=say, say=print)
    print(f"{folder}: {outcome.measured} problems in {outcome.seconds:.0f} s, {outcome.processes} processes")
    found: dict[Problem, list[Measurement]] = {}
    for row in read_run(folder):
        found.setdefault(Problem.parse(row.problem), []).append(row)
    return found


def false_winners(config: Path, neighbours: int) -> bool:
    """Print how many problems chose a copy over the original."""
    with busy(neighbours):
        found = measured(load(config), HOME / f"aa-{neighbours}")
    rows = []
    for name, policy in (
        ("the shipped policy", Policy(max_error=1e-2)),
        ("no overhead counted", Policy(max_error=1e-2, overhead_ns=0.0)),
        ("no overhead, no tie", Policy(max_error=1e-2, overhead_ns=0.0, tie=0.0)),
    ):
        chosen = {p: choose(p, forms(p.op)[0], measured, policy).candidate for p, measured in found.items()}
        false = [p for p, candidate in chosen.items() if candidate.startswith("same.")]
        rate = len(false) / len(found)
        print(f"{name}: {len(false)} false winners on {len(found)} problems: {rate:.2%}")
        for problem in false:
            print(f"  {problem.id}: {chosen[problem]}")
        extra: dict[str, object] = {"false": len(false), "problems": len(found), "rate": rate, "busy": neighbours}
        rows.append(Row(f"aa {name}", f"A/A sweep of {config.name}", "itself", None, None, extra))
    write_result(f"trust/result-aa-{neighbours}", rows)
    return float(rows[0].extra["rate"]) <= 0.01  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cell:
    """What two sweeps chose for one problem; ratio: time of the one's choice / time of the other's."""

    problem: Problem
    choices: tuple[str, str]
    ratio: Interval

    @property
    def apart(self) -> float:
        """How far the choices are apart, as a share of the time."""
        return max(self.ratio.value, 1 / self.ratio.value) - 1

    @property
    def agrees(self) -> bool:
        """Whether they are within the share, as measured in both sweeps."""
        return self.apart <= WITHIN


def agreement(config: Path, neighbours: int) -> bool:
    """Sweep twice and print on how many problems the choices agree."""
    with busy(neighbours):
        one, other = (measured(load(config), HOME / f"agree-{neighbours}-{name}") for name in "ab")
    cells = list(compared(one, other))
    same = sum(cell.choices[0] == cell.choices[1] for cell in cells)
    within = [cell for cell in cells if cell.agrees]
    beyond = [cell for cell in cells if not cell.agrees]
    sure = [c for c in beyond if c.ratio.low > 1 + WITHIN or c.ratio.high < 1 / (1 + WITHIN)]
    share = len(within) / len(cells)
    print(
        f"{len(cells)} choices: {same} the same, {len(within)} ({share:.1%}) within {WITHIN:.0%} of each other; "
        f"of the {len(beyond)} others {len(sure)} differ by more with 95 % confidence"
    )
    for cell in sorted(beyond, key=lambda cell: -cell.apart):
        print(f"  {cell.problem.id}: {cell.choices[0]} / {cell.choices[1]}: {cell.ratio}")
    extra: dict[str, object] = {
        "choices": len(cells), "same": same, "within": len(within), "share": share,
        "confidently_apart": len(sure), "busy": neighbours,
    }  # fmt: skip
    row = Row(f"agree busy={neighbours}", f"two sweeps of {config.name}", "the other sweep", None, None, extra)
    write_result(f"trust/result-agree-{neighbours}", [row])
    return share >= 0.99


def compared(
    one: Mapping[Problem, Sequence[Measurement]], other: Mapping[Problem, Sequence[Measurement]]
) -> Iterator[Cell]:
    """The choices of two sweeps, for each problem that both have, in the form that a model calls."""
    for problem in one.keys() & other.keys():
        policy = Policy(max_error=BUDGETS[problem.trait("dtype")])
        form = forms(problem.op)[0]
        both = (one[problem], other[problem])
        choices = [choose(problem, form, rows, policy).candidate for rows in both]
        if choices[0] == choices[1]:
            yield Cell(problem, (choices[0], choices[1]), Interval(1.0, 1.0, 1.0, 0))
            continue
        blocks: list[list[tuple[int, int]]] = []
        for rows in both:
            by_name = {row.candidate: row for row in rows}
            blocks += paired(by_name[choices[0]], by_name[choices[1]])
        yield Cell(problem, (choices[0], choices[1]), block_ratio(blocks))


if __name__ == "__main__":
    main()
