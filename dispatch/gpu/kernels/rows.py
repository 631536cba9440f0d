"""Kernels over the rows of a matrix: rms_norm, layer_norm, softmax and silu_and_mul.

Each program takes ROWS rows. Where LOOP is 0, a block of columns holds a whole row, and the row is read once; else
it takes any width, a block at a time. Arithmetic is in float32. Pointers that a constant makes useless may be null.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(ROWS: tl.constexpr):
    """Indices (ROWS, 1) of this program's rows; 64 bits wide, since a matrix may have more than 2**31 elements."""
    return (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]


@triton.jit
def _summed(x, residual, total, mask, RESIDUAL: tl.constexpr):
    """x, or x + residual rounded to its dtype, which also goes to total; as float32."""
    h = tl.load(x, mask=mask, other=0.0)
    if RESIDUAL:
        h = (h.to(tl.float32) + tl.load(residual, mask=mask, other=0.0).to(tl.float32)).to(h.dtype)
        tl.store(total, h, mask=mask)
    return h.to(tl.float32)


@triton.jit
def _affine(y, weight, bias, cols, n, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    if WEIGHT:
        y = y * tl.load(weight + cols, mask=cols < n, other=0.0).to(tl.float32)
    if BIAS:
        y = y + tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)
    return y


@triton.jit
def rms_norm(
    x, residual, weight, y, total, m, n, x_stride, residual_stride, eps,
    WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr, LOOP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (m, n) = h / sqrt(mean(h^2) + eps) * weight (n,), with h = x, or with RESIDUAL total = x + residual."""
    row = _rows(ROWS)
    x += row * x_stride
    residual += row * residual_stride
    y += row * n
    total += row * n
    cols = tl.arange(0, BLOCK)[None, :]
    if LOOP:
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            at = start + cols
            h = _summed(x + at, residual + at, total + at, (row < m) & (at < n), RESIDUAL)
            squares += h * h
        scale = tl.rsqrt(tl.sum(squares, 1) / n + eps)[:, None]
        if RESIDUAL:
            tl.debug_barrier()  # other threads may have written what is read next
        for start in range(0, n, BLOCK):
            at = start + cols
            mask = (row < m) & (at < n)
            if RESIDUAL:
                h = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
            else:
                h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(y + at, _affine(h * scale, weight, weight, at, n, WEIGHT, 0), mask=mask)
    else:
        mask = (row < m) & (cols < n)
        h = _summed(x + cols, residual + cols, total + cols, mask, RESIDUAL)
        scale = tl.rsqrt(tl.sum(h * h, 1) / n + eps)[:, None]
        tl.store(y + cols, _affine(h * scale, weight, weight, cols, n, WEIGHT, 0), mask=mask)


@triton.jit
def layer_norm(
    x, weight, bias, y, m, n, x_stride, eps,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, LOOP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (m, n) = (x - mean) / sqrt(variance + eps) * weight (n,) + bias (n,).

    The variance is of what is left once the mean is gone: the mean of squares less the square of the mean loses all
    digits where the mean is large. Blocks are merged as Chan, Golub and LeVeque do (1979).
    """
    row = _rows(ROWS)
    x += row * x_stride
    y += row * n
    cols = tl.arange(0, BLOCK)[None, :]
    if LOOP:
        mean = tl.zeros([ROWS], tl.float32)
        spread = tl.zeros([ROWS], tl.float32)
        for start in range(0, n, BLOCK):
            at = start + cols
            mask = (row < m) & (at < n)
            count = tl.minimum(n - start, BLOCK).to(tl.float32)
            part = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
            middle = tl.sum(part, 1) / count
            apart = tl.where(mask, part - middle[:, None], 0.0)
            share = count / (start + count)
            step = middle - mean
            mean += step * share
            spread += tl.sum(apart * apart, 1) + step * step * start * share
        scale = tl.rsqrt(spread / n + eps)[:, None]
        for start in range(0, n, BLOCK):
            at = start + cols
            mask = (row < m) & (at < n)
            centred = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean[:, None]
            tl.store(y + at, _affine(centred * scale, weight, bias, at, n, WEIGHT, BIAS), mask=mask)
    else:
        mask = (row < m) & (cols < n)
        h = tl.load(x + cols, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, h - (tl.sum(h, 1) / n)[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 1) / n + eps)[:, None]
        tl.store(y + cols, _affine(centred * scale, weight, bias, cols, n, WEIGHT, BIAS), mask=mask)


@triton.jit
def softmax(x, y, m, n, x_stride, LOOP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y (m, n) = exp(x - max) / sum; a row of -inf alone is NaN, as the framework has it.

    The loop keeps a running maximum and a sum for each column of the block, corrected whenever the maximum grows
    (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018).
    """
    row = _rows(ROWS)
    x += row * x_stride
    y += row * n
    cols = tl.arange(0, BLOCK)[None, :]
    if LOOP:
        top = tl.full([ROWS, 1], float("-inf"), tl.float32)
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            at = start + cols
            part = tl.load(x + at, mask=(row < m) & (at < n), other=float("-inf")).to(tl.float32)
            new = tl.maximum(top, tl.max(part, 1)[:, None])
            base = tl.where(new == float("-inf"), 0.0, new)  # -inf less -inf is NaN, and numbers may follow
            sums = sums * tl.exp(top - base) + tl.exp(part - base)
            top = new
        base = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(sums, 1)[:, None]
        for start in range(0, n, BLOCK):
            at = start + cols
            mask = (row < m) & (at < n)
            part = tl.load(x + at, mask=mask, other=float("-inf")).to(tl.float32)
            tl.store(y + at, tl.exp(part - base) / total, mask=mask)
    else:
        mask = (row < m) & (cols < n)
        part = tl.load(x + cols, mask=mask, other=float("-inf")).to(tl.float32)
        powers = tl.exp(part - tl.max(part, 1)[:, None])
        tl.store(y + cols, powers / tl.sum(powers, 1)[:, None], mask=mask)


@triton.jit
def silu_and_mul(x, y, m, n, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y (m, n) = silu(x[:, :n]) * x[:, n:], of x (m, 2n); blocks of columns are programs of their own."""
    row = _rows(ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < m) & (cols < n)
    x += row * x_stride
    gate = tl.load(x + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + n + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * n + cols, gate / (1.0 + tl.exp(-gate)) * up, mask=mask)
