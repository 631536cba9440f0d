"""Programs of attention over many query rows (``kernels/attention.py``)."""

from __future__ import annotations

from collections.abc import Iterator

from dks.dispatch.gpu.elements import SWEPT, aligns, counts, element_of, symbol
from dks.dispatch.gpu.program import Argument, Program
from dks.dispatch.kernel import Params

HEAD_SIZES = (64, 128)


def _params(*sets: tuple[int, int, int, int]) -> tuple[Params, ...]:
    return tuple(tuple(zip(("bm", "bn", "warps", "stages"), each, strict=True)) for each in sets)


PARAMS: tuple[Params, ...] = _params((128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (32, 64, 4, 3))
"""Query rows and keys of a block, warps, blocks of keys that are on their way."""

_FEWEST_ROWS = 32

SCALAR_PARAMS: tuple[Params, ...] = _params((64, 32, 4, 2), (32, 32, 4, 2))
"""Those for calls that are not aligned: element by element, larger blocks take more registers than there are."""


def objection(d: int) -> str | None:
    """Why there is no program for heads of d elements, or None."""
    return None if d in HEAD_SIZES else f"takes heads of {' or '.join(map(str, HEAD_SIZES))} elements, not {d}"


def unsuited(params: Params, rows: int) -> str | None:
    """Why a parameter set can't be meant for so many query rows, though it would be right, or None."""
    bm = dict(params)["bm"]
    return None if 2 * rows > bm or bm == _FEWEST_ROWS else f"most of a block of {bm} rows would be idle"


def prefill(dtype: str, causal: bool, d: int, params: Params, align: int) -> tuple[Program, ...]:
    """q (b, h, rows, d), k and v (b, hkv, kv, d) -> y (b, h, rows, d), in any strides whose last is 1.

    Args:
        dtype: of all four.
        causal: whether row i sees only keys up to i + diagonal.
        d: one of ``HEAD_SIZES``.
        params: one of ``PARAMS``, or of ``SCALAR_PARAMS``.
        align: of all addresses and strides. No number of rows or keys is: their masks are per row.

    Raises:
        ValueError: dtype or d is none of those.
    """
    if d not in HEAD_SIZES:
        raise ValueError(f"d: found {d}, expected one of {', '.join(map(str, HEAD_SIZES))}")
    element, p = element_of(dtype), dict(params)
    return (
        Program(
            symbol=symbol("prefill", element.name, f"causal{causal:d}", f"d{d}", params=params, align=align),
            source="attention.py",
            function="prefill",
            arguments=(
                *map(element.pointer, ("q", "k", "v", "y")),
                *counts("b", "h", "hkv", "rows", "kv", "diagonal"),
                Argument("scale", "fp32"),
                *(element.step(f"{tensor}_{dim}") for tensor in "qkvy" for dim in "bhs"),
            ),
            constants=(("CAUSAL", int(causal)), ("D", d), ("BM", p["bm"]), ("BN", p["bn"]), ("UPCAST", 0)),
            align=align,
            warps=p["warps"],
            stages=p["stages"],
            grid=((("rows", p["bm"]),), (("h", 1),), (("b", 1),)),
        ),
    )


def programs() -> Iterator[Program]:
    """What a sweep compiles."""
    for dtype in SWEPT:
        for align in aligns(dtype):
            for d in HEAD_SIZES:
                for causal in (False, True):
                    for params in PARAMS if align > element_of(dtype).size else SCALAR_PARAMS:
                        yield from prefill(dtype, causal, d, params, align)
