"""Generated layer_norm, rms_norm and softmax against float64: every size, alignment and odd value."""

from __future__ import annotations

import ctypes
import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from dks.dispatch.tiles import build, library
from dks.dispatch.tiles.isa import ISAS
from dks.dispatch.tiles.unit import Unit

EPS = 1e-5
GUARD = 64  # elements around everything, of a value that no result has
MARK = -12345.0
ELEMENTS = {torch.float32: "float", torch.bfloat16: "dks::bf16"}
LIMIT = {torch.float32: 4e-7, torch.bfloat16: 4e-3}
OPS = ("LayerNorm", "RmsNorm", "Softmax")
VECTORS = {"avx2": "dks::Avx2", "avx512": "dks::Avx512"}
CASES = [
    pytest.param(op, isa, dtype, id=f"{op}-{isa}-{str(dtype)[6:]}")
    for op, isa, dtype in itertools.product(OPS, VECTORS, ELEMENTS)
]


def function(op: str, isa: str, dtype: torch.dtype) -> Callable[..., int]:
    if (why := ISAS[isa].lack()) is not None:
        pytest.skip(why)
    constants = f"{VECTORS[isa]}, {ELEMENTS[dtype]}, 2, 4" + ("" if op == "Softmax" else ", true")
    symbol = f"dks_test_{op.lower()}_{isa}_{ELEMENTS[dtype][-4:]}"
    unit = Unit(symbol, isa, "softmax" if op == "Softmax" else "norm", "rows.hpp", f"dks::{op}<{constants}>")
    assert build.build([unit]) == {}
    library.look_in(build.locate)
    return library.function(unit)


def place(values: torch.Tensor, offset: int) -> torch.Tensor:
    """``values`` at ``offset`` bytes past a cache line, with guards around them."""
    room = torch.full((values.numel() + 2 * GUARD + 64,), MARK, dtype=values.dtype)
    begin = GUARD + (offset - room[GUARD:].data_ptr()) % 64 // values.element_size()
    view = room[begin : begin + values.numel()].view(values.shape)
    assert view.data_ptr() % 64 == offset % 64
    view.copy_(values)
    return view


def assert_guarded(view: torch.Tensor) -> None:
    whole = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())
    begin = view.storage_offset()
    assert (whole[:begin] == MARK).all() and (whole[begin + view.numel() :] == MARK).all()


def call(
    op: str,
    f: Callable[..., int],
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    offsets: tuple[int, ...] = (0,) * 6,
    threads: int = 1,
    wants_sum: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y and x + residual, with everything at its offset, and nothing written but what should be."""
    m, n = x.shape
    inputs = [
        None if t is None else place(t, o) for t, o in zip((x, weight, bias, residual), offsets, strict=False)
    ]
    copies = [None if t is None else t.clone() for t in inputs]
    y, total = place(torch.full_like(x, 7.0), offsets[4]), place(torch.full_like(x, 7.0), offsets[5])
    at = [None if t is None else t.data_ptr() for t in inputs]
    if op == "Softmax":
        code = f(at[0], y.data_ptr(), m, n, threads)
    else:
        norm = library.Norm(at[1], at[2], n, EPS, threads)
        code = f(ctypes.byref(norm), at[0], at[3], y.data_ptr(), total.data_ptr() if wants_sum else None, m)
    assert code == library.OK
    for t, copy in zip(inputs, copies, strict=True):
        if t is not None and copy is not None:
            assert torch.equal(t.nan_to_num(1.0), copy.nan_to_num(1.0)), "an input was written"
    assert_guarded(y)
    assert_guarded(total)
    if residual is None or not wants_sum:
        assert (total == 7.0).all(), "a sum that nobody asked for"
        return y, None
    return y, total


def reference(
    op: str, x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    x, shape = x.double(), x.shape[-1:]
    w, b = (None if t is None else t.double() for t in (weight, bias))
    if op == "Softmax":
        return torch.softmax(x, -1)
    if op == "LayerNorm":
        return F.layer_norm(x, shape, w, b, EPS)
    y = F.rms_norm(x, shape, w, EPS)
    return y if b is None else y + b


def assert_close(y: torch.Tensor, wanted: torch.Tensor, what: object, slack: float = 1.0) -> None:
    """Each element within the element's rounding, by the size of the row."""
    gap = (y.double() - wanted).abs().amax(-1)
    assert (gap <= slack * LIMIT[y.dtype] * wanted.abs().amax(-1).clamp_min(1e-2)).all(), (what, gap)


def draw(*shape: int, dtype: torch.dtype, seed: int, mean: float = 0.5) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean).to(dtype)


