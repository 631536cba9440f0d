"""``attention`` in graphs: ``torch.ops.dks.attention``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dks.dispatch.traced import define, lie_beside, takes


def fits(q: Any, k: Any, v: Any, mask: Any, dropout: float) -> bool:
    """Whether a traced call on these belongs in the graph as ``ATTENTION``; see ``takes``."""
    if dropout != 0.0 or not takes(q, k, v) or not lie_beside(q, mask):
        return False
    if mask is not None and mask.dtype is not torch.bool and not takes(q, mask):
        return False
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        return False
    fit: bool = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    return fit


def _framework(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    gqa: bool,
) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa)


def _serve(server: Any, *arguments: Any) -> Any:
    q, k, v, mask, causal, scale, gqa, _ = arguments
    return server.call(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa)


def _heads_together(y: torch.Tensor) -> torch.Tensor:
    """The heads of one token beside each other, as torch's kernel for CPUs leaves them and models want them."""
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def _fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    b, h, length, d = q.shape
    return q.new_empty((b, length, h, d)).transpose(1, 2)


ATTENTION = define(
    "attention",
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale, bool enable_gqa, "
    "str table) -> Tensor",
    _framework,
    _serve,
    _fake,
    _heads_together,
)
