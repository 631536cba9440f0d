"""From cells to rows, the table and the result file; what runs a GPU benchmark from the command line."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType

import torch
from rich.table import Table

from bench.cells import geomean
from bench.gpu import ALL, HOME, OURS, Bench, Cell, Gpu, NotHere
from bench.report import Row, commit, finite, write_result
from dks.dispatch import command_line
from dks.dispatch.environment import Environment
from dks.dispatch.intervals import Interval, geometric_mean, paired_ratio


def row(
    id: str,
    words: str,
    peer: str,
    cells: Sequence[Cell],
    target: float | None,
    how: str = "each",
    note: str = "",
) -> Row:
    """A row over cells of one mode.

    Args:
        how: ``each``, the geometric mean of the cells' ratios; ``worst``, the lowest; ``weighted``, the ratio of
            their times summed by weight.
    """
    pairs = [(cell, ratio) for cell in cells if (ratio := cell.ratio(peer)) is not None]
    notes = [note] if note else []
    if len(pairs) < len(cells):
        reasons = sorted({why for cell in cells for who, why in cell.lost.items() if who in (peer, OURS, ALL)})
        notes.append(f"{peer} or {OURS} missing in {len(cells) - len(pairs)} of {len(cells)} cells")
        notes += reasons[:3]
    if not pairs:
        return Row(id, words, peer, None, target, {"note": "; ".join(notes or ["nothing measured"])})
    lowest, least = min(pairs, key=lambda pair: pair[1].value)
    ways = {"each": lambda: geomean([ratio for _, ratio in pairs]), "worst": lambda: least}
    shown = ways.get(how, lambda: _weighted(pairs, peer))()
    of = [lowest] if how == "worst" else [cell for cell, _ in pairs]
    extra: dict[str, object] = {
        "mode": cells[0].mode,
        "ours_us": finite(geometric_mean([cell.us(OURS) for cell in of])),
        "peer_us": finite(geometric_mean([cell.us(peer) for cell in of])),
        "worst": finite(least.value),
        "worst_cell": lowest.name,
        "cells": [_cell_json(cell, ratio, peer) for cell, ratio in pairs],
        "note": "; ".join(notes),
    }
    return Row(id, words, peer, shown, target, extra)


def _weighted(pairs: Sequence[tuple[Cell, Interval]], peer: str) -> Interval:
    """Round by round all cells' times, each as often as its weight: as if one round were one pass of them all."""
    rounds = range(min(ratio.n for _, ratio in pairs))
    sums = [[sum(cell.weight * cell.ns[who][i] for cell, _ in pairs) for i in rounds] for who in (peer, OURS)]
    return paired_ratio(*sums)


def _cell_json(cell: Cell, ratio: Interval, peer: str) -> dict[str, object]:
    return {
        "cell": cell.name,
        "weight": cell.weight,
        **cell.figures,
        "ratio": finite(ratio.value),
        "ci_low": finite(ratio.low),
        "ci_high": finite(ratio.high),
        "pairs": ratio.n,
        "ours_us": finite(cell.us(OURS)),
        "peer_us": finite(cell.us(peer)),
    }


def report(name: str, rows: Sequence[Row], notes: Sequence[str], environment: Environment) -> None:
    """Print the table and write runs/gpu-NAME/result.json."""
    table = Table(title=f"GPU: {name}, {environment.arch}")
    for column in ("row", "workload", "peer"):
        table.add_column(column)
    for column in ("peer us", "ours us", "ratio [95 % CI]", "worst", "target", "met"):
        table.add_column(column, justify="right")
    table.add_column("note")
    for each_ in rows:
        table.add_row(*_shown(each_))
    command_line.print_table(table)
    for note in notes:
        print(note)
    print(f"written: {write_result(f'gpu-{name}', rows, notes, environment)}")


def _shown(row: Row) -> tuple[str, ...]:
    figures = [row.extra.get(name) for name in ("peer_us", "ours_us", "worst")]
    met = "" if row.ratio is None or row.target is None else "yes" if row.ratio.value >= row.target else "no"
    peer, ours, worst = (f"{value:.3g}" if isinstance(value, float) else "" for value in figures)
    target = "" if row.target is None else f"{row.target:g}"
    ratio = str(row.ratio or "not measured")
    return row.id, row.workload, row.peer, peer, ours, ratio, worst, target, met, str(row.extra.get("note", ""))


def is_built(name: str) -> bool:
    """Whether there is a package ``runs/gpu/out/NAME``."""
    return (HOME / "out" / name / "manifest.json").is_file()


def package(name: str) -> ModuleType:
    """The generated package ``runs/gpu/out/NAME``. Raises NotHere where it is not built or does not load."""
    out = HOME / "out"
    if not is_built(name):
        raise NotHere(f"needs the package {name} in {out}; run scripts/gpu_campaign.sh codegen after its sweep")
    if str(out) not in sys.path:
        sys.path.insert(0, str(out))
    try:
        found = importlib.import_module(name)
    except Exception as error:  # of a package that does not belong here, each in its own words
        raise NotHere(f"the package {name} does not load: {str(error).splitlines()[0]}") from None
    if (table := found.stats()["table"]) != "serving":
        raise NotHere(f"the package {name} would measure the framework against itself: its table is {table}")
    return found


def stamp(*packages: str) -> list[str]:
    """What cells on disk depend on: this commit, and the packages' bytes."""
    digests = [
        hashlib.sha256((HOME / "out" / name / "manifest.json").read_bytes()).hexdigest() for name in packages
    ]
    return [commit(), *digests]


def served_by(name: str, ops: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """How many calls of this process a package's rules served, and why the framework served the others."""
    parts = [
        f"{op} {sum(found['hits'].values())} hits, "
        + (", ".join(f"{count} {reason}" for reason, count in found["fallbacks"].items()) or "no fallbacks")
        for op, found in ops.items()
    ]
    return f"{name}: {'; '.join(parts) or 'not called'}"


def gpu_state() -> str:
    """Clocks, temperature, power and throttle reasons in nvidia-smi's words, or why they are not known."""
    fields = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"
    return f"nvidia-smi ({fields}): {done.stdout.strip()}"


def run(
    name: str,
    description: str,
    rows: Callable[[Bench], Iterable[Row]],
    packages: Sequence[str] = (),
    words: Sequence[str] | None = None,
) -> int:
    """A benchmark's main function: exit code 0, or 2 with one line where it can't be run here."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=420.0, help="for measuring what is missing [420]")
    options = parser.parse_args(words)
    try:
        gpu = Gpu()
        for each_ in packages:
            package(each_)
        bench = Bench(gpu, name, options.seconds, stamp(*packages))
        before = gpu_state()
        with torch.no_grad():
            found = list(rows(bench))
    except NotHere as error:
        print(f"bench gpu-{name}: {error}", file=sys.stderr)
        return 2
    served = [served_by(each_, package(each_).stats()["ops"]) for each_ in packages]
    notes = [*bench.notes, *served, f"before: {before}", f"after: {gpu_state()}"]
    report(name, found, notes, Environment.current("cuda:0"))
    return 0
