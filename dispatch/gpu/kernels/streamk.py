"""linear with even shares: no block waits while others work on a last, ragged wave of tiles.

After M. Osama et al., "Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix Multiplication on the
GPU", PPoPP 2023, in its form of whole tiles first and one wave of shared ones. As many blocks as run at once take
whole tiles, one after the other, while there is one for each; then the steps along k of the tiles that are left,
all in one line, are cut into as many even shares. The sums of a share's pieces of tiles go to the workspace, and a
second program adds them in the order of k: nobody waits for a flag, nothing is added in the order of arrival, and
so every run with the same number of blocks gives the same bits.

Tiles and their order are those of ``matmul.py``.
"""

import triton
import triton.language as tl

from dks.dispatch.gpu.kernels.epilogue import finish
from dks.dispatch.gpu.kernels.matmul import matrix, sums, tile, tile_at


@triton.jit
def shares(m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr):
    """How all is divided: blocks that work, tiles that are taken whole, tiles that are shared, steps of one tile,
    steps of a share, and how many shares, the first ones, have one step more.

    Both programs have the same number of blocks along x, BLOCKS of which the workspace has room for.
    """
    blocks = tl.minimum(tl.num_programs(0), BLOCKS)
    tiles = tl.cdiv(m, BM) * tl.cdiv(n, BN)
    steps = tl.cdiv(k, BK)
    shared = tiles % blocks
    return blocks, tiles - shared, shared, steps, shared * steps // blocks, shared * steps % blocks


@triton.jit
def block_of(step, least, more):
    """The block whose share has a step of the shared tiles' line."""
    large = more * (least + 1)  # steps in the shares that have one more
    return tl.where(step < large, step // (least + 1), more + (step - large) // tl.maximum(least, 1))


@triton.jit
def matmul_shared(
    x, weight, y, bias, residual, x_scale, weight_scale, m, n, k,
    x_stride, weight_stride, y_stride, residual_stride, workspace,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr,
    BIAS: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr, TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The tiles of y that are taken whole, and the sums of all pieces of the others.

    A piece of the shared tile t that block b sums is at workspace[b + t] (BM, BN): along the line from piece to
    piece b or t or both go up, so that each has a place of its own and the pieces of a tile lie side by side.
    """
    blocks, whole, _, steps, least, more = shares(m, n, k, BM, BN, BK, BLOCKS)
    block = tl.program_id(0)
    x = matrix(x, m, k, x_stride, BM, BK, TMA)
    weight = matrix(weight, n, k, weight_stride, BN, BK, TMA)
    y = matrix(y, m, n, y_stride, BM, BN, TMA)
    if block < blocks:
        for index in tl.range(block, whole, blocks):
            tile(
                index, x, weight, y, bias, residual, x_scale, weight_scale, m, n, k,
                x_stride, weight_stride, y_stride, residual_stride,
                BM, BN, BK, GROUP, BIAS, EPILOGUE, SCALED, TMA, UPCAST,
            )  # fmt: skip
        first = block * least + tl.minimum(block, more)
        last = (block + 1) * least + tl.minimum(block + 1, more)
        places = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        for t in tl.range(first // steps, tl.cdiv(last, steps)):
            row, column = tile_at(whole + t, m, n, BM, BN, GROUP)
            start = tl.maximum(first - t * steps, 0) * BK
            stop = tl.minimum(tl.minimum(last - t * steps, steps) * BK, k)
            acc = sums(x, weight, row, column, start, stop, m, n, x_stride, weight_stride, BM, BN, BK, TMA, UPCAST)
            at = workspace + tl.cast(block + t, tl.int64) * (BM * BN) + places
            tl.store(at, acc.to(tl.float32))


@triton.jit
def add_shared(
    workspace, y, bias, residual, x_scale, weight_scale, m, n, k, y_stride, residual_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, BIAS: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The shared tiles of y, ROWS of one each time, from the sums of their pieces in the order of k."""
    _, whole, shared, steps, least, more = shares(m, n, k, BM, BN, BK, BLOCKS)
    t = tl.program_id(0)
    if t < shared:
        first, last = block_of(t * steps, least, more), block_of(t * steps + steps - 1, least, more)
        top = tl.program_id(1) * ROWS
        at = workspace + tl.cast(first + t, tl.int64) * (BM * BN)
        at = at + (top + tl.arange(0, ROWS))[:, None] * BN + tl.arange(0, BN)[None, :]
        acc = tl.zeros((ROWS, BN), tl.float32)
        for _ in tl.range(first, last + 1):
            acc += tl.load(at)
            at += BM * BN
        row, column = tile_at(whole + t, m, n, BM, BN, GROUP)
        finish(
            acc, row + top, column, y, bias, residual, x_scale, weight_scale, m, n, y_stride, residual_stride,
            ROWS, BN, BIAS, EPILOGUE, SCALED,
        )  # fmt: skip
