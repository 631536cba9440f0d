"""linear: y = epilogue(x @ weight.T + bias), in tiles of the tensor cores.

x (m, k) and weight (n, k) have their k side by side, rows x_stride and weight_stride elements apart; y (m, n)
and residual (m, n) likewise. bf16 and fp16, or int8 and fp8 e4m3 with a float32 scale for each row of x and of
weight. Sums are float32, of int8 int32. An address that a variant has no use for is never read: it may be null.

After Triton's matrix multiplication tutorials (github.com/triton-lang/triton, MIT), with rows beyond the last
read as the last one, so that only the rest of k needs masks, and those outside of the pipelined loop. With TMA the
hardware copies tiles and fills what lies outside with zeros: no masks at all.
"""

import triton
import triton.language as tl

from dks.dispatch.gpu.kernels.epilogue import ended, finish, keep, piece_of


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
def matrix(address, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """What tiles (ROWS, COLUMNS) of a matrix are moved by: with TMA a description of it, else its address."""
    if TMA:
        return tl.make_tensor_descriptor(address, [rows, columns], [stride, 1], [ROWS, COLUMNS])
    else:
        return address


@triton.jit
def sums(
    x, weight, row, column, start, stop, m, n, x_stride, weight_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The tile (BM, BN) of x @ weight.T that begins at (row, column), over k from start to stop.

    x and weight as ``matrix`` has them. start is a multiple of BK, and so is stop, or it is k.
    """
    if TMA:
        acc = tl.zeros((BM, BN), tl.int32 if x.dtype == tl.int8 else tl.float32)
        for at in tl.range(start, stop, BK):
            acc = multiply(x.load([row, at]), weight.load([column, at]), acc, BK, UPCAST)
    else:
        rows = tl.minimum(tl.arange(0, BM), m - 1 - row)
        columns = tl.minimum(tl.arange(0, BN), n - 1 - column)
        steps = tl.arange(0, BK)
        acc = tl.zeros((BM, BN), tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32)
        # Tiles may lie further apart than 32 bits reach; what is within one does not.
        x_at = x + tl.cast(row, tl.int64) * x_stride + start + rows[:, None] * x_stride + steps[None, :]
        weight_at = weight + tl.cast(column, tl.int64) * weight_stride + start
        weight_at = weight_at + columns[:, None] * weight_stride + steps[None, :]
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
    BIAS: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of y, from the first of k to the last; x, weight and y as ``matrix`` has them."""
    row, column = tile_at(index, m, n, BM, BN, GROUP)
    acc = sums(x, weight, row, column, 0, k, m, n, x_stride, weight_stride, BM, BN, BK, TMA, UPCAST)
    if TMA:
        value = ended(
            acc, row, column, bias, residual, x_scale, weight_scale, m, n, residual_stride,
            BM, BN, BIAS, EPILOGUE, SCALED,
        )  # fmt: skip
        y.store([row, column], value.to(y.dtype))
    else:
        finish(
            acc, row, column, y, bias, residual, x_scale, weight_scale, m, n, y_stride, residual_stride,
            BM, BN, BIAS, EPILOGUE, SCALED,
        )  # fmt: skip


@triton.jit
def matmul(
    x, weight, y, bias, residual, x_scale, weight_scale, m, n, k,
    x_stride, weight_stride, y_stride, residual_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, RESIDENT: tl.constexpr,
    BIAS: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr, TMA: tl.constexpr,
    FLAT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y whole, a block a tile; with RESIDENT, as many blocks as run at once take tiles until none is left.

    With FLAT the steps along k of all of a block's tiles are one loop: the next tile is on its way in while one
    is on its way out.
    """
    x = matrix(x, m, k, x_stride, BM, BK, TMA)
    weight = matrix(weight, n, k, weight_stride, BN, BK, TMA)
    y = matrix(y, m, n, y_stride, BM, BN, TMA)
    if RESIDENT:
        tiles = tl.cdiv(m, BM) * tl.cdiv(n, BN)
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT):
            tile(
                index, x, weight, y, bias, residual, x_scale, weight_scale, m, n, k,
                x_stride, weight_stride, y_stride, residual_stride,
                BM, BN, BK, GROUP, BIAS, EPILOGUE, SCALED, TMA, UPCAST,
            )  # fmt: skip
    else:
        tile(
            tl.program_id(0), x, weight, y, bias, residual, x_scale, weight_scale, m, n, k,
            x_stride, weight_stride, y_stride, residual_stride,
            BM, BN, BK, GROUP, BIAS, EPILOGUE, SCALED, TMA, UPCAST,
        )  # fmt: skip


@triton.jit
def matmul_parts(
    x, weight, workspace, m, n, k, x_stride, weight_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sums of SPLIT pieces of k, each in blocks of its own: for shapes of too few tiles to fill a device."""
    x = matrix(x, m, k, x_stride, BM, BK, TMA)
    weight = matrix(weight, n, k, weight_stride, BN, BK, TMA)
    row, column = tile_at(tl.program_id(0), m, n, BM, BN, GROUP)
    start, stop = piece_of(k, BK, SPLIT)
    acc = sums(x, weight, row, column, start, stop, m, n, x_stride, weight_stride, BM, BN, BK, TMA, UPCAST)
    keep(acc, row, column, workspace, m, n, BM, BN)
