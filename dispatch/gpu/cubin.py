"""A compiled program: the device's code and all that launching it takes. On disk a ``.cubin`` and a ``.json``.

Files may come from anywhere: ``read`` takes nothing that is not of the form that ``write`` gives it, and the sizes
of the kernel's arguments are those in the code itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dks.dispatch.errors import BadInput
from dks.dispatch.gpu.limits import ARCHS
from dks.dispatch.gpu.program import Argument, Factor
from dks.dispatch.manifest import read_at_most, seal
from dks.dispatch.plain import in_words, parse_json
from dks.dispatch.trust import put

VERSION = 1
MAX_ELF = 16 * 2**20
MAX_SIDE = 64 * 2**10
MAX_INPUTS = 48
"""Most arguments of a kernel and names of its grid; ``gpu.h`` has the same."""
MAX_FACTORS = 8

TYPES = {"i32": 4, "i64": 8, "fp32": 4}
"""Bytes of an argument by its type; addresses have 8."""

ELEMENTS = {
    **dict.fromkeys(("i1", "i8", "u8", "fp8e4nv", "fp8e5"), 1),
    **dict.fromkeys(("i16", "u16", "fp16", "bf16"), 2),
    **dict.fromkeys(("i32", "u32", "fp32"), 4),
    **dict.fromkeys(("i64", "u64", "fp64"), 8),
}
"""Bytes of what an address points to; the device faults where it is not aligned by as many."""

_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}\Z")
_FUNCTION = re.compile(r"[A-Za-z_$][A-Za-z0-9_$.]{0,499}\Z")
_DIGEST = re.compile(r"[0-9a-f]{16}\Z")
_VERSION = re.compile(r"[0-9A-Za-z.+-]{1,60}\Z")

_ALL_TYPES = {*TYPES, *(f"*{name}" for name in ELEMENTS)}

Grid = tuple[tuple[Factor, ...], tuple[Factor, ...], tuple[Factor, ...]]


@dataclass(frozen=True, slots=True)
class Cubin:
    """One program, compiled for one architecture.

    Attributes:
        symbol, arguments, align, grid, resident: the program's; see ``Program``.
        program: its digest.
        arch: as ``limits.ARCHS`` has it.
        triton: version of the compiler.
        function: the kernel's name in the code.
        warps: of 32 threads, in a block; the compiler may add some to the program's.
        shared: bytes of dynamic shared memory.
        tensor_memory: columns of it, where the architecture has any.
        scratch: bytes of global memory that each block of a launch needs for itself.
        scratch_align: of the first of them.
        registers: of a thread; None where nobody could say, as for the next two.
        stack: bytes of a thread's stack; registers that had to be spilled are there.
        local: bytes of local memory beside it.
        elf: the code.
    """

    symbol: str
    program: str
    arch: int
    triton: str
    function: str
    arguments: tuple[Argument, ...]
    align: int
    grid: Grid
    resident: int
    warps: int
    shared: int
    tensor_memory: int
    scratch: int
    scratch_align: int
    registers: int | None
    stack: int | None
    local: int | None
    elf: bytes = field(repr=False)

    def layout(self) -> list[int]:
        """Bytes of each of the kernel's parameters: its arguments, then the addresses of two scratch memories."""
        return [8 if each.type.startswith("*") else TYPES[each.type] for each in self.arguments] + [8, 8]

    def divisors(self) -> list[int]:
        """What must divide each argument, else nothing may be launched: as the alignment class says, and an address
        by its element's size whatever that says; 1 where nothing is known."""
        least = [ELEMENTS[each.type[1:]] if each.type.startswith("*") else 1 for each in self.arguments]
        known = [self.align // each.unit if each.unit else 1 for each in self.arguments]
        return list(map(max, least, known))

    def inputs(self) -> tuple[str, ...]:
        """Names of what a launch must be told: the arguments, and what the grid names beside them."""
        names = [each.name for each in self.arguments]
        names += [name for axis in self.grid for name, _ in axis if name]
        return tuple(dict.fromkeys(names))


def check(cubin: Cubin) -> None:
    """Raises ValueError unless it is one that can be launched: types, ranges, and the code's own parameters."""
    for name, pattern in (
        ("symbol", _SYMBOL),
        ("program", _DIGEST),
        ("triton", _VERSION),
        ("function", _FUNCTION),
    ):
        found = getattr(cubin, name)
        if not isinstance(found, str) or not pattern.match(found):
            raise ValueError(f"{name} is {found!r}")
    if type(cubin.arch) is not int or cubin.arch not in ARCHS:
        raise ValueError(f"arch is {cubin.arch!r}, expected one of {ARCHS}")
    for name, low, high in (
        ("align", 1, 256),
        ("resident", 0, 64),
        ("warps", 1, 32),
        ("shared", 0, 2**20),
        ("tensor_memory", 0, 2**16),
        ("scratch", 0, 2**20),
        ("scratch_align", 1, 4096),
        ("registers", 0, 2**16),
        ("stack", 0, 2**20),
        ("local", 0, 2**20),
    ):
        found = getattr(cubin, name)
        if found is None and name in ("registers", "stack", "local"):
            continue
        if type(found) is not int or not low <= found <= high:
            raise ValueError(f"{name} is {found!r}, expected a whole number from {low} to {high}")
    _check_arguments(cubin)
    _check_grid(cubin.grid)
    if len(cubin.inputs()) > MAX_INPUTS:
        raise ValueError(f"{len(cubin.inputs())} arguments and names of the grid, expected at most {MAX_INPUTS}")
    if (found := parameters(cubin.elf, cubin.function)) != cubin.layout():
        raise ValueError(f"{cubin.function} has parameters of {found} bytes, expected {cubin.layout()}")
    if (arch := arch_of(cubin.elf)) not in (0, cubin.arch):
        raise ValueError(f"the code is for sm_{arch}, expected sm_{cubin.arch}")


def _check_arguments(cubin: Cubin) -> None:
    for name in ("align", "scratch_align"):
        if getattr(cubin, name) & (getattr(cubin, name) - 1):
            raise ValueError(f"{name} is {getattr(cubin, name)}, expected a power of two")
    if len({each.name for each in cubin.arguments}) != len(cubin.arguments):
        raise ValueError("two arguments of one name")
    for each in cubin.arguments:
        if not isinstance(each.name, str) or not _SYMBOL.match(each.name):
            raise ValueError(f"an argument's name is {each.name!r}")
        if not isinstance(each.type, str) or each.type not in _ALL_TYPES:
            raise ValueError(f"argument {each.name} is {each.type!r}, expected an address, {', '.join(TYPES)}")
        if type(each.unit) is not int or not 0 <= each.unit <= 256 or each.unit & (each.unit - 1):
            raise ValueError(f"argument {each.name} has unit {each.unit!r}, expected 0 or a power of two")
        if each.unit and each.type == "fp32":
            raise ValueError(f"argument {each.name} is fp32 and has unit {each.unit}, expected none")


def _check_grid(grid: Grid) -> None:
    if not isinstance(grid, tuple) or len(grid) != 3:
        raise ValueError("the grid has not three axes")
    for axis in grid:
        if not isinstance(axis, tuple) or len(axis) > MAX_FACTORS:
            raise ValueError(f"an axis of the grid has more than {MAX_FACTORS} factors")
        for name, size in axis:
            if not isinstance(name, str) or not (name == "" or _SYMBOL.match(name)):
                raise ValueError(f"the grid names {name!r}")
            if type(size) is not int or not 1 <= size < 2**31:
                raise ValueError(f"the grid divides by {size!r}")


def write(cubin: Cubin, json: Path) -> None:
    """Write ``json`` and the code beside it, as ``.cubin``: the code first, so that a ``.json`` has one."""
    put(json.with_suffix(".cubin"), cubin.elf)
    put(json, describe(cubin).encode())


def describe(cubin: Cubin) -> str:
    """The text of the ``.json``."""
    fields = {name: getattr(cubin, name) for name in _NAMES}
    fields["arguments"] = [dataclasses.astuple(each) for each in cubin.arguments]
    return seal({"version": VERSION, **fields, "elf": hashlib.sha256(cubin.elf).hexdigest()})


def read(json: Path) -> Cubin:
    """The compiled program in two files, which may be anybody's.

    Raises:
        BadInput: a file is missing, too large, changed, or not what ``write`` writes.
    """
    try:
        return parse(read_at_most(json, MAX_SIDE), read_at_most(json.with_suffix(".cubin"), MAX_ELF), str(json))
    except OSError as error:
        raise BadInput(
            f"{json}: found no readable compiled program ({error.strerror}), expected a .json and a .cubin; "
            "compile it again"
        ) from None


def parse(text: bytes, elf: bytes, what: str) -> Cubin:
    """The same from their bytes; ``what`` is the subject of messages."""
    data = parse_json(text, what)
    try:
        if data.get("version") != VERSION:
            raise ValueError(f"version {data.get('version')!r}, expected {VERSION}")
        if set(data) != {"version", *_NAMES, "elf", "digest"}:
            raise ValueError("other fields")
        if seal(data).encode() != text:
            raise ValueError("the text differs from its digest")
        if hashlib.sha256(elf).hexdigest() != data["elf"]:
            raise ValueError("the code differs from its digest")
        cubin = _from(data, elf)
        check(cubin)
    except (ValueError, TypeError, KeyError, struct.error) as error:
        raise BadInput(
            f"{what}: found no compiled program ({in_words(error)}), expected it as DKS wrote it; delete it and "
            "compile it again"
        ) from None
    return cubin


def _from(data: Mapping[str, Any], elf: bytes) -> Cubin:
    plain = {name: data[name] for name in _NAMES if name not in ("arguments", "grid")}
    arguments = tuple(Argument(*each) for each in _list(data["arguments"], MAX_INPUTS))
    axes = [_list(axis, MAX_FACTORS) for axis in _list(data["grid"], 3)]
    grid: Any = tuple(tuple((name, size) for name, size in axis) for axis in axes)
    return Cubin(**plain, arguments=arguments, grid=grid, elf=elf)


def _list(found: object, most: int) -> list[Any]:
    if not isinstance(found, list) or len(found) > most:
        raise ValueError(f"found {type(found).__name__}, expected a list of at most {most}")
    return found


_NAMES = tuple(each.name for each in dataclasses.fields(Cubin) if each.name != "elf")


# What follows reads the code's own file (ELF, as NVIDIA's tools print it with `readelf -S` and `cuobjdump -elf`).

_EM_CUDA = 190
_MAX_SECTIONS = 4096
_MAX_NAME = 600
_NOTHING = 8  # the kind of a section that holds nothing in the file
_VALUE, _BYTES = 0x03, 0x04  # how an entry of .nv.info holds its value
_PARAMETER = 0x17  # the entry of one parameter of a kernel
_ARCH_AT = {7: 0, 8: 8}  # bit of the file's flags where its architecture begins, by the version of its form


def parameters(elf: bytes, function: str) -> list[int]:
    """Bytes of each parameter of a kernel, in order.

    Raises:
        ValueError: it is no cubin, or has no such kernel.
    """
    sections = _sections(elf)
    if f".text.{function}" not in sections:
        raise ValueError(f"found no code of {function}")
    start, length = sections.get(f".nv.info.{function}", (0, 0))
    info, at, found = elf[start : start + length], 0, dict[int, int]()
    while at + 4 <= len(info):
        form, kind, value = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _BYTES:
            if kind == _PARAMETER and value == 12 and at + 12 <= len(info):
                _, ordinal, _, packed = struct.unpack_from("<IHHI", info, at)
                found[ordinal] = packed >> 18 & 0x3FFF
            at += value
    if sorted(found) != list(range(len(found))):
        raise ValueError(f"found parameters {sorted(found)} of {function}")
    return [found[i] for i in range(len(found))]


def arch_of(elf: bytes) -> int:
    """The architecture that code is for, as ``limits.ARCHS`` has it; 0 where the file's form is a newer one.

    Raises:
        ValueError: it is no cubin.
    """
    _sections(elf)
    shift = _ARCH_AT.get(elf[8])
    return 0 if shift is None else int(struct.unpack_from("<I", elf, 48)[0]) >> shift & 0xFF


def _sections(elf: bytes) -> dict[str, tuple[int, int]]:
    """Where the sections of an ELF file begin and how long they are, by name."""
    if len(elf) < 64 or elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("found no ELF file of 64 bits, little end first")
    machine, offset = struct.unpack_from("<H", elf, 18)[0], struct.unpack_from("<Q", elf, 40)[0]
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    if machine != _EM_CUDA:
        raise ValueError(f"found code for machine {machine}, expected NVIDIA's, {_EM_CUDA}")
    if size != 64 or not 0 < count <= _MAX_SECTIONS or names >= count or offset + size * count > len(elf):
        raise ValueError("found no table of sections")
    table = [struct.unpack_from("<IIQQQQ", elf, offset + size * i) for i in range(count)]
    texts, found = table[names][4], dict[str, tuple[int, int]]()
    for name, kind, _, _, start, length in table:
        if kind == _NOTHING:
            start = length = 0  # noqa: PLW2901
        if start + length > len(elf):
            raise ValueError("found a section past the end")
        end = elf.find(b"\0", texts + name, texts + name + _MAX_NAME)
        if end >= 0:
            found[elf[texts + name : end].decode("ascii", "replace")] = start, length
    return found
