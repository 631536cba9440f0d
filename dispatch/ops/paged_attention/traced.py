"""``paged_attention`` in graphs: ``torch.ops.dks.paged_attention``."""

from __future__ import annotations

from typing import Any

import torch

from dks.dispatch.ops.paged_attention.gather import attend
from dks.dispatch.traced import define


def _framework(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    room = (0, block_table.shape[1] * k_cache.shape[1])
    return attend(q, k_cache, v_cache, block_table, lengths, scale, room)


def _serve(server: Any, *arguments: Any) -> Any:
    return server.call(*arguments[:-1])


PAGED_ATTENTION = define(
    "paged_attention",
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor lengths, float? scale, "
    "str table) -> Tensor",
    _framework,
    _serve,
    lambda q, *_: q.new_empty(q.shape),
)