@pytest.mark.parametrize(("op", "isa", "dtype"), CASES)
def test_every_size_alignment_and_form(op: str, isa: str, dtype: torch.dtype) -> None:
    f, rng, size = function(op, isa, dtype), random.Random(1), dtype.itemsize
    widths = sorted({*range(1, 70), *rng.sample(range(70, 301), 60), 128, 256, 300, 1024})
    offsets = itertools.cycle(range(0, 64, size))
    for seed, n in enumerate(widths):
        m, threads = 1 + seed % 9, 1 + seed % 3
        x = draw(m, n, dtype=dtype, seed=seed)
        weight, bias = (draw(n, dtype=dtype, seed=seed + s) if rng.random() < 0.7 else None for s in (1, 2))
        residual = draw(m, n, dtype=dtype, seed=seed + 3) if op != "Softmax" and rng.random() < 0.5 else None
        here = tuple((next(offsets) + rng.randrange(0, 64, size)) % 64 for _ in range(6))
        asks = rng.random() < 0.5
        y, total = call(op, f, x, weight, bias, residual, here, threads, asks)
        h = x if residual is None else x + residual
        assert total is None or torch.equal(total, h)
        if n > 1 or op != "LayerNorm":  # one number is its own mean: bias alone, whatever rounding leaves
            assert_close(y, reference(op, h, weight, bias), (m, n, threads, here))


@pytest.mark.parametrize(("op", "isa", "dtype"), CASES)
def test_every_offset_of_every_pointer(op: str, isa: str, dtype: torch.dtype) -> None:
    f, (m, n) = function(op, isa, dtype), (5, 77)
    x, residual = draw(m, n, dtype=dtype, seed=1), None if op == "Softmax" else draw(m, n, dtype=dtype, seed=2)
    weight, bias = draw(n, dtype=dtype, seed=3), draw(n, dtype=dtype, seed=4)
    wanted = reference(op, x if residual is None else x + residual, weight, bias)
    first, _ = call(op, f, x, weight, bias, residual)
    for pointer in (0, 4) if op == "Softmax" else range(6):
        for offset in range(0, 64 + dtype.itemsize, dtype.itemsize):
            offsets = tuple(offset if p == pointer else 0 for p in range(6))
            y, _ = call(op, f, x, weight, bias, residual, offsets)
            assert torch.equal(y, first), (pointer, offset)
    assert_close(first, wanted, "aligned")


@pytest.mark.parametrize(("op", "isa", "dtype"), CASES)
def test_odd_values_are_as_in_torch_and_stay_in_their_row(op: str, isa: str, dtype: torch.dtype) -> None:
    f = function(op, isa, dtype)
    for n, value, row in itertools.product((1, 3, 16, 45, 130), (math.nan, math.inf, -math.inf), (0, 2, 5)):
        for at in sorted({0, n // 2, n - 1}):
            x = draw(6, n, dtype=dtype, seed=n)
            plain, _ = call(op, f, x)
            x[row, at] = value
            y, _ = call(op, f, x)
            torch.testing.assert_close(y.isnan(), reference(op, x).isnan(), msg=str((n, value, row, at)))
            others = torch.arange(6) != row
            assert torch.equal(y[others], plain[others]), (n, value, row, at)
            assert_close(y.nan_to_num(1.0), reference(op, x).nan_to_num(1.0), (n, value, row, at))


@pytest.mark.parametrize(("op", "isa", "dtype"), CASES)
def test_hard_values(op: str, isa: str, dtype: torch.dtype) -> None:
    f = function(op, isa, dtype)
    for n in (5, 64, 301):
        x = draw(5, n, dtype=dtype, seed=n)
        hard = [x * 0, x * 1e-3, x * 1e3, x + 64]
        if op == "Softmax":
            hard += [x * 0 - math.inf, x - 1e30, torch.where(x > 0.5, x, -math.inf)]
        for values in hard:
            y, _ = call(op, f, values)
            wanted = reference(op, values)
            assert torch.equal(y.isnan(), wanted.isnan())
            # A mean of 64 is rounded itself, which each element then has beside its own error.
            assert_close(y.nan_to_num(1.0), wanted.nan_to_num(1.0), n, 64 if values is hard[3] else 1)


@pytest.mark.parametrize(("op", "isa", "dtype"), CASES)
def test_threads_change_nothing(op: str, isa: str, dtype: torch.dtype) -> None:
    f = function(op, isa, dtype)
    for m in (1, 4, 7, 9, 33):
        x = draw(m, 50, dtype=dtype, seed=m)
        one, _ = call(op, f, x)
        assert all(torch.equal(call(op, f, x, threads=t)[0], one) for t in (2, 3, 64))
    call(op, f, draw(1, 50, dtype=dtype, seed=1)[:0], threads=2)  # no rows: nothing is touched
