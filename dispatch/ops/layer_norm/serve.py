"""Serving ``layer_norm``: the functional form, the prepared layer, and the swap inside a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dks.dispatch.problem import alignment
from dks.dispatch.runtime import Plan, Swap
from dks.dispatch.served import (
    DTYPE_NAMES,
    Dispatch,
    PreparedModule,
    Server,
    hooks_note,
    join,
    parameter_objection,
    tensors_objection,
)


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
        run = None
        shape = tuple(normalized_shape)
        reason = tensors_objection(x, weight, bias) or _shape_objection(x, shape, weight, bias)
        if reason is None:
            plan = self.plan("direct", x.dtype, shape[0], weight)
            dispatch = Dispatch(self.runtime, plan, plan.bind(weight, bias, eps))
            parameters = [t.data_ptr() for t in (weight, bias) if t is not None]
            align = alignment(x.data_ptr(), shape[0] * x.element_size(), *parameters)
            run = dispatch.choose(align, x.numel() // shape[0])
        else:
            self.runtime.counters.add(self.op, reason)
        return self.dispatch_or(run, lambda: F.layer_norm(x, shape, weight, bias, eps), x)

    def plan(self, form: str, dtype: torch.dtype, n: int, weight: torch.Tensor | None) -> Plan:
        """The table's plan for rows of ``n`` elements."""
        traits = {"dtype": DTYPE_NAMES[dtype], "affine": "no" if weight is None else "yes"}
        return self.runtime.plan(self.op, form, traits, {"n": n})

    def prepare(
        self, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
    ) -> PreparedLayerNorm:
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
        return [
            self._swap_one(parent, path, name, child)
            for path, parent in list(model.named_modules())
            for name, child in list(parent.named_children())
            if type(child) is nn.LayerNorm
        ]

    def _swap_one(self, parent: nn.Module, path: str, name: str, child: nn.LayerNorm) -> Swap:
        where, n = join(path, name), child.normalized_shape[-1]
        note = hooks_note(child) or parameter_objection(child.weight, child.bias)
        if len(child.normalized_shape) != 1 or child.weight is None or child.bias is None:
            note = f"normalises over {child.normalized_shape} with weight and bias in part"
        if note is not None:
            return Swap(where, self.op, False, note)
        plan = self.plan("prepared", child.weight.dtype, n, child.weight)
        if plan.find is None:
            return Swap(where, self.op, False, f"n={n} {child.weight.dtype} is not in the table")
        if not plan.changes_anything:
            return Swap(where, self.op, False, f"n={n}: the framework's own kernel is the choice everywhere")
        layer = PreparedLayerNorm(self, child.weight, child.bias, child.eps)
        setattr(parent, name, layer.train(child.training))
        return Swap(where, self.op, True, layer.describe())


class PreparedLayerNorm(PreparedModule):
    """layer(x (..., n)) -> (..., n). Made by ``prepare_layer_norm``; see ``PreparedModule``."""

    weight: nn.Parameter
    bias: nn.Parameter
    _server: LayerNormServer

    def __init__(
        self, server: LayerNormServer, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> None:
        self.__dict__["eps"] = eps  # before the base binds, which needs it
        self.__dict__["features"] = weight.shape[0]
        super().__init__(server, weight, bias)

    def plan(self, weight: nn.Parameter | None, bias: nn.Parameter | None) -> Plan | None:
        assert weight is not None
        if parameter_objection(weight, bias) or 0 in weight.shape:
            return None
        return self._server.plan("prepared", weight.dtype, self.features, weight)

    def constants(self) -> tuple[object, ...]:
        return (self.eps,)

    def row_bytes(self) -> int:
        return self.features * self.weight.element_size()

    def framework(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (self.features,), self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"n={self.features} eps={self.eps}"


def _shape_objection(
    x: torch.Tensor, shape: tuple[int, ...], weight: torch.Tensor | None, bias: torch.Tensor | None
) -> str | None:
    if len(shape) != 1 or x.dim() < 1 or x.shape[-1] != shape[0] or (weight is None) != (bias is None):
        return "shape"
    if weight is not None and bias is not None and not (weight.shape == bias.shape == shape):
        return "shape"
    if shape[0] == 0:
        return "zero_sized"
    tensors = [t for t in (x, weight, bias) if t is not None]
    return None if all(t.is_contiguous() for t in tensors) else "strides"
