"""Rows of activations in one byte an element, with a float32 scale each: row i of x is about y[i] * scale[i].

A row is read twice, the second time from L2. One with NaN gets a scale of NaN, and so does what is made of it; one
with an infinity gets an infinite scale and products of 0 * inf, which are NaN too: no finite number is made up.
"""

import triton
import triton.language as tl


@triton.jit
def quantize(x, y, scale, n, x_stride, MOST: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr):
    """x (m, n) -> y (m, n) in -MOST..MOST, rounded to whole numbers with ROUND; scale (m,)."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    y += row * n
    cols = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    odd = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        at = start + cols
        value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
        odd |= (value != value).to(tl.int32)
        largest = tl.maximum(largest, tl.abs(value))
    # Of a row of zeros it stays a normal number: a denormal one may be flushed to zero.
    step = tl.maximum(tl.max(largest, 0), 1e-30) / MOST
    step = tl.where(tl.max(odd, 0) != 0, float("nan"), step)
    tl.store(scale + row, step)
    for start in range(0, n, BLOCK):
        at = start + cols
        value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32) / step
        if ROUND:
            # Adding and taking away 1.5 * 2**23 rounds to even, and NaN becomes any number: its scale says it.
            value = (value + 12582912.0) - 12582912.0
        value = tl.minimum(tl.maximum(value, -MOST), MOST)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=at < n)
