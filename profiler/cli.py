"""``dks-profile``: measure on this machine, look at what was measured, and say what can be measured."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from dks.dispatch import command_line, pool, room
from dks.dispatch.compiler import find_compiler
from dks.dispatch.environment import Environment, private_cache_bytes
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement, read_run
from dks.dispatch.modes import EAGER, MODES
from dks.dispatch.problem import Candidate, Problem, short
from dks.dispatch.tiles import build
from dks.profiler.config import load
from dks.profiler.counters import EnergyMeter
from dks.profiler.device import open_device
from dks.profiler.findings import Contest
from dks.profiler.forms import duration
from dks.profiler.interference import Watch, default_sources
from dks.profiler.isolation import environment_of
from dks.profiler.look import look
from dks.profiler.replay import replay as replay_run
from dks.profiler.seeds import seeded
from dks.profiler.sweep import Event, Outcome, run_sweep
from dks.profiler.timing import StoppingRule


class Duration(click.ParamType[float]):
    """Seconds, from ``90s``, ``5m`` or ``1.5h``."""

    name = "duration"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return duration(value)
        except ValueError as error:
            self.fail(f"found {value!r}, {error}", param, ctx)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dks")
def cli() -> None:
    """Measure, on this machine, every kernel that could serve an operator.

    \b
    dks-profile doctor                                  what can be measured here
    dks-profile run configs/minilm.yaml -o runs/minilm  measure; run it again to resume
    dks-profile show runs/minilm --op linear            winners and their evidence
    """


@cli.command()
@click.argument("config", type=click.Path(path_type=Path, readable=False))
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(path_type=Path, readable=False),
    help="Run directory [runs/CONFIG's name].",
)
@click.option("--device", help="cpu or cuda:0; overrides the config.")
@click.option("--ops", help="Only these operators, separated by commas.")
@click.option(
    "--budget", type=Duration(), help="Stop after this time, e.g. 5m; overrides the config. Lists what is left."
)
@click.option("--fresh", is_flag=True, help="Forget what the run directory holds.")
def run(
    config: Path, folder: Path | None, device: str | None, ops: str | None, budget: float | None, fresh: bool
) -> int:
    """Measure the problems of CONFIG. A second run measures only what is missing.

    \b
    dks-profile run configs/minilm.yaml -o runs/minilm --budget 5m
    """
    sweep = whole = load(config, device or "")
    if ops is not None:
        sweep = sweep.restrict([name for name in ops.split(",") if name])
    try:
        environment = environment_of(sweep.device)
    except ValueError as error:
        raise BadInput(str(error)) from None
    sweep = seeded(sweep, environment, click.echo)
    folder = folder or Path("runs") / sweep.name
    with _progress() as notify:
        outcome = run_sweep(
            sweep,
            folder,
            budget_s=budget if budget is not None else sweep.budget,
            fresh=fresh,
            whole=whole,
            notify=notify,
            say=click.echo,
        )
    _report(outcome, folder)
    return 1 if outcome.winnerless else 0


def _report(outcome: Outcome, folder: Path) -> None:
    for note in outcome.notes:
        click.echo(note)
    for name in outcome.stale:
        click.echo(f"set aside: {folder / name}: the config no longer has this problem")
    for id in outcome.split:
        click.echo(f"split a bin that was too wide: {id} is a representative now")
    click.echo(
        f"{outcome.measured} problems measured, {outcome.reused} reused, {len(outcome.unfinished)} unfinished "
        f"in {outcome.seconds:.0f} s and {outcome.processes} processes -> {folder}"
    )
    if outcome.processes:
        click.echo(
            f"isolation and storage took {outcome.idle_s:.1f} s of that, {outcome.idle_s / outcome.seconds:.1%}: "
            "starting processes, handing over, writing"
        )
    for id, lack in outcome.unfinished:
        click.echo(f"unfinished: {id}: {lack}")
    for id in outcome.winnerless:
        click.echo(f"only the default is left: {id}; see dks-profile show {shlex.quote(str(folder))}")
    click.echo(f"next: dks-codegen build {shlex.quote(str(folder))} -o OUT_DIR --name NAME")


def _contest(event: Event) -> str:
    return Contest(event.problem, event.mode).id


@contextmanager
def _progress() -> Iterator[Callable[[Event], None]]:
    """A bar with an ETA on a terminal, one plain line a problem elsewhere; both still while kernels are timed."""
    console = Console()
    if not console.is_terminal:
        start = [time.monotonic()]

        def line(event: Event) -> None:
            if event.done == 1:
                start[0] = time.monotonic()
            left = (event.total - event.done) * (time.monotonic() - start[0]) / max(1, event.done - 1)
            click.echo(
                f"[{event.done}/{event.total}] process {event.process}: {_contest(event)}  {event.headline}"
                + (f"  ~{left:.0f} s left of this pass" if event.done > 1 else "")
            )

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # A thread that redraws the bar would be a neighbour to the kernels.
    with Progress(*columns, console=console, auto_refresh=False) as bar:
        passes: dict[int, TaskID] = {}

        def advance(event: Event) -> None:
            if event.done == 1 or not passes:
                passes.clear()
                passes[0] = bar.add_task(f"process {event.process}", total=event.total)
            bar.update(passes[0], completed=event.done)
            bar.console.print(escape(f"{_contest(event)}  {event.headline}"), highlight=False)
            bar.refresh()

        yield advance


@cli.command()
@click.argument("folder", metavar="RUN_DIR", type=click.Path(path_type=Path, readable=False))
@click.option("--op", help="Only this operator.")
def show(folder: Path, op: str | None) -> int:
    """Show the fastest candidate of each problem, its ratio to the default, and every failure. At any time: what a
    sweep that is at work or was killed has acknowledged is shown as unfinished.

    \b
    dks-profile show runs/minilm --op linear
    """
    found = look(folder)
    rows = [row for row in found.rows if row.op in pool.operators()]
    if op is not None:
        try:
            pool.operator(op)
        except KeyError as error:
            raise BadInput(str(error.args[0])) from None
        rows = [row for row in rows if row.op == op]
        if not rows:
            look_at = f"dks-profile show {shlex.quote(str(folder))}"
            raise BadInput(f"{folder}: found no measurements of {op}, expected some; see {look_at}")
    contests: dict[tuple[str, str], list[Measurement]] = {}
    for row in rows:
        contests.setdefault((row.problem, row.mode), []).append(row)
    problems = len({problem for problem, _ in contests})
    unfinished = {(contest.problem.id, contest.mode) for contest in found.unfinished}
    title = f"{folder}: {problems} problems, {len(rows)} candidates measured"
    table = Table(title=f"{title}\nunfinished: {found.state}" if found.state else title)
    texts = ("problem", "mode", "role", "class", "fastest")
    for column in (
        *texts,
        "default us",
        "us",
        "ratio [95 % CI]",
        "error",
        "n",
        "processes",
        *(("state",) if found.state else ()),
    ):
        table.add_column(column, justify="left" if column in texts else "right")
    for problem, mode in sorted(contests, key=lambda each: (_problem_order(each[0]), each[1])):
        for cells in _show_problem(problem, contests[problem, mode]):
            table.add_row(*cells, *(("unfinished" * ((problem, mode) in unfinished),) if found.state else ()))
    command_line.print_table(table)
    _show_disturbed(rows)
    _show_failures(rows)
    for line in found.notes:
        click.echo(line)
    if found.damaged:
        raise BadInput("; ".join(found.damaged))
    return 0


def _show_disturbed(rows: list[Measurement]) -> None:
    """How much was thrown away: rounds of the framework's own kernel, which takes part in all of them."""
    flags = [flag for row in rows if row.candidate == pool.operator(row.op).default for flag in row.disturbed]
    if flags:
        click.echo(
            f"{sum(flags)} of {len(flags)} rounds were disturbed by others ({sum(flags) / len(flags):.1%}): "
            "marked, repeated, and left out of every figure where enough others are left"
        )


