"""What the framework can do with a paged cache: gather it into contiguous keys and values, then SDPA."""

from __future__ import annotations

import torch
import torch.nn.functional as F

FEW_KEYS = 16
"""Over fewer keys than this, without a mask, torch's attention on CPUs answers zero for a query of NaN."""


def used_pages(
    block_table: torch.Tensor, lengths: torch.Tensor, page: int, shortest: int, longest: int
) -> torch.Tensor:
    """The columns of ``block_table`` (b, max_pages) that hold ``longest`` keys; 0 past each sequence's end.

    Args:
        lengths: (b,), keys of each sequence, all within ``shortest`` and ``longest``.
        page: keys of a page.
    """
    used = block_table[:, : -(-longest // page)]
    if -(-shortest // page) == used.shape[1]:
        return used
    starts = torch.arange(0, longest, page, device=lengths.device)
    return torch.where(starts < lengths[:, None], used, 0)


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None,
    bounds: tuple[int, int],
) -> torch.Tensor:
    """paged_attention in the framework's operators; differentiable in q and the caches.

    Args:
        q, k_cache, v_cache, block_table, lengths, scale: as of the operator.
        bounds: (shortest, longest): all lengths are within them. They need not be tight.
    """
    shortest, longest = bounds
    b, h, d = q.shape
    page, hkv = k_cache.shape[1:3]
    used = used_pages(block_table, lengths, page, shortest, longest)
    pages = used.shape[1]
    k, v = (
        cache.index_select(0, used.reshape(-1)).view(b, pages * page, hkv, d)[:, :longest]
        for cache in (k_cache, v_cache)
    )
    mask = None
    if shortest < longest or longest < FEW_KEYS:
        seen = torch.arange(longest, device=lengths.device) < lengths[:, None]
        mask = seen[:, None, None]
        for t in (k, v):
            # A mask does not do: what lies there may be NaN, and NaN hidden or weighted with zero stays NaN.
            t[:, shortest:].masked_fill_(~seen[:, shortest:, None, None], 0)
    # The heads that share a key head are rows of one query: no key is repeated.
    grouped = q.reshape(b, hkv, h // hkv, d)
    y = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), mask, scale=scale)
    return y.reshape(b, h, d)
