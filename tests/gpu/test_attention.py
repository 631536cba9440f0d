"""Attention of many query rows, interpreted, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dks.dispatch.gpu import attention
from dks.dispatch.kernel import Params
from tests.gpu.interpreted import DTYPES, assert_close, blank, check_family, launch, placed, some


def params(bm: int, bn: int) -> Params:
    return (("bm", bm), ("bn", bn), ("warps", 4), ("stages", 2))


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, diagonal: int | None
) -> torch.Tensor:
    """In float64; a row that sees no key is zero."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(groups, 1) for t in (k, v))
    scores = q.double() @ k.transpose(2, 3) * scale
    if diagonal is not None:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(diagonal + 1)
        scores.masked_fill_(hidden, -torch.inf)
    weights = torch.softmax(scores, -1)
    return torch.where(scores.amax(-1, keepdim=True) == -torch.inf, 0.0, weights) @ v


def prefill(
    form: Params, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, diagonal: int | None
) -> torch.Tensor:
    """Heads of y lie between its rows, as a projection takes them."""
    b, h, length, d = q.shape
    y = blank(b, length, h, d, dtype=q.dtype, gap=1).transpose(1, 2)
    dtype = next(name for name, dtype in DTYPES.items() if dtype is q.dtype)
    values = {
        **{"q": q, "k": k, "v": v, "y": y, "b": b, "h": h, "hkv": k.shape[1], "rows": length, "kv": k.shape[2]},
        **{"diagonal": diagonal or 0, "scale": scale},
    }
    for name in "qkvy":
        values |= {f"{name}_{dim}": stride for dim, stride in zip("bhs", values[name].stride()[:3], strict=True)}
    launch(attention.prefill(dtype, diagonal is not None, d, form, 2), values, ("y",))
    return y


def drawn(b: int, h: int, length: int, d: int, dtype: str, layout: str = "bhsd") -> torch.Tensor:
    if layout == "bshd":
        return placed(torch.randn(b, length, h, d).to(DTYPES[dtype]), 3, 1).transpose(1, 2)
    return placed(torch.randn(b, h, length, d).to(DTYPES[dtype]), 1)


# Probabilities are rounded before they are multiplied with the values, which average out most of it.
SLACK = 2


SHAPES = (
    (1, 1, 1, 1, 1, 64, "bhsd"),
    (2, 2, 1, 17, 17, 64, "bshd"),
    (1, 2, 2, 32, 32, 128, "bhsd"),
    (1, 3, 1, 5, 47, 64, "bshd"),
    (1, 1, 1, 47, 5, 128, "bhsd"),
)


@pytest.mark.parametrize(("dtype", "diagonal", "shape"), some(3, DTYPES, (None, 0), SHAPES))
def test_prefill(dtype: str, diagonal: int | None, shape: tuple[Any, ...]) -> None:
    b, h, hkv, length, kv, d, layout = shape
    q = drawn(b, h, length, d, dtype, layout)
    k, v = (drawn(b, hkv, kv, d, dtype, layout) for _ in range(2))
    y = prefill(params(16, 16), q, k, v, d**-0.5, diagonal)
    assert_close(y, reference(q, k, v, d**-0.5, diagonal), SLACK)


@pytest.mark.parametrize(
    ("diagonal", "shape"), some(2, (-40, -17, -16, -1, 1, 16, 30, 1000), ((33, 33), (20, 50), (50, 20)))
)
def test_the_diagonal_may_lie_anywhere_and_rows_without_keys_are_zero(
    diagonal: int, shape: tuple[int, int]
) -> None:
    length, kv = shape
    q, k, v = drawn(1, 1, length, 64, "float32"), *(drawn(1, 1, kv, 64, "float32") for _ in range(2))
    y = prefill(params(16, 32), q, k, v, 0.3, diagonal)
    assert_close(y, reference(q, k, v, 0.3, diagonal))
    assert (y == 0).all(-1).sum() == min(max(-diagonal, 0), length)


@pytest.mark.parametrize("form", attention.PARAMS + attention.SCALAR_PARAMS)
def test_every_parameter_set(form: Params) -> None:
    q, k, v = drawn(1, 1, 130, 64, "bfloat16"), *(drawn(1, 1, 140, 64, "bfloat16") for _ in range(2))
    assert_close(prefill(form, q, k, v, 0.125, 0), reference(q, k, v, 0.125, 0), SLACK)


def test_scales_of_any_sign_and_large_scores() -> None:
    q, k, v = (drawn(1, 1, 20, 64, "float32") for _ in range(3))
    for scale in (-0.2, 0.0, 1e4):
        assert_close(prefill(params(16, 16), q, k, v, scale, None), reference(q, k, v, scale, None), 200)


def test_nan_reaches_the_rows_that_see_it_and_no_other() -> None:
    q, k, v = (drawn(1, 1, 40, 64, "float32") for _ in range(3))
    k[0, 0, 20] = torch.nan
    y = prefill(params(16, 16), q, k, v, 0.125, 0)
    assert y.isnan().all(-1).flatten().tolist() == [row >= 20 for row in range(40)]


def test_what_there_is_no_program_of() -> None:
    with pytest.raises(ValueError, match="d: found 80, expected one of 64, 128"):
        attention.prefill("bfloat16", False, 80, params(16, 16), 2)
    with pytest.raises(ValueError, match="dtype: found 'int8', expected one of float32, bfloat16, float16"):
        attention.prefill("int8", False, 64, params(16, 16), 2)


def test_the_family() -> None:
    check_family(attention.programs())
