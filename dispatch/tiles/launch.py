"""Generated kernels as Python calls them: compiled where the process has the fast path, else through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dks.dispatch import native
from dks.dispatch.kernel import Declined, Launch, Run
from dks.dispatch.tiles import library
from dks.dispatch.tiles.unit import Unit

Kept = Sequence[torch.Tensor | None]
"""What addresses in the constants point to: held as long as the kernel."""


def linear(unit: Unit, constant: library.Linear, dtype: torch.dtype, kept: Kept) -> Run:
    """run(x (..., k)[, residual (..., n)]) -> (..., n), all of ``dtype`` and contiguous. Raises Missing."""
    function = library.function(unit)
    if native.module is not None:
        fast: Run = _native("linear", function, constant, dtype, constant.k, kept)
        return fast
    n, k, address = constant.n, constant.k, ctypes.addressof(constant)

    # What the address points to must outlive the function: its defaults hold it.
    def run(
        x: torch.Tensor, residual: torch.Tensor | None = None, _kept: object = (constant, kept)
    ) -> torch.Tensor:
        y = x.new_empty(*x.shape[:-1], n)  # sizes one by one: torch takes a microsecond more to read a tuple
        other = None if residual is None else residual.data_ptr()
        if code := function(address, x.data_ptr(), other, y.data_ptr(), x.numel() // k):
            raise Declined(library.DECLINED[code])
        return y

    return run


def norm(unit: Unit, constant: library.Norm, dtype: torch.dtype, kept: Kept, *, adds: bool = False) -> Launch:
    """run(x (..., n)) -> (..., n), or run(x, r) -> (y, x + r) if it ``adds``; all contiguous. Raises Missing."""
    function = library.function(unit)
    if native.module is not None:
        fast: Launch = _native("norm", function, constant, dtype, constant.n, kept)
        return fast
    n, given, empty_like = constant.n, ctypes.byref(constant), torch.empty_like

    def run(x: torch.Tensor, _kept: object = (constant, kept)) -> torch.Tensor:
        y = empty_like(x)
        function(given, x.data_ptr(), None, y.data_ptr(), None, x.numel() // n)
        return y

    def fused(
        x: torch.Tensor, r: torch.Tensor, _kept: object = (constant, kept)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, h = empty_like(x), empty_like(x)
        function(given, x.data_ptr(), r.data_ptr(), y.data_ptr(), h.data_ptr(), x.numel() // n)
        return y, h

    return fused if adds else run


def _native(
    kind: str,
    function: Callable[..., int],
    constant: ctypes.Structure,
    dtype: torch.dtype,
    width: int,
    kept: Kept,
) -> Any:
    assert native.module is not None
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    return native.module.Kernel(
        kind, address, bytes(constant), native.CODES[dtype], width, (function, *kept), library.DECLINED
    )
