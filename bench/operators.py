"""``make bench``: every problem of the MiniLM sweep, measured again: default, chosen, oracle.

Each bin is measured at its edge and at a size between edges that no sweep saw. The choice comes from the
generated package; the oracle is the fastest candidate inside the budget, picked in the odd rounds and timed in
the even ones, so that luck does not flatter it. Kernels are timed bound and called, as the sweep times them:
what dispatching adds to a call is not in these ratios; it is in the demo's.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType

from rich.table import Table as RichTable

from bench.commands import CONFIG, PROFILE, packages, profile
from bench.report import ROOT, Row, commit, environment_lines, finite, write_result
from dks.dispatch import command_line, pool
from dks.dispatch.environment import Environment
from dks.dispatch.evidence import Measurement
from dks.dispatch.intervals import Interval, geometric_mean, paired_ratio
from dks.dispatch.problem import Candidate, Problem
from dks.profiler.bench import Bench, Job
from dks.profiler.config import Sweep, load
from dks.profiler.findings import Findings, Header, to_rows
from dks.profiler.timing import StoppingRule

BUDGET_OF = {"float32": ("minilm_exact", 1e-5), "bfloat16": ("minilm_bf16", 1e-2)}
SECONDS = 0.3  # a problem


@dataclass(frozen=True)
class Result:
    """One problem: what the table chose, and how it did against the default and the oracle."""

    problem: Problem
    where: str  # "bin" or "between"
    match: str
    chosen: str
    oracle: str
    default_us: float
    chosen_us: float
    vs_default: Interval
    vs_oracle: Interval  # oracle's time / chosen's: 1 is the oracle itself


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, help="also write the table as Markdown here")
    options = parser.parse_args()
    profile(CONFIG, PROFILE)
    tables = packages(PROFILE, ROOT / "runs" / "bench" / "out")
    sweep = load(CONFIG)
    problems = list(questions(sweep))
    bench = Bench(seed=1, cache=sweep.measure.cache)
    results = []
    start = time.monotonic()
    for done, (problem, where) in enumerate(problems, 1):
        result = measure(bench, tables, problem, where)
        results += [] if result is None else [result]
        if done % 20 == 0 or done == len(problems):
            left = (time.monotonic() - start) / done * (len(problems) - done)
            print(f"[{done}/{len(problems)}] {problem.id}  ~{left:.0f} s left", flush=True)
    report(results, options.page)


def questions(sweep: Sweep) -> Iterator[tuple[Problem, str]]:
    """Each problem of the sweep, and beside it one whose dynamic dims lie inside the bins below its own."""
    for part in sweep.operators:
        operator = pool.operator(part.op)
        for weighted in part.problems:
            problem = weighted.problem
            yield problem, "bin"
            dims = dict(problem.dims)
            for name in operator.dynamic:
                bins = part.bins[name]
                low, high = bins.bounds(bins.index(dims[name]))
                dims[name] = round(math.sqrt(low * high))  # inside the bin in ratio, as sizes spread
            if tuple(dims.items()) != problem.dims:
                yield Problem.of(problem.op, dict(problem.traits), dims, problem.align), "between"


def measure(bench: Bench, tables: Mapping[str, ModuleType], problem: Problem, where: str) -> Result | None:
    """Time every candidate inside the budget on one problem, together; None where the choice does not run."""
    name, budget = BUDGET_OF[problem.trait("dtype")]
    choice = tables[name].explain(problem.op, align=problem.align, **dict(problem.dims), **dict(problem.traits))
    kernels = pool.kernels()
    dtype = problem.trait("dtype")
    candidates = [
        c
        for c in pool.candidates_for(problem.op)
        if dtype in kernels[c.kernel].precision
        and (kernels[c.kernel].precision[dtype].limit <= budget or c.id == choice.candidate)
    ]
    rows = measured(bench, problem, candidates)
    timed = {row.candidate: row for row in rows if row.samples_ns}
    default = timed[pool.operator(problem.op).default]
    chosen = timed.get(choice.candidate)
    if chosen is None:
        found = next(row for row in rows if row.candidate == choice.candidate)
        print(f"{problem.id}: {choice.candidate} was chosen and is {found.status} here: {found.reason}")
        return None
    inside = [row for row in timed.values() if (row.error or 0.0) <= budget or row in (default, chosen)]
    oracle = min(inside, key=lambda row: median(row.samples_ns[::2]))
    against = _halves(oracle, chosen)
    return Result(
        problem=problem,
        where=where,
        match=choice.match,
        chosen=chosen.candidate,
        oracle=oracle.candidate,
        default_us=median(default.samples_ns) / 1e3,
        chosen_us=median(chosen.samples_ns) / 1e3,
        vs_default=paired_ratio(default.samples_ns, chosen.samples_ns),
        vs_oracle=against,
    )


def measured(bench: Bench, problem: Problem, candidates: Sequence[Candidate]) -> list[Measurement]:
    """Check and time these candidates in this process."""
    findings = Findings({c.id: bench.check(problem, c)[0] for c in candidates})
    # Nobody is dropped: a choice that does badly needs its samples most.
    rule = StoppingRule(20, 60, SECONDS * len(candidates), 0.01, racing=False)
    for found in bench.time(Job(problem, tuple(findings.ok()), rule, process=0)):
        if isinstance(found, list):
            findings.add(found)
        else:
            findings.found[found[0]] = found[1]
    environment = json.dumps(Environment.current().to_dict())
    return to_rows(Header(problem, "bin", 1.0, "cold", environment), findings, candidates)


def _halves(oracle: Measurement, chosen: Measurement) -> Interval:
    if oracle is chosen:
        return Interval(1.0, 1.0, 1.0, len(chosen.samples_ns) // 2)
    return paired_ratio(oracle.samples_ns[1::2], chosen.samples_ns[1::2])


def summary(results: Sequence[Result]) -> RichTable:
    """Geometric means by operator, dtype and place."""
    table = RichTable(title="geometric means over problems")
    for column in (
        "operator",
        "dtype",
        "where",
        "problems",
        "default / chosen",
        "worst",
        "best",
        "oracle / chosen",
        "worst ",
    ):
        table.add_column(column, justify="left" if column in ("operator", "dtype", "where") else "right")
    for (op, dtype, where), group in _grouped(results).items():
        gains = [r.vs_default.value for r in group]
        regrets = [r.vs_oracle.value for r in group]
        table.add_row(
            op, dtype, where, str(len(group)),
            f"{geometric_mean(gains):.3f}", f"{min(gains):.3f}", f"{max(gains):.3f}",
            f"{geometric_mean(regrets):.3f}", f"{min(regrets):.3f}",
        )  # fmt: skip
    return table


def _grouped(results: Sequence[Result]) -> dict[tuple[str, str, str], list[Result]]:
    grouped: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for result in results:
        grouped[result.problem.op, result.problem.trait("dtype"), result.where].append(result)
    return dict(sorted(grouped.items()))


COLUMNS = (
    "problem",
    "where",
    "default us",
    "chosen",
    "us",
    "default / chosen [95 % CI]",
    "oracle",
    "oracle / chosen",
)


def cells(result: Result) -> tuple[str, ...]:
    """One line of the full table."""
    traits = " ".join(f"{value}" for name, value in result.problem.traits if value not in ("yes", "no", "bshd"))
    dims = " ".join(f"{name}={size}" for name, size in result.problem.dims)
    return (
        f"{result.problem.op} {traits} {dims}",
        result.where,
        f"{result.default_us:.1f}",
        result.chosen,
        f"{result.chosen_us:.1f}",
        str(result.vs_default),
        result.oracle,
        f"{result.vs_oracle.value:.3f}",
    )


def report(results: Sequence[Result], page: Path | None) -> None:
    """Print both tables, and write runs/bench/result.json and the page."""
    full = RichTable(title="every problem: default, chosen, oracle")
    for column in COLUMNS:
        full.add_column(column, justify="left" if column in ("problem", "where", "chosen", "oracle") else "right")
    for result in results:
        full.add_row(*cells(result))
    command_line.print_table(full)
    command_line.print_table(summary(results))
    rows = [
        Row(
            f"{r.problem.slug}",
            f"{r.problem.id} ({r.where})",
            "the framework's own kernel",
            r.vs_default,
            extra={
                "chosen": r.chosen,
                "oracle": r.oracle,
                "match": r.match,
                "oracle_ratio": [finite(x) for x in (r.vs_oracle.value, r.vs_oracle.low, r.vs_oracle.high)],
                "default_us": round(r.default_us, 2),
                "chosen_us": round(r.chosen_us, 2),
            },
        )
        for r in results
    ]
    print(f"written: {write_result('bench', rows)}")
    if page is not None:
        page.write_text(markdown(results), encoding="utf-8")
        print(f"written: {page}")


def markdown(results: Sequence[Result]) -> str:
    """The page in the docs: command, environment, and every problem."""
    lines = [
        "# Every problem: default, chosen, oracle",
        "",
        "Written by `python -m bench.operators --page docs/results.md`; do not edit.",
        "",
        (__doc__ or "").split("\n\n", 1)[1].strip(),
        "",
        "Ratios are medians of interleaved pairs with 95 % intervals; above 1, the chosen kernel is faster.",
        "",
        f"- commit: {commit()}",
        *(f"- {line}" for line in environment_lines()),
        "",
        "| operator | dtype | where | problems | default / chosen | worst | oracle / chosen | worst |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for (op, dtype, where), group in _grouped(results).items():
        gains, regrets = [r.vs_default.value for r in group], [r.vs_oracle.value for r in group]
        figures = (geometric_mean(gains), min(gains), geometric_mean(regrets), min(regrets))
        shown = " | ".join(f"{figure:.3f}" for figure in figures)
        lines.append(f"| {op} | {dtype} | {where} | {len(group)} | {shown} |")
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(result)) + " |" for result in results]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
