"""linear for few rows of x: y = epilogue(x @ weight.T + bias), bound by reading the weight once.

A block takes BN rows of weight and ROWS of x, reads BN x BK elements a step in the widest loads, multiplies
without tensor cores, and adds along k only once, at its end. Layouts and dtypes are those of ``matmul.py``. More
rows of x than ROWS are right too, and read the weight once for each ROWS of them.
"""

import triton
import triton.language as tl

from dks.dispatch.gpu.kernels.epilogue import finish, keep, piece_of


@triton.jit
def step(acc, x, weight):
    """acc (ROWS, BN, BK) + x (ROWS, 1, BK) * weight (1, BN, BK)."""
    return acc + x.to(acc.dtype) * weight.to(acc.dtype)


@triton.jit
def few_sums(
    x, weight, row, column, start, stop, m, n, x_stride, weight_stride,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x @ weight.T (ROWS, BN) for rows of x from row and of weight from column on, over k from start to stop."""
    rows = tl.minimum(tl.arange(0, ROWS), m - 1 - row)
    columns = tl.minimum(tl.arange(0, BN), n - 1 - column)
    steps = tl.arange(0, BK)
    weight += tl.cast(column, tl.int64) * weight_stride + start
    # Three axes from the first load on: a block spreads (BN, BK) over its threads once, and nothing moves between.
    x += tl.cast(row, tl.int64) * x_stride + start
    x_at = x + rows[:, None, None] * x_stride + steps[None, None, :]
    weight_at = weight + columns[None, :, None] * weight_stride + steps[None, None, :]
    acc = tl.zeros((ROWS, BN, BK), tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32)
    whole = (stop - start) // BK
    for _ in tl.range(0, whole, num_stages=STAGES):
        acc = step(acc, tl.load(x_at), tl.load(weight_at, eviction_policy="evict_first"))
        x_at += BK
        weight_at += BK
    rest = stop - start - whole * BK
    if rest > 0:
        inside = (steps < rest)[None, None, :]
        a = tl.load(x_at, mask=inside, other=0.0)
        b = tl.load(weight_at, mask=inside, other=0.0)
        acc = step(acc, a, b)
    return tl.sum(acc, 2)


@triton.jit
def gemv(
    x, weight, y, bias, residual, x_scale, weight_scale, m, n, k,
    x_stride, weight_stride, y_stride, residual_stride,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """y whole."""
    row = tl.program_id(2) * ROWS
    column = tl.program_id(0) * BN
    acc = few_sums(x, weight, row, column, 0, k, m, n, x_stride, weight_stride, ROWS, BN, BK, STAGES)
    finish(
        acc, row, column, y, bias, residual, x_scale, weight_scale, m, n, y_stride, residual_stride,
        ROWS, BN, BIAS, EPILOGUE, SCALED,
    )  # fmt: skip


@triton.jit
def gemv_parts(
    x, weight, workspace, m, n, k, x_stride, weight_stride,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Sums of SPLIT pieces of k, for weights of too few rows to fill a device."""
    row = tl.program_id(2) * ROWS
    column = tl.program_id(0) * BN
    start, stop = piece_of(k, BK, SPLIT)
    acc = few_sums(x, weight, row, column, start, stop, m, n, x_stride, weight_stride, ROWS, BN, BK, STAGES)
    keep(acc, row, column, workspace, m, n, ROWS, BN)
