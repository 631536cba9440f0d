"""``make bench-heldout``: regret on sizes that no choice was made from, of tables of at most 4 kernels an operator.

Sweeps ``heldout.yaml``, builds a table for each error budget, and prints its certificate: what the table chooses on
a held-out size against the best candidate that was measured there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich
from rich.table import Table

from bench.commands import command, profile
from bench.report import ROOT, Row, environment_lines, write_result
from dks.dispatch.intervals import Interval

HOME = ROOT / "runs" / "heldout"
BUDGETS = {"exact": "1e-5", "bf16": "1e-2", "int8": "5e-2"}
MOST_MEAN, MOST_P95 = 0.02, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "bench" / "heldout.yaml")
    parser.add_argument("--max-kernels", type=int, default=4, help="an operator and class [4]")
    options = parser.parse_args()
    rich.print("\n".join(environment_lines()))
    profile(options.config, HOME / "run")
    rows = []
    for name, budget in BUDGETS.items():
        limits = ("--max-error", budget, "--max-kernels", options.max_kernels)
        command("dks-codegen", "build", HOME / "run", "-o", HOME / "out", "--name", f"heldout_{name}", *limits)
        lut = json.loads((HOME / "out" / f"heldout_{name}" / "lut.json").read_text(encoding="utf-8"))
        rows += certified(name, lut["certificate"])
    show(rows)
    path = write_result("heldout", rows)
    rich.print(f"written: {path.relative_to(ROOT)}")


def certified(name: str, certificate: Mapping[str, Any]) -> list[Row]:
    """A row an operator and one for all: best time / chosen time, so that a regret of 2 % is a ratio of 0.98."""
    rows = []
    for op, part in {**certificate["operators"], "all": certificate["overall"]}.items():
        mean, low, high = part["geomean"]
        ratio = Interval(1 / (1 + mean), 1 / (1 + high), 1 / (1 + low), part["n"])
        extra = {"regret_p95": part["p95"], "regret_max": part["max"], "worst": part["worst"]}
        peer = "the best candidate measured on each"
        rows.append(Row(f"heldout-{name}-{op}", f"{op} on held-out sizes, {name}", peer, ratio, 1 / 1.02, extra))
    return rows


def show(rows: list[Row]) -> None:
    """The rows as a table of regrets."""
    table = Table(title="regret on held-out sizes, at most 4 kernels an operator and class")
    for column in ("table", "sizes and forms", "geometric mean [95 %]", "p95", "max", "inside 2 % and 5 %"):
        table.add_column(column, justify="left" if column == "table" else "right")
    for row in rows:
        assert row.ratio is not None
        mean, low, high = (1 / value - 1 for value in (row.ratio.value, row.ratio.high, row.ratio.low))
        p95, most = float(str(row.extra["regret_p95"])), float(str(row.extra["regret_max"]))
        inside = "yes" if mean <= MOST_MEAN and p95 <= MOST_P95 else "no"
        cells = (f"{mean:.2%} [{low:.2%}, {high:.2%}]", f"{p95:.1%}", f"{most:.1%}", inside)
        table.add_row(row.workload, str(row.ratio.n), *cells)
    rich.print(table)


if __name__ == "__main__":
    main()
