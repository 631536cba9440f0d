"""cuBLASLt from Python: its candidates for a problem, and running one of them. Nothing here compiles."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

MOST = 32
"""Algorithms that the heuristic is asked for."""

EPILOGUES: Mapping[str, int] = {"none": 0, "relu": 1, "gelu_tanh": 3, "add": 5}
"""Epilogues that cuBLASLt can fuse: of the GELUs its own is the tanh form, and it has no SiLU."""

TYPES: Mapping[str, int] = {
    "float32": 0,
    "float16": 2,
    "int8": 3,
    "int32": 10,
    "bfloat16": 14,
    "float8_e4m3fn": 28,
}
_OUT = {"float8_e4m3fn": "bfloat16", "int8": "int32"}

_ALGORITHM, _ROOM = 64, 512
_POINTER, _INT64, _INT32, _UINT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_uint32


class Refused(RuntimeError):
    """cuBLASLt is not there, or can't do what it was asked; the message says why."""


@dataclass(frozen=True, slots=True)
class Matmul:
    """y (m, n) = epilogue(x (m, k) @ weight (n, k)^T + bias), all row-major, and what is known of the addresses.

    Attributes:
        dtype: of x and weight: bfloat16, float16, float8_e4m3fn or int8. y, bias and residual are of the same
            type; bfloat16 for fp8, int32 for int8, which takes no bias and no epilogue.
        epilogue: one of EPILOGUES.
        ldx, ldw, ldr, ldy: distances of rows of x, weight, residual and y in elements; 0 means contiguous.
        align: bytes, a power of two, that divide the addresses of x, weight, residual, y and bias, in this order.
        scales: fp8: x and weight come with one float32 scale each.
        fast: fp8: products are summed without promotion to full float32.
        workspace: bytes that an algorithm may use.
    """

    m: int
    n: int
    k: int
    dtype: str
    epilogue: str = "none"
    bias: bool = False
    ldx: int = 0
    ldw: int = 0
    ldr: int = 0
    ldy: int = 0
    align: tuple[int, int, int, int, int] = (16, 16, 16, 16, 16)
    scales: bool = False
    fast: bool = False
    workspace: int = 32 << 20

    def objection(self) -> str | None:
        """Why cuBLASLt can't be asked, or None; its own reasons come with the search."""
        if self.dtype not in TYPES:
            return f"cuBLASLt: takes {', '.join(TYPES)}, not {self.dtype}"
        if self.epilogue not in EPILOGUES:
            return f"cuBLASLt: fuses {', '.join(EPILOGUES)}, not {self.epilogue}"
        return None


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to compute a problem.

    Attributes:
        data: cuBLASLt's 64 bytes of it.
        version: of the cuBLASLt that made them, and the only one that may read them.
        workspace: bytes that it needs.
        waves: of blocks that fill the device.
    """

    data: bytes
    version: int
    workspace: int = 0
    waves: float = 0.0

    @property
    def id(self) -> str:
        """First 16 hex digits of a SHA-256 over the version and the bytes."""
        return hashlib.sha256(self.version.to_bytes(8, "little") + self.data).hexdigest()[:16]


class Call(ctypes.Structure):
    """``struct dks_lt_call`` of ``cublaslt.h``: addresses on the device, the stream's handle."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "weight", "bias", "residual", "x_scale", "weight_scale", "y")),
        ("workspace", _POINTER),
        ("workspace_bytes", ctypes.c_uint64),
        ("stream", _POINTER),
    )


class Problem(ctypes.Structure):
    """``struct dks_lt_problem``."""

    _fields_ = (
        *((name, _INT64) for name in ("m", "n", "k", "ldx", "ldw", "ldr", "ldy")),
        *((name, _INT32) for name in ("type", "out", "epilogue", "bias", "scales", "fast")),
        *((f"align_{name}", _UINT32) for name in "xwryb"),
        ("workspace", ctypes.c_uint64),
    )


