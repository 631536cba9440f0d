"""Compiled programs, as a process launches them: those of loaded packages, or of the cache while measuring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dks.dispatch.gpu.launch import HasAddress, Library, Plan, Step
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
        found = {(kernel.symbol, kernel.program): kernel for kernel in library.embedded().values()}
        if all((program.symbol, program.digest()) in found for program, _ in steps):
            return Plan(library, [Step(found[each.symbol, each.digest()], bound) for each, bound in steps])
    return _locate(steps)


def lack(programs: Sequence[Program]) -> str | None:
    """Why this process can't launch them, or None."""
    try:
        plan([(program, {}) for program in programs])
    except Missing as error:
        return str(error)
    return None