def _problem_order(text: str) -> tuple[object, ...]:
    problem = Problem.parse(text)
    return (problem.op, problem.traits, tuple(size for _, size in reversed(problem.dims)), problem.align)


def _show_problem(problem: str, rows: list[Measurement]) -> Iterator[tuple[str, ...]]:
    """The fastest candidate of each precision class."""
    default = next((row for row in rows if row.candidate == pool.operator(row.op).default), rows[0])
    timed = [row for row in rows if row.status == "ok" and row.ratio is not None]
    if not timed:
        yield (escape(problem), default.mode, "", "", "none could be timed", "", "", "", "", "", "")
    for precision in ("exact", "bf16", "int8", "int4"):
        group = [row for row in timed if row.precision == precision]
        if not group:
            continue
        best = max(group, key=lambda row: row.ratio or 0.0)
        yield (
            escape(problem),
            best.mode if problem else "",
            best.role.replace("_", " ") if problem else "",
            precision,
            short(best.candidate),
            f"{(default.median_ns or 0) / 1e3:.1f}",
            f"{(best.median_ns or 0) / 1e3:.1f}",
            f"{best.ratio:.2f} [{best.ratio_low or 0:.2f}, {best.ratio_high or float('inf'):.2f}]",
            f"{best.error:.1e}",
            str(len(best.samples_ns)),
            str(len(set(best.processes))),
        )
        problem = ""


def _show_failures(rows: list[Measurement]) -> None:
    seen: dict[tuple[str, str, str, str, str], tuple[set[str], set[str]]] = {}
    for row in rows:
        if row.status != "ok":
            key = (row.op, Candidate.parse(row.candidate).kernel, row.mode, row.status, row.reason)
            candidates, problems = seen.setdefault(key, (set(), set()))
            candidates.add(row.candidate)
            problems.add(row.problem)
    for (op, kernel, mode, status, reason), (candidates, problems) in sorted(seen.items()):
        which = candidates.pop() if len(candidates) == 1 else f"{kernel} ({len(candidates)} candidates)"
        which += "" if mode == EAGER else f" in {mode} mode"
        click.echo(f"{op} {which}: {status} on {len(problems)} problems: {reason}")


