"""What every operator's server shares: try the table, else the framework, and count which."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from dks.dispatch import pool
from dks.dispatch.ambient import (
    ambient_objection,
    is_compiling,
    tensor_objection,
    transform_objection,
    wants_gradient,
)
from dks.dispatch.kernel import DTYPES, Declined, Run
from dks.dispatch.problem import MAX_ALIGNMENT, Candidate, alignment
from dks.dispatch.runtime import MATCH_NAMES, MISS_NAMES, Plan, Runtime, Swap

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_SAMPLES = 8  # machine words of a parameter that are compared at each call

_M = TypeVar("_M", bound="PreparedModule")


class Dispatch:
    """A plan with its kernels bound: serves calls by their sizes and alignment, and counts each once."""

    __slots__ = ("_blocked", "_calls", "_counters", "_find", "_hits", "_op", "_runtime", "kernels", "plan")

    def __init__(self, runtime: Runtime, plan: Plan, bind: Callable[[Candidate], Run]) -> None:
        """Bind each candidate of ``plan`` once; one that can't be bound is recorded and never runs."""
        self.plan = plan
        self.kernels: dict[str, Run] = {}
        for candidate in set(plan.candidates.values()):
            try:
                self.kernels[candidate.id] = bind(candidate)
            except Exception as error:  # a kernel may raise anything; the framework serves without it
                runtime.note_failure(candidate, error)
        self._calls = {
            rule: self.kernels[candidate.id]
            for rule, candidate in plan.candidates.items()
            if candidate.id in self.kernels
        }
        self._op = plan.problem.op
        self._find = plan.find
        self._blocked = plan.blocked or ""
        self._runtime = runtime
        self._counters = runtime.counters
        self._hits = tuple(runtime.counters.counter(self._op, match) for match in MATCH_NAMES)

    def serve(
        self, framework: Callable[..., torch.Tensor], align: int, sizes: tuple[int, ...], *args: Any
    ) -> torch.Tensor:
        """Run the kernel chosen for these dynamic sizes on ``args``; without one, ``framework(*args)``."""
        if self._find is None:
            self._counters.add(self._op, self._blocked)
            return framework(*args)
        code = self._find(align, *sizes)
        if code < 0:
            self._counters.add(self._op, MISS_NAMES[-1 - code])
            return framework(*args)
        rule = code >> 2
        call = self._calls.get(rule)
        if call is None:
            known = rule in self.plan.candidates
            self._counters.add(self._op, "kernel_failed" if known else "kernel_changed")
            return framework(*args)
        try:
            y = call(*args)
        except Exception as error:  # a kernel may raise anything; the framework judges the call
            failure = error
        else:
            next(self._hits[code & 3])
            return y
        return self._after_failure(failure, rule, framework, args)

    def _after_failure(
        self, failure: Exception, rule: int, framework: Callable[..., torch.Tensor], args: tuple[Any, ...]
    ) -> torch.Tensor:
        """The framework's answer, or its error where the call was wrong; else the kernel is out for good."""
        y = framework(*args)
        if isinstance(failure, Declined):
            self._counters.add(self._op, "declined")
            return y
        self._counters.add(self._op, "kernel_failed")
        candidate = self.plan.candidates[rule]
        self._calls = {r: call for r, call in self._calls.items() if self.plan.candidates[r] != candidate}
        self._runtime.note_failure(candidate, failure)
        return y


class Server:
    """Base of the servers in ``ops/*/serve.py``."""

    op: str

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._direct: dict[tuple[object, ...], Dispatch] = {}

    def swap(self, model: nn.Module) -> list[Swap]:
        """Swap what this operator can serve in ``model``, in place; returns what it did and left."""
        raise NotImplementedError

    def count(self, outcome: str) -> None:
        """Count one call that never reached the table."""
        self.runtime.counters.add(self.op, outcome)

    def bind_again(self, path: str, layer: PreparedModule) -> list[Swap]:
        """Bind ``layer`` to its parameters as they are now, if it is this server's and they changed."""
        if layer._server is not self or not layer.stale:
            return []
        layer.refresh()
        return [Swap(path, self.op, layer._binding is not None, f"bound again: {layer.describe()}")]

    def direct(self, key: tuple[object, ...], plan: Callable[[], Plan], statics: int) -> Dispatch:
        """The dispatch of calls without preparation, cached by ``key``.

        Its kernels take the dynamic arguments and then the operator's ``statics`` constant ones, and bind
        those at each call: direct kernels use the caller's tensors as they are, so binding copies nothing.
        """
        found = self._direct.get(key)
        if found is None:
            made = plan()
            kernels, problem = pool.kernels(), made.problem

            def late(candidate: Candidate) -> Run:
                bind, params = kernels[candidate.kernel].bind, candidate.params
                if not statics:
                    return bind(problem, params)
                return lambda *args: bind(problem, params, *args[-statics:])(*args[:-statics])

            found = self._direct[key] = Dispatch(self.runtime, made, late)
        return found


