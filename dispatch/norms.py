"""What the servers of normalisation layers share: which calls are rows of a table, and the swap in a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import nn

from dks.dispatch.ambient import is_compiling
from dks.dispatch.disguise import disguise_note, serves
from dks.dispatch.lookalike import EPS_NAMES, Lookalike, norm_like
from dks.dispatch.prepared import PreparedModule, as_modules_do, parameter_note, prepare
from dks.dispatch.runtime import Swap
from dks.dispatch.served import Question, Server, tensors_objection
from dks.dispatch.swap import bind_again, patched_note, places, restore_layers, swap_note
from dks.dispatch.traced import takes


class LikeNorm(PreparedModule):
    """A norm that is none of PyTorch's but computes the same: what no kernel serves, its own class does."""

    own = PreparedModule.own | {"_argument", "_eps_name"}
    settings = EPS_NAMES
    inputs = (1,)
    _argument: str  # what its forward calls x
    _eps_name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See ``forward``."""
        if len(args) != 1 or kwargs or is_compiling():
            return as_modules_do(self, *args, **kwargs)
        try:
            fast = self._fast
        except AttributeError:  # see PreparedModule
            fast = as_modules_do
        return fast(self, args[0])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """input (..., n) -> (..., n), as its own class would compute it: same errors, same names of arguments."""
        if not serves(self):
            return type(self).forward(self, *args, **kwargs)
        if not args and {*kwargs} == {self._argument}:
            args, kwargs = tuple(kwargs.values()), {}
        if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
            return self.plain_class.forward(self, *args, **kwargs)
        return super().forward(args[0])

    def framework(self, x: torch.Tensor) -> Any:
        return self.plain_class.forward(self, x)

    def fused_question(self, _weight: torch.Tensor, _bias: torch.Tensor | None) -> None:
        """None: nobody calls it with a residual."""

    @property
    def gains(self) -> bool:
        """Whether any kernel is bound: also PyTorch's own is another than the module's class has."""
        binding = self.binding
        return binding is not None and any(dispatch.kernels for dispatch in binding.dispatches)

    @property
    def _epsilon(self) -> float:
        eps: float = getattr(self, self._eps_name)
        return eps

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(self._parameters["weight"].shape)  # type: ignore[union-attr]


class NormServer(Server):
    """Base of the servers of layers that normalise the last dim alone."""

    layer: type[nn.Module]  # what ``swap`` replaces
    parameters: tuple[str, ...]  # names of all it holds, the weight first

    def question(self, form: str, dtype: torch.dtype, n: int, weight: torch.Tensor | None) -> Question:
        """What to ask a table for, for rows of ``n`` elements."""
        raise NotImplementedError

    def prepared(self, norm: nn.Module) -> PreparedModule:
        """Let ``norm`` serve, in place."""
        raise NotImplementedError

    def swap(self, model: nn.Module) -> list[Swap]:
        """Let every layer of this kind serve that the table makes faster."""
        found = places(model)
        swaps: dict[nn.Module, Swap] = {}  # one layer under two names stays one layer
        for path, module in found:
            if isinstance(module, PreparedModule) and module not in swaps:
                swaps |= bind_again(self, path, module)
            elif type(module) is self.layer:
                swaps[module] = self._swap_one(path, module, None)
            elif module not in swaps and self.knows_any and (like := norm_like(module, self.op)) is not None:
                swaps[module] = self._swap_one(path, module, like)
        return [replace(swaps[module], path=path) for path, module in found if module in swaps]

    def restore(self, model: nn.Module) -> list[Swap]:
        """Make plain again what ``swap`` and ``prepare`` let serve in ``model``, in place."""
        return restore_layers(self, places(model))

    @property
    def like(self) -> type[LikeNorm]:
        """What ``swap`` makes of a norm of another class that computes the same."""
        raise NotImplementedError

    def _prepared_like(self, norm: nn.Module, like: Lookalike) -> PreparedModule:
        argument = next(iter(signature(norm.forward).parameters))
        return prepare(norm, self.like, self, {"_argument": argument, "_eps_name": like.eps_name})

    def _swap_one(self, path: str, norm: nn.Module, like: Lookalike | None) -> Swap:
        note = self._note(norm) if like is None else self._like_note(norm, like)
        if note is not None:
            return Swap(path, self.op, False, note)
        weight = norm._parameters["weight"]
        assert weight is not None  # ``_note`` saw it
        n = weight.shape[0]
        question = self.question("prepared", weight.dtype, n, weight)
        if self.plan(question).find is None:
            return Swap(path, self.op, False, f"n={n} {weight.dtype} is not in the table")
        if like is None and not self.changes_anything(question):
            return Swap(path, self.op, False, f"n={n}: the framework's own kernel is the choice everywhere")
        layer = self.prepared(norm) if like is None else self._prepared_like(norm, like)
        if not layer.gains:
            layer.restore()
            return Swap(path, self.op, False, f"n={n}: the chosen kernels could not be bound")
        name = "" if like is None else f"{layer.plain_class.__name__} "
        return Swap(path, self.op, True, f"{name}{layer.describe()}")

    def _like_note(self, norm: nn.Module, like: Lookalike) -> str | None:
        weight, *bias = (norm._parameters.get(name) for name in self.parameters)
        note = like.note or disguise_note(norm, self.like)
        if note is None:
            assert weight is not None  # its form was looked at
            note = parameter_note(self.device, weight, *bias)
        return note

    def _note(self, norm: nn.Module) -> str | None:
        """Why a layer must stay as it is, or None."""
        weight, *bias = (norm._parameters.get(name) for name in self.parameters)
        if weight is None or any(t is None for t in bias):
            return "has no " + " or no ".join(self.parameters)
        if norm.normalized_shape != weight.shape or weight.dim() != 1:
            return f"normalises over {norm.normalized_shape}, expected the last dim alone"
        note = patched_note(self.layer) or swap_note(norm, self.parameters)
        return note or parameter_note(self.device, weight, *bias)


def rows_objection(
    device: str, x: Any, normalized_shape: Sequence[int], *parameters: torch.Tensor | None
) -> str | None:
    """Why the framework must serve a functional call, or None where it normalises contiguous rows."""
    if (reason := tensors_objection(device, x, *parameters)) is not None:
        return reason
    if not isinstance(normalized_shape, (tuple, list)):
        return "shape"
    shape = tuple(normalized_shape)
    given = [t for t in parameters if t is not None]
    if len(shape) != 1 or x.shape[-1:] != shape or any(t.shape != shape for t in given):
        return "shape"
    if shape[0] == 0:
        return "zero_sized"
    return None if all(t.is_contiguous() for t in (x, *given)) else "strides"


def rows_traced(x: Any, normalized_shape: Any, *others: torch.Tensor | None) -> bool:
    """Whether a traced call belongs in the graph as the table's operator: rows, and parameters that fit them."""
    if not takes(x, *others) or not isinstance(normalized_shape, (tuple, list)) or len(normalized_shape) != 1:
        return False
    n = normalized_shape[0]
    return x.dim() > 0 and x.shape[-1] == n and all(t is None or t.shape == (n,) for t in others)
