"""Serving ``rms_norm``: the functional form, the prepared layer, and the swap inside a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dks.dispatch.ambient import is_compiling
from dks.dispatch.kernel import Output
from dks.dispatch.norms import LikeNorm, NormServer, rows_objection, rows_traced
from dks.dispatch.ops.rms_norm.traced import ADD_RMS_NORM, RMS_NORM, add_and_normalize, normalize
from dks.dispatch.prepared import PreparedModule, as_modules_do, as_parameter, prepare
from dks.dispatch.problem import alignment
from dks.dispatch.served import DTYPE_NAMES, Question, residual_objection
from dks.dispatch.traced import takes, wanted


class RMSNormServer(NormServer):
    """``NAME.rms_norm``, ``NAME.prepare_rms_norm`` and the swap of ``nn.RMSNorm``."""

    op = "rms_norm"
    layer = nn.RMSNorm
    parameters = ("weight",)

    def call(
        self,
        x: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        eps: float | None = None,
        residual: torch.Tensor | None = None,
    ) -> Output:
        """``F.rms_norm`` for any tensors that it takes; dispatches where only the last dim is normalised.

        Args:
            x: (..., *normalized_shape).
            normalized_shape: the trailing dims to normalise over.
            weight: of ``normalized_shape``, or None.
            eps: added to the mean of squares; None as the framework reads it.
            residual: what is added to ``x`` first.

        Returns:
            y of x's shape; with a residual (y, h), where h = x + residual and y is of h.
        """

        def framework(*_: Any) -> Output:
            return _framework(x, normalized_shape, weight, eps, residual)

        reason = "compiling" if is_compiling() else rows_objection(self.device, x, normalized_shape, weight)
        if reason is None and residual is not None:
            reason = residual_objection(residual, x, x.shape[-1])
        if reason is not None:
            if wanted(reason) and _traceable(x, normalized_shape, weight, residual):
                return _traced(x, normalized_shape, weight, eps, residual, False, self.runtime.name)
            self.runtime.counters.add(self.op, reason)
            return framework()
        n, fused = x.shape[-1], residual is not None
        key = (x.dtype, weight is None, fused, n)
        dispatch = self.direct(key, lambda: self.question("direct", x.dtype, n, weight, fused), 2)
        tensors = [t for t in (x, residual) if t is not None]
        addresses = [t.data_ptr() for t in (*tensors, weight) if t is not None]
        align = alignment(n * x.element_size(), *addresses)
        return dispatch.serve(framework, align, (x.numel() // n,), *tensors, weight, eps)

    def question(
        self, form: str, dtype: torch.dtype, n: int, weight: torch.Tensor | None, fused: bool = False
    ) -> Question:
        """What to ask a table for, for rows of ``n`` elements, ``fused`` with the addition of a residual."""
        affine, residual = ("yes" if given else "no" for given in (weight is not None, fused))
        traits = {"dtype": DTYPE_NAMES[dtype], "affine": affine, "residual": residual}
        return Question(self.op, form, traits, {"n": n})

    def prepare(self, weight: torch.Tensor, eps: float | None = None) -> PreparedRMSNorm:
        """A module that dispatches: layer(x (..., n)) -> y (..., n), layer(x, residual) -> (y, h), weight (n,).

        Raises:
            ValueError: weight is not (n,).
        """
        if weight.dim() != 1:
            raise ValueError(f"prepare_rms_norm: found weight {tuple(weight.shape)}, expected (n,)")
        norm = nn.RMSNorm.__new__(nn.RMSNorm)
        nn.Module.__init__(norm)
        norm.__dict__.update(normalized_shape=tuple(weight.shape), eps=eps, elementwise_affine=True)
        norm.register_parameter("weight", as_parameter(weight))
        return self.prepared(norm)

    def prepared(self, norm: nn.Module) -> PreparedRMSNorm:
        """Let an ``nn.RMSNorm`` serve, in place."""
        return prepare(norm, PreparedRMSNorm, self, {})

    @property
    def like(self) -> type[LikeNorm]:
        return LikeRMSNorm


class PreparedRMSNorm(PreparedModule):
    """layer(x (..., n)) -> y (..., n), layer(x, residual) -> (y, h): an ``nn.RMSNorm`` that serves; see
    ``PreparedModule``."""

    weight: nn.Parameter
    eps: float | None
    inputs = (1, 2)
    normalized_shape: tuple[int, ...]
    settings = frozenset({"eps", "normalized_shape"})
    _server: RMSNormServer

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """See ``forward``."""
        # As of every prepared layer, but nn.RMSNorm calls its argument x: one more call would cost each of them.
        if is_compiling():
            return as_modules_do(self, x) if residual is None else as_modules_do(self, x, residual)
        try:
            fast = self._fast
        except AttributeError:
            fast = as_modules_do
        return fast(self, x) if residual is None else fast(self, x, residual)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """x (..., n)[, residual (..., n)] -> the layer's output, as the framework would compute it."""
        return PreparedModule.forward(self, x, residual)

    @property
    def _epsilon(self) -> float | None:
        return self.eps

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.normalized_shape

    @property
    def setting(self) -> float | None:
        return self._epsilon

    def traced(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if not _traceable(x, self._shape, self.weight, residual):
            return None
        return _traced(x, self._shape, self.weight, self._epsilon, residual, True, self._server.runtime.name)

    def question(self, weight: torch.Tensor, _bias: torch.Tensor | None) -> Question:
        return self._server.question("prepared", weight.dtype, weight.shape[0], weight)

    def fused_question(self, weight: torch.Tensor, _bias: torch.Tensor | None) -> Question:
        return self._server.question("prepared", weight.dtype, weight.shape[0], weight, fused=True)

    def constants(self, weight: torch.Tensor, _bias: torch.Tensor | None) -> tuple[object, ...]:
        return (weight, self._epsilon)

    def row_bytes(self) -> int:
        return self.weight.shape[0] * self.weight.element_size()

    def framework(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Output:
        return _framework(x, self._shape, self.weight, self._epsilon, residual)

    def label(self) -> str:
        return f"n={self.weight.shape[0]} eps={self._epsilon}"


class LikeRMSNorm(LikeNorm, PreparedRMSNorm):  # type: ignore[misc] # it takes fewer arguments
    """layer(x (..., n)) -> y (..., n): a norm of another class that serves, as Llama's; see ``LikeNorm``."""


def _traceable(x: Any, normalized_shape: Any, weight: torch.Tensor | None, residual: torch.Tensor | None) -> bool:
    """Whether a traced call belongs in the graph as the table's operator."""
    if not rows_traced(x, normalized_shape, weight):
        return False
    return residual is None or (takes(x, residual) and residual.shape == x.shape)


def _traced(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
    prepared: bool,
    table: str,
) -> Output:
    if residual is None:
        y: torch.Tensor = RMS_NORM(x, normalized_shape, weight, eps, prepared, table)
        return y
    both: tuple[torch.Tensor, torch.Tensor] = ADD_RMS_NORM(
        x, residual, normalized_shape, weight, eps, prepared, table
    )
    return both


def _framework(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
) -> Output:
    if residual is None:
        return normalize(x, normalized_shape, weight, eps)
    return add_and_normalize(x, residual, normalized_shape, weight, eps)
