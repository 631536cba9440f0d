"""Serving ``layer_norm``: the functional form, the prepared layer, and the swap inside a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dks.dispatch.ambient import is_compiling
from dks.dispatch.prepared import PreparedModule, parameter_objection
from dks.dispatch.problem import alignment
from dks.dispatch.runtime import Plan, Swap
from dks.dispatch.served import DTYPE_NAMES, Server, tensors_objection
from dks.dispatch.swap import bind_again, children, replace, swap_note


class LayerNormServer(Server):
    """``NAME.layer_norm``, ``NAME.prepare_layer_norm`` and the swap of ``nn.LayerNorm``."""

    op = "layer_norm"

    def call(
        self,
        x: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        """``F.layer_norm`` for any tensors that it takes; dispatches where only the last dim is normalised.

        Args:
            x: (..., *normalized_shape).
            normalized_shape: the trailing dims to normalise over.
            weight: of ``normalized_shape``, or None.
            bias: of ``normalized_shape``, or None.
            eps: added to the variance.
        """

        def framework(x: torch.Tensor, *constants: Any) -> torch.Tensor:
            return F.layer_norm(x, normalized_shape, *constants)

        reason = "compiling" if is_compiling() else _objection(x, normalized_shape, weight, bias)
        if reason is not None:
            self.runtime.counters.add(self.op, reason)
            return framework(x, weight, bias, eps)
        n = x.shape[-1]
        dispatch = self.direct((x.dtype, weight is None, n), lambda: self.plan("direct", x.dtype, n, weight), 3)
        parameters = [t.data_ptr() for t in (weight, bias) if t is not None]
        align = alignment(x.data_ptr(), n * x.element_size(), *parameters)
        return dispatch.serve(framework, align, (x.numel() // n,), x, weight, bias, eps)

    def plan(self, form: str, dtype: torch.dtype, n: int, weight: torch.Tensor | None) -> Plan:
        """The table's plan for rows of ``n`` elements."""
        traits = {"dtype": DTYPE_NAMES[dtype], "affine": "no" if weight is None else "yes"}
        return self.runtime.plan(self.op, form, traits, {"n": n})

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> PreparedLayerNorm:
        """A module that dispatches: layer(x (..., n)) -> (..., n), with weight and bias (n,).

        Raises:
            ValueError: weight and bias are not both (n,).
        """
        if weight.dim() != 1 or weight.shape != bias.shape:
            found = f"weight {tuple(weight.shape)}, bias {tuple(bias.shape)}"
            raise ValueError(f"prepare_layer_norm: found {found}, expected (n,) and (n,)")
        return PreparedLayerNorm(self, weight, bias, eps)

    def swap(self, model: nn.Module) -> list[Swap]:
        """Swap every ``nn.LayerNorm`` the table makes faster."""
        if type(model) is nn.LayerNorm:
            return [Swap("", self.op, False, "nothing holds the model itself: use prepare_layer_norm")]
        swaps: list[Swap] = []
        made: dict[nn.Module, PreparedLayerNorm] = {}  # one layer under two names stays one layer
        for parent, name, where, child in children(model):
            if isinstance(child, PreparedLayerNorm):
                swaps += bind_again(self, where, child)
            elif type(child) is nn.LayerNorm:  # a subclass means something by being one
                swaps.append(self._swap_one(parent, where, name, child, made))
        return swaps

    def _swap_one(
        self,
        parent: nn.Module,
        where: str,
        name: str,
        norm: nn.LayerNorm,
        made: dict[nn.Module, PreparedLayerNorm],
    ) -> Swap:
        note = _swap_note(norm)
        if note is not None:
            return Swap(where, self.op, False, note)
        layer = made.get(norm)
        if layer is None:
            n = norm.weight.shape[0]
            plan = self.plan("prepared", norm.weight.dtype, n, norm.weight)
            if plan.find is None:
                return Swap(where, self.op, False, f"n={n} {norm.weight.dtype} is not in the table")
            if not plan.changes_anything:
                note = f"n={n}: the framework's own kernel is the choice everywhere"
                return Swap(where, self.op, False, note)
            layer = PreparedLayerNorm(self, norm.weight, norm.bias, norm.eps)
            if not layer.gains:
                return Swap(where, self.op, False, f"n={n}: the chosen kernels could not be bound")
            made[norm] = layer
        replace(parent, name, norm, layer)
        return Swap(where, self.op, True, layer.describe())


class PreparedLayerNorm(PreparedModule):
    """layer(x (..., n)) -> (..., n). Made by ``prepare_layer_norm``; see ``PreparedModule``."""

    weight: nn.Parameter
    bias: nn.Parameter
    eps: float
    _server: LayerNormServer

    def __init__(self, server: LayerNormServer, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        self.__dict__["eps"] = eps  # before the base binds, which needs it
        self.__dict__["features"] = weight.shape[0]
        super().__init__(server, weight, bias)

    def plan(self, weight: torch.Tensor, _bias: torch.Tensor | None) -> Plan:
        return self._server.plan("prepared", weight.dtype, self.features, weight)

    def constants(self) -> tuple[object, ...]:
        return (self.eps,)

    def row_bytes(self) -> int:
        return self.features * self.weight.element_size()

    def framework(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (self.features,), self.weight, self.bias, self.eps)

    def plain(self) -> nn.LayerNorm:
        layer = nn.LayerNorm.__new__(nn.LayerNorm)
        own = {"normalized_shape": (self.features,), "elementwise_affine": True}
        layer.__dict__.update(self._attributes() | own)
        return layer

    def extra_repr(self) -> str:
        return f"n={self.features} eps={self.eps}"


def _swap_note(norm: nn.LayerNorm) -> str | None:
    if norm._parameters.get("weight") is None or norm._parameters.get("bias") is None:
        return "has no weight or no bias"
    if len(norm.normalized_shape) != 1 or norm.weight.dim() != 1:
        return f"normalises over {norm.normalized_shape}, expected the last dim alone"
    return swap_note(norm) or parameter_objection(norm.weight, norm.bias)


def _objection(
    x: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None, bias: torch.Tensor | None
) -> str | None:
    if (reason := tensors_objection(x, weight, bias)) is not None:
        return reason
    if not isinstance(normalized_shape, (tuple, list)):
        return "shape"
    shape = tuple(normalized_shape)
    if len(shape) != 1 or x.dim() < 1 or x.shape[-1] != shape[0] or (weight is None) != (bias is None):
        return "shape"
    if weight is not None and bias is not None and not (weight.shape == bias.shape == shape):
        return "shape"
    if shape[0] == 0:
        return "zero_sized"
    tensors = [t for t in (x, weight, bias) if t is not None]
    return None if all(t.is_contiguous() for t in tensors) else "strides"