@cli.command()
def doctor() -> int:
    """Say what this machine can profile, and why not the rest.

    \b
    dks-profile doctor
    """
    environment = Environment.current()
    for name, value in environment.to_dict().items():
        click.echo(f"{name:>10}: {value}")
    cache = private_cache_bytes()
    click.echo(f"{'cache':>10}: {f'{cache} bytes private to a core' if cache else 'unknown: 2 MiB is assumed'}")
    click.echo(
        f"{'energy':>10}: {EnergyMeter().unavailable() or 'read from RAPL: the packages, their idle power in it'}"
    )
    blind = Watch().unavailable()
    click.echo(
        f"{'watched':>10}: interference by {', '.join(s.name for s in default_sources() if s.name not in blind)}"
    )
    for name, reason in blind.items():
        click.echo(f"{'':>10}  not by {name}: {reason}")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    click.echo(f"{'gpus':>10}: {', '.join(gpus) or 'none that PyTorch sees'}")
    for name in gpus:
        _describe_gpu(name)
    command, lack = find_compiler()
    click.echo(f"{'compiler':>10}: {' '.join(command) or f'{lack}: generated kernels can not be measured'}")
    click.echo(
        f"{'compiling':>10}: at most {room.at_once(room.CXX_BYTES)} at once: {room.cpus()} CPUs and "
        f"{room.memory() / 1e9:.1f} GB of memory may be used"
    )
    click.echo(f"{'compiled':>10}: {build.closed() or f'kept in {build.cache()}'}")
    table = Table(title="kernels")
    for column in ("operator", "kernel", "precision", "weight form", "device", "here"):
        table.add_column(column)
    for op in pool.operators():
        for kernel in pool.kernels_for(op):
            classes = ", ".join(f"{dtype}: {p.value}" for dtype, p in kernel.precision.items())
            devices = [device for device in ("cpu", "cuda") if kernel.runs_on(device)]
            here = "cpu" in devices or gpus
            why = kernel.unavailable() if here else "it is for GPUs, and PyTorch sees none"
            answer = "yes" if why is None else f"no: {why}"
            table.add_row(op, kernel.id, classes, kernel.form or "-", " ".join(devices), answer)
    command_line.print_table(table)
    return 0


def _describe_gpu(name: str) -> None:
    gpu = open_device(name)
    click.echo(f"{name:>10}: {Environment.current(name).arch}")
    click.echo(
        f"{'':>10}  energy: {gpu.no_energy() or 'read from NVML, idle power in it, over 10 s for finalists'}"
    )
    for mode in MODES:
        blind = Watch(gpu.sources(mode)).unavailable()
        seen = [source.name for source in gpu.sources(mode) if source.name not in blind]
        click.echo(f"{'':>10}  {mode} calls watched for interference by {', '.join(seen) or 'nothing'}")
        for source, reason in blind.items():
            click.echo(f"{'':>10}    not by {source}: {reason}")


@cli.command()
@click.argument("folder", metavar="RUN_DIR", type=click.Path(path_type=Path, readable=False))
@click.option("--min-rounds", type=click.IntRange(2), default=10, show_default=True, help="As in a config.")
@click.option("--max-rounds", type=click.IntRange(2), default=100, show_default=True, help="As in a config.")
@click.option(
    "--precision", type=click.FloatRange(1e-6, 1), default=0.02, show_default=True, help="As in a config."
)
def replay(folder: Path, min_rounds: int, max_rounds: int, precision: float) -> int:
    """Say what racing would have cost and chosen in RUN_DIR, a run measured with racing: false. Needs no device.

    \b
    dks-profile replay runs/exhaustive --precision 0.01
    """
    rule = StoppingRule(min_rounds, max_rounds, seconds=3600.0, precision=precision)
    found = replay_run(read_run(folder), rule)
    table = Table(title=f"{folder}: {found.problems} problems replayed, {found.cells} choices")
    for column in ("rule", "kernel seconds", "half-width of the chosen ratio"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for label, seconds, width in zip(("racing", "exhaustive"), found.kernel_s, found.width, strict=True):
        table.add_row(label, f"{seconds:.2f}", f"{width:.2%}")
    command_line.print_table(table)
    regret, saved = found.regret, found.saved
    click.echo(
        f"racing takes {saved.value:.1f}x [{saved.low:.1f}, {saved.high:.1f}] fewer kernel seconds; "
        f"regret of its choices {regret.value:.2%} [{regret.low:.2%}, {regret.high:.2%}] in the geometric mean, "
        f"{found.worst:.2%} at worst; "
        f"{found.same} of {found.cells} choices are those of the exhaustive sweep"
    )
    return 0


def main() -> None:
    """The command's entry point."""
    command_line.run(cli, kept="what was measured is kept; run it again to resume")


if __name__ == "__main__":
    main()
