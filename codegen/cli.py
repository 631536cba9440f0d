"""``dks-codegen``: select from measurements, generate the package, check it, and explain a choice."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from dks.codegen.admission import forms
from dks.codegen.certificate import Certificate, caveats, describe, interval_words, percent
from dks.codegen.lut import Invariant, Lut
from dks.codegen.package import build as build_package
from dks.codegen.package import check_destination, check_package_name
from dks.codegen.policy import load_policy
from dks.codegen.select import select
from dks.dispatch import command_line, pool
from dks.dispatch.environment import Environment
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import read_run
from dks.dispatch.loader import import_package
from dks.dispatch.manifest import MANIFEST, dead_kernels, intact, misfits
from dks.dispatch.modes import mode_of

_ARGUMENT = re.compile(r"([a-z_]+)=([a-z0-9_]+)\Z")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dks")
def cli() -> None:
    """Turn measurements into a static dispatch package.

    \b
    dks-codegen build runs/minilm -o out --name minilm_exact --max-error 1e-5
    dks-codegen check out
    dks-codegen explain out linear m=17 n=384 k=384
    """


@cli.command()
@click.argument(
    "run_dirs", metavar="RUN_DIR...", nargs=-1, required=True, type=click.Path(path_type=Path, readable=False)
)
@click.option(
    "-o",
    "--output",
    "out",
    required=True,
    type=click.Path(path_type=Path, readable=False),
    help="Where the package goes.",
)
@click.option("--name", required=True, help="The package's import name.")
@click.option("--max-error", type=float, help="Relative error a kernel may show against float64 [1e-2].")
@click.option(
    "--objective",
    default="latency",
    show_default=True,
    help="latency, throughput, energy, memory, or a YAML file with a policy's fields.",
)
@click.option(
    "--max-regret",
    type=float,
    help="Build only if the 95th percentile of the regret on held-out shapes is at most this, such as 0.05.",
)
@click.option(
    "--max-kernels",
    type=int,
    help="Choose at most so many kernels for an operator, form and dtype, the framework's own counted [8].",
)
@click.option(
    "--batch-invariant",
    is_flag=True,
    default=None,
    help="One kernel for all sizes of a layer: a row's result has the same bits in every batch. Prints its price.",
)
@click.option("--device", help="Build for results of another machine: the arch they name, in full.")
def build(
    run_dirs: tuple[Path, ...],
    out: Path,
    name: str,
    objective: str,
    device: str | None,
    **limits: Any,
) -> int:
    """Select winners from RUN_DIR... and generate OUT_DIR/NAME.

    Held-out shapes of the run certify the choices: regret is how much longer the chosen candidate takes than
    the best one on a shape that no choice was made from.

    \b
    dks-codegen build runs/minilm -o out --name minilm_exact --max-error 1e-5
    dks-codegen build runs/minilm -o out --name minilm_exact --max-regret 0.05
    """
    check_package_name(name)
    check_destination(out, name)
    policy = load_policy(objective, **limits)
    rows = [row for folder in run_dirs for row in read_run(folder)]
    lut = select(rows, policy)
    _check_device(lut.environment, device)
    built = build_package(lut, rows, out, name)
    _print_summary(lut)
    _print_few(lut)
    broken = _print_invariant(lut)
    _print_certificate(lut.certificate)
    state = "built" if built.changed else "unchanged"
    click.echo(
        f"{built.folder}: {state}; {len(lut.rules)} rules, error at most {policy.max_error:g}, {policy.objective}"
    )
    click.echo(
        f"lookup: {built.lookup}" if built.lookup == "compiled" else f"lookup: Python form only: {built.lookup}"
    )
    click.echo(f"kernels: {built.kernels}")
    if built.caution:
        click.echo(f"it won't be loaded from there: {built.caution}", err=True)
    for dtype, us in lut.expected_us.items():
        click.echo(
            f"expected time of a model call, weighted by traffic, with {dtype} activations: {us / 1e3:.3f} ms"
        )
    return 1 if broken else 0


def _check_device(measured: Environment, wanted: str | None) -> None:
    if wanted is not None:
        if measured.arch != wanted:
            raise BadInput(f"device: found results of {measured.arch!r}, expected {wanted!r}")
        return
    here = Environment.current(measured.device) if measured.device == "cpu" else None
    if here is None or here.machine != measured.machine:
        raise BadInput(
            f"measurements: found results of another device ({measured.machine}), expected this one "
            f"({'none such here' if here is None else here.machine}); measure here, or name it: "
            f"--device {measured.arch!r}"
        )


def _print_summary(lut: Lut) -> None:
    table = Table(title="chosen candidates, by how many bins chose them")
    for column in ("operator", "form", "traits", "static dims", "candidates"):
        table.add_column(column)
    for group in lut.groups:
        used = Counter(lut.rules[i].candidate for cells in group.cells.values() for i in cells if i >= 0)
        default = pool.operator(group.op).default
        chosen = ", ".join(
            f"{id} {n}" for id, n in sorted(used.items(), key=lambda item: (item[0] != default, -item[1]))
        )
        traits = " ".join(f"{k}={v}" for k, v in group.traits)
        statics = " ".join(f"{k}={v}" for k, v in group.statics)
        table.add_row(group.op, group.form, traits, statics, chosen)
    command_line.print_table(table)


def _print_few(lut: Lut) -> None:
    """What the limit on kernels costs, where it changed anything."""
    for few in lut.few:
        weighted = "no known traffic" if few.weighted is None else f"{percent(few.weighted)} weighted by traffic"
        click.echo(
            f"{few.op} {few.form} with {few.dtype}: {len(few.after)} of {len(few.before)} kernels kept, at most "
            f"{lut.policy.max_kernels}; that changed {few.changed} rules and costs {weighted}, at worst "
            f"{percent(few.worst)} ({few.worst_problem})"
        )


def _print_invariant(lut: Lut) -> bool:
    """What batch invariance costs, a layer at a time; whether a layer that models call could not be made so."""
    if not lut.policy.batch_invariant:
        return False
    table = Table(title="batch invariance: one kernel a layer, and what it costs over the choice bin by bin")
    for column in ("operator", "form", "layer", "kernel", "by traffic", "at worst"):
        table.add_column(column, justify="right" if column in ("by traffic", "at worst") else "left")
    for each in lut.invariant:
        weighted = "no traffic" if each.weighted is None else percent(each.weighted)
        kernel = each.candidate or "none: the framework's"
        table.add_row(each.op, each.form, escape(_layer(each)), kernel, weighted, percent(each.worst))
    command_line.print_table(table)
    served = [each for each in lut.invariant if each.candidate is not None]
    cost, free = sum(each.cost for each in served), sum(each.free_cost for each in served)
    total = "no known traffic" if free <= 0.0 else f"{percent(cost / free - 1.0)} weighted by traffic"
    click.echo(f"batch invariance costs {total}, over {len(served)} of {len(lut.invariant)} layers and forms")
    broken = False
    for each in lut.invariant:
        if each.candidate is not None:
            continue
        first = each.form == forms(each.op, mode_of(each.form))[0]
        broken |= first
        said = "a layer that models call" if first else "calls without preparation"
        click.echo(
            f"not batch-invariant: {each.op} {each.form} {_layer(each)} ({said}): it is not in the table and the "
            "framework serves it, since no kernel that declares it was measured and admitted in every bin; measure "
            "more kernels there, or allow a larger --max-error",
            err=True,
        )
    return broken


def _layer(each: Invariant) -> str:
    """What tells a layer from others of its operator, in a few words."""
    return " ".join(f"{name}={value}" for name, value in {**each.statics, **each.traits}.items())


def _print_certificate(certificate: Certificate) -> None:
    stored = certificate.to_json()
    if certificate.overall is None:
        click.echo(describe(None, stored["certificate_note"]))
        return
    table = Table(title="certificate: regret on held-out shapes, which no choice was made from")
    for column in ("operator", "shapes", "geometric mean", "p95", "max", "worst", "chosen", "best there"):
        table.add_column(column, justify="right" if column in ("shapes", "p95", "max") else "left")
    for name, part in {**certificate.operators, "all": certificate.overall}.items():
        numbers = (str(part.shapes), interval_words(part.geomean), percent(part.p95), percent(part.max))
        worst = escape(f"{part.worst['problem']} {part.worst['form']}")
        table.add_row(name, *numbers, worst, part.worst["chosen"], part.worst["best"])
    command_line.print_table(table)
    if certificate.weighted is not None:
        click.echo(f"regret of the total time, weighted by traffic: {percent(certificate.weighted)}")
    for line in caveats(stored["certificate"]):
        click.echo(f"shapes and forms: {line}")


def _packages(out: Path) -> list[Path]:
    """The packages in ``out``: itself, or its folders."""
    if (out / MANIFEST).is_file():
        return [out]
    found = sorted(path.parent for path in out.glob(f"*/{MANIFEST}")) if out.is_dir() else []
    if not found:
        raise BadInput(f"{out}: found no package in it, expected one that dks-codegen build wrote")
    return found


@cli.command()
@click.argument("out", metavar="OUT_DIR", type=click.Path(path_type=Path, readable=False))
def check(out: Path) -> int:
    """Say whether the package is whole and fits this machine, and what its choices are worth.

    \b
    dks-codegen check out
    dks-codegen check out/minilm_exact
    """
    bad = 0
    for folder in _packages(out):
        manifest, problems = intact(folder)
        problems += [f"environment: {line}" for line in misfits(manifest)]
        problems += [f"kernel {id}: {why}" for id, why in dead_kernels(manifest).items()]
        for line in problems:
            click.echo(f"{folder}: {line}", err=True)
        bad += bool(problems)
        if not problems:
            click.echo(f"{folder}: whole, fits this machine, lookup {manifest.lookup}")
            for tools in sorted(set(manifest.toolchains.values())):
                compiled = [kernel for kernel, by in manifest.toolchains.items() if by == tools]
                click.echo(f"{folder}: {', '.join(compiled)}: measured and compiled with {tools}")
        click.echo(f"{folder}: {describe(manifest.certificate, manifest.certificate_note)}")
    if bad:
        raise BadInput(
            f"{out}: found {bad} package(s) that can't serve here, expected none; measure and build again"
        )
    return 0


@cli.command()
@click.argument("out", metavar="OUT_DIR", type=click.Path(path_type=Path, readable=False))
@click.argument("op", metavar="OP")
@click.argument("arguments", metavar="DIM=SIZE...", nargs=-1)
def explain(out: Path, op: str, arguments: tuple[str, ...]) -> int:
    """Say what a call would run, and on what evidence.

    \b
    dks-codegen explain out linear m=17 n=384 k=384
    dks-codegen explain out linear m=17 n=384 k=384 dtype=bfloat16 align=16
    dks-codegen explain out linear m=17 n=384 k=384 mode=graph
    """
    asked: dict[str, int | str] = {}
    for argument in arguments:
        match = _ARGUMENT.match(argument)
        if match is None or match[1] in asked:
            raise BadInput(f"argument: found {argument!r}, expected each NAME=VALUE once, such as m=17")
        asked[match[1]] = int(match[2]) if match[2].isdigit() else match[2]
    align = asked.pop("align", 64)
    if align not in (1, 2, 4, 8, 16, 32, 64):
        raise BadInput(f"align: found {align!r}, expected a power of two from 1 to 64")
    for folder in _packages(out):
        with warnings.catch_warnings():
            # What makes the runtime warn is part of the answer here.
            warnings.simplefilter("ignore", RuntimeWarning)
            package = import_package(folder)
            try:
                choice = package.explain(op, align=align, **asked)
            except (KeyError, ValueError) as error:
                raise BadInput(str(error.args[0])) from None
        click.echo(f"{folder.name}: {choice}")
    return 0


def main() -> None:
    """The command's entry point."""
    command_line.run(cli, kept="what was there before is intact")


if __name__ == "__main__":
    main()
