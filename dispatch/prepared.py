"""A layer whose parameters are bound to the table's kernels, once for all calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import nn

from dks.dispatch import pool, traced
from dks.dispatch.ambient import (
    grad_enabled,
    is_compiling,
    objection,
    tensor_objection,
    transform_objection,
    wants_gradient,
)
from dks.dispatch.kernel import Launch
from dks.dispatch.problem import MAX_ALIGNMENT, Candidate, alignment
from dks.dispatch.runtime import Plan
from dks.dispatch.served import DTYPE_NAMES, Dispatch, Server, residual_objection
from dks.dispatch.watch import Watch

_M = TypeVar("_M", bound="PreparedModule")


class Binding:
    """The kernels that a layer's parameters are bound to, and when those may serve."""

    __slots__ = ("_dtype", "changed", "dispatch", "features", "fused", "row_bits")

    def __init__(
        self,
        dispatch: Dispatch,
        fused: Dispatch | None,
        watch: Watch,
        dtype: torch.dtype,
        features: int,
        row_bytes: int,
    ) -> None:
        self.dispatch = dispatch
        self.fused = fused  # for calls that bring a residual as well
        self.changed = watch.changed
        self.features = features
        self.row_bits = row_bytes | MAX_ALIGNMENT
        self._dtype = dtype

    def objection(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> str | None:
        """Why the framework must serve these inputs, or None."""
        reason = objection(x, self._dtype)
        if reason is not None:
            return reason
        if grad_enabled() and wants_gradient(x, weight, bias):
            return "gradient"
        shape = x.shape
        if not shape or shape[-1] != self.features:
            return "shape"
        if not x.is_contiguous():
            return "strides"
        if weight is None or self.changed(weight, bias):
            return "weight_changed"
        return None if residual is None else residual_objection(residual, x, weight.shape[0])


class PreparedModule(nn.Module):
    """A layer with its constant arguments bound to the table's kernels.

    ``weight`` and ``bias`` stay ordinary parameters: they are saved, moved and trained as before. When they
    change, ``refresh`` binds them again; moving the module or loading a state dict does that by itself, and
    any other change is noticed at the next call (see ``Watch``) and served by the framework.

    Packed weights neither copy nor travel: a deep copy binds its own, and a pickle holds the framework's own
    layer, which ``optimize`` swaps again after loading. So does a script; torch.jit.script leaves that layer
    in the model as well.
    """

    features: int  # size of the last dim of what comes in
    adds_residual = False  # whether each call brings a residual, of the output's shape, that is added to it

    def __init__(self, server: Server, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_parameter("weight", _as_parameter(weight))
        self.register_parameter("bias", _as_parameter(bias))
        self._server = server
        self.refresh()

    def plan(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Plan:
        """The table's plan for this layer."""
        raise NotImplementedError

    def fused_plan(self, _weight: torch.Tensor) -> Plan | None:
        """The table's plan for calls that bring a residual as well; None where the operator has none."""
        return None

    def constants(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[object, ...]:
        """The constant arguments, as the kernels' ``bind`` takes them."""
        return (weight, bias)

    def row_bytes(self) -> int:
        """Row strides in and out, or-ed together, in bytes."""
        raise NotImplementedError

    @property
    def setting(self) -> Hashable:
        """What the layer was made with beside its parameters."""
        raise NotImplementedError

    def traced(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """This layer's operator for graphs, called; None where the framework's own belongs in the graph."""
        raise NotImplementedError

    def framework(self, x: torch.Tensor) -> torch.Tensor:
        """The framework's own operator on this layer; takes a residual as well if the layer adds one."""
        raise NotImplementedError

    def plain(self) -> nn.Module:
        """The framework's own layer with the same parameters, buffers, hooks and attributes."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Bind the parameters as they are now. Costs a copy a weight form: for start-up, not a request."""
        weight, bias = self._tensors()
        self._binding: Binding | None = None
        self._unbound = transform_objection() or parameter_objection(weight, bias)
        if self._unbound is not None or weight is None:
            return
        plan, fused_plan = self.plan(weight, bias), self.fused_plan(weight)
        watch = Watch(weight, bias)  # before binding: a write that comes between is then noticed
        # What is bound here serves every mode: grad and inference mode, with and without autocast.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            held = _on_cache_line(weight)
            statics = self.constants(held, None if bias is None else _on_cache_line(bias))
            dispatch = self._dispatch(plan, statics)
            fused = None if fused_plan is None else self._dispatch(fused_plan, statics)
        self._binding = Binding(dispatch, fused, watch, weight.dtype, self.features, self.row_bytes())
        traced.remember(self, weight, bias)

    def _dispatch(self, plan: Plan, statics: tuple[object, ...]) -> Dispatch:
        def bind(candidate: Candidate) -> Launch:
            return pool.kernels()[candidate.kernel].bind(plan.problem, candidate.params, *statics)

        return Dispatch(self._server.runtime, plan, bind)

    def _tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        # Missing where a parametrization computes them: the framework then serves.
        return self._parameters.get("weight"), self._parameters.get("bias")

    @property
    def server(self) -> Server:
        """What serves this layer."""
        return self._server

    @property
    def bound(self) -> bool:
        """Whether any table could serve this layer."""
        return self._binding is not None

    @property
    def stale(self) -> bool:
        """Whether the parameters are others than those that are bound."""
        return self._binding is None or self._binding.changed(*self._tensors())

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """input (..., features) -> the layer's output, as the framework would compute it.

        Raises:
            TypeError: a residual for a layer that adds none, or none for one that does.
        """
        if (residual is None) is self.adds_residual:
            raise TypeError(self._wrong_arguments())
        given: tuple[torch.Tensor, ...] = (input,) if residual is None else (input, residual)
        binding = self._binding
        if is_compiling():
            reason: str | None = "compiling"
        elif binding is None:
            reason = self._unbound
        else:
            parameters = self._parameters
            reason = binding.objection(input, residual, parameters.get("weight"), parameters.get("bias"))
            if reason is None:
                bits = input.data_ptr() | binding.row_bits
                if residual is not None:
                    bits |= residual.data_ptr()
                rows = input.numel() // binding.features
                return binding.dispatch.serve(self.framework, bits & -bits, (rows,), *given)
        if binding is not None and traced.wanted(str(reason)):
            y: torch.Tensor | None = self.traced(*given)
            if y is not None:
                return y
        self._server.runtime.counters.add(self._server.op, str(reason))
        return self.framework(*given)

    def _wrong_arguments(self) -> str:
        if self.adds_residual:
            return f"{self._server.op}: found no residual, expected layer(x, residual): it was prepared to add one"
        return f"{self._server.op}: found a residual, expected layer(x): it was not prepared to add one"

    @property
    def gains(self) -> bool:
        """Whether a kernel other than the framework's own is bound."""
        default = pool.operator(self._server.op).default
        return self._binding is not None and any(id != default for id in self._binding.dispatch.kernels)

    def describe(self) -> str:
        """What is bound, in a line."""
        if self._binding is None:
            return f"the framework's own kernel ({self._unbound})"
        dispatch = self._binding.dispatch
        packed = dispatch.plan.form_bytes() / 2**20
        return f"{self.extra_repr()}: {', '.join(sorted(dispatch.kernels))} ({packed:.1f} MiB packed)"

    def _apply(self: _M, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _M:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._refresh_if_stale()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh_if_stale()

    def _refresh_if_stale(self) -> None:
        if self.stale:
            self.refresh()

    def __deepcopy__(self: _M, memo: dict[int, Any]) -> _M:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        own = {k: v for k, v in self.__dict__.items() if k not in ("_binding", "_server")}
        new.__dict__.update(copy.deepcopy(own, memo))
        new._server = self._server
        new.refresh()
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Later protocols insist on the class of what is pickled, which here is another.
        return self.plain().__reduce_ex__(min(protocol, 1))

    def __prepare_scriptable__(self) -> nn.Module:
        return self.plain()

    def _attributes(self) -> dict[str, Any]:
        own = ("_binding", "_server", "_unbound", "adds_residual", "features")
        kept = {k: v for k, v in self.__dict__.items() if k not in own}
        return {k: v.copy() if isinstance(v, dict) else v for k, v in kept.items()}


def parameter_objection(weight: torch.Tensor | None, bias: torch.Tensor | None = None) -> str | None:
    """Why no table could serve a layer with these parameters (dtype, device, subclass, shape), or None."""
    if weight is None:
        return "weight_changed"
    if weight.dtype not in DTYPE_NAMES:
        return "dtype"
    for t in (weight, bias):
        if t is not None and (reason := tensor_objection(t, weight.dtype)):
            return reason
    if 0 in weight.shape:
        return "zero_sized"
    return "shape" if bias is not None and bias.shape != weight.shape[:1] else None


def _as_parameter(t: torch.Tensor | None) -> nn.Parameter | None:
    return t if t is None or isinstance(t, nn.Parameter) else nn.Parameter(t, requires_grad=t.requires_grad)


def _on_cache_line(t: torch.Tensor) -> torch.Tensor:
    """``t``, or a copy where its address would lower every call's alignment (as in a mapped file)."""
    t = t.detach()
    if alignment(t.data_ptr()) == MAX_ALIGNMENT and t.is_contiguous():
        return t
    return t.clone(memory_format=torch.contiguous_format)
