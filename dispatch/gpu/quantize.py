"""Programs that quantise activations (``kernels/quantize.py``), and weights in the same form."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dks.dispatch.gpu.elements import SWEPT, aligns, element_of, symbol
from dks.dispatch.gpu.program import Argument, Program

FORMS = {"int8": ("i8", 127, 1), "float8_e4m3fn": ("fp8e4nv", 448, 0)}
"""Triton's name, the largest number, and whether only whole ones exist."""

BLOCK, WARPS = 4096, 8


def quantize(dtype: str, form: str, align: int) -> tuple[Program, ...]:
    """x (m, n) -> y (m, n), scale (m,); y and scale are contiguous.

    Args:
        dtype: of x.
        form: of y, a key of ``FORMS``.
        align: of x's address, its rows' distance and its width in bytes; of y by half of that.

    Raises:
        ValueError: dtype or form is none of those.
    """
    element = element_of(dtype)
    if form not in FORMS:
        raise ValueError(f"form: found {form!r}, expected one of {', '.join(FORMS)}")
    name, most, rounds = FORMS[form]
    return (
        Program(
            symbol=symbol("quantize", element.name, name, params=(), align=align),
            source="quantize.py",
            function="quantize",
            arguments=(
                element.pointer("x"),
                # Its rows are n bytes apart, and n is known in x's elements alone.
                Argument("y", f"*{name}", element.size),
                Argument("scale", "*fp32"),
                element.step("n"),
                element.step("x_stride"),
            ),
            constants=(("MOST", most), ("ROUND", rounds), ("BLOCK", BLOCK)),
            align=align,
            warps=WARPS,
            stages=1,
            grid=((("m", 1),), (), ()),
        ),
    )


def quantized(weight: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, k) weights -> the same in ``form``, and float32 scales (n,): weight is about quantised * scale.

    Raises:
        ValueError: a weight is NaN or infinite, which no such number stands for.
    """
    wide = weight.detach().float()
    largest = wide.abs().amax(dim=1)
    if not torch.isfinite(largest).all():
        raise ValueError("weight: found NaN or infinity, expected finite values")
    _, most, rounds = FORMS[form]
    scale = largest.clamp_min(1e-30) / most
    steps = (wide / scale[:, None]).clamp_(-most, most)
    return (torch.round(steps) if rounds else steps).to(getattr(torch, form)), scale


def programs() -> Iterator[Program]:
    """What a sweep compiles."""
    for dtype in SWEPT:
        for form in FORMS:
            for align in aligns(dtype):
                yield from quantize(dtype, form, align)