class Watch:
    """Notices that one of a layer's parameters was written to or replaced.

    A write that hides from the version counter (through ``.data``, a fused optimizer, numpy) is noticed if it
    changes one of the few words that are sampled across the tensor.
    """

    __slots__ = ("_bias", "_seen", "_storages", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        tensors = [t for t in (weight, bias) if t is not None]
        # Held, so that no other tensor can come to lie at these addresses, and the samples stay readable.
        self._storages = [t.untyped_storage() for t in tensors]
        self._seen = []
        for t in tensors:
            sample = _sample(t)
            version = None if t.is_inference() else t._version
            self._seen.append((t, t.data_ptr(), version, sample.tobytes, sample.tobytes()))

    def changed(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> bool:
        """Whether the parameters are no longer what they were."""
        if weight is not self._weight or bias is not self._bias:
            return True
        for t, address, version, read, seen in self._seen:
            if t.data_ptr() != address:  # first: what was resized away must not be read
                return True
            if (version is not None and t._version != version) or read() != seen:
                return True
        return False


def _sample(t: torch.Tensor) -> memoryview:
    elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    size = elements * t.element_size()
    view = memoryview((ctypes.c_uint8 * size).from_address(t.data_ptr())).cast("B")
    words = view[: size // 8 * 8].cast("Q") if size >= 8 else view
    return words[:: max(1, len(words) // _SAMPLES)][:_SAMPLES]


class Binding:
    """The kernels that a layer's parameters are bound to, and when those may serve."""

    __slots__ = ("_dtype", "changed", "dispatch", "features", "row_bits")

    def __init__(self, dispatch: Dispatch, watch: Watch, dtype: torch.dtype, features: int, row_bytes: int) -> None:
        self.dispatch = dispatch
        self.changed = watch.changed
        self.features = features
        self.row_bits = row_bytes | MAX_ALIGNMENT
        self._dtype = dtype

    def objection(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> str | None:
        """Why the framework must serve ``x``, or None."""
        reason = tensor_objection(x, self._dtype) or ambient_objection()
        if reason is not None:
            return reason
        if wants_gradient(x, weight, bias):
            return "gradient"
        shape = x.shape
        if not shape or shape[-1] != self.features:
            return "shape"
        if not x.is_contiguous():
            return "strides"
        return "weight_changed" if self.changed(weight, bias) else None


class PreparedModule(nn.Module):
    """A layer with its constant arguments bound to the table's kernels.

    ``weight`` and ``bias`` stay ordinary parameters: they are saved, moved and trained as before. When they
    change, ``refresh`` binds them again; moving the module or loading a state dict does that by itself, and
    any other change is noticed at the next call (see ``Watch``) and served by the framework.

    Packed weights neither copy nor travel: a deep copy binds its own, and a pickle holds the framework's own
    layer, which ``optimize`` swaps again after loading.
    """

    features: int  # size of the last dim of what comes in

    def __init__(self, server: Server, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_parameter("weight", _as_parameter(weight))
        self.register_parameter("bias", _as_parameter(bias))
        self._server = server
        self.refresh()

    def plan(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Plan:
        """The table's plan for this layer."""
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
        plan = self.plan(weight, bias)
        watch = Watch(weight, bias)  # before binding: a write that comes between is then noticed
        # What is bound here serves every mode: grad and inference mode, with and without autocast.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            statics = (_on_cache_line(weight), _on_cache_line(bias), *self.constants())
            dispatch = Dispatch(
                self._server.runtime,
                plan,
                lambda c: pool.kernels()[c.kernel].bind(plan.problem, c.params, *statics),
            )
        self._binding = Binding(dispatch, watch, weight.dtype, self.features, self.row_bytes())

    def _tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        # Missing where a parametrization computes them: the framework then serves.
        return self._parameters.get("weight"), self._parameters.get("bias")

    @property
    def stale(self) -> bool:
        """Whether the parameters are others than those that are bound."""
        return self._binding is None or self._binding.changed(*self._tensors())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input (..., features) -> the layer's output, as the framework would compute it."""
        if is_compiling():
            self._server.runtime.counters.add(self._server.op, "compiling")
            return self.framework(input)
        binding = self._binding
        if binding is None:
            reason = self._unbound
        else:
            parameters = self._parameters
            reason = binding.objection(input, parameters.get("weight"), parameters.get("bias"))
            if reason is None:
                bits = input.data_ptr() | binding.row_bits
                rows = input.numel() // binding.features
                return binding.dispatch.serve(self.framework, bits & -bits, (rows,), input)
        self._server.count(str(reason))
        return self.framework(input)

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
        own = ("_binding", "_server", "_unbound", "features")
        kept = {k: v for k, v in self.__dict__.items() if k not in own}
        return {k: v.copy() if isinstance(v, dict) else v for k, v in kept.items()}


def tensors_objection(x: object, *constants: torch.Tensor | None) -> str | None:
    """Why the framework must serve a functional call on these tensors, the activations first, or None."""
    if not isinstance(x, torch.Tensor):
        return "subclass"
    if x.dtype not in DTYPE_NAMES:
        return "dtype"
    for t in (x, *constants):
        if t is not None and (reason := tensor_objection(t, x.dtype)):
            return reason
    if (reason := ambient_objection()) is not None:
        return reason
    return "gradient" if wants_gradient(x, *constants) else None


def parameter_objection(weight: torch.Tensor | None, bias: torch.Tensor | None) -> str | None:
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


def attachment_note(module: nn.Module) -> str | None:
    """What a user put on ``module`` that a swap would drop, or None."""
    if any(held for name, held in module.__dict__.items() if name.endswith("_hooks")):
        return "has hooks, which a swap would drop"
    if "forward" in module.__dict__:
        return "has a forward of its own, which a swap would drop"
    return None if module._compiled_call_impl is None else "is compiled"


def swap_note(module: nn.Module) -> str | None:
    """Why a layer must stay as it is: what a user attached, or state beyond a weight and a bias; or None."""
    extra = module._modules or module._buffers or set(module._parameters) != {"weight", "bias"}
    return attachment_note(module) or ("holds more than a weight and a bias" if extra else None)


def replace(parent: nn.Module, name: str, old: nn.Module, new: PreparedModule) -> None:
    """Put ``new`` where ``old`` is, with what else ``old`` carries: its mode and a user's attributes."""
    for key, value in old.__dict__.items():
        new.__dict__.setdefault(key, value)
    setattr(parent, name, new.train(old.training))


def children(model: nn.Module) -> list[tuple[nn.Module, str, str, nn.Module]]:
    """(parent, name, dotted path, child) of every child in ``model``; a shared one comes once a name."""
    return [
        (parent, name, join(path, name), child)
        for path, parent in model.named_modules()
        for name, child in parent._modules.items()
        if child is not None
    ]


def join(path: str, name: str) -> str:
    """The dotted path of a child module."""
    return f"{path}.{name}" if path else name


def _as_parameter(t: torch.Tensor | None) -> nn.Parameter | None:
    return t if t is None or isinstance(t, nn.Parameter) else nn.Parameter(t, requires_grad=t.requires_grad)


def _on_cache_line(t: torch.Tensor | None) -> torch.Tensor | None:
    """``t``, or a copy where its address would lower every call's alignment (as in a mapped file)."""
    if t is None:
        return None
    t = t.detach()
    if alignment(t.data_ptr()) == MAX_ALIGNMENT and t.is_contiguous():
        return t
    return t.clone(memory_format=torch.contiguous_format)
