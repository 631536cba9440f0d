"""Programs over rows: rms_norm, layer_norm, softmax, silu_and_mul (``kernels/rows.py``).

Outputs are contiguous, rows of inputs lie ``*_stride`` apart. Addresses, strides and the width n are of the
alignment class: with n unknown, the last vector of a row would be cut.
"""

from __future__ import annotations

from collections.abc import Iterator

from dks.dispatch.gpu.elements import SWEPT, aligns, counts, element_of, symbol
from dks.dispatch.gpu.program import Argument, Program
from dks.dispatch.kernel import Params


def _params(*sets: tuple[int, int, int, int]) -> tuple[Params, ...]:
    return tuple(tuple(zip(("block", "rows", "loop", "warps"), each, strict=True)) for each in sets)


PARAMS: tuple[Params, ...] = _params(
    (128, 8, 0, 4),
    (512, 4, 0, 4),
    (1024, 1, 0, 4),
    (2048, 1, 0, 4),
    (4096, 1, 0, 4),
    (4096, 1, 0, 8),
    (8192, 1, 0, 8),
    (16384, 1, 0, 16),
    (4096, 1, 1, 8),
    (8192, 1, 1, 16),
)
"""Columns of a block, rows of a program, whether it loops over blocks (else n is at most one), warps."""

LOOP: Params = PARAMS[-2]
"""The parameters of a program that takes rows of any width."""

SILU_PARAMS: tuple[Params, ...] = tuple(
    (("block", block), ("rows", rows), ("warps", warps))
    for block, rows, warps in ((512, 4, 4), (1024, 1, 4), (2048, 1, 4), (4096, 1, 8))
)
"""Of silu_and_mul, whose blocks of columns have nothing to do with each other."""


def objection(params: Params, n: int) -> str | None:
    """Why a parameter set of ``PARAMS`` can't take rows of n elements, or None."""
    p = dict(params)
    if p["loop"] or n <= p["block"]:
        return None
    return f"holds a row of at most {p['block']} elements, not {n}"


def unsuited(params: Params, n: int) -> str | None:
    """Why a parameter set can't be meant for rows of n elements, though it would be right, or None."""
    p = dict(params)
    if p["loop"]:
        return None if n > p["block"] else f"a row of {n} elements needs no loop"
    return None if 2 * n > p["block"] or p["block"] == 128 else f"most of a block of {p['block']} would be idle"


def suits(params: Params, n: int) -> str | None:
    """Why a parameter set is not measured on rows of n elements, or None."""
    return objection(params, n) or unsuited(params, n)


def expect_room(params: Params, n: int) -> None:
    """Raises ValueError where a parameter set can't take rows of n elements."""
    if why := objection(params, n):
        raise ValueError(f"params: found {dict(params)}, which {why}")


def rms_norm(dtype: str, weight: bool, residual: bool, params: Params, align: int) -> tuple[Program, ...]:
    """x, residual (m, n) -> y, total (m, n); without a residual, that and total are null, without a weight that.

    The constant ``eps`` is under the root.
    """
    element = element_of(dtype)
    return (
        _program(
            "rms_norm",
            symbol("rms_norm", element.name, f"w{weight:d}", f"r{residual:d}", params=params, align=align),
            (
                *map(element.pointer, ("x", "residual", "weight", "y", "total")),
                *counts("m"),
                *map(element.step, ("n", "x_stride", "residual_stride")),
                Argument("eps", "fp32"),
            ),
            (("WEIGHT", int(weight)), ("RESIDUAL", int(residual))),
            params,
            align,
        ),
    )


def layer_norm(dtype: str, weight: bool, bias: bool, params: Params, align: int) -> tuple[Program, ...]:
    """x (m, n) -> y (m, n); weight and bias (n,) are null where there is none."""
    element = element_of(dtype)
    return (
        _program(
            "layer_norm",
            symbol("layer_norm", element.name, f"w{weight:d}", f"b{bias:d}", params=params, align=align),
            (
                *map(element.pointer, ("x", "weight", "bias", "y")),
                *counts("m"),
                *map(element.step, ("n", "x_stride")),
                Argument("eps", "fp32"),
            ),
            (("WEIGHT", int(weight)), ("BIAS", int(bias))),
            params,
            align,
        ),
    )


def softmax(dtype: str, params: Params, align: int) -> tuple[Program, ...]:
    """x (m, n) -> y (m, n)."""
    element = element_of(dtype)
    pointers, steps = map(element.pointer, ("x", "y")), map(element.step, ("n", "x_stride"))
    name = symbol("softmax", element.name, params=params, align=align)
    return (_program("softmax", name, (*pointers, *counts("m"), *steps), (), params, align),)


def silu_unsuited(params: Params, n: int) -> str | None:
    """Why a parameter set of ``SILU_PARAMS`` can't be meant for rows of n elements, or None."""
    block = dict(params)["block"]
    return None if 2 * n > block or block == 512 else f"most of a block of {block} would be idle"


def silu_and_mul(dtype: str, params: Params, align: int) -> tuple[Program, ...]:
    """x (m, 2n) -> y (m, n), for one of ``SILU_PARAMS``."""
    element, p = element_of(dtype), dict(params)
    return (
        Program(
            symbol=symbol("silu_and_mul", element.name, params=params, align=align),
            source="rows.py",
            function="silu_and_mul",
            arguments=(
                *map(element.pointer, ("x", "y")),
                *counts("m"),
                *map(element.step, ("n", "x_stride")),
            ),
            constants=(("ROWS", p["rows"]), ("BLOCK", p["block"])),
            align=align,
            warps=p["warps"],
            stages=1,
            grid=((("m", p["rows"]),), (("n", p["block"]),), ()),
        ),
    )


def programs() -> Iterator[Program]:
    """What a sweep compiles: norms with a weight, and a bias."""
    for dtype in SWEPT:
        for align in aligns(dtype):
            for params in PARAMS:
                for residual in (False, True):
                    yield from rms_norm(dtype, True, residual, params, align)
                yield from layer_norm(dtype, True, True, params, align)
                yield from softmax(dtype, params, align)
            for params in SILU_PARAMS:
                yield from silu_and_mul(dtype, params, align)


def _program(
    function: str,
    name: str,
    arguments: tuple[Argument, ...],
    constants: tuple[tuple[str, int], ...],
    params: Params,
    align: int,
) -> Program:
    p = dict(params)
    return Program(
        symbol=name,
        source="rows.py",
        function=function,
        arguments=arguments,
        constants=(*constants, ("LOOP", p["loop"]), ("ROWS", p["rows"]), ("BLOCK", p["block"])),
        align=align,
        warps=p["warps"],
        stages=1,
        grid=((("m", p["rows"]),), (), ()),
    )
