"""The generated kernels that a table chose, as one shared library with a C header."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dks.codegen.lut import Lut
from dks.codegen.templating import environment as templates
from dks.dispatch import pool
from dks.dispatch.errors import BadInput
from dks.dispatch.manifest import KERNELS
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.tiles import build
from dks.dispatch.tiles.library import Missing
from dks.dispatch.tiles.unit import HEADERS, Unit

HEADER = "kernels.h"


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


def describe(package: Path, count: int) -> str:
    """What was shipped, in a line."""
    if not count:
        return "no generated kernels were chosen: none are shipped"
    return f"{count} generated kernels in {KERNELS}: {(package / KERNELS).stat().st_size / 1024:.0f} KiB"
