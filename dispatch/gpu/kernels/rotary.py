"""Rotary position embedding of queries and keys (Su et al., RoFormer, 2021), pairs in halves as GPT-NeoX has it."""

import triton
import triton.language as tl


@triton.jit
def _turn(x, y, head, heads, head_stride, cosine, sine, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """y (heads, 2 * HALF) = x turned; x and y are those of one token, cosine and sine (1, BLOCK)."""
    pair = tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (pair < HALF)
    x += head * head_stride + pair
    y += head * (2 * HALF) + pair
    left = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(y, left * cosine - right * sine, mask=mask)
    tl.store(y + HALF, right * cosine + left * sine, mask=mask)


@triton.jit
def rotary(
    q, k, cos, sin, positions, q_out, k_out, tokens, h, hkv, rows, q_token, q_head, k_token, k_head, cache_stride,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """q (tokens, h, 2 * HALF) and k (tokens, hkv, 2 * HALF), turned by rows ``positions`` (tokens,) of the caches.

    cos and sin: (rows, HALF), cache_stride apart; a token whose position they have not becomes NaN, since the host
    can't look at positions without waiting for them. q_out and k_out are contiguous. Programs along z take q and
    then k, of which those along y past its heads have nothing to do.
    """
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)[None, :]
    position = tl.load(positions + token)
    there = (position >= 0) & (position < rows) & (pair < HALF)
    at = position * cache_stride + pair
    cosine = tl.load(cos + at, mask=there, other=float("nan")).to(tl.float32)
    sine = tl.load(sin + at, mask=there, other=float("nan")).to(tl.float32)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    if tl.program_id(2) == 0:
        _turn(q + token * q_token, q_out + token * h * (2 * HALF), head, h, q_head, cosine, sine, HALF, BLOCK)
    else:
        _turn(k + token * k_token, k_out + token * hkv * (2 * HALF), head, hkv, k_head, cosine, sine, HALF, BLOCK)
