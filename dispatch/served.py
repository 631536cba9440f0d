"""What every operator's server shares: try the table, else the framework, and count which."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from dks.dispatch.ambient import ambient_objection, tensor_objection, wants_gradient
from dks.dispatch.kernel import DTYPES, Run
from dks.dispatch.problem import MAX_ALIGNMENT, alignment
from dks.dispatch.runtime import MATCH_NAMES, MISS_NAMES, Plan, Runtime, Swap

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_M = TypeVar("_M", bound="PreparedModule")


class Dispatch:
    """A plan with its kernels bound: from sizes and alignment to the kernel that serves them."""

    __slots__ = ("_blocked", "_calls", "_counters", "_find", "_hits", "_op", "plan")

    def __init__(self, runtime: Runtime, plan: Plan, calls: dict[int, Run]) -> None:
        self.plan = plan
        self._op = plan.problem.op
        self._find = plan.find
        self._calls = calls
        self._blocked = plan.blocked or ""
        self._counters = runtime.counters
        self._hits = tuple(runtime.counters.counter(self._op, match) for match in MATCH_NAMES)

    def choose(self, align: int, *sizes: int) -> Run | None:
        """The kernel for these dynamic sizes, counted as a hit; None, counted as a fallback."""
        if self._find is None:
            self._counters.add(self._op, self._blocked)
            return None
        code = self._find(align, *sizes)
        if code < 0:
            self._counters.add(self._op, MISS_NAMES[-1 - code])
            return None
        call = self._calls.get(code >> 2)
        if call is None:
            self._counters.add(self._op, "kernel_changed")
            return None
        next(self._hits[code & 3])
        return call


class Server:
    """Base of the servers in ``ops/*/serve.py``."""

    op: str

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def swap(self, model: nn.Module) -> list[Swap]:
        """Swap what this operator can serve in ``model``, in place; returns what it did and left."""
        raise NotImplementedError

    def dispatch_or(
        self, run: Run | None, framework: Callable[[], torch.Tensor], *args: object
    ) -> torch.Tensor:
        """Run the chosen kernel; the framework where none was chosen or the kernel refuses its launch."""
        if run is not None:
            try:
                return run(*args)
            except RuntimeError:
                # The framework decides whether the call itself was wrong: it raises its own error then.
                self.runtime.counters.add(self.op, "kernel_failed")
        return framework()


class PreparedModule(nn.Module):
    """A layer with its constant arguments bound to the table's kernels.

    ``weight`` and ``bias`` stay ordinary parameters: they are saved, moved and trained as before. When they
    change, ``refresh`` binds them again; moving the module or loading a state dict does that by itself, and
    any other change is noticed at the next call and served by the framework.
    """

    features: int  # size of the last dim of what comes in

    def __init__(self, server: Server, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = _as_parameter(weight)
        self.bias = _as_parameter(bias)
        self._server = server
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh())
        self.refresh()

    def plan(self, weight: nn.Parameter | None, bias: nn.Parameter | None) -> Plan | None:
        """The table's plan for this layer, None where no table could serve it."""
        raise NotImplementedError

    def constants(self) -> tuple[object, ...]:
        """Constant arguments after weight and bias, as the kernels' ``bind`` takes them."""
        return ()

    def row_bytes(self) -> int:
        """Row strides in and out, or-ed together, in bytes."""
        raise NotImplementedError

    def framework(self, x: torch.Tensor) -> torch.Tensor:
        """The framework's own operator on this layer."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Bind the parameters as they are now. Costs a copy a weight form: for start-up, not a request."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        plan = self.plan(weight, bias)
        self._dispatch = None
        if plan is not None:
            with torch.no_grad():
                calls = plan.bind(_on_cache_line(weight), _on_cache_line(bias), *self.constants())
            self._dispatch = Dispatch(self._server.runtime, plan, calls)
        self._bound_to = identity(weight), identity(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., features) -> the layer's output, as the framework would compute it."""
        dispatch = self._dispatch
        reason = "unknown_shape" if dispatch is None else self._objection(x)
        if reason is not None or dispatch is None:
            self._server.runtime.counters.add(self._server.op, str(reason))
            return self.framework(x)
        align = alignment(x.data_ptr(), self.row_bytes())
        run = dispatch.choose(align, x.numel() // self.features)
        return self._server.dispatch_or(run, lambda: self.framework(x), x)

    def _objection(self, x: torch.Tensor) -> str | None:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        reason = ambient_objection() or tensor_objection(x, x.dtype if weight is None else weight.dtype)
        if reason is not None:
            return reason
        if wants_gradient(x, weight, bias):
            return "gradient"
        if x.dim() < 1 or x.shape[-1] != self.features:
            return "shape"
        if not x.is_contiguous():
            return "strides"
        return "weight_changed" if (identity(weight), identity(bias)) != self._bound_to else None

    def describe(self) -> str:
        """What is bound, in a line."""
        plan = None if self._dispatch is None else self._dispatch.plan
        if plan is None:
            return "the framework's own kernel"
        kernels = sorted({candidate.id for candidate in plan.candidates.values()})
        return f"{self.extra_repr()}: {', '.join(kernels)} ({plan.form_bytes() / 2**20:.1f} MiB packed)"

    def _apply(self: _M, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _M:
        super()._apply(fn, recurse)
        self.refresh()
        return self

    def __deepcopy__(self: _M, memo: dict[int, Any]) -> _M:
        # Packed weights can't be copied (some depend on their address): the copy binds its own.
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        own = {k: v for k, v in self.__dict__.items() if k not in ("_dispatch", "_server")}
        new.__dict__.update(copy.deepcopy(own, memo))
        new._server = self._server
        new.refresh()
        return new


def tensors_objection(*tensors: torch.Tensor | None) -> str | None:
    """Why the framework must serve a functional call on these tensors, the activations first, or None."""
    x = tensors[0]
    assert x is not None
    reason = ambient_objection()
    for t in tensors:
        if reason is None and t is not None:
            reason = tensor_objection(t, x.dtype)
    if reason is None and wants_gradient(*tensors):
        return "gradient"
    return reason or (None if x.dtype in DTYPE_NAMES else "dtype")


def parameter_objection(*parameters: torch.Tensor | None) -> str | None:
    """Why no table could serve a layer with these parameters (device, dtype, subclass), or None."""
    first = next((t for t in parameters if t is not None), None)
    if first is not None and first.dtype not in DTYPE_NAMES:
        return "dtype"
    for t in parameters:
        if t is not None and first is not None and (reason := tensor_objection(t, first.dtype)):
            return reason
    return None


def hooks_note(module: nn.Module) -> str | None:
    """Why a swap would lose something a user put on ``module``, or None."""
    return "has hooks, which a swap would drop" if module._forward_hooks or module._forward_pre_hooks else None


def identity(t: torch.Tensor | None) -> tuple[int, int]:
    """Address and version of a tensor: what changes when somebody writes to it or replaces it."""
    if t is None:
        return (0, 0)
    return (t.data_ptr(), -1 if t.is_inference() else t._version)


def join(path: str, name: str) -> str:
    """The dotted path of a child module."""
    return f"{path}.{name}" if path else name


def _as_parameter(t: torch.Tensor | None) -> nn.Parameter | None:
    return t if t is None or isinstance(t, nn.Parameter) else nn.Parameter(t, requires_grad=False)


def _on_cache_line(t: torch.Tensor | None) -> torch.Tensor | None:
    """``t``, or a copy where its address would lower every call's alignment (as in a mapped file)."""
    if t is None:
        return None
    t = t.detach()
    if alignment(t.data_ptr()) == MAX_ALIGNMENT and t.is_contiguous():
        return t
    return t.clone(memory_format=torch.contiguous_format)
