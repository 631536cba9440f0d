"""How a linear's tiles end: scales, bias, activation or residual, rounded once; and partial sums along k.

The matrix product and the product with few rows share it. All that follows the sum is in float32.
"""

import triton
import triton.language as tl


@triton.jit
def activate(y, EPILOGUE: tl.constexpr):
    """The epilogues of the output alone, in float32, with NaN kept as the framework keeps it."""
    if EPILOGUE == "relu":
        y = tl.where(y < 0, 0.0, y)  # a maximum would hide NaN
    elif EPILOGUE == "gelu":
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    elif EPILOGUE == "gelu_tanh":
        # 0.5 y (1 + tanh(u)) = y / (1 + exp(-2u)): no tanh needed, and nothing cancels
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    elif EPILOGUE == "silu":
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def ended(
    acc, row, column, bias, residual, x_scale, weight_scale, m, n, residual_stride,
    BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The tile of y that begins at (row, column), in float32; acc (BM, BN) holds its sums along k, or int32 ones.

    Offsets within a tile fit 32 bits, those of tiles need not: only the latter are computed in 64.
    """
    rows = tl.arange(0, BM)
    columns = column + tl.arange(0, BN)
    row_inside = rows < m - row
    column_inside = columns < n
    start = tl.cast(row, tl.int64)
    value = acc.to(tl.float32)
    if SCALED:
        of_rows = tl.load(x_scale + start + rows, mask=row_inside, other=0.0)
        of_columns = tl.load(weight_scale + columns, mask=column_inside, other=0.0)
        value = value * of_rows[:, None] * of_columns[None, :]
    if BIAS:
        value += tl.load(bias + columns, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == "add":
        at = residual + start * residual_stride + rows[:, None] * residual_stride + columns[None, :]
        inside = row_inside[:, None] & column_inside[None, :]
        value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        value = activate(value, EPILOGUE)
    return value


@triton.jit
def finish(
    acc, row, column, y, bias, residual, x_scale, weight_scale, m, n, y_stride, residual_stride,
    BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Write the tile of y that begins at (row, column); see ``ended``."""
    value = ended(
        acc, row, column, bias, residual, x_scale, weight_scale, m, n, residual_stride,
        BM, BN, BIAS, EPILOGUE, SCALED,
    )  # fmt: skip
    rows = tl.arange(0, BM)
    columns = column + tl.arange(0, BN)
    inside = (rows < m - row)[:, None] & (columns < n)[None, :]
    at = y + tl.cast(row, tl.int64) * y_stride + rows[:, None] * y_stride + columns[None, :]
    tl.store(at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def piece_of(k, BK: tl.constexpr, SPLIT: tl.constexpr):
    """Where this block's piece of k starts and stops: whole steps of BK, so that k's rest is in one piece.

    A piece may be empty: then the sums that it keeps are zero.
    """
    length = tl.cdiv(tl.cdiv(k, BK), SPLIT) * BK
    start = tl.minimum(tl.program_id(1) * length, k)
    return start, tl.minimum(start + length, k)


@triton.jit
def keep(acc, row, column, workspace, m, n, BM: tl.constexpr, BN: tl.constexpr):
    """Write a piece's sums to workspace (SPLIT, m, n), for ``add_parts``."""
    rows = tl.arange(0, BM)
    columns = column + tl.arange(0, BN)
    start = (tl.program_id(1).to(tl.int64) * m + row) * n
    inside = (rows < m - row)[:, None] & (columns < n)[None, :]
    tl.store(workspace + start + rows[:, None] * n + columns[None, :], acc.to(tl.float32), mask=inside)


@triton.jit
def add_parts(
    workspace, y, bias, residual, x_scale, weight_scale, m, n, y_stride, residual_stride,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
    BIAS: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """y from the sums of all pieces, added in their order: the same result in every run."""
    row = tl.program_id(0) * BM
    column = tl.program_id(1) * BN
    rows = tl.arange(0, BM)
    columns = column + tl.arange(0, BN)
    inside = (rows < m - row)[:, None] & (columns < n)[None, :]
    at = workspace + row.to(tl.int64) * n + rows[:, None] * n + columns[None, :]
    part = tl.cast(m, tl.int64) * n
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in tl.static_range(SPLIT):
        acc += tl.load(at, mask=inside, other=0.0)
        at += part
    finish(
        acc, row, column, y, bias, residual, x_scale, weight_scale, m, n, y_stride, residual_stride,
        BM, BN, BIAS, EPILOGUE, SCALED,
    )  # fmt: skip
