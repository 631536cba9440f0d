"""Generated kernels are compiled before anything is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

from dks.dispatch import pool
from dks.dispatch.native import build as native_build
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.tiles import build
from dks.dispatch.tiles.unit import Unit

Said = Callable[[str], None]


def units(asked: Iterable[tuple[Problem, Candidate]]) -> list[Unit]:
    """The generated functions that these candidates run on this machine, each once."""
    found: dict[Unit, None] = {}
    for problem, candidate in asked:
        kernel = pool.kernels()[candidate.kernel]
        # A kernel of somebody's own may raise anything: that is recorded when it is checked.
        with suppress(Exception):
            if kernel.unit is None or kernel.unavailable() or kernel.objection(problem):
                continue
            if kernel.suits(problem, candidate.params) is None:
                found[kernel.unit(problem, candidate.params)] = None
    return list(found)


def compile_for(asked: Iterable[tuple[Problem, Candidate]], say: Said) -> None:
    """Compile what these candidates need. What does not compile gets a status when it is checked."""
    wanted = units(asked)
    if wanted and (why := build.distrust()):
        say(f"no generated kernel is measured: {why}")
        return
    if wanted:
        _, why = native_build.cached()
        if why:
            say(f"generated kernels are launched through Python, which takes longer: {why}")
    missing = [unit for unit in wanted if not build.is_built(unit)]
    if not missing:
        return
    say(f"compiling {len(missing)} generated kernels ({len(wanted) - len(missing)} are there) into {build.cache()}")
    failed = build.build(missing)
    for symbol, why in failed.items():
        say(f"not compiled: {symbol}: {why.splitlines()[0]}")
