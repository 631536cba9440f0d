"""``make bench-replay``: what racing saves and costs, replayed on a record of every candidate to the end."""

from __future__ import annotations

import sys

import rich

from bench.commands import command
from bench.report import ROOT, Row, environment_lines, write_result
from dks.dispatch.evidence import read_run
from dks.profiler.forms import Measure
from dks.profiler.replay import replay
from dks.profiler.timing import StoppingRule

CONFIG = ROOT / "bench" / "exhaustive.yaml"
RECORD = ROOT / "runs" / "exhaustive"
LEAST_SAVED = 8.0
MOST_REGRET = 0.01


def main() -> None:
    rich.print("\n".join(environment_lines()))
    command("dks-profile", "run", CONFIG, "-o", RECORD)
    shipped = Measure()
    rule = StoppingRule(shipped.min_rounds, shipped.max_rounds, seconds=3600.0, precision=shipped.precision)
    found = replay(read_run(RECORD), rule)
    command(
        "dks-profile", "replay", RECORD, "--min-rounds", rule.min_rounds,
        "--max-rounds", rule.max_rounds, "--precision", rule.precision,
    )  # fmt: skip
    extra: dict[str, object] = {
        "racing_kernel_s": found.kernel_s[0],
        "exhaustive_kernel_s": found.kernel_s[1],
        "regret": found.regret.value,
        "regret_low": found.regret.low,
        "regret_high": found.regret.high,
        "regret_worst": found.worst,
        "choices": found.cells,
    }
    workload = f"{found.problems} problems of {CONFIG.name}, all candidates"
    row = Row("racing", workload, "the same rule without racing", found.saved, LEAST_SAVED, extra)
    print(write_result("replay", [row]))
    sys.exit(0 if found.saved.value >= LEAST_SAVED and found.regret.value <= MOST_REGRET else 1)


if __name__ == "__main__":
    main()
