"""Programs of the cross-entropy of logits (``kernels/cross_entropy.py``)."""

from __future__ import annotations

from collections.abc import Iterator

from dks.dispatch.gpu.elements import SWEPT, aligns, counts, element_of, symbol
from dks.dispatch.gpu.program import Argument, Program
from dks.dispatch.kernel import Params

PARAMS: tuple[Params, ...] = tuple(
    (("block", block), ("warps", warps), ("stages", stages))
    for block, warps, stages in ((1024, 4, 1), (4096, 4, 1), (4096, 8, 3), (8192, 8, 1), (16384, 16, 1))
)
"""Columns of a block, warps, blocks that are loaded ahead."""


def unsuited(params: Params, n: int) -> str | None:
    """Why a parameter set can't be meant for rows of n elements, though it would be right, or None."""
    block = dict(params)["block"]
    return None if 2 * n > block or block == 1024 else f"most of a block of {block} would be idle"


def cross_entropy(dtype: str, params: Params, align: int) -> tuple[Program, ...]:
    """logits (m, n), targets (m,) int64, ignored -> losses (m,) of logits' dtype.

    Targets and losses are aligned to their own elements alone.
    """
    element, p = element_of(dtype), dict(params)
    return (
        Program(
            symbol=symbol("cross_entropy", element.name, params=params, align=align),
            source="cross_entropy.py",
            function="cross_entropy",
            arguments=(
                element.pointer("logits"),
                Argument("targets", "*i64"),
                Argument("losses", f"*{element.name}"),
                *counts("m"),
                *map(element.step, ("n", "stride")),
                Argument("ignored", "i64"),
            ),
            constants=(("BLOCK", p["block"]), ("STAGES", p["stages"])),
            align=align,
            warps=p["warps"],
            stages=p["stages"],
            grid=((("m", 1),), (), ()),
        ),
    )


def programs() -> Iterator[Program]:
    """What a sweep compiles."""
    for dtype in SWEPT:
        for align in aligns(dtype):
            for params in PARAMS:
                yield from cross_entropy(dtype, params, align)
