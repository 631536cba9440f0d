"""A layer whose parameters are bound to the table's kernels, once for all calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as modules

from dks.dispatch import modes, native, pool, traced
from dks.dispatch.ambient import (
    grad_enabled,
    is_compiling,
    objection,
    tensor_objection,
    transform_objection,
    wants_gradient,
)
from dks.dispatch.disguise import Disguised, disguise, serves
from dks.dispatch.generation import Generation
from dks.dispatch.kernel import Launch
from dks.dispatch.problem import MAX_ALIGNMENT, Candidate, alignment
from dks.dispatch.served import DTYPE_NAMES, Dispatch, Question, Server, residual_objection
from dks.dispatch.watch import Watch

_M = TypeVar("_M", bound="PreparedModule")

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_ALL_HOOKS = tuple(getattr(modules, f"_global{name}") for name in HOOKS)
_CALLS = frozenset({*HOOKS, "forward", "_compiled_call_impl"})
"""Attributes of a module that decide what calling it does."""


def as_modules_do(layer: nn.Module, *given: Any, **named: Any) -> Any:
    """The Python form of a call: hooks, then ``forward``. Looked up late, since tracers patch it."""
    return nn.Module.__call__(layer, *given, **named)


def _captured() -> bool:
    return modes.current() == modes.GRAPH


class Binding:
    """The kernels of one generation that a layer's parameters are bound to.

    Attributes:
        dispatch: of calls without a residual, or None.
        fused: of calls that bring one, or None.
        graph: the same for calls that a CUDA graph captures, where the table tells them apart.
    """

    __slots__ = ("dispatch", "fused", "graph")

    def __init__(self, dispatch: Dispatch | None, fused: Dispatch | None, graph: Binding | None = None) -> None:
        self.dispatch = dispatch
        self.fused = fused
        self.graph = graph

    @property
    def dispatches(self) -> list[Dispatch]:
        """Those there are."""
        own = [dispatch for dispatch in (self.dispatch, self.fused) if dispatch is not None]
        return own if self.graph is None else own + self.graph.dispatches

    def failed(self, rule: int, error: Exception, layer: PreparedModule, *given: torch.Tensor) -> Any:
        """What the fast path calls where a kernel raised; see ``Dispatch.failed``."""
        dispatch = self.dispatch if len(given) == 1 else self.fused
        assert dispatch is not None
        return dispatch.failed(rule, error, layer.framework, *given)


class PreparedModule(Disguised):
    """A layer with its constant arguments bound to the table's kernels, in its own place: see ``disguise``.

    ``weight`` and ``bias`` stay ordinary parameters: they are saved, moved and trained as before. When they
    change, ``refresh`` binds them again; moving the module or loading a state dict does that by itself. Any other
    change that PyTorch counts is noticed by the next call, one that nobody counts within ``scrub_calls`` calls and
    on a GPU never (see ``watch``). From then on the framework serves, until ``refresh``.

    A call goes through the compiled fast path where the process has one; whatever is out of the ordinary goes
    on to ``forward``, with the hooks that modules have.

    Packed weights neither copy nor travel: a deep copy, a pickle and a script hold the framework's own layer,
    which ``optimize`` lets serve again.
    """

    inputs: tuple[int, ...] = (1,)  # how many tensors a call may bring: x, or x and a residual
    own = frozenset(
        {
            "_bindings", "_device", "_dtype", "_fast", "_features", "_held", "_layer", "_row_bits", "_server",
            "_statics", "_unbound", "_watch",
        }
    )  # fmt: skip
    settings: frozenset[str] = frozenset()  # attributes of the plain layer that its kernels were bound to as well

    _server: Server
    _features: int  # size of the last dim of what comes in

    def question(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Question | None:
        """What to ask a table for, for calls without a residual; None where there are none."""
        raise NotImplementedError

    def fused_question(self, _weight: torch.Tensor, _bias: torch.Tensor | None) -> Question | None:
        """The same for calls that bring a residual."""
        return None

    def constants(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[object, ...]:
        """The constant arguments, as the kernels' ``bind`` takes them."""
        return (weight, bias)

    def row_bytes(self) -> int:
        """Row strides in and out, or-ed together, in bytes."""
        raise NotImplementedError

    @property
    def function(self) -> Callable[..., torch.Tensor] | None:
        """The framework's own function of (x, weight, bias), if that is all that ``framework`` is."""
        return None

    @property
    def setting(self) -> Hashable:
        """What the layer was made with beside its parameters."""
        raise NotImplementedError

    def traced(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """This layer's operator for graphs, called; None where the framework's own belongs in the graph."""
        raise NotImplementedError

    def framework(self, x: torch.Tensor) -> Any:
        """The framework's own operator on this layer; takes a residual as well where ``inputs`` allows."""
        raise NotImplementedError

    def label(self) -> str:
        """What the layer is, in a few words: its sizes, and what else kernels were bound to."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Bind the parameters as they are now. Costs a copy a weight form: for start-up, not a request."""
        runtime = self._server.runtime
        with runtime.lock:  # no generation is swapped in that this layer would miss
            weight, bias = self._tensors()
            self._fast: Callable[..., Any] = as_modules_do
            self._bindings: dict[int, Binding] = {}
            self._layer: Any = None
            self._watch: Watch | None = None
            self._unbound = transform_objection() or parameter_objection(weight, bias)
            if self._unbound is not None or weight is None:
                return
            watch = Watch(weight, bias)  # before binding: a write that comes between is then noticed
            self._features = weight.shape[-1]
            self._dtype, self._row_bits = weight.dtype, self.row_bytes() | MAX_ALIGNMENT
            self._device = weight.device.type
            if not all(_lies_well(t) for t in (weight, bias) if t is not None):
                watch.cover()  # even kernels that read in place read a copy then
            with torch.inference_mode(False), torch.no_grad():
                held = (_on_cache_line(weight), None if bias is None else _on_cache_line(bias))
            self._held = held
            self._statics = self.constants(*held)
            if native.module is not None and runtime.serial is not None and not watch.debugs:
                self._layer = native.module.Layer(runtime.serial, self._parameters, self._hooks(), as_modules_do)
            self._watch = watch  # after all else that ``hold`` needs: a thread that is lost in a fork may end here
            for generation in runtime.held:
                self.hold(generation)
            if self._layer is not None and not self.called_otherwise:
                self._fast = self._quick()
            runtime.layers.add(self)
        traced.remember(self, weight, bias)

    def _hooks(self) -> tuple[Any, ...]:
        """The dicts of all hooks that a call may have to run."""
        return (*hooks_of(self), *_ALL_HOOKS)

    def hold(self, generation: Generation) -> None:
        """Bind the parameters to a generation's kernels, whether it serves yet or not; not to one for another kind
        of device."""
        if self._watch is None or self._device != generation.device:
            return
        # Not of the parameters as they are now: a functional call in another thread lends the layer others.
        weight, bias = self._held
        question, fused = self.question(weight, bias), self.fused_question(weight, bias)
        # What is bound here serves every mode: grad and inference mode, with and without autocast.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._device, enabled=False):
            bound: dict[str, Launch] = {}  # what two modes or calls choose is packed once
            binding: Binding | None = None
            for mode in reversed(generation.modes):  # eager last: it holds the other
                plain, adds = (
                    None if asked is None else self._dispatch(generation, asked, mode, bound)
                    for asked in (question, fused)
                )
                binding = Binding(plain, adds, binding)
        assert binding is not None  # there is a mode
        _wait_for(weight, captured=binding.graph is not None)
        self._bindings = {**self._bindings, generation.serial: binding}
        if self._layer is not None and all(dispatch.native is not None for dispatch in binding.dispatches):
            self._layer.hold(generation.serial, self._compiled(binding, self._watch.native, weight))
        if self._fast is not as_modules_do:
            self._fast = self._quick()

    def _quick(self) -> Callable[..., Any]:
        """The compiled form of a call, which knows nothing of CUDA graphs: what one captures goes another way."""
        call: Callable[..., Any] = self._layer.call
        if all(binding.graph is None for binding in self._bindings.values()):
            return call
        return lambda layer, *given: as_modules_do(layer, *given) if _captured() else call(layer, *given)

    def release(self, generation: Generation) -> None:
        """Forget what was bound to a generation."""
        self._forget(generation.serial)

    def _forget(self, serial: int) -> None:
        self._bindings = {number: binding for number, binding in self._bindings.items() if number != serial}
        if self._layer is not None:
            self._layer.release(serial)

    def keep(self, generations: Collection[Generation]) -> None:
        """Forget what was bound to any other generation."""
        serials = {generation.serial for generation in generations}
        for serial in [serial for serial in self._bindings if serial not in serials]:
            self._forget(serial)

    def _dispatch(
        self, generation: Generation, question: Question, mode: str, bound: dict[str, Launch]
    ) -> Dispatch:
        plan, watch = modes.plan(generation, *question, mode), self._watch
        assert watch is not None  # ``hold`` saw it

        def bind(candidate: Candidate) -> Launch:
            key = f"{plan.problem.id} {candidate.id}"
            if key not in bound:
                kernel = pool.kernels()[candidate.kernel]
                if kernel.keeps_values:
                    watch.cover()
                bound[key] = kernel.bind(plan.problem, candidate.params, *self._statics)
            return bound[key]

        return Dispatch(self._server.runtime, plan, bind, is_framework=self.function is not None)

    def _compiled(self, binding: Binding, watch: object, weight: torch.Tensor) -> Any:
        assert native.module is not None
        plans = [None if d is None else d.native for d in (binding.dispatch, binding.fused)]
        return native.module.Binding(
            *plans,
            native.CODES[self._dtype],
            native.place(weight),
            self._features,
            weight.shape[0],
            self._row_bits,
            self.function,
            binding.failed,
            watch,
        )

    def _tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        # Missing where a parametrization computes them: the framework then serves.
        return self._parameters.get("weight"), self._parameters.get("bias")

    @property
    def server(self) -> Server:
        """What serves this layer."""
        return self._server

    @property
    def binding(self) -> Binding | None:
        """What is bound to the generation that serves now."""
        runtime = self._server.runtime
        while True:
            serial = runtime.generation.serial
            found = self._bindings.get(serial)
            # Two reloads may come between the two reads: what served before them is then let go.
            if found is not None or serial == runtime.generation.serial:
                return found

    @property
    def bound(self) -> bool:
        """Whether any table could serve this layer."""
        return self._watch is not None

    @property
    def stale(self) -> bool:
        """Whether the parameters are others than those that are bound; looks at every byte that can be read."""
        return self._watch is None or self._watch.differs(*self._tensors())

    @property
    def scrub_calls(self) -> int:
        """Calls within which every byte of the parameters is compared with what is bound; see ``watch``. 0 where no
        byte is: no kernel keeps values of its own, or they are on a GPU."""
        return 0 if self._watch is None else self._watch.scrub_calls

    def __call__(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """See ``forward``."""
        if is_compiling():
            return as_modules_do(self, input) if residual is None else as_modules_do(self, input, residual)
        try:
            fast = self._fast
        except AttributeError:  # somebody kept this method, and the module is plain since
            fast = as_modules_do
        return fast(self, input) if residual is None else fast(self, input, residual)

    def __setattr__(self, name: str, value: Any) -> None:
        settings = self.settings  # before, since it may get another class
        super().__setattr__(name, value)
        if name in _CALLS:  # somebody changes what a call does: no short cut past that
            self.__dict__["_fast"] = as_modules_do
        elif name in settings:
            self.refresh()

    @property
    def called_otherwise(self) -> bool:
        """Whether a call does something else than hooks and ``forward``."""
        return "forward" in self.__dict__ or self._compiled_call_impl is not None

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """input (..., features)[, residual] -> the layer's output, as the framework would compute it.

        Raises:
            TypeError: a residual for a layer that adds none, or none for one that does.
        """
        given: tuple[torch.Tensor, ...] = (input,) if residual is None else (input, residual)
        if not serves(self):
            return type(self).forward(self, *given)
        if len(given) not in self.inputs:
            raise TypeError(self._wrong_arguments())
        if is_compiling() or torch.compiler.is_exporting():
            return self._in_graph(given)
        binding = self.binding
        if binding is None:
            reason: str | None = self._why_unbound()
        else:
            if binding.graph is not None and _captured():
                binding = binding.graph
            reason = self._objection(input, residual)
            if reason is None:
                bits = input.data_ptr() | self._row_bits
                if residual is not None:
                    bits |= residual.data_ptr()
                rows = (input.numel() // self._features,)
                dispatch = binding.dispatch if residual is None else binding.fused
                assert dispatch is not None
                return dispatch.serve(self.framework, bits & -bits, rows, *given)
        self._server.count(str(reason))
        return self.framework(*given)

    def _in_graph(self, given: tuple[torch.Tensor, ...]) -> Any:
        """The call as a graph is to hold it. Reads nothing that a reload or ``refresh`` changes: ``torch.compile``
        would guard it, and compile again."""
        y = self.traced(*given)
        if y is not None:
            return y
        self._server.count("compiling")
        return self.framework(*given)

    def _why_unbound(self) -> str:
        """Why nothing of the generation that serves is bound."""
        generation = self._server.runtime.generation
        if self._unbound is None and self._device != generation.device:
            return "device"
        return self._unbound or generation.blocked or "unbound"

    def _objection(self, x: torch.Tensor, residual: torch.Tensor | None) -> str | None:
        """Why the framework must serve these inputs, or None."""
        weight, bias = self._tensors()
        reason = objection(x, self._dtype, self._device, self._held[0])
        if reason is not None:
            return reason
        if grad_enabled() and wants_gradient(x, weight, bias):
            return "gradient"
        shape = x.shape
        if not shape or shape[-1] != self._features:
            return "shape"
        if not x.is_contiguous():
            return "strides"
        if weight is None or self._watch is None or self._watch.changed(weight, bias):
            return "weight_changed"
        if self._watch.debugs and not _captured() and (name := self._watch.overwritten()) is not None:
            raise RuntimeError(self._why_overwritten(name))
        return None if residual is None else residual_objection(residual, x, weight.shape[0])

    def _why_overwritten(self, name: str) -> str:
        return (
            f"{self._server.runtime.name}: {self._server.op} {self.label()}: found other bytes in {name} than "
            "were bound, written where no version counter sees it (through .data, by numpy, by another process); "
            "expected layer.refresh() after such a write"
        )

    def _wrong_arguments(self) -> str:
        if self.inputs == (2,):
            return f"{self._server.op}: found no residual, expected layer(x, residual): it was prepared to add one"
        return f"{self._server.op}: found a residual, expected layer(x): it was not prepared to add one"

    @property
    def gains(self) -> bool:
        """Whether a kernel other than the framework's own is bound."""
        default, binding = pool.operator(self._server.op).default, self.binding
        return binding is not None and any(id != default for d in binding.dispatches for id in d.kernels)

    def describe(self) -> str:
        """What is bound, in a line."""
        binding = self.binding
        if binding is None:
            return f"the framework's own kernel ({self._why_unbound()})"
        dispatch = binding.dispatches[0]
        packed = dispatch.plan.form_bytes() / 2**20
        return f"{self.label()}: {', '.join(sorted(dispatch.kernels))} ({packed:.1f} MiB packed)"

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

    def restore(self) -> None:
        runtime = self._server.runtime
        with runtime.lock:  # no generation is bound to what does not serve
            runtime.layers.discard(self)
            super().restore()

    def extra_repr(self) -> str:
        plain = super().extra_repr()
        return f"{plain}{', ' if plain else ''}served by {self._server.runtime.name}"


_P = TypeVar("_P", bound=PreparedModule)


def prepare(module: nn.Module, kind: type[_P], server: Server, attributes: Mapping[str, Any]) -> _P:
    """Let ``module`` serve as a ``kind``, bound to its parameters, in place.

    Args:
        attributes: what ``kind.own`` names beside what every prepared layer has.
    """
    layer = disguise(module, kind, {"_server": server, **attributes})
    try:
        layer.refresh()
    except BaseException:
        layer.restore()
        raise
    return layer


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """The dicts of hooks that calls of ``module`` run."""
    return tuple(module.__dict__[name] for name in HOOKS)


def parameter_note(device: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> str | None:
    """Why a table for this kind of device could not serve a layer with these parameters, or None."""
    why = parameter_objection(weight, bias)
    if why is None and weight.device.type != device:
        return f"device: its parameters are on {weight.device.type}, not {device}"
    if why == "unwatched":
        return "unwatched: inference tensors on a GPU; make the model outside of torch.inference_mode()"
    return why


def parameter_objection(weight: torch.Tensor | None, bias: torch.Tensor | None = None) -> str | None:
    """Why no table could serve a layer with these parameters (dtype, device, subclass, shape), or None."""
    if weight is None:
        return "weight_changed"
    if weight.dtype not in DTYPE_NAMES:
        return "dtype"
    device = "cuda" if weight.is_cuda else "cpu"
    for t in (weight, bias):
        if t is not None and (reason := tensor_objection(t, weight.dtype, device, weight)):
            return reason
        if t is not None and t.is_cuda and t.is_inference():
            return "unwatched"
    if 0 in weight.shape:
        return "zero_sized"
    return "shape" if bias is not None and bias.shape != weight.shape[:1] else None


def as_parameter(t: torch.Tensor | None) -> nn.Parameter | None:
    """``t``, as the parameter of a layer that is made of it."""
    return t if t is None or isinstance(t, nn.Parameter) else nn.Parameter(t, requires_grad=t.requires_grad)


def _wait_for(t: torch.Tensor, *, captured: bool) -> None:
    """Until what was packed on a GPU is there: another thread may serve from it on another stream at once.

    Args:
        captured: whether calls in CUDA graphs have kernels of their own. Calls that warm up for a capture never run
            those, and cuBLAS, which may be one of them, can't make its handle once a capture has begun.
    """
    if t.is_cuda and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(t.device).synchronize()
        if captured:
            with torch.cuda.device(t.device):
                torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]


def _on_cache_line(t: torch.Tensor) -> torch.Tensor:
    """``t``, or a copy where it does not lie well."""
    return t.detach() if _lies_well(t) else t.detach().clone(memory_format=torch.contiguous_format)


def _lies_well(t: torch.Tensor) -> bool:
    """Whether kernels can read ``t`` itself: its address lowers no call's alignment, as in a mapped file."""
    return alignment(t.data_ptr()) == MAX_ALIGNMENT and t.is_contiguous()