class Found(ctypes.Structure):
    """``struct dks_lt_found``."""

    _fields_ = (
        ("algorithm", ctypes.c_ubyte * _ALGORITHM),
        ("workspace", ctypes.c_uint64),
        ("waves", ctypes.c_float),
        ("unused", _INT32),
    )


class Library:
    """cuBLASLt, with a handle for the device that was current when it was opened."""

    def __init__(self, binary: Path, path: str | None = None) -> None:
        """Open it with the library that ``build`` compiled.

        Args:
            binary: libdks_cublaslt.so.
            path: of libcublasLt; None looks for version 13, then 12, where the system finds libraries.

        Raises:
            Refused: there is no cuBLASLt, or it finds no device.
        """
        self._c = ctypes.CDLL(str(binary))
        self._c.dks_lt_open.restype = _POINTER
        self._c.dks_lt_version.restype = ctypes.c_uint64
        why = ctypes.create_string_buffer(_ROOM)
        opened = self._c.dks_lt_open(path.encode() if path else None, why, ctypes.c_size_t(_ROOM))
        if not opened:
            raise Refused(_text(why))
        self._lt = _POINTER(opened)
        self.version: int = self._c.dks_lt_version(self._lt)

    def close(self) -> None:
        """Give the handle back; the library can't be used after it."""
        self._c.dks_lt_close(self._lt)
        self._lt = _POINTER()

    def search(self, matmul: Matmul, most: int = MOST) -> list[Algorithm]:
        """The heuristic's best algorithms, each once, in its order of the time that it expects.

        Raises:
            Refused: cuBLASLt has none, with its reason.
        """
        problem, found = _problem(matmul), (Found * most)()
        count = self._ask("dks_lt_search", ctypes.byref(problem), found, most)
        algorithms = dict[str, Algorithm]()
        for each in found[:count]:
            algorithm = Algorithm(bytes(each.algorithm), self.version, each.workspace, each.waves)
            algorithms.setdefault(algorithm.id, algorithm)
        return list(algorithms.values())

    def check(self, matmul: Matmul, algorithm: Algorithm) -> Algorithm:
        """The algorithm with what it needs for this problem.

        Raises:
            Refused: another version made it, or cublasLtMatmulAlgoCheck says that it can't run here.
        """
        if algorithm.version != self.version:
            raise Refused(f"algorithm of cuBLASLt {algorithm.version}: found version {self.version}; sweep again")
        problem, found = _problem(matmul), Found()
        self._ask("dks_lt_check", ctypes.byref(problem), algorithm.data, ctypes.byref(found))
        return Algorithm(algorithm.data, algorithm.version, found.workspace, found.waves)

    def bind(self, matmul: Matmul, algorithm: Algorithm) -> Callable[[Call], None]:
        """A function that runs a checked algorithm; it raises Refused where cuBLASLt does not launch it.

        Raises:
            Refused: as ``check`` does.
        """
        data, problem = self.check(matmul, algorithm).data, _problem(matmul)

        def run(call: Call) -> None:
            self._ask("dks_lt_run", ctypes.byref(problem), data, ctypes.byref(call))

        return run

    def _ask(self, function: str, *arguments: object) -> int:
        why = ctypes.create_string_buffer(_ROOM)
        answer: int = self._c[function](self._lt, *arguments, why, ctypes.c_size_t(_ROOM))
        if answer < 0:
            raise Refused(_text(why))
        return answer


def _problem(matmul: Matmul) -> Problem:
    if why := matmul.objection():
        raise Refused(why)
    return Problem(
        *(matmul.m, matmul.n, matmul.k),
        *(matmul.ldx or matmul.k, matmul.ldw or matmul.k, matmul.ldr or matmul.n, matmul.ldy or matmul.n),
        *(TYPES[matmul.dtype], TYPES[_OUT.get(matmul.dtype, matmul.dtype)], EPILOGUES[matmul.epilogue]),
        *(matmul.bias, matmul.scales, matmul.fast, *matmul.align, matmul.workspace),
    )


def _text(why: ctypes.Array[ctypes.c_char]) -> str:
    return why.value.decode("utf-8", "replace")
