"""A compiler that dies."""

import os
import signal

import triton

os.kill(os.getpid(), signal.SIGKILL)


@triton.jit
def never(x):
    """Never compiled."""
