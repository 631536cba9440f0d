"""Compiled programs made by hand, as far as a launcher and a reader look at them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from dks.dispatch.gpu.cubin import Cubin
from dks.dispatch.gpu.program import Argument

ARGUMENTS = (
    Argument("x", "*bf16", 1),
    Argument("y", "*fp32", 1),
    Argument("m", "i32"),
    Argument("n", "i32", 2),
    Argument("stride", "i64", 2),
    Argument("scale", "fp32"),
)
LETTERS = {"i32": "i", "i64": "l", "fp32": "f"}


def elf(function: str, sizes: Sequence[int], arch: int = 90) -> bytes:
    """A file with the sections that the reader looks at."""
    at, info = 0, b""
    for i, size in enumerate(sizes):
        at = -(-at // size) * size
        info += struct.pack("<BBH", 4, 0x17, 12) + struct.pack("<IHHI", 0, i, at, size << 18 | 0x1F000)
        at += size
    names = b"\0.shstrtab\0" + f".text.{function}\0.nv.info.{function}\0".encode()
    contents = [(0, b"", 0), (3, names, 1), (1, b"code" * 8, 11), (0x70000000, info, 12 + len(f".text.{function}"))]
    body, table = b"", b""
    for kind, data, name in contents:
        table += struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, 64 + len(body), len(data), 0, 0, 1, 0)
        body += data
    head = b"\x7fELF\x02\x01\x01\x41\x08" + bytes(7) + struct.pack("<HHI", 2, 190, 1)
    head += struct.pack("<QQQ", 0, 0, 64 + len(body)) + struct.pack(
        "<IHHHHHH", arch << 8 | 2, 64, 0, 0, 64, len(contents), 1
    )
    return head + body + table


def made(symbol: str = "f", **changes: Any) -> Cubin:
    """A program whose function's name says what its parameters are; see ``fake_cuda.c``."""
    arguments = changes.get("arguments", ARGUMENTS)
    letters = "".join("p" if each.type.startswith("*") else LETTERS[each.type] for each in arguments)
    fields: dict[str, Any] = {
        "symbol": symbol,
        "program": "0123456789abcdef",
        "arch": 90,
        "triton": "3.7.1",
        "function": f"{symbol}__{letters}pp",
        "arguments": arguments,
        "align": 16,
        "grid": ((("m", 64), ("n", 32)), (("", 3),), ()),
        "resident": 0,
        "warps": 4,
        "shared": 1024,
        "tensor_memory": 0,
        "scratch": 0,
        "scratch_align": 1,
        "registers": 64,
        "stack": 0,
        "local": 0,
        "elf": b"",
    } | changes
    cubin = Cubin(**fields)
    if cubin.elf:
        return cubin
    return Cubin(**(fields | {"elf": elf(cubin.function, cubin.layout(), cubin.arch)}))
