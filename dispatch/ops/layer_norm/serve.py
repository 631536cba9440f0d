"""Serving ``layer_norm``: the functional form, the prepared layer, and the swap inside a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dks.dispatch.ambient import is_compiling
from dks.dispatch.norms import LikeNorm, NormServer, rows_objection, rows_traced
from dks.dispatch.ops.layer_norm.traced import LAYER_NORM
from dks.dispatch.prepared import PreparedModule, as_parameter, prepare
from dks.dispatch.problem import alignment
from dks.dispatch.served import DTYPE_NAMES, Question
from dks.dispatch.traced import wanted


class LayerNormServer(NormServer):
    """``NAME.layer_norm``, ``NAME.prepare_layer_norm`` and the swap of ``nn.LayerNorm``."""

    op = "layer_norm"
    layer = nn.LayerNorm
    parameters = ("weight", "bias")

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

        reason = "compiling" if is_compiling() else rows_objection(self.device, x, normalized_shape, weight, bias)
        if reason is None and (weight is None) != (bias is None):
            reason = "shape"
        if reason is not None:
            if wanted(reason) and rows_traced(x, normalized_shape, weight, bias):
                y: torch.Tensor = LAYER_NORM(x, normalized_shape, weight, bias, eps, False, self.runtime.name)
                return y
            self.runtime.counters.add(self.op, reason)
            return framework(x, weight, bias, eps)
        n = x.shape[-1]
        dispatch = self.direct((x.dtype, weight is None, n), lambda: self.question("direct", x.dtype, n, weight), 3)
        parameters = [t.data_ptr() for t in (weight, bias) if t is not None]
        align = alignment(x.data_ptr(), n * x.element_size(), *parameters)
        return dispatch.serve(framework, align, (x.numel() // n,), x, weight, bias, eps)

    def question(self, form: str, dtype: torch.dtype, n: int, weight: torch.Tensor | None) -> Question:
        """What to ask a table for, for rows of ``n`` elements."""
        traits = {"dtype": DTYPE_NAMES[dtype], "affine": "no" if weight is None else "yes"}
        return Question(self.op, form, traits, {"n": n})

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> PreparedLayerNorm:
        """A module that dispatches: layer(x (..., n)) -> (..., n), with weight and bias (n,).

        Raises:
            ValueError: weight and bias are not both (n,).
        """
        if weight.dim() != 1 or weight.shape != bias.shape:
            found = f"weight {tuple(weight.shape)}, bias {tuple(bias.shape)}"
            raise ValueError(f"prepare_layer_norm: found {found}, expected (n,) and (n,)")
        norm = nn.LayerNorm.__new__(nn.LayerNorm)
        nn.Module.__init__(norm)
        norm.__dict__.update(normalized_shape=tuple(weight.shape), eps=eps, elementwise_affine=True)
        norm.register_parameter("weight", as_parameter(weight))
        norm.register_parameter("bias", as_parameter(bias))
        return self.prepared(norm)

    def prepared(self, norm: nn.Module) -> PreparedLayerNorm:
        """Let an ``nn.LayerNorm`` serve, in place."""
        return prepare(norm, PreparedLayerNorm, self, {})

    @property
    def like(self) -> type[LikeNorm]:
        return LikeLayerNorm


class PreparedLayerNorm(PreparedModule):
    """layer(x (..., n)) -> (..., n): an ``nn.LayerNorm`` that serves; see ``PreparedModule``."""

    weight: nn.Parameter
    bias: nn.Parameter
    eps: float
    normalized_shape: tuple[int, ...]
    settings = frozenset({"eps", "normalized_shape"})
    _server: LayerNormServer

    def question(self, weight: torch.Tensor, _bias: torch.Tensor | None) -> Question:
        return self._server.question("prepared", weight.dtype, weight.shape[0], weight)

    def constants(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[object, ...]:
        return (weight, bias, self._epsilon)

    def row_bytes(self) -> int:
        return self.weight.shape[0] * self.weight.element_size()

    @property
    def _epsilon(self) -> float:
        return self.eps

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.normalized_shape

    @property
    def setting(self) -> float:
        return self._epsilon

    def traced(self, x: torch.Tensor, _residual: torch.Tensor | None = None) -> Any:
        if not rows_traced(x, self._shape, self.weight, self.bias):
            return None
        table = self._server.runtime.name
        return LAYER_NORM(x, self._shape, self.weight, self.bias, self._epsilon, True, table)

    def framework(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self._shape, self.weight, self.bias, self._epsilon)

    def label(self) -> str:
        return f"n={self.weight.shape[0]} eps={self._epsilon}"


class LikeLayerNorm(LikeNorm, PreparedLayerNorm):
    """layer(x (..., n)) -> (..., n): a norm of another class that serves; see ``LikeNorm``."""
