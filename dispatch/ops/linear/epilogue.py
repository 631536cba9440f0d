"""What follows a linear: the framework's form, and the in-place one that saves an allocation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from dks.dispatch.kernel import Run

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
"""Epilogues of the output alone, as the framework computes them. ``gelu`` is the exact one (erf)."""

EPILOGUES: Mapping[str, Callable[..., torch.Tensor]] = {**ACTIVATIONS, "add": torch.add}
"""Epilogue by trait value. ``add`` takes a residual after the output, (..., n) like it and of its dtype: with
that epilogue the dynamic arguments are x and the residual, and every kernel's run takes both."""

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


def finish(y: torch.Tensor, epilogue: str, residual: torch.Tensor | None = None) -> torch.Tensor:
    """The epilogue on an output, as the framework computes it."""
    apply = EPILOGUES[epilogue]
    return apply(y) if residual is None else apply(y, residual)


def fused_in_place(run: Run, epilogue: str) -> Run:
    """``run`` followed by the epilogue on its fresh output, without a second buffer."""
    if epilogue == "none":
        return run
    if epilogue == "add":
        return lambda x, residual: run(x).add_(residual)
    apply = _IN_PLACE[epilogue]
    return lambda x: apply(run(x))


def onednn_fused(make: Callable[[str, str], Run], epilogue: str) -> Run:
    """``make(attr, algorithm)``, which fuses oneDNN's form of the epilogue, or the epilogue after it in place.

    oneDNN's relu turns NaN into zero, and so hides it: that epilogue stays torch's.
    """
    if epilogue in _ONEDNN:
        return make(*_ONEDNN[epilogue])
    return fused_in_place(make(*_ONEDNN["none"]), epilogue)
