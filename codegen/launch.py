"""What C++ servers need of a package besides the lookup: headers, how to launch what was chosen, and the table as
a library that can be opened while the server runs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import dks.dispatch
from dks.codegen.lut import Evidence, Lut
from dks.codegen.templating import environment as templates
from dks.dispatch import compiler, pool
from dks.dispatch.native.build import FLAGS
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.switches import openmp

LAUNCH = "launch.hpp"
LIBRARY = "_server.so"  # not _table.so: Python would take that for _table.py
DISPATCH = Path(dks.dispatch.__file__).parent
_CPP = ("lookup.hpp", "serving.hpp", "package_data.hpp", "package.hpp", "linear.hpp")
HEADERS = (*(f"cpp/{name}" for name in _CPP), "tiles/abi.h")
"""Hand-written headers that lie in each package, so that a server builds from its folder alone."""

_SOURCE = DISPATCH / "cpp" / "server_library.cpp"
_FLOATS = {"avx2": 8, "avx512": 16}  # of a vector
_WIDENED = {"f32": "f32", "w16": "bf16", "w8": "int8"}
_DOTTED = {"bf16": ("bf16", 2), "i8": ("int8", 4)}  # inputs of one 32-bit lane
_TILE = 16  # lanes of a vector, and of a row of an AMX tile


@dataclass(frozen=True, slots=True)
class KernelView:
    """A generated kernel as ``struct dks::Kernel`` of ``package_data.hpp`` has it."""

    symbol: str
    kind: str
    threads: int
    by_rows: int = 0
    weights: str = "other"
    panel: int = 0
    group: int = 0
    step: int = 0


def kernel_view(rule: Evidence) -> KernelView | None:
    """How to launch what a rule chose; None where it is no generated kernel."""
    candidate, problem = Candidate.parse(rule.candidate), Problem.parse(rule.problem)
    kernel = pool.kernels()[candidate.kernel]
    if kernel.unit is None:
        return None
    unit, given = kernel.unit(problem, candidate.params), dict(candidate.params)
    if unit.kind != "linear":
        return KernelView(unit.symbol, unit.kind, given["t"])
    weights, panel, group, step = panels_of(candidate.kernel, given)
    return KernelView(unit.symbol, unit.kind, given["t"], given["r"], weights, panel, group, step)


def panels_of(kernel: str, params: dict[str, int]) -> tuple[str, int, int, int]:
    """(weights, panel, group, step) of a linear's weights, as ``abi.h`` describes them.

    int4 weights are ``other``, with zeros: C++ servers leave them to their default.
    """
    name, _, isa = kernel.removeprefix("tile.").partition("_")
    if name in _WIDENED:
        return _WIDENED[name], params["nv"] * _FLOATS[isa], 1, 1
    if name in _DOTTED:
        weights, group = _DOTTED[name]
        panel = params["nt" if "nt" in params else "nv"] * _TILE
        return weights, panel, group, group * _TILE if "nt" in params else group
    return "other", 0, 0, 0


def render_launch(lut: Lut, name: str, generation: str) -> str:
    """The text of ``launch.hpp``."""
    views = [kernel_view(rule) for rule in lut.rules]
    kernels = sorted(
        {view for view in views if view is not None}, key=lambda view: (view.symbol, view.threads, view.by_rows)
    )
    place = {view: index for index, view in enumerate(kernels)}
    return (
        templates()
        .get_template("launch.hpp.j2")
        .render(
            name=name,
            generation=generation,
            environment=lut.environment,
            switches=openmp(lut.environment.switches),
            max_error=float(lut.policy.max_error),
            kernels=kernels,
            kernel_of=[-1 if view is None else place[view] for view in views],
        )
    )


def ship_headers(package: Path, lut: Lut, name: str, generation: str) -> None:
    """Put ``launch.hpp`` and the headers it is used with into ``package``."""
    for header in HEADERS:
        shutil.copyfile(DISPATCH / header, package / Path(header).name)
    (package / LAUNCH).write_text(render_launch(lut, name, generation), encoding="utf-8", newline="\n")


def compile_library(package: Path) -> str:
    """Compile ``_server.so`` in a package with its headers; the same package and compiler give the same bytes.

    Returns:
        Why there is none, or an empty text. C++ servers can't open such a package, everybody else can.
    """
    return compiler.build(package / LIBRARY, [*FLAGS, "-iquote", "..", str(_SOURCE)])
