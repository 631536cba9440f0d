"""Programs over rows, interpreted, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dks.dispatch.gpu import rows
from dks.dispatch.kernel import Params
from tests.gpu.interpreted import DTYPES, assert_close, blank, check_family, launch, null, placed, some


def params(block: int, count: int, loop: int) -> Params:
    return (("block", block), ("rows", count), ("loop", loop), ("warps", 4))


FORMS = (params(32, 1, 0), params(32, 4, 0), params(16, 1, 1), params(8, 2, 1))
SHAPES = ((1, 1), (3, 32), (5, 29), (8, 17))
CASES = some(5, DTYPES, FORMS, SHAPES)


def drawn(m: int, n: int, dtype: str, gap: int = 0, offset: int = 0) -> torch.Tensor:
    return placed((torch.randn(m, n) + 0.5).to(DTYPES[dtype]), gap, offset)


def rms_norm(form: Params, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None) -> Any:
    (m, n), nothing = x.shape, null(x.dtype)
    y = blank(m, n, dtype=x.dtype)
    total = nothing if residual is None else blank(m, n, dtype=x.dtype)
    dtype = next(name for name, dtype in DTYPES.items() if dtype is x.dtype)
    values = {
        "x": x,
        "residual": nothing if residual is None else residual,
        "weight": nothing if weight is None else weight,
        "y": y,
        "total": total,
        "m": m,
        "n": n,
        "x_stride": x.stride(0),
        "residual_stride": 0 if residual is None else residual.stride(0),
        "eps": 1e-5,
    }
    programs = rows.rms_norm(dtype, weight is not None, residual is not None, form, 2)
    launch(programs, values, ("y", "total"))
    return y, total


@pytest.mark.parametrize(("dtype", "form", "shape"), CASES)
def test_rms_norm(dtype: str, form: Params, shape: tuple[int, int]) -> None:
    m, n = shape
    x, residual = drawn(m, n, dtype, gap=3, offset=1), drawn(m, n, dtype, gap=1)
    weight = placed(torch.randn(n).to(x.dtype))
    wide = x.double()
    assert_close(rms_norm(form, x, None, weight)[0], F.rms_norm(wide, (n,), weight.double(), 1e-5), 2)
    assert_close(rms_norm(form, x, None, None)[0], F.rms_norm(wide, (n,), None, 1e-5), 2)
    y, total = rms_norm(form, x, residual, weight)
    assert_close(total, wide + residual.double())
    # What is normalised is the rounded sum, as the next layer sees it.
    assert_close(y, F.rms_norm(total.double(), (n,), weight.double(), 1e-5), 2)


def layer_norm(form: Params, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Any:
    (m, n), nothing = x.shape, null(x.dtype)
    dtype = next(name for name, dtype in DTYPES.items() if dtype is x.dtype)
    values = {
        "x": x,
        "weight": nothing if weight is None else weight,
        "bias": nothing if bias is None else bias,
        "y": blank(m, n, dtype=x.dtype),
        "m": m,
        "n": n,
        "x_stride": x.stride(0),
        "eps": 1e-5,
    }
    launch(rows.layer_norm(dtype, weight is not None, bias is not None, form, 2), values, ("y",))
    return values["y"]


@pytest.mark.parametrize(("dtype", "form", "shape"), CASES)
def test_layer_norm(dtype: str, form: Params, shape: tuple[int, int]) -> None:
    m, n = shape
    x = drawn(m, n, dtype, gap=3, offset=1)
    weight, bias = (placed(torch.randn(n).to(x.dtype)) for _ in range(2))
    for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
        wide = [None if t is None else t.double() for t in (w, b)]
        assert_close(layer_norm(form, x, w, b), F.layer_norm(x.double(), (n,), *wide, 1e-5), 4)


@pytest.mark.parametrize("form", FORMS)
def test_layer_norm_of_a_small_spread_around_a_large_mean(form: Params) -> None:
    x = torch.randn(4, 29) / 16 + 1000  # one element in float32 is known to 1e-3 of the spread
    assert_close(layer_norm(form, x, None, None), F.layer_norm(x.double(), (29,), eps=1e-5), 200)


def softmax(form: Params, x: torch.Tensor) -> Any:
    m, n = x.shape
    dtype = next(name for name, dtype in DTYPES.items() if dtype is x.dtype)
    values = {"x": x, "y": blank(m, n, dtype=x.dtype), "m": m, "n": n, "x_stride": x.stride(0)}
    launch(rows.softmax(dtype, form, 2), values, ("y",))
    return values["y"]


@pytest.mark.parametrize(("dtype", "form", "shape"), CASES)
def test_softmax(dtype: str, form: Params, shape: tuple[int, int]) -> None:
    x = drawn(*shape, dtype, gap=3, offset=1)
    assert_close(softmax(form, x), torch.softmax(x.double(), 1))


@pytest.mark.parametrize("form", FORMS)
def test_softmax_of_extremes_is_the_frameworks(form: Params) -> None:
    inf, nan, most = torch.inf, torch.nan, torch.finfo(torch.float32).max
    x = torch.randn(8, 29)
    x[0] = -inf
    x[1, :20] = -inf  # whole blocks
    x[2, 20:] = -inf
    x[3] = most
    x[4, ::2], x[4, 1::2] = -most, most
    x[5, 3] = inf
    x[6, 28] = nan
    x[7] = -1e30
    y = softmax(form, x)
    assert_close(y, torch.softmax(x, 1).double())
    assert y[[0, 5, 6]].isnan().all() and not y[[1, 2, 3, 4, 7]].isnan().any()


@pytest.mark.parametrize(("dtype", "form", "shape"), some(5, DTYPES, [(8, 1), (32, 4)], SHAPES))
def test_silu_and_mul(dtype: str, form: tuple[int, int], shape: tuple[int, int]) -> None:
    m, n = shape
    x = drawn(m, 2 * n, dtype, gap=5, offset=3)
    x[0, 0] = -300.0  # whose exponential no float32 holds
    values = {"x": x, "y": blank(m, n, dtype=x.dtype), "m": m, "n": n, "x_stride": x.stride(0)}
    chosen = (("block", form[0]), ("rows", form[1]), ("warps", 4))
    launch(rows.silu_and_mul(dtype, chosen, 2), values, ("y",))
    gate, up = x.double().chunk(2, 1)
    assert_close(values["y"], F.silu(gate) * up, 2)


@pytest.mark.parametrize("form", rows.PARAMS)
def test_every_parameter_set_on_rows_that_do_not_fill_it(form: Params) -> None:
    p = dict(form)
    x = drawn(p["rows"] + 1, p["block"] + 5 if p["loop"] else p["block"] - 3, "bfloat16")
    n = x.shape[1]
    assert rows.objection(form, n) is rows.unsuited(form, n) is None
    assert_close(softmax(form, x), torch.softmax(x.double(), 1))
    assert_close(layer_norm(form, x, None, None), F.layer_norm(x.double(), (n,)), 2)
    assert_close(rms_norm(form, x, x, None)[0], F.rms_norm(2 * x.double(), (n,)), 2)


def test_a_parameter_set_says_which_rows_it_takes_and_is_meant_for() -> None:
    once, loop = params(1024, 1, 0), params(1024, 1, 1)
    assert rows.objection(once, 1024) is rows.objection(loop, 1025) is None
    assert rows.objection(once, 1025) == "holds a row of at most 1024 elements, not 1025"
    assert rows.unsuited(once, 513) is rows.unsuited(loop, 1025) is None
    assert rows.unsuited(once, 512) == "most of a block of 1024 would be idle"
    assert rows.unsuited(loop, 1024) == "a row of 1024 elements needs no loop"
    for n in (1, 64, 128, 512, 768, 1024, 4096, 5120, 14336, 16384, 16385, 128256):
        assert any(not rows.objection(form, n) and not rows.unsuited(form, n) for form in rows.PARAMS), n


def test_the_family() -> None:
    check_family(rows.programs())
