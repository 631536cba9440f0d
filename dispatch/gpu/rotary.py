"""Programs of rotary position embedding (``kernels/rotary.py``)."""

from __future__ import annotations

from collections.abc import Iterator

from dks.dispatch.gpu.elements import SWEPT, aligns, counts, element_of, symbol
from dks.dispatch.gpu.program import Argument, Program
from dks.dispatch.kernel import Params

PARAMS: tuple[Params, ...] = tuple(
    (("heads", heads), ("warps", warps)) for heads, warps in ((8, 1), (16, 2), (32, 4))
)
"""Heads of a program, warps: with heads of 64, 16 bytes of q a thread."""


def unsuited(params: Params, h: int) -> str | None:
    """Why a parameter set can't be meant for h heads, though it would be right, or None."""
    heads = dict(params)["heads"]
    return None if 2 * h > heads or heads == 8 else f"most of a block of {heads} heads would be idle"


def rotary(dtype: str, cache: str, d: int, params: Params, align: int) -> tuple[Program, ...]:
    """q (tokens, h, d), k (tokens, hkv, d), cos and sin (positions, d / 2), positions (tokens,) int64
    -> q_out, k_out, contiguous.

    Args:
        dtype: of q and k.
        cache: of cos and sin. Models compute them in float32; a cache in the model's dtype is half as large.
        d: size of a head, even; pairs are i and i + d / 2.
        params: one of ``PARAMS``.
        align: of all addresses but that of positions, and of all strides.

    Raises:
        ValueError: dtype or cache is none of those there are, or d is odd.
    """
    if d < 2 or d % 2:
        raise ValueError(f"d: found {d}, expected an even number")
    element, table, p = element_of(dtype), element_of(cache), dict(params)
    half = d // 2
    return (
        Program(
            symbol=symbol("rotary", element.name, table.name, f"d{d}", params=params, align=align),
            source="rotary.py",
            function="rotary",
            arguments=(
                *map(element.pointer, ("q", "k")),
                *map(table.pointer, ("cos", "sin")),
                Argument("positions", "*i64"),
                *map(element.pointer, ("q_out", "k_out")),
                *counts("tokens", "h", "hkv", "rows"),
                *map(element.step, ("q_token", "q_head", "k_token", "k_head")),
                table.step("cache_stride"),
            ),
            constants=(("HALF", half), ("BLOCK", 1 << (half - 1).bit_length()), ("HEADS", p["heads"])),
            align=align,
            warps=p["warps"],
            stages=1,
            grid=((("tokens", 1),), (("h", p["heads"]),), (("", 2),)),
        ),
    )


def programs() -> Iterator[Program]:
    """What a sweep compiles: the usual head sizes, caches in float32."""
    for dtype in SWEPT:
        for align in aligns(dtype):
            for d in (64, 128):
                for params in PARAMS:
                    yield from rotary(dtype, "float32", d, params, align)
