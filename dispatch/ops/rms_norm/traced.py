"""``rms_norm`` in graphs: ``torch.ops.dks.rms_norm``, and ``torch.ops.dks.add_rms_norm`` with a residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dks.dispatch.traced import define, layer_for


def normalize(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None,
    eps: float | None,
    _prepared: bool = False,
) -> torch.Tensor:
    """The framework's own operator."""
    return F.rms_norm(x, shape, weight, eps)


def add_and_normalize(
    x: torch.Tensor,
    residual: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None,
    eps: float | None,
    _prepared: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h), where h = x + residual and y is of h, in the framework's own operators."""
    h = x + residual
    return F.rms_norm(h, shape, weight, eps), h


def _serve(server: Any, *arguments: Any) -> Any:
    x, shape, weight, eps, prepared, table = arguments
    if prepared and weight is not None:
        layer = layer_for(table, server.op, weight, None, eps)
        if layer is not None:
            return layer.forward(x)
    return server.call(x, shape, weight, eps)


def _serve_sum(server: Any, *arguments: Any) -> Any:
    x, residual, shape, weight, eps, prepared, table = arguments
    if prepared and weight is not None:
        layer = layer_for(table, server.op, weight, None, eps)
        if layer is not None:
            return layer.forward(x, residual)
    return server.call(x, shape, weight, eps, residual)


RMS_NORM = define(
    "rms_norm",
    "rms_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight, float? eps, bool prepared, str table) -> Tensor",
    normalize,
    _serve,
    lambda x, *_: x.new_empty(x.shape),
)
ADD_RMS_NORM = define(
    "rms_norm",
    "add_rms_norm(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight, float? eps, bool prepared, "
    "str table) -> (Tensor, Tensor)",
    add_and_normalize,
    _serve_sum,
    lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
