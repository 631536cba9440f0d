"""Kernels of the tests, as ``dispatch/gpu/kernels`` has them."""

import triton
import triton.language as tl
from dks.dispatch.gpu.kernels.small_parts import scaled


@triton.jit
def multiply(
    a, b, c, m, n, k, lda, ldb, ldc, scale, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr
):
    """c (m, n) = scale * a (m, k) @ b (k, n), all contiguous in their last dim."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), dtype=ACC)
    for at in range(0, k, BK):
        left = (rows[:, None] < m) & (at + inner[None, :] < k)
        right = (at + inner[:, None] < k) & (columns[None, :] < n)
        x = tl.load(a + rows[:, None] * lda + at + inner[None, :], mask=left, other=0.0)
        y = tl.load(b + (at + inner[:, None]) * ldb + columns[None, :], mask=right, other=0.0)
        sums = tl.dot(x, y, sums)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(c + rows[:, None] * ldc + columns[None, :], scaled(sums, scale).to(tl.bfloat16), mask=inside)


@triton.jit
def copy(x, y, n, WIDTH: tl.constexpr):
    """y (rows, n) = x (rows, n)."""
    columns = tl.arange(0, WIDTH)
    at = tl.program_id(0) * n + columns
    tl.store(y + at, tl.load(x + at, mask=columns < n), mask=columns < n)


@triton.jit
def broken(x, n, WIDTH: tl.constexpr):
    """Adds what can't be added."""
    tl.store(x + tl.arange(0, WIDTH), tl.arange(0, WIDTH) + tl.arange(0, 2 * WIDTH))
