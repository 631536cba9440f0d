"""Compiled CUTLASS kernels, as a process calls them. Nothing here compiles."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dks.dispatch.gpu.call import Function, Source
from dks.dispatch.gpu.cutlass.configuration import Configuration
from dks.dispatch.gpu.launch import ContextLost, LaunchFailed, Misaligned
from dks.dispatch.gpu.limits import LIMITS
from dks.dispatch.kernel import Declined
from dks.dispatch.manifest import CUTLASS
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
_MISALIGNED, _FAILED = 1, 5
_ABSENT = {3: "it could not be initialised", 34: "a stub stands for it", 35: "none, or too old", 100: "no device"}
"""CUDA errors of a machine that runs nothing, by number."""
_STICKY = frozenset((214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 911))
"""Those after which the process is lost for CUDA, as ``driver.hpp`` has them."""


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
        ("device", _INT64),
    )


@dataclass(frozen=True)
class Kernel:
    """One kernel of a loaded library."""

    symbol: str
    library: ctypes.CDLL

    @property
    def functions(self) -> tuple[int, int]:
        """Addresses of the function and of the one that says how much workspace it needs."""
        found = (self.library[self.symbol], self.library[f"{self.symbol}_workspace"])
        run, workspace = (int(ctypes.cast(each, _POINTER).value or 0) for each in found)
        return run, workspace

    def function(self, constant: Linear, values: tuple[Source | int, ...], keep: object) -> Function:
        """As a call's recipe takes it: values of ``Call``'s fields up to ``ldy``, and what addresses point to."""
        run, workspace = self.functions
        return Function(run, workspace, ctypes.addressof(constant), values, self.settle, (self, constant, keep))

    def settle(self, status: int) -> None:
        """Nothing where a status is 0.

        Raises:
            Declined: the call is not one for this kernel or this machine; nothing was launched.
            Misaligned: the one of these that another kernel may take.
            ContextLost: every later CUDA call of this process fails too.
            LaunchFailed: CUTLASS or the driver refused.
        """
        if status == OK:
            return
        said, error = f"{self.symbol}: {why(status)}", status - _CUDA
        if status == _MISALIGNED:
            raise Misaligned(said)
        if error in _STICKY:
            raise ContextLost(f"{said}; every later CUDA call of this process fails too")
        if status == _FAILED or (error >= 0 and error not in _ABSENT):
            raise LaunchFailed(said)
        raise Declined(said)

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


Locate = Callable[[Configuration], Kernel]


def _nowhere(configuration: Configuration) -> Kernel:
    raise Missing(f"{configuration.symbol}: no loaded package ships it, and nothing is compiled while serving")


_shipped: dict[str, ctypes.CDLL] = {}  # by digest
_locate: Locate = _nowhere


def add(data: bytes, digest: str) -> None:
    """Load a package's library from its bytes, unless one of this digest is there; it stays for good.

    Without a driver it loads all the same: each call then says what is missing. Raises Missing where it can't be
    loaded.
    """
    if digest in _shipped:
        return
    file = os.memfd_create(CUTLASS)
    try:
        with os.fdopen(os.dup(file), "wb") as writer:
            writer.write(data)
        _shipped[digest] = ctypes.CDLL(f"/proc/self/fd/{file}")
    except OSError as error:
        os.close(file)  # otherwise it stays open, so that its number names this library alone
        raise Missing(str(error)) from None


def look_in(locate: Locate) -> None:
    """From now on, kernels that no package ships are what ``locate`` finds: for measuring, not for serving."""
    global _locate  # noqa: PLW0603 - set once, by what measures
    _locate = locate


def find(configuration: Configuration) -> Kernel:
    """The kernel of a configuration, for whatever device it was compiled. Raises Missing where there is none."""
    for library in _shipped.values():
        for each in dict.fromkeys(configuration.on(device) for device in LIMITS):
            if _made_from(library, each) == each.digest():
                return Kernel(each.symbol, library)
    return _locate(configuration)


def lack(configuration: Configuration) -> str | None:
    """Why this process can't call it, or None."""
    try:
        find(configuration)
    except Missing as error:
        return str(error)
    return None


def _made_from(library: ctypes.CDLL, configuration: Configuration) -> str:
    """Digest of what a library's kernel of this name was made from; empty where it has none."""
    try:
        found = (ctypes.c_char * len(configuration.digest())).in_dll(library, f"{configuration.symbol}_source")
    except ValueError:
        return ""
    return found.value.decode("ascii", "replace")


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
    if status - _CUDA in _ABSENT:
        return f"no NVIDIA driver that could run it (CUDA error {status - _CUDA}: {_ABSENT[status - _CUDA]})"
    return f"CUDA error {status - _CUDA}" if status >= _CUDA else REASONS.get(status, f"status {status}")
