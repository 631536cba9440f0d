"""The roofs of one core of this machine, by the functions of ``roofs.cpp``: multiply-adds and bytes a second."""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dks.dispatch.compiler import failure, find_compiler, run_compiler
from dks.dispatch.tiles.isa import ISAS

SOURCE = Path(__file__).with_name("roofs.cpp")
PEAKS = ("fma_fp32", "amx_bf16", "amx_int8")
READ_STEP = 512  # bytes are read in multiples of this
_CALLS = 9


class Roofs:
    """Work without any waste, to be timed beside a kernel that does the same amount.

    Raises:
        RuntimeError: they can't be compiled here; the message says why.
    """

    def __init__(self) -> None:
        command, reason = find_compiler()
        if reason:
            raise RuntimeError(reason)
        here = [isa for isa in ISAS.values() if isa.unavailable() is None]
        if not here:
            raise RuntimeError(f"this CPU has none of {', '.join(ISAS)}")
        options = dict.fromkeys(option for isa in here for option in isa.options)
        with tempfile.TemporaryDirectory() as name:
            built = Path(name) / "roofs.so"
            flags = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", *options)
            code, output = run_compiler([*command, *flags, str(SOURCE), "-o", built.name], built.parent)
            if code != 0:
                raise RuntimeError(failure(command, code, output))
            self._library = ctypes.CDLL(str(built))
        self.peaks = tuple(name for name in PEAKS if hasattr(self._library, f"roof_{name}") and self._allowed(name))

    def _allowed(self, name: str) -> bool:
        return self.multiply_adds(name, 1)() == 0

    def multiply_adds(self, name: str, count: int) -> Callable[[], int]:
        """A call that does at least ``count`` of them; ``name`` is one of ``peaks``."""
        return partial(self._library[f"roof_{name}"], ctypes.c_int64(count))

    def read(self, size: int) -> Callable[[], int]:
        """A call that reads ``size`` bytes of its own, a multiple of READ_STEP."""
        if size % READ_STEP:
            raise ValueError(f"read: found {size} bytes, expected a multiple of {READ_STEP}")
        buffer = torch.randint(256, (size,), dtype=torch.uint8)
        function = self._library.roof_read

        def call(_kept: object = buffer) -> int:
            return int(function(ctypes.c_void_p(buffer.data_ptr()), ctypes.c_int64(size)))

        return call

    def peak(self, name: str) -> float:
        """Multiply-adds a second, the best of some calls."""
        count = 2**27
        return count / _best(self.multiply_adds(name, count))

    def bandwidth(self, size: int) -> float:
        """Bytes read a second from a buffer of ``size`` bytes, the best of some calls."""
        return size / _best(self.read(size))


def _best(call: Callable[[], int]) -> float:
    times = []
    for _ in range(_CALLS):
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return min(times)
