"""cuBLASLt from Python: its candidates for a problem, and running one of them. Nothing here compiles."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from dks.dispatch.gpu.call import Function, Source
from dks.dispatch.gpu.launch import LaunchFailed, Misaligned
from dks.dispatch.kernel import Declined
from dks.dispatch.manifest import CUBLASLT
from dks.dispatch.tiles.library import Missing

HERE = Path(__file__).parent
SOURCES = ("cublaslt.h", "cublaslt.cpp")
"""All that the library is made of, beside this file."""

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


_CODES = {
    1: "an address is not divisible by what the algorithm was chosen for",
    2: "the algorithm can't run so many rows",
    3: "the workspace is too small",
    4: "bound on another device",
}
_FAILED, _NOT_SUPPORTED = 1000, 15


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
        self._c.dks_lt_linear_make.restype = _POINTER
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
        self._same_version(algorithm)
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

    def function(
        self,
        matmul: Matmul,
        algorithm: Algorithm,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        device: int,
        values: tuple[Source | int, ...],
    ) -> Function:
        """An algorithm as a call's recipe takes it.

        Args:
            matmul: whose number of rows does not matter: cuBLASLt is asked about each that comes.
            device: number of the one that was current when this was opened.
            values: as ``dks_lt_linear`` has them, up to ``ldy``.

        Raises:
            Refused: another version made the algorithm.
        """
        self._same_version(algorithm)
        problem = _problem(matmul)
        addresses = (_POINTER(None if each is None else each.data_ptr()) for each in (weight, bias))
        made = self._c.dks_lt_linear_make(
            self._lt, ctypes.byref(problem), algorithm.data, *addresses, _INT64(device)
        )
        if not made:
            raise MemoryError("cuBLASLt: no memory for what is bound")
        run, workspace = (
            int(ctypes.cast(self._c[f"dks_lt_linear_{name}"], _POINTER).value or 0) for name in ("run", "workspace")
        )
        return Function(run, workspace, made, values, settle, (_Held(self._c, made), self, weight, bias))

    def _same_version(self, algorithm: Algorithm) -> None:
        if algorithm.version != self.version:
            raise Refused(f"algorithm of cuBLASLt {algorithm.version}: found version {self.version}; sweep again")

    def _ask(self, function: str, *arguments: object) -> int:
        why = ctypes.create_string_buffer(_ROOM)
        answer: int = self._c[function](self._lt, *arguments, why, ctypes.c_size_t(_ROOM))
        if answer < 0:
            raise Refused(_text(why))
        return answer


class _Held:
    """A ``struct dks_lt_linear``, until nobody can call it."""

    def __init__(self, library: ctypes.CDLL, address: int) -> None:
        self._free, self._address = library.dks_lt_linear_free, _POINTER(address)

    def __del__(self) -> None:
        self._free(self._address)


def settle(code: int) -> None:
    """Nothing where an ``enum dks_lt_code`` is 0.

    Raises:
        Declined: the algorithm can't serve this call; nothing was launched.
        Misaligned: the one of these that another kernel may take.
        LaunchFailed: cuBLASLt failed.
    """
    if code == 0:
        return
    said = f"cuBLASLt: {_CODES.get(code) or f'status {code - _FAILED}'}"
    if code >= _FAILED and code != _FAILED + _NOT_SUPPORTED:
        raise LaunchFailed(said)
    raise Misaligned(said) if code == 1 else Declined(said)


@lru_cache
def digest() -> str:
    """First 16 hex digits of a SHA-256 over the sources."""
    return hashlib.sha256(b"\0".join((HERE / name).read_bytes() for name in SOURCES)).hexdigest()[:16]


Locate = Callable[[], Path]


def _nowhere() -> Path:
    raise Missing("cuBLASLt: no loaded package ships what opens it, and nothing is compiled while serving")


_shipped: dict[str, Path] = {}  # by digest
_locate: Locate = _nowhere
_opened: dict[tuple[Path, int], Library] = {}


def add(data: bytes, digest: str) -> None:
    """Keep a package's library, unless one of this digest is there; it stays for good, in memory."""
    if digest not in _shipped:
        file = os.memfd_create(CUBLASLT)  # open for good, so that its number names this library alone
        with os.fdopen(os.dup(file), "wb") as writer:
            writer.write(data)
        _shipped[digest] = Path(f"/proc/self/fd/{file}")


def look_in(locate: Locate) -> None:
    """From now on, where no package ships the library it is where ``locate`` says: for measuring alone."""
    global _locate  # noqa: PLW0603 - set once, by what measures
    _locate = locate


def opened(device: torch.device) -> Library:
    """cuBLASLt with a handle for a device, one for the life of the process.

    Raises:
        Missing: there is no library of this version that opens it, no cuBLASLt, or no device.
    """
    index = device.index or 0
    path = next((path for path in _shipped.values() if _is_ours(path)), None) or _locate()
    if (path, index) not in _opened:
        try:
            if device.type == "cuda":
                with torch.cuda.device(index):
                    torch.cuda.synchronize()  # so that the device's context is this thread's current one
                    _opened[path, index] = Library(path, _of_torch())
            else:
                _opened[path, index] = Library(path, _of_torch())
        except (Refused, OSError) as error:
            raise Missing(f"cuBLASLt: {error}") from None
    return _opened[path, index]


def _is_ours(path: Path) -> bool:
    """Whether it was made from this version's sources."""
    try:
        found = (ctypes.c_char * len(digest())).in_dll(ctypes.CDLL(str(path)), "dks_lt_source").value
    except (OSError, ValueError):
        return False
    return found.decode("ascii", "replace") == digest()


def _of_torch() -> str | None:
    """The name of the cuBLASLt that PyTorch has loaded already: the system finds a loaded one by its name."""
    major = str(torch.version.cuda or "").partition(".")[0]
    return f"libcublasLt.so.{major}" if major else None


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
