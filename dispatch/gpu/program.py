"""A Triton kernel with its constants, before it is compiled: what a generated C++ unit is on a CPU.

Nothing here imports Triton: serving code asks a program for its digest alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

SOURCES = Path(__file__).parent / "kernels"
_IMPORT = re.compile(r"^from dks\.dispatch\.gpu\.kernels\.(\w+) import ", re.MULTILINE)

Factor = tuple[str, int]
"""How many blocks of a size cover an argument's value; with an empty name the number itself."""


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a kernel that is known when it is launched.

    Attributes:
        name: as the kernel's source has it.
        type: Triton's: ``*bf16``, ``*fp32``, ``*i32``, ``i32``, ``fp32`` ...
        unit: bytes that one step of it moves an address by, where the call's alignment class holds for it: 1
            for an address, the element's size for a stride or a row's width. 0 where nothing is known of it.
    """

    name: str
    type: str
    unit: int = 0


@dataclass(frozen=True, slots=True)
class Program:
    """One configuration of one kernel for one alignment class.

    Attributes:
        symbol: unique among programs; letters, digits and '_'.
        source: file in ``gpu/kernels``.
        function: in it, decorated with ``triton.jit``.
        arguments: in the order of the function's, without its constants.
        constants: values of its ``tl.constexpr`` arguments; a dtype is its name, ``"fp32"``.
        align: bytes by which the arguments with a unit are divisible; the compiler vectorises by it.
        warps: of 32 threads, in a block.
        stages: of the software pipeline.
        grid: blocks along x, y and z, each a product of factors.
        resident: 0, or how many blocks a multiprocessor is given at most, each of which then takes work until
            there is none: x is cut down to that many.
    """

    symbol: str
    source: str
    function: str
    arguments: tuple[Argument, ...]
    constants: tuple[tuple[str, int | str], ...]
    align: int
    warps: int
    stages: int
    grid: tuple[tuple[Factor, ...], tuple[Factor, ...], tuple[Factor, ...]]
    resident: int = 0

    def divisible(self) -> dict[int, int]:
        """By the position of an argument: a power of two above 1 that divides it in every call of this class."""
        found = {i: self.align // each.unit for i, each in enumerate(self.arguments) if each.unit}
        return {i: divisor for i, divisor in found.items() if divisor > 1}

    def blocks(self, values: Mapping[str, int], multiprocessors: int) -> tuple[int, int, int]:
        """The grid for these values of the arguments that it names."""
        x, y, z = (prod(-(-values[name] // size) if name else size for name, size in axis) for axis in self.grid)
        return (min(x, self.resident * multiprocessors) if self.resident else x), y, z

    def digest(self) -> str:
        """First 16 hex digits of a SHA-256 over all that decides the code but the compiler and the device."""
        text = "\0".join(str(getattr(self, name)) for name in self.__slots__)
        return hashlib.sha256(f"{text}\0{source_of(self.source)}".encode()).hexdigest()[:16]


@lru_cache
def source_of(name: str) -> str:
    """A kernel file's text and that of all it imports from its folder."""
    todo, seen = [name], dict[str, str]()
    while todo:
        file = todo.pop()
        if file not in seen:
            seen[file] = (SOURCES / file).read_text(encoding="utf-8")
            todo += [f"{module}.py" for module in _IMPORT.findall(seen[file])]
    return "\0".join(f"{file}\0{seen[file]}" for file in sorted(seen))
