"""The generated kernels that a table chose: C++ ones as a shared library with a C header, Triton programs as
another with what launches them, CUTLASS kernels as a third."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dks.codegen.lut import Lut
from dks.codegen.templating import environment as templates
from dks.dispatch import pool
from dks.dispatch.errors import BadInput
from dks.dispatch.gpu import compile as gpu_compile
from dks.dispatch.gpu import embed, measuring
from dks.dispatch.gpu.cublaslt import build as cublaslt_build
from dks.dispatch.gpu.cutlass import build as cutlass_build
from dks.dispatch.gpu.cutlass.configuration import Configuration
from dks.dispatch.gpu.program import Program
from dks.dispatch.manifest import CUBLASLT, CUTLASS, GPU, KERNELS
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.tiles import build
from dks.dispatch.tiles.library import Missing
from dks.dispatch.tiles.unit import HEADERS, Unit

HEADER = "kernels.h"
LICENCE = "cutlass_license.txt"


def chosen_units(lut: Lut) -> list[Unit]:
    """The generated functions that its rules run, by symbol."""
    found = {}
    for rule in lut.rules:
        candidate = Candidate.parse(rule.candidate)
        kernel = pool.kernels()[candidate.kernel]
        if kernel.unit is not None:
            unit = kernel.unit(Problem.parse(rule.problem), candidate.params)
            found[unit.symbol] = unit
    return [found[symbol] for symbol in sorted(found)]


def chosen_programs(lut: Lut) -> list[Program]:
    """The Triton programs that its rules launch, by symbol."""
    found: dict[str, Program] = {}
    for rule in lut.rules:
        candidate = Candidate.parse(rule.candidate)
        kernel = pool.kernels()[candidate.kernel]
        if kernel.programs is not None:
            found |= {each.symbol: each for each in kernel.programs(Problem.parse(rule.problem), candidate.params)}
    return [found[symbol] for symbol in sorted(found)]


def chosen_configurations(lut: Lut) -> list[Configuration]:
    """The CUTLASS kernels that its rules run, as they are compiled for its GPU, by symbol."""
    found: dict[str, Configuration] = {}
    for rule in lut.rules:
        candidate = Candidate.parse(rule.candidate)
        kernel = pool.kernels()[candidate.kernel]
        if kernel.configuration is not None:
            chosen = kernel.configuration(Problem.parse(rule.problem), candidate.params)
            chosen = chosen.on(_capability(lut.environment.isa))
            found[chosen.symbol] = chosen
    return [found[symbol] for symbol in sorted(found)]


def _capability(isa: str) -> int:
    """Of sm_90: 90."""
    return int(isa.removeprefix("sm_"))


def ship_cublaslt(lut: Lut, package: Path) -> None:
    """Put what opens cuBLASLt into ``package``, where a rule runs one of its algorithms.

    Raises:
        BadInput: it can't be compiled here.
    """
    if not any(pool.kernels()[Candidate.parse(rule.candidate).kernel].search for rule in lut.rules):
        return
    why = cublaslt_build.compile_into(package)
    if why:
        raise BadInput(
            f"kernels: the table chose algorithms of cuBLASLt, and what opens it can't be compiled here ({why}); "
            "install a C++ compiler or name one in $CXX"
        )
    (package / cublaslt_build.BINARY).rename(package / CUBLASLT)


def ship_configurations(configurations: Sequence[Configuration], package: Path) -> None:
    """Put the library of these CUTLASS kernels and their licence into ``package``; nothing where there are none.

    Raises:
        BadInput: they can't be compiled here.
    """
    if not configurations:
        return
    try:
        cutlass_build.link(configurations, package / CUTLASS)
        (package / LICENCE).write_text(cutlass_build.licence(), encoding="utf-8", newline="\n")
    except Missing as error:
        raise BadInput(
            f"kernels: the table chose {len(configurations)} CUTLASS kernels that can't be compiled here "
            f"({error}); install the extra gpu and nvcc, or build where they were measured"
        ) from None


def ship_programs(programs: Sequence[Program], isa: str, package: Path) -> None:
    """Put the library of these programs into ``package``; nothing where there are none.

    Args:
        isa: of the GPU that they were measured on, such as sm_90.

    Raises:
        BadInput: they can't be compiled here.
    """
    if not programs:
        return
    try:
        arch = measuring.arch_for(measuring.capability_of(isa))
        failed = gpu_compile.build(programs, (arch,))
        if failed:
            raise Missing(next(iter(failed.values())))
        embed.build([gpu_compile.load(each, arch) for each in programs], package / GPU)
    except (Missing, ValueError) as error:
        raise BadInput(
            f"kernels: the table chose {len(programs)} Triton programs that can't be compiled here ({error}); "
            "install the extra gpu and a C++ compiler"
        ) from None


def ship(units: Sequence[Unit], package: Path) -> None:
    """Put the library and its header into ``package``; nothing where there are no units.

    Raises:
        BadInput: they can't be compiled here.
    """
    if not units:
        return
    try:
        build.link(units, package / KERNELS)
    except Missing as error:
        raise BadInput(
            f"kernels: the table chose {len(units)} generated kernels that can't be compiled here ({error}); "
            "install a C++ compiler or name one in $CXX"
        ) from None
    abi = (HEADERS / "abi.h").read_text(encoding="utf-8")
    text = templates().get_template("kernels.h.j2").render(abi=abi, units=units)
    (package / HEADER).write_text(text, encoding="utf-8", newline="\n")


def describe(package: Path, units: int, programs: int, configurations: int) -> str:
    """What was shipped, in a line."""
    shipped = (
        (units, "generated kernels", KERNELS),
        (programs, "Triton programs", GPU),
        (configurations, "CUTLASS kernels", CUTLASS),
    )
    found = [
        f"{count} {what} in {file}: {(package / file).stat().st_size / 1024:.0f} KiB"
        for count, what, file in shipped
        if count
    ]
    return "; ".join(found) or "no generated kernels were chosen: none are shipped"
