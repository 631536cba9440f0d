"""What a kernel imports from another file."""

import triton


@triton.jit
def scaled(x, scale):
    """x * scale."""
    return x * scale
