"""Kernels that do to their process what kernels do. Named by ``DKS_KERNELS`` in tests; nothing else knows them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.problem import Precision, Problem


def acting(act: Callable[[], object], after: int = 0) -> Callable[..., Run]:
    """A right linear that acts before it answers, from call number ``after`` on."""

    def bind(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
        calls = [0]

        def run(x: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            if calls[0] > after:
                act()
            return torch.nn.functional.linear(x, weight, bias)

        return run

    return bind


def hang() -> None:
    while True:
        time.sleep(1)


def hang_with_children() -> None:
    """Leaves one child in its group and one outside it."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    subprocess.Popen(command)
    subprocess.Popen(command, start_new_session=True)
    hang()


def hangs_in_bind(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
    """As a compiler does that never comes back."""
    hang()
    raise AssertionError


def allocate() -> None:
    torch.empty(2**50, dtype=torch.uint8)


def device_error() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def once() -> None:
    """Kills its process the first time that any process calls it."""
    path = Path(os.environ["DKS_TEST_ONCE"])
    if not path.exists():
        path.write_text("was here")
        os.kill(os.getpid(), signal.SIGKILL)


FAULTS: dict[str, Callable[[], object]] = {
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "exit": lambda: os._exit(0),
    "hang": hang,
    "hang_with_children": hang_with_children,
    "memory": allocate,
    "device": device_error,
    "once": once,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
}

LATE = 150
"""More calls than checks make, and fewer than checks and rounds together."""


def kernel(name: str, bind: Callable[..., Run]) -> Kernel:
    return Kernel(f"fault.{name}", "linear", {"float32": Precision.EXACT}, bind, rank=9)


KERNELS = [kernel(name, acting(act)) for name, act in FAULTS.items()]
KERNELS.append(kernel("late_segfault", acting(FAULTS["segfault"], after=LATE)))
KERNELS.append(kernel("late_device", acting(FAULTS["device"], after=LATE)))
KERNELS.append(kernel("hang_in_bind", hangs_in_bind))
KERNELS.append(kernel("good", acting(lambda: None)))
