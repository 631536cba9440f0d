"""What a kernel must leave as it was: settings of torch and of the process, threads, the harness's functions."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F

_SUBNORMAL, _HALF = sys.float_info.min, 0.5


def _keeps_denormals() -> bool:
    return _SUBNORMAL * _HALF > 0.0  # flushed to zero where the processor was told so


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch._C._set_deterministic_algorithms(value[0], warn_only=value[1])


# Of the variables that the libraries below torch read.
_VARIABLES = ("DNNL_", "GOMP_", "KMP_", "LD_", "MKL_", "OMP_", "ONEDNN_", "OPENBLAS_")


def _environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}


def _set_environ(values: dict[str, str]) -> None:
    for name in _environ().keys() - values:
        del os.environ[name]
    os.environ.update(values)


def _threads() -> frozenset[int]:
    return frozenset(sys._current_frames())  # of Python, however they were started


_Setting = tuple[Callable[[], Any], Callable[[Any], Any] | None]

# Name -> (how to read it, how to set it back or None).
_SETTINGS: dict[str, _Setting] = {
    "torch.get_num_threads()": (torch.get_num_threads, torch.set_num_threads),
    "torch.get_default_dtype()": (torch.get_default_dtype, torch.set_default_dtype),
    "grad mode": (torch.is_grad_enabled, torch._C._set_grad_enabled),
    "inference mode": (torch.is_inference_mode_enabled, None),
    "autocast": (torch._C._is_any_autocast_enabled, None),
    "torch function modes": (torch._C._len_torch_function_stack, None),
    "torch dispatch modes": (torch._C._len_torch_dispatch_stack, None),
    "float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "deterministic algorithms": (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        _set_deterministic,
    ),
    "torch.backends.mkldnn.enabled": (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    "quantized engine": (
        lambda: torch.backends.quantized.engine,
        lambda engine: setattr(torch.backends.quantized, "engine", engine),
    ),
    "denormal numbers": (_keeps_denormals, lambda kept: torch.set_flush_denormal(not kept)),
    "garbage collection": (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    "working directory": (os.getcwd, os.chdir),
    "environment variables": (_environ, _set_environ),
    "threads": (_threads, None),
}
if hasattr(os, "sched_getaffinity"):
    _SETTINGS["cpu affinity"] = (
        lambda: os.sched_getaffinity(0),
        lambda cpus: os.sched_setaffinity(0, cpus),
    )


def _watched() -> list[ModuleType | type]:
    """Where the functions live that time, compare and serve."""
    own = [m for name, m in sorted(sys.modules.items()) if name.startswith(("dks.dispatch", "dks.profiler"))]
    return [time, torch, torch.linalg, torch.Tensor, F, *own]


def _functions(place: ModuleType | type) -> dict[str, Any]:
    """What can be called there: a module may keep other globals as it likes, and may gain names."""
    found = {name: value for name, value in vars(place).items() if callable(value)}
    if place is torch:
        # Its Python functions are wrapped where torch._dynamo is imported, which a kernel may do.
        return {name: value for name, value in found.items() if isinstance(value, BuiltinFunctionType)}
    return found


class ProcessState:
    """A picture of the process, to be compared with it later.

    A process that spawns threads or patches functions in its own good time should do so before the picture.
    """

    def __init__(self) -> None:
        self._functions = [(place, _functions(place)) for place in _watched()]
        self.refresh()

    def refresh(self) -> None:
        """Take the settings and threads as they are now for right; the functions stay those of the start."""
        self._values = {name: get() for name, (get, _) in _SETTINGS.items()}

    def restore(self) -> str:
        """Set back what can be set back.

        Returns:
            What had changed (name, found, expected), or "". A thread that ended since is no change.
        """
        faults = []
        for place, functions in self._functions:
            now = vars(place)
            for name, value in functions.items():
                if now.get(name) is not value:
                    setattr(place, name, value)
                    faults.append(f"{place.__name__}.{name}: found it replaced, expected the original")
        faults += [fault for name in _SETTINGS if (fault := self._restored(name))]
        return "; ".join(faults)

    def _restored(self, name: str) -> str:
        get, put = _SETTINGS[name]
        expected = self._values[name]
        try:
            found = get()
        except OSError as error:  # the working directory may be gone
            found = error
        if name == "threads":
            more = len(found - expected)
            return f"threads: found {more} more alive, expected none" if more else ""
        if found == expected:
            return ""
        if put is not None:
            put(expected)
        if isinstance(expected, dict):
            changed = sorted({key for key, _ in found.items() ^ expected.items()})
            return f"{name}: found {', '.join(changed)} changed, expected none"
        return f"{name}: found {found}, expected {expected}"
