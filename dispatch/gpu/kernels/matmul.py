"""linear: y = epilogue(x @ weight.T + bias), in tiles of the tensor cores.

x (m, k) and weight (n, k) have their k side by side, rows x_stride and weight_stride elements apart; y (m, n)
and residual (m, n) likewise. bf16 and fp16, or int8 and fp8 e4m3 with a float32 scale for each row of x and of
weight. Sums are float32, of int8 int32. An address that a variant has no use for is never read: it may be null.

After Triton's matrix multiplication tutorial (github.com/triton-lang/triton, MIT), with rows beyond the last
read as the last one, so that only the rest of k needs masks, and those outside of the pipelined loop.
"""

import triton
import triton.language as tl

from dks.dispatch.gpu.kernels.epilogue import finish, keep, piece_of


@triton.jit
def tile_at(index, m, n, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column where tile ``index`` begins.

    Tiles that run at the same time shall share what they read through L2: they go down GROUP rows of tiles
    before the next column, so that a near-square patch of y is in progress and not one long strip.
    """
    height = tl.cdiv(m, BM)
    patch = GROUP * tl.cdiv(n, BN)
    first = index // patch * GROUP
    rows = tl.minimum(height - first, GROUP)
    inside = index % patch
    return (first + inside % rows) * BM, inside // rows * BN


@triton.jit
def multiply(a, b, acc, BK: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b.T for a (BM, BK), b (BN, BK)."""
    if UPCAST:  # only in tests: Triton's interpreter multiplies the bits of bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    # Hopper adds fp8 products with 14 bits: sums of BK of them go to float32 then.
    return tl.dot(a, tl.trans(b), acc, max_num_imprecise_acc=BK, out_dtype=acc.dtype)


@triton.jit
def sums(
    x, weight, row, column, start, stop, m, n, x_stride, weight_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The tile (BM, BN) of x @ weight.T that begins at (row, column), over k from start to stop."""
    rows = tl.minimum(tl.arange(0, BM), m - 1 - row)
    columns = tl.minimum(tl.arange(0, BN), n - 1 - column)
    steps = tl.arange(0, BK)
    # Tiles may lie further apart than 32 bits reach; what is within one does not.
    x += tl.cast(row, tl.int64) * x_stride + start
    weight += tl.cast(column, tl.int64) * weight_stride + start
    x_at = x + rows[:, None] * x_stride + steps[None, :]
    weight_at = weight + columns[:, None] * weight_stride + steps[None, :]
    acc = tl.zeros((BM, BN), tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32)
    whole = (stop - start) // BK
    for _ in tl.range(0, whole):
        acc = multiply(tl.load(x_at), tl.load(weight_at), acc, BK, UPCAST)
        x_at += BK
        weight_at += BK
    rest = stop - start - whole * BK
    if rest > 0:
        inside = (steps < rest)[None, :]
        a = tl.load(x_at, mask=inside, other=0.0)
        b = tl.load(weight_at, mask=inside, other=0.0)
        acc = multiply(a, b, acc, BK, UPCAST)
    return acc


@triton.jit
def tile(
    index, x, weight, y, bias, residual, x_scale, weight_scale, m, n, k,
    x_stride, weight_stride, y_stride, residual_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of y, from the first of k to the last."""
    row, column = tile_at(index, m, n, BM, BN, GROUP)
    acc = sums(x, weight, row, column, 0, k, m, n, x_stride, weight_stride, BM, BN, BK, UPCAST)
    finish(
        acc, row, column, y, bias, residual, x_scale, weight_scale, m, n, y_stride, residual_stride,
        BM, BN, BIAS, EPILOGUE, SCALED,
    )  # fmt: skip


@triton.jit
def matmul(
    x, weight, y, bias, residual, x_scale, weight_scale, m, n, k,
    x_stride, weight_stride, y_stride, residual_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, RESIDENT: tl.constexpr,
    BIAS: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y whole, a block a tile; with RESIDENT, as many blocks as run at once take tiles until none is left."""
    if RESIDENT:
        tiles = tl.cdiv(m, BM) * tl.cdiv(n, BN)
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            tile(
                index, x, weight, y, bias, residual, x_scale, weight_scale, m, n, k,
                x_stride, weight_stride, y_stride, residual_stride,
                BM, BN, BK, GROUP, BIAS, EPILOGUE, SCALED, UPCAST,
            )  # fmt: skip
    else:
        tile(
            tl.program_id(0), x, weight, y, bias, residual, x_scale, weight_scale, m, n, k,
            x_stride, weight_stride, y_stride, residual_stride,
            BM, BN, BK, GROUP, BIAS, EPILOGUE, SCALED, UPCAST,
        )  # fmt: skip


@triton.jit
def matmul_parts(
    x, weight, workspace, m, n, k, x_stride, weight_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sums of SPLIT pieces of k, each in blocks of its own: for shapes of too few tiles to fill a device."""
    row, column = tile_at(tl.program_id(0), m, n, BM, BN, GROUP)
    start, stop = piece_of(k, BK, SPLIT)
    acc = sums(x, weight, row, column, start, stop, m, n, x_stride, weight_stride, BM, BN, BK, UPCAST)
    keep(acc, row, column, workspace, m, n, BM, BN)
