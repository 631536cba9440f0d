"""Compiled programs, as a process launches them: those of loaded packages, or of the cache while measuring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dks.dispatch.gpu.launch import HasAddress, Kernel, Library, Plan, Step
from dks.dispatch.gpu.program import Program
from dks.dispatch.tiles.library import Missing

Steps = Sequence[tuple[Program, Mapping[str, int | float | str | HasAddress]]]
"""Programs in launching order with what their arguments are bound to; see ``launch.Step``."""

Locate = Callable[[Steps], Plan]


class Unsuited(Missing):
    """A program that is compiled, and not worth measuring."""


def _nowhere(steps: Steps) -> Plan:
    raise Missing(f"{steps[0][0].symbol}: no loaded package ships it, and nothing is compiled while serving")


_shipped: dict[str, Library] = {}  # by digest
_locate: Locate = _nowhere


def add(data: bytes, digest: str) -> None:
    """Load a package's library from its bytes, unless one of this digest is there; it stays for good.

    Without a driver it loads all the same: each call then says what is missing. Raises Missing where it can't be
    loaded.
    """
    if digest not in _shipped:
        _shipped[digest] = Library.from_bytes(data)


def look_in(locate: Locate) -> None:
    """From now on, programs that no package ships are planned by ``locate``: for measuring, not for serving."""
    global _locate  # noqa: PLW0603 - set once, by what measures
    _locate = locate


def plan(steps: Steps) -> Plan:
    """What launches these programs, of one library that has them all: these very ones, not others of their names.

    Raises:
        Missing: there is none.
    """
    for library in _shipped.values():
        wanted, found = [(program.symbol, program.digest()) for program, _ in steps], _kernels(library)
        if all(each in found for each in wanted):
            return Plan(library, [Step(found[each], bound) for each, (_, bound) in zip(wanted, steps, strict=True)])
    return _locate(steps)


def ships(programs: Sequence[Program]) -> bool:
    """Whether one loaded library has all of these programs."""
    wanted = {(program.symbol, program.digest()) for program in programs}
    return any(wanted <= set(_kernels(library)) for library in _shipped.values())


def _kernels(library: Library) -> dict[tuple[str, str], Kernel]:
    return {(kernel.symbol, kernel.program): kernel for kernel in library.embedded().values()}
