"""Activations that follow a linear: the framework's form, and the in-place one that saves an allocation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from dks.dispatch.kernel import Run

EPILOGUES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
"""Epilogue by trait value, as the framework computes it. ``gelu`` is the exact one (erf)."""

_IN_PLACE: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": lambda y: torch.ops.aten.gelu_.default(y, approximate="tanh"),
    "silu": torch.ops.aten.silu_.default,
}

_ONEDNN: Mapping[str, tuple[str, str]] = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}


def fused_in_place(run: Run, epilogue: str) -> Run:
    """``run`` followed by the epilogue on its fresh output, without a second buffer."""
    if epilogue == "none":
        return run
    apply = _IN_PLACE[epilogue]
    return lambda x: apply(run(x))


def onednn_fused(make: Callable[[str, str], Run], epilogue: str) -> Run:
    """``make(attr, algorithm)``, which fuses oneDNN's form of the epilogue, or the epilogue after it in place.

    oneDNN's relu turns NaN into zero, and so hides it: that epilogue stays torch's.
    """
    if epilogue in _ONEDNN:
        return make(*_ONEDNN[epilogue])
    return fused_in_place(make(*_ONEDNN["none"]), epilogue)
