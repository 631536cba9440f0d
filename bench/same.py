"""The framework's own linear under other names: whatever an A/A sweep prefers among these, it is wrong."""

from __future__ import annotations

from dataclasses import replace

from dks.dispatch.ops.linear.torch_linear import KERNEL

COPIES = 6
KERNELS = [replace(KERNEL, id=f"same.copy{index}", rank=1) for index in range(COPIES)]
