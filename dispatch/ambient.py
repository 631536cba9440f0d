"""When the framework itself must serve: everything in which a tensor is more than its numbers."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch_level = torch._C._functorch.maybe_current_level
_tracing = torch._C._is_tracing
_any_autocast = torch._C._is_any_autocast_enabled
grad_enabled = torch.is_grad_enabled
_Tensor, _Parameter, _strided = torch.Tensor, torch.nn.Parameter, torch.strided

# True only while torch.compile or torch.export reads the code; eager calls pay one cheap call for it.
is_compiling = torch.compiler.is_dynamo_compiling


def transform_objection() -> str | None:
    """Why operators called in this thread now are not plain computations, or None.

    Traces, dispatch and function modes (fake tensors, FLOP counters), functorch transforms and forward-mode
    gradients all need to see the operator itself.
    """
    if _dispatch_modes() or _functorch_level() is not None or _tracing():
        return "transformed"
    if _function_modes() and not _only_default_devices():
        return "transformed"
    return "gradient" if forward_ad._current_level >= 0 else None


def is_differentiating() -> bool:
    """Whether a functorch transform or forward-mode gradients are at work in this thread."""
    return _functorch_level() is not None or forward_ad._current_level >= 0


def _only_default_devices() -> bool:
    # ``torch.set_default_device`` is a mode as well, for a process's life; it changes factories alone.
    modes = (torch._C._get_function_stack_at(i) for i in range(_function_modes()))
    return all(type(mode) is DeviceContext for mode in modes)


def tensor_objection(x: object, dtype: torch.dtype, device: str, beside: torch.Tensor | None = None) -> str | None:
    """Why ``x`` itself asks for the framework, or None: subclass, dtype, device or layout.

    Args:
        device: kind of device that the table is for, ``cpu`` or ``cuda``.
        beside: a tensor on the device, number included, on which ``x`` must be as well.
    """
    if type(x) is not _Tensor and type(x) is not _Parameter:
        return "subclass"
    if x.dtype is not dtype:
        return "dtype"
    if not (x.is_cpu if device == "cpu" else _on_gpu(x, beside)):
        return "device"
    # A tensor of zeros that autograd made has no memory at all.
    if x.layout is not _strided or x.is_nested or x.is_neg() or x._is_zerotensor():
        return "layout"
    return None


def _on_gpu(x: torch.Tensor, beside: torch.Tensor | None) -> bool:
    return x.is_cuda and (beside is None or x.get_device() == beside.get_device())


def objection(x: object, dtype: torch.dtype, device: str, beside: torch.Tensor | None = None) -> str | None:
    """Why the framework must serve a call on ``x``: ``x`` itself, or the state of this thread; or None."""
    reason = tensor_objection(x, dtype, device, beside)
    if reason is not None:
        return reason
    return "autocast" if _any_autocast() else transform_objection()


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record an operator on these tensors."""
    if grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False
