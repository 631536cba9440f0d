"""Compiled units, as a process calls them. Nothing here compiles."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dks.dispatch.tiles.unit import Unit

OK = 0
DECLINED = {
    1: "outside the kernel's domain: integers stand for no NaN or infinity, and keys have room in the block table",
    2: "scratch memory ran out",
    3: "the system refuses this process AMX",
}
"""Why a function returned another code than 0; see ``abi.h``."""

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "linear": (_POINTER, _POINTER, _POINTER, _POINTER, _INT64),
    "norm": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT64),
    "softmax": (_POINTER, _POINTER, _INT64, _INT64, _INT32),
    "decode": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
}

Locate = Callable[[Unit], Path]


class Missing(RuntimeError):
    """A unit has no compiled form here; the message says why."""


def _nowhere(unit: Unit) -> Path:
    raise Missing(f"{unit.symbol}: no loaded package ships it, and nothing is compiled while serving")


_shipped: dict[str, ctypes.CDLL] = {}  # by digest
_locate: Locate = _nowhere


def add(name: str, data: bytes, digest: str) -> None:
    """Load a package's library from its bytes, unless one of this digest is there; it stays for good.

    From memory, because the system takes a path that it has loaded before for the same library, whatever lies there
    since; and what runs is what was checked. Raises OSError where it can't be loaded.
    """
    if digest in _shipped:
        return
    file = os.memfd_create(name)
    try:
        with os.fdopen(os.dup(file), "wb") as writer:
            writer.write(data)
        _shipped[digest] = ctypes.CDLL(f"/proc/self/fd/{file}")
    except OSError:
        os.close(file)  # otherwise it stays open, so that its number names this library alone
        raise


def look_in(locate: Locate) -> None:
    """From now on, units that no package ships are where ``locate`` says: for measuring, not for serving."""
    global _locate  # noqa: PLW0603 - set once, by what measures
    _locate = locate


def function(unit: Unit) -> Callable[..., int]:
    """The C function of a unit: takes addresses and sizes as its kind's signature in ``abi.h`` has them.

    Raises:
        Missing: it is not there, its library can't be loaded, or this CPU lacks its instructions: calling it would
            end the process.
    """
    if (reason := unit.needs.lack()) is not None:
        raise Missing(f"{unit.symbol}: {reason}")
    for library in _shipped.values():
        if _has(library, unit):
            return _typed(library, unit)
    try:
        return _typed(ctypes.CDLL(str(_locate(unit))), unit)
    except OSError as error:
        raise Missing(f"{unit.symbol}: {error}") from None


def lack(unit: Unit) -> str | None:
    """Why this process can't call a unit, or None."""
    try:
        function(unit)
    except Missing as error:
        return str(error)
    return None


def _has(library: ctypes.CDLL, unit: Unit) -> bool:
    """Whether it holds this very unit, not one of the same name from another version."""
    digest = unit.digest()
    try:
        made_from = (ctypes.c_char * len(digest)).in_dll(library, f"{unit.symbol}_source")
    except ValueError:
        return False
    return made_from.value == digest.encode()


def _typed(library: ctypes.CDLL, unit: Unit) -> Callable[..., int]:
    found = library[unit.symbol]  # a new object each time, so that no other owner's types are touched
    found.argtypes = _SIGNATURES[unit.kind]
    found.restype = ctypes.c_int
    return found


class Linear(ctypes.Structure):
    """``struct dks_linear`` of ``abi.h``."""

    _fields_ = (
        ("weight", _POINTER),
        ("bias", _POINTER),
        ("scale", _POINTER),
        ("sums", _POINTER),
        ("n", _INT64),
        ("k", _INT64),
        ("epilogue", _INT32),
        ("threads", _INT32),
        ("by_rows", _INT32),
    )


class Norm(ctypes.Structure):
    """``struct dks_norm`` of ``abi.h``."""

    _fields_ = (
        ("weight", _POINTER),
        ("bias", _POINTER),
        ("n", _INT64),
        ("eps", ctypes.c_float),
        ("threads", _INT32),
    )


class Decode(ctypes.Structure):
    """``struct dks_decode`` of ``abi.h``."""

    _fields_ = (
        *((name, _INT64) for name in ("b", "h", "hkv", "d", "kv", "q_b", "q_h", "k_b", "k_h", "k_s")),
        *((name, _INT64) for name in ("v_b", "v_h", "v_s", "page")),
        ("block_table", _POINTER),
        ("table_stride", _INT64),
        ("lengths", _POINTER),
        ("scale", ctypes.c_float),
        ("threads", _INT32),
    )
