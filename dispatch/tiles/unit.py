"""A generated C++ function, before it is compiled."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dks.dispatch.tiles.isa import ISAS, Isa

HEADERS = Path(__file__).parent
_INCLUDE = re.compile(r'^#include "([a-z0-9_]+\.hp*)"$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Unit:
    """One tile configuration of one template.

    Attributes:
        symbol: of the exported C function; unique, letters, digits and '_'.
        isa: name of the instruction set.
        kind: whose signature it has: ``linear``, ``norm``, ``softmax`` or ``decode``; see ``abi.h``.
        header: where the template is.
        type: the template with its constants, e.g. ``dks::FmaGemm<dks::Avx512, float, float, 6, 4, 0, true, 0>``;
            its static ``run`` is the function.
        defines: names the preprocessor shall know, e.g. ``DKS_EMULATE`` to test without the instructions.
    """

    symbol: str
    isa: str
    kind: str
    header: str
    type: str
    defines: tuple[str, ...] = ()

    @property
    def needs(self) -> Isa:
        """The instruction set that it is compiled for."""
        return ISAS[self.isa]

    @property
    def options(self) -> tuple[str, ...]:
        """What the compiler is told besides what every unit needs."""
        return (*self.needs.options, *(f"-D{name}" for name in self.defines))

    def digest(self) -> str:
        """First 16 hex digits of a SHA-256 over everything that decides the code but the compiler."""
        text = "\0".join((self.symbol, *self.options, self.kind, self.header, self.type))
        return hashlib.sha256(f"{text}\0{source_of(self.header)}".encode()).hexdigest()[:16]


@lru_cache
def source_of(header: str) -> str:
    """A header's text and that of all it includes from this folder."""
    todo, seen = [header], dict[str, str]()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen[name] = (HEADERS / name).read_text(encoding="utf-8")
            todo += _INCLUDE.findall(seen[name])
    return "\0".join(f"{name}\0{seen[name]}" for name in sorted(seen))
