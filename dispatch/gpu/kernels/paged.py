"""Attention of one query row a sequence over a paged cache, the keys shared out among programs (split KV).

After Dao et al., Flash-Decoding, 2023, over the pages of Kwon et al., PagedAttention, 2023.
"""

import triton
import triton.language as tl

from dks.dispatch.gpu.kernels.attention import attend, dot, weighted


@triton.jit
def decode(
    q, k, v, block_table, lengths, y, workspace, b, h, hkv, splits,
    q_b, q_h, k_p, k_s, k_h, v_p, v_s, v_h, table_stride, scale,
    D: tl.constexpr, PAGE: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y (b, h, D) of q like it over k, v (pages, PAGE, hkv, D), or parts of it for ``combine`` if splits > 1.

    Sequence i has lengths[i] keys in the pages that row i of block_table names; nothing past them is read. One
    program takes one sequence, one key head with all of its query heads (at most BH), and one split of the keys.

    workspace: for each (sequence, head, split) D float32, which are those of this split alone; then one float32
    for each, log2 of its sum of powers, -inf where it has no keys: there the former are not written.
    """
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    groups = h // hkv
    member = tl.arange(0, BH)
    head = kv_head * groups + member
    d = tl.arange(0, D)[None, :]
    query = tl.load(q + sequence * q_b + head[:, None] * q_h + d, mask=(member < groups)[:, None], other=0.0)
    length = tl.load(lengths + sequence)
    share = tl.cdiv(tl.cdiv(length, BN), splits) * BN
    first = split * share
    last = tl.minimum(first + share, length)
    k += kv_head.to(tl.int64) * k_h
    v += kv_head.to(tl.int64) * v_h
    block_table += sequence * table_stride
    scale *= 1.4426950408889634  # log2(e)
    top = tl.full([BH], float("-inf"), tl.float32)
    total = tl.zeros([BH], tl.float32)
    sums = tl.zeros([BH, D], tl.float32)
    for start in range(first, last, BN):
        key = start + tl.arange(0, BN)
        real = key < last
        page = tl.load(block_table + key // PAGE, mask=real, other=0).to(tl.int64)[:, None]
        slot = (key % PAGE)[:, None]
        keys = tl.load(k + (page * k_p + slot * k_s) + d, mask=real[:, None], other=0.0)
        scores = dot(query, tl.trans(keys), None, UPCAST) * scale
        scores = tl.where(real[None, :], scores, float("-inf"))
        values = tl.load(v + (page * v_p + slot * v_s) + d, mask=real[:, None], other=0.0)
        top, total, sums = attend(scores, values, top, total, sums, UPCAST)
    place = sequence * h + head
    if splits == 1:
        tl.store(y + place[:, None] * D + d, weighted(total, sums), mask=(member < groups)[:, None])
    else:
        place = place * splits + split
        mine = (member < groups) & (first < last)
        tl.store(workspace + place[:, None] * D + d, weighted(total, sums), mask=mine[:, None])
        powers = workspace + b.to(tl.int64) * h * splits * D
        tl.store(powers + place, top + tl.log2(total), mask=member < groups)


@triton.jit
def combine(workspace, y, b, h, splits, D: tl.constexpr, SPLITS: tl.constexpr):
    """y (b, h, D) of the parts that ``decode`` left in the workspace, at most SPLITS of them."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    place = row * splits + split
    d = tl.arange(0, D)
    powers = workspace + b.to(tl.int64) * h * splits * D
    power = tl.load(powers + place, mask=split < splits, other=float("-inf"))
    written = power != float("-inf")
    top = tl.max(power, 0)
    weight = tl.exp2(power - tl.where(top == float("-inf"), 0.0, top))
    part = tl.load(workspace + place[:, None] * D + d[None, :], mask=written[:, None], other=0.0)
    total = tl.sum(weight, 0)
    tl.store(y + row * D + d, tl.sum(part * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total))
