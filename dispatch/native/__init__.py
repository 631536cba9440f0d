"""The compiled fast path: what serves a call in nanoseconds where Python takes microseconds.

One extension serves a process, the first that a loaded package brought; every package of this version brings the
same. Without one (no compiler where the package was built, PyTorch before 2.11, another version's package) the
Python form serves, and ``why`` says so.
"""

from __future__ import annotations

import hashlib
import importlib.util
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import torch

from dks.dispatch.kernel import Declined
from dks.dispatch.native import probes

HERE = Path(__file__).parent
SOURCES = (
    *(HERE / name for name in ("module.cpp", "direct.hpp", "layer.hpp", "plan.hpp", "kernel.hpp")),
    *(HERE / name for name in ("gpu_kernel.hpp", "watch.hpp", "thread.hpp", "tensor.hpp", "python.hpp")),
    HERE.parent / "cpp" / "lookup.hpp",
    HERE.parent / "tiles" / "abi.h",
    HERE.parent / "gpu" / "gpu.h",
)
"""All that the extension is made of; the first one is compiled."""

BINARY = "_dispatch.abi3.so"

module: ModuleType | None = None
"""The extension of this process, or None."""

why = "no loaded package brought the compiled fast path"
"""Why there is none; empty where there is one."""


def digest() -> str:
    """Hex digest of the sources, which a binary shows as ``SOURCE``."""
    text = hashlib.sha256()
    for path in SOURCES:
        text.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return text.hexdigest()[:16]


def install(path: Path) -> str:
    """Load the extension at ``path``, unless this process has one; returns why there is none, or an empty text."""
    global why  # noqa: PLW0603 - one extension a process
    if module is None:
        why = _install(path)
    return why


def _install(path: Path) -> str:
    global module  # noqa: PLW0603
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None:
        return f"torch {torch.__version__} has no DLPack exchange table (2.11 and later have)"
    try:
        loader = ExtensionFileLoader("_dispatch", str(path))
        spec = importlib.util.spec_from_file_location("_dispatch", path, loader=loader)
        assert spec is not None
        made = importlib.util.module_from_spec(spec)
        loader.exec_module(made)
        if digest() != made.SOURCE:
            return (
                f"{path.name} was compiled from another version's sources ({made.SOURCE}); build the package again"
            )
        made.setup(_given(exchange))
    except (ImportError, RuntimeError, AttributeError) as error:
        return f"{path.name}: {error}"
    module = made
    return ""


def _given(exchange: object) -> dict[str, object]:
    return {
        "exchange": exchange,
        "tensor": torch.Tensor,
        "parameter": torch.nn.Parameter,
        "new_empty": torch.Tensor.new_empty,
        "empty_like": torch.empty_like,
        "is_neg": torch.Tensor.is_neg,
        "declined": Declined,
        "bytes": torch.uint8,
        "special": probes.special(),
        "autocast": probes.autocast(),
        "gradients": probes.gradients(),
    }


DEVICES = {"cpu": 1, "cuda": 2}
"""DLPack's number of each kind of device that tables are for."""


def place(t: torch.Tensor) -> tuple[int, int]:
    """DLPack's (kind, index) of the device that a tensor of a CPU or GPU is on."""
    return DEVICES[t.device.type], t.device.index or 0


CODES = {torch.float32: (2, 32), torch.float16: (2, 16), torch.bfloat16: (4, 16)}
"""DLPack's (code, bits) of the dtypes that kernels take."""
