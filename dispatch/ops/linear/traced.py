"""``linear`` in graphs: ``torch.ops.dks.linear``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dks.dispatch.ops.linear.epilogue import finish
from dks.dispatch.prepared import PreparedModule
from dks.dispatch.traced import define, layer_for, takes


def fits(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None
) -> bool:
    """Whether a traced call on these belongs in the graph as ``LINEAR``; see ``takes``."""
    if not takes(x, weight, bias, residual) or x.dim() < 1 or weight.dim() != 2:
        return False
    if x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    return residual is None or residual.shape == (*x.shape[:-1], weight.shape[0])


def _framework(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: str,
    residual: torch.Tensor | None,
    _prepared: bool,
) -> torch.Tensor:
    return finish(F.linear(x, weight, bias), "add" if residual is not None else epilogue, residual)


def _serve(server: Any, *arguments: Any) -> Any:
    x, weight, bias, epilogue, residual, prepared, table = arguments
    if prepared:
        setting = epilogue if residual is None else "add"
        layer = layer_for(table, server.op, weight, bias, setting)
        if layer is not None:
            return PreparedModule.forward(layer, x, residual)  # also of a pair's linear, whose own is the plain one
    return server.call(x, weight, bias, epilogue, residual)


def _fake(x: torch.Tensor, weight: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


LINEAR = define(
    "linear",
    "linear(Tensor x, Tensor weight, Tensor? bias, str epilogue, Tensor? residual, bool prepared, str table)"
    " -> Tensor",
    _framework,
    _serve,
    _fake,
)
