"""Peers that are no kernels of the pool, and decoding with sequences of one length, as those peers need it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.cells import Call
from dks.dispatch import pool
from dks.dispatch.kernel import DTYPES, Inputs
from dks.dispatch.problem import Problem


def layer_norm(inputs: Inputs) -> Call:
    """F.layer_norm of rms_norm's rows, with its weight and a bias of zeros."""
    weight, eps = inputs.static
    (x,) = inputs.dynamic
    bias = torch.zeros_like(weight)
    return lambda: F.layer_norm(x, weight.shape, weight, bias, eps)


def full_length(problem: Problem, generator: torch.Generator, draw: str) -> Inputs:
    """paged_attention's inputs where every sequence has kv keys, in shuffled pages: no peer needs a mask."""
    b, kv, hkv, d, page = (problem.dim(name) for name in ("b", "kv", "hkv", "d", "page"))
    drawn = pool.operator("paged_attention").make_inputs(problem, generator, draw)
    q, *_, scale = drawn.dynamic
    pages = -(-kv // page)
    order = torch.randperm(b * pages, generator=generator, dtype=torch.int32)
    dtype = DTYPES[problem.trait("dtype")]
    k_cache, v_cache = (torch.randn((b * pages, page, hkv, d), generator=generator).to(dtype) for _ in range(2))
    lengths = torch.full((b,), kv, dtype=torch.int32)
    return Inputs(static=(), dynamic=(q, k_cache, v_cache, order.view(b, pages), lengths, scale))


def contiguous_attention(inputs: Inputs) -> Call:
    """SDPA over the same keys and values, (b, hkv, kv, d) in one piece: what paging costs is not in it.

    All sequences have one length.
    """
    q, k_cache, v_cache, block_table, lengths, scale = inputs.dynamic
    b, h, d = q.shape
    hkv, kv = k_cache.shape[2], int(lengths[0])
    query = q.view(b, hkv, h // hkv, d)
    k, v = (
        cache[block_table.long()].view(b, -1, hkv, d)[:, :kv].transpose(1, 2).contiguous()
        for cache in (k_cache, v_cache)
    )
    return lambda: F.scaled_dot_product_attention(query, k, v, scale=scale).view(b, h, d)
