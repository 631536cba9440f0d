"""``layer_norm`` in graphs: ``torch.ops.dks.layer_norm``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dks.dispatch.traced import define, layer_for


def _framework(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    _prepared: bool,
) -> torch.Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _serve(server: Any, *arguments: Any) -> Any:
    x, shape, weight, bias, eps, prepared, table = arguments
    if prepared and weight is not None:
        layer = layer_for(table, server.op, weight, bias, eps)
        if layer is not None:
            return layer.forward(x)
    return server.call(x, shape, weight, bias, eps)


LAYER_NORM = define(
    "layer_norm",
    "layer_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, bool prepared, "
    "str table) -> Tensor",
    _framework,
    _serve,
    lambda x, *_: x.new_empty(x.shape),
)
