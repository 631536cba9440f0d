"""The framework's own path: all sequences gathered at once, with a mask where their lengths differ."""

from __future__ import annotations

import torch

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.ops.paged_attention.gather import attend
from dks.dispatch.problem import Precision, Problem


def bind(_problem: Problem, _params: tuple[tuple[str, int], ...]) -> Run:
    """run(q (b, h, d), k_cache, v_cache (pages, page, hkv, d), block_table, lengths, scale) -> (b, h, d)."""

    def run(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        lengths: torch.Tensor,
        scale: float | None,
    ) -> torch.Tensor:
        if lengths.is_cpu:
            counts = lengths.tolist()
            bounds = min(counts), max(counts)
        else:  # looking at them would wait for the device, and no CUDA graph could hold it
            bounds = 0, block_table.shape[1] * k_cache.shape[1]
        return attend(q, k_cache, v_cache, block_table, lengths, scale, bounds)

    return run


KERNEL = Kernel(
    id="torch.paged_gather_sdpa",
    op="paged_attention",
    precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16, "float16": Precision.BF16},
    bind=bind,
    rank=0,
)
