"""When the framework itself must serve: everything in which a tensor is more than its numbers."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_stack_size = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.maybe_current_level


def ambient_objection() -> str | None:
    """Why the state of this thread asks for the framework's own operator, or None.

    Tracing, autocast, dispatch modes (fake tensors, FLOP counters), functorch transforms and forward-mode
    gradients all need to see the operator itself.
    """
    if torch.compiler.is_compiling():
        return "compiling"
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    if _stack_size() or _functorch_level() is not None:
        return "transformed"
    if forward_ad._current_level >= 0:
        return "gradient"
    return None


def tensor_objection(x: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why ``x`` itself asks for the framework, or None: subclass, device, layout, dtype, strides."""
    if type(x) is not torch.Tensor and type(x) is not torch.nn.Parameter:
        return "subclass"
    if x.dtype is not dtype:
        return "dtype"
    if x.device.type != "cpu":
        return "device"
    if x.layout is not torch.strided or x.is_neg():
        return "layout"
    return None


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record an operator on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
