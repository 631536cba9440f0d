"""Compiled CUTLASS kernels, as a process calls them. Nothing here compiles."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from dks.dispatch.gpu.cutlass.configuration import Configuration
from dks.dispatch.tiles.library import Missing

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32

OK = 0
REASONS = {
    1: "an address, a row's distance, n or k is not divisible by what the kernel needs",
    2: "a size, a distance or the number of multiprocessors is out of range, or CUTLASS refuses it",
    3: "the workspace is too small",
    4: "a pointer is missing that the kernel needs, or given that it can't use",
    5: "CUTLASS could not launch",
}
_CUDA = 1000


class Linear(ctypes.Structure):
    """``struct dks_cutlass_linear`` of ``abi.h``."""

    _fields_ = (
        *((name, _POINTER) for name in ("weight", "bias", "weight_scale")),
        *((name, _INT64) for name in ("n", "k", "ldw")),
        ("multiprocessors", _INT32),
    )


class Call(ctypes.Structure):
    """``struct dks_cutlass_call``."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "x_scale", "residual", "y")),
        *((name, _INT64) for name in ("rows", "ldx", "ldr", "ldy")),
        ("workspace", _POINTER),
        ("workspace_bytes", _INT64),
        ("stream", _POINTER),
    )


@dataclass(frozen=True)
class Kernel:
    """One kernel of a loaded library."""

    symbol: str
    library: ctypes.CDLL

    def run(self, linear: Linear, call: Call) -> int:
        """Put it on the call's stream; 0 or a status, see ``why``."""
        status: int = self.library[self.symbol](ctypes.byref(linear), ctypes.byref(call))
        return status

    def workspace(self, linear: Linear, call: Call) -> int:
        """Bytes of workspace that a call needs on the current device.

        Raises:
            ValueError: the kernel would refuse this call, with the reason.
        """
        function = self.library[f"{self.symbol}_workspace"]
        function.restype = _INT64
        size: int = function(ctypes.byref(linear), ctypes.byref(call))
        if size < 0:
            raise ValueError(f"{self.symbol}: {why(-size)}")
        return size


def load(path: Path, configuration: Configuration) -> Kernel:
    """The kernel of a configuration in the library at ``path``.

    Raises:
        Missing: it can't be loaded, or was made from something else.
    """
    digest = configuration.digest()
    try:
        library = ctypes.CDLL(str(path))
        made_from = (ctypes.c_char * len(digest)).in_dll(library, f"{configuration.symbol}_source").value
    except (OSError, ValueError) as error:
        raise Missing(f"{configuration.symbol}: {error}") from None
    if made_from != digest.encode():
        raise Missing(f"{configuration.symbol}: {path} has that of another version; build it again")
    return Kernel(configuration.symbol, library)


def why(status: int) -> str:
    """What a kernel's status means; an empty text for 0."""
    if status == OK:
        return ""
    return f"CUDA error {status - _CUDA}" if status >= _CUDA else REASONS.get(status, f"status {status}")
