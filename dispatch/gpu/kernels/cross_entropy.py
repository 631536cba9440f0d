"""Cross-entropy of logits, row by row, without a matrix of probabilities."""

import triton
import triton.language as tl


@triton.jit
def cross_entropy(logits, targets, losses, m, n, stride, ignored, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """losses (m,) = log(sum(exp(logits))) - logits[target], of logits (m, n) and targets (m,).

    Computed in float32, whatever the dtype of logits and losses. 0 where the target is ``ignored``; NaN where it
    is no column, and then nothing is read there. One program takes a row, with a running maximum as in softmax.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    if target == ignored:
        tl.store(losses + row, 0.0)
    else:
        cols = tl.arange(0, BLOCK)
        top = float("-inf")
        sums = tl.zeros([BLOCK], tl.float32)
        # Loads ahead: without a product in the loop, the compiler makes none unless it is told to.
        for start in tl.range(0, n, BLOCK, num_stages=STAGES):
            at = start + cols
            part = tl.load(logits + at, mask=at < n, other=float("-inf")).to(tl.float32)
            new = tl.maximum(top, tl.max(part, 0))
            base = tl.where(new == float("-inf"), 0.0, new)  # -inf less -inf is NaN, and numbers may follow
            sums = sums * tl.exp(top - base) + tl.exp(part - base)
            top = new
        base = tl.where(top == float("-inf"), 0.0, top)
        there = (target >= 0) & (target < n)
        hit = tl.load(logits + target, mask=there, other=float("nan")).to(tl.float32)
        tl.store(losses + row, base - hit + tl.log(tl.sum(sums, 0)))
