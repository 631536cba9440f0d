"""Attention of many query rows: softmax(q @ k.T * scale) @ v, without a matrix of scores.

After Dao, FlashAttention-2, 2023. Powers are of two, with log2(e) in the scale: that is what the hardware has.
"""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, sums, UPCAST: tl.constexpr):
    """sums + a @ b in float32; UPCAST is for Triton's interpreter, which multiplies the bits of bfloat16."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def attend(scores, values, top, total, sums, UPCAST: tl.constexpr):
    """The state once a block of keys is in: the largest score, the sum of powers, and that of powers times values.

    A row that has seen no key has a top of -inf: what is taken off must be a number, or all that follows is NaN.
    """
    new = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    powers = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(powers, 1)
    sums = dot(powers.to(values.dtype), values, sums * shrink[:, None], UPCAST)
    return new, total, sums


@triton.jit
def weighted(total, sums):
    """Rows that have seen no key are zero, as the framework has them."""
    return sums / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _blocks(
    first, last, query, k, v, k_s, v_s, visible, kv, scale, top, total, sums,
    D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The state once keys ``first`` to ``last`` are in; row i sees keys up to visible[i], if MASKED."""
    key = tl.arange(0, BN)
    d = tl.arange(0, D)[None, :]
    for start in range(first, last, BN):
        keys = k + tl.cast(start, tl.int64) * k_s + (key[:, None] * k_s + d)
        values = v + tl.cast(start, tl.int64) * v_s + (key[:, None] * v_s + d)
        if MASKED:
            real = (start + key < kv)[:, None]
            scores = dot(query, tl.trans(tl.load(keys, mask=real, other=0.0)), None, UPCAST) * scale
            scores = tl.where((start + key)[None, :] <= visible[:, None], scores, float("-inf"))
            held = tl.load(values, mask=real, other=0.0)
        else:
            scores = dot(query, tl.trans(tl.load(keys)), None, UPCAST) * scale
            held = tl.load(values)
        top, total, sums = attend(scores, held, top, total, sums, UPCAST)
    return top, total, sums


@triton.jit
def prefill(
    q, k, v, y, b, h, hkv, rows, kv, diagonal, scale, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, y_b, y_h, y_s,
    CAUSAL: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y (b, h, rows, D) of q like it and k, v (b, hkv, kv, D); their last dims' strides are 1.

    With CAUSAL, row i sees the keys up to i + diagonal: 0 is what ``scaled_dot_product_attention`` means by causal,
    kv - rows lets the last row see all keys. A row that sees none is zero.
    """
    tile = tl.program_id(0)
    if CAUSAL:
        tile = tl.num_programs(0) - 1 - tile  # those with most keys first
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tile.to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)[None, :]
    inside = (row < rows)[:, None]
    q += batch * q_b + head.to(tl.int64) * q_h
    k += batch * k_b + (head // (h // hkv)).to(tl.int64) * k_h
    v += batch * v_b + (head // (h // hkv)).to(tl.int64) * v_h
    y += batch * y_b + head.to(tl.int64) * y_h
    query = tl.load(q + row[:, None] * q_s + d, mask=inside, other=0.0)
    last = kv
    whole = kv  # the keys that all rows of the tile see
    visible = tl.zeros([BM], tl.int32) + (kv - 1)
    if CAUSAL:
        corner = tile * BM + diagonal
        last = tl.maximum(tl.minimum(kv, corner + BM), 0)
        whole = tl.maximum(tl.minimum(kv, corner + 1), 0)
        visible = tl.minimum(visible, corner + tl.arange(0, BM))
    whole = whole // BN * BN
    scale *= 1.4426950408889634  # log2(e)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, D], tl.float32)
    top, total, sums = _blocks(
        0, whole, query, k, v, k_s, v_s, visible, kv, scale, top, total, sums, D, BN, 0, UPCAST
    )
    top, total, sums = _blocks(
        whole, last, query, k, v, k_s, v_s, visible, kv, scale, top, total, sums, D, BN, 1, UPCAST
    )
    tl.store(y + row[:, None] * y_s + d, weighted(total, sums), mask=inside)
