"""Rotary embedding, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

from dks.dispatch.gpu import rotary
from tests.gpu.interpreted import DTYPES, assert_close, blank, check_family, launch, placed, some


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (tokens, heads, d), cos and sin (tokens, d / 2): as a model of transformers has it."""
    left, right = x.double().chunk(2, -1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


SHAPES = ((1, 1, 1, 64, 4), (3, 8, 2, 128, 4), (5, 7, 7, 64, 8), (2, 6, 3, 80, 4), (4, 9, 1, 2, 32))


@pytest.mark.parametrize(("dtype", "cache", "shape"), some(4, DTYPES, ("float32", "same"), SHAPES))
def test_rotary(dtype: str, cache: str, shape: tuple[int, ...]) -> None:
    tokens, h, hkv, d, heads = shape
    kind = dtype if cache == "same" else cache
    angles = torch.rand(11, d // 2) * 6
    # Cosines and sines side by side, as vLLM keeps them: rows lie further apart than they are long.
    both = placed(torch.cat((angles.cos(), angles.sin()), -1).to(DTYPES[kind]))
    cos, sin = both.chunk(2, -1)
    positions = torch.randint(0, 11, (tokens,))
    # A projection's output: queries, keys and values of a token follow each other.
    q, k, _ = placed(torch.randn(tokens, h + 2 * hkv, d).to(DTYPES[dtype]), offset=1).split((h, hkv, hkv), 1)
    q_out, k_out = (blank(*t.shape, dtype=t.dtype) for t in (q, k))
    values = {
        **{"q": q, "k": k, "cos": cos, "sin": sin, "positions": positions, "q_out": q_out, "k_out": k_out},
        **{"tokens": tokens, "h": h, "hkv": hkv, "rows": len(cos), "q_token": q.stride(0), "q_head": q.stride(1)},
        **{"k_token": k.stride(0), "k_head": k.stride(1), "cache_stride": cos.stride(0)},
    }
    programs = rotary.rotary(dtype, kind, d, (("heads", heads), ("warps", 1)), 2)
    launch(programs, values, ("q_out", "k_out"))
    assert_close(q_out, turned(q, cos[positions], sin[positions]), 2)
    assert_close(k_out, turned(k, cos[positions], sin[positions]), 2)


def test_a_position_that_the_caches_have_not_reads_nothing_and_gives_nan() -> None:
    q = torch.ones(3, 1, 64)
    cos = torch.ones(11, 32)
    out = blank(3, 1, 64, dtype=torch.float32)
    values = {
        **{"q": q, "k": q.clone(), "cos": cos, "sin": cos.clone(), "positions": torch.tensor([-1, 10, 11])},
        **{"q_out": out, "k_out": out.clone(), "tokens": 3, "h": 1, "hkv": 1, "rows": 11, "cache_stride": 32},
        **{"q_token": 64, "q_head": 64, "k_token": 64, "k_head": 64},
    }
    launch(rotary.rotary("float32", "float32", 64, rotary.PARAMS[0], 16), values, ("q_out", "k_out"))
    assert out[[0, 2]].isnan().all() and not out[1].isnan().any()


def test_an_odd_head_has_no_halves() -> None:
    with pytest.raises(ValueError, match="d: found 65, expected an even number"):
        rotary.rotary("bfloat16", "float32", 65, rotary.PARAMS[0], 2)


def test_the_family() -> None:
    check_family(rotary.programs())
