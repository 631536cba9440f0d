"""The layers that serve ``linear``: one by itself, one prepared with an epilogue, and a pair in a model."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, symbolic_trace

from dks.dispatch.ambient import is_compiling
from dks.dispatch.disguise import Disguised, disguise, serves
from dks.dispatch.ops.linear.epilogue import finish
from dks.dispatch.ops.linear.traced import LINEAR, fits
from dks.dispatch.prepared import HOOKS, PreparedModule, as_modules_do, as_parameter, hooks_of, prepare
from dks.dispatch.served import Question

if TYPE_CHECKING:
    from dks.dispatch.ops.linear.serve import LinearServer


class PreparedLinear(PreparedModule):
    """layer(x (..., k)) -> (..., n): an ``nn.Linear`` that serves; see ``PreparedModule``."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    epilogue: str = "none"
    _server: LinearServer

    def question(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Question | None:
        return None if self.epilogue == "add" else self._server.question("prepared", weight, bias, self.epilogue)

    def fused_question(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Question | None:
        return self._server.question("prepared", weight, bias, "add") if self.epilogue == "add" else None

    @property
    def function(self) -> Callable[..., torch.Tensor] | None:
        return F.linear if self.epilogue == "none" else None

    def row_bytes(self) -> int:
        n, k = self.weight.shape
        return (n | k) * self.weight.element_size()

    @property
    def setting(self) -> str:
        return self.epilogue

    def traced(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if not fits(x, self.weight, self.bias, residual):
            return None
        epilogue = "none" if self.epilogue == "add" else self.epilogue
        return LINEAR(x, self.weight, self.bias, epilogue, residual, True, self._server.runtime.name)

    def framework(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.epilogue == "none" else finish(y, self.epilogue, residual)

    def label(self) -> str:
        n, k = self.weight.shape
        return f"n={n} k={k}" + ("" if self.epilogue == "none" else f" {self.epilogue}")


class ActivatedLinear(PreparedLinear):
    """layer(x (..., k)[, residual (..., n)]) -> (..., n), made by ``prepare_linear`` with an epilogue.

    No layer of PyTorch's computes that. So it is no ``nn.Linear``, to which tools would add inside of the epilogue,
    and copies hold a graph of PyTorch's functions with the same parameters.
    """

    own = PreparedModule.own | {"epilogue", "inputs"}

    def plain(self) -> nn.Module:
        graph: GraphModule = symbolic_trace(_Added(self) if self.epilogue == "add" else _Activated(self))
        for node in graph.graph.nodes:
            node.type = None  # this file's annotations are texts, which a pickle can't name
        graph.recompile()
        graph.__dict__.update(self._attributes())
        return graph

    def restore(self) -> None:
        """It is none in a disguise."""

    def extra_repr(self) -> str:
        return f"{self.label()}, served by {self._server.runtime.name}"


class _Activated(nn.Module):
    """Computes what an ``ActivatedLinear`` does, for a trace."""

    def __init__(self, layer: ActivatedLinear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._epilogue = layer.epilogue

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return finish(F.linear(input, self.weight, self.bias), self._epilogue)


class _Added(_Activated):
    def forward(self, input: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return finish(F.linear(input, self.weight, self.bias), "add", residual)


class PairedLinear(PreparedLinear):
    """The linear of a ``Pair``, bound together with its activation. Called by itself it is the plain linear."""

    own = PreparedModule.own | {"epilogue", "_activation", "_more_hooks"}
    _activation: nn.Module
    _more_hooks: tuple[Any, ...]  # those of the pair and of its activation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return as_modules_do(self, *args, **kwargs)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """input (..., k) -> (..., n), without the activation."""
        if not serves(self):
            return type(self).forward(self, input)
        self._server.count("unpaired")
        return F.linear(input, self.weight, self.bias)

    def framework(self, x: torch.Tensor, _residual: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self._activation(F.linear(x, self.weight, self.bias))
        return y

    @property
    def callable_as_one(self) -> bool:
        """Whether nobody listens between this and the activation, and calls of either do what their classes do."""
        return not (self.called_otherwise or any(super()._hooks()) or any(hooks_of(self._activation)))

    def _hooks(self) -> tuple[Any, ...]:
        return (*super()._hooks(), *self._more_hooks)


class Pair(Disguised):
    """A module that calls a linear and then an activation, served as one. Both children stay in their places.

    Each call looks whether they are still what was fused, with nothing attached. If not, it is the plain module's.
    """

    own = frozenset({"_parts", "_server"})
    _parts: Parts
    _server: LinearServer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or is_compiling():
            return as_modules_do(self, *args, **kwargs)
        try:
            parts = self._parts
        except AttributeError:  # see PreparedModule
            return as_modules_do(self, *args)
        return parts.linear._fast(self, args[0]) if parts.same(self) else as_modules_do(self, *args)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """input (..., k) -> (..., n), as the plain module would compute it."""
        if not serves(self):
            return type(self).forward(self, *args, **kwargs)
        if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor) or not self.intact:
            return super().forward(*args, **kwargs)  # as a tracer's stand-ins are: it is to see both children
        return PreparedModule.forward(self._parts.linear, args[0])

    def framework(self, x: torch.Tensor) -> torch.Tensor:
        """What serves in the place of a kernel that raised."""
        return self._parts.linear.framework(x)

    @property
    def server(self) -> LinearServer:
        """What serves this pair."""
        return self._server

    @property
    def linear(self) -> PairedLinear:
        """The linear that was fused."""
        return self._parts.linear

    @property
    def intact(self) -> bool:
        """Whether the two may be served as one: they are what was fused, and nobody listens in between."""
        return self._parts.same(self) and self._parts.linear.callable_as_one


class Parts:
    """The two children of a pair, and what it and they held when they were fused."""

    __slots__ = ("_kind", "_states", "activation", "linear")

    def __init__(self, parent: nn.Module, linear: PairedLinear, activation: nn.Module) -> None:
        self.linear, self.activation = linear, activation
        self._kind = type(linear)
        self._states = _State(parent), _State(activation)

    def same(self, parent: nn.Module) -> bool:
        """Whether all is as it was, hooks aside."""
        of_parent, of_activation = self._states
        return (
            tuple(parent.__dict__["_modules"].values()) == (self.linear, self.activation)
            and type(self.linear) is self._kind
            and of_parent.same(parent)
            and of_activation.same(self.activation)
        )


_NO_MATTER = vars(nn.Module()).keys() - {*HOOKS} | Pair.own
"""Attributes that a call of a pair or of its activation never reads, or that are looked at elsewhere."""


class _State:
    """What the attributes of a module were."""

    __slots__ = ("_count", "_get", "_seen", "_values")

    def __init__(self, module: nn.Module) -> None:
        self._seen = [(name, value) for name, value in vars(module).items() if name not in _NO_MATTER]
        self._count = len(vars(module))
        self._get = itemgetter(*(name for name, _ in self._seen))
        self._values = tuple(value for _, value in self._seen)

    def same(self, module: nn.Module) -> bool:
        held = module.__dict__
        try:
            if len(held) != self._count:
                return False
            if is_compiling():  # which can't read an itemgetter
                return all(held[name] is value for name, value in self._seen)
            return bool(self._get(held) == self._values)
        except Exception:  # one is gone, or is now something that compares to no truth
            return False


def fuse(server: LinearServer, parent: nn.Module, linear: nn.Linear, activation: nn.Module, epilogue: str) -> Pair:
    """Let ``parent``, which does no more than call the two in turn, serve them as one, in place."""
    more = (*hooks_of(parent), *hooks_of(activation))
    own = {"epilogue": epilogue, "_activation": activation, "_more_hooks": more}
    paired = prepare(linear, PairedLinear, server, own)
    pair = disguise(parent, Pair, {"_server": server, "_parts": None})
    pair.__dict__["_parts"] = Parts(pair, paired, activation)
    return pair


def unpair(pair: Pair) -> None:
    """Make a pair and its linear plain again, in place."""
    linear = pair.linear
    pair.restore()
    if isinstance(linear, PairedLinear):  # a tool may have given it another class
        linear.restore()


def made_linear(
    server: LinearServer, weight: torch.Tensor, bias: torch.Tensor | None, epilogue: str
) -> PreparedLinear:
    """A layer of these parameters, made to serve: an ``nn.Linear`` where there is no epilogue."""
    plain = epilogue == "none"
    kind = nn.Linear if plain else nn.Module
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.register_parameter("weight", as_parameter(weight))
    layer.register_parameter("bias", as_parameter(bias))
    if plain:
        layer.__dict__.update(in_features=weight.shape[1], out_features=weight.shape[0])
        return prepare(layer, PreparedLinear, server, {})
    own = {"epilogue": epilogue, "inputs": (2,) if epilogue == "add" else (1,)}
    return prepare(layer, ActivatedLinear, server, own)
