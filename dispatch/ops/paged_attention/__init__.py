"""paged_attention: attention of one query row a sequence, as in decoding, over a paged cache of keys and values.

q (b, h, d), k_cache and v_cache (pages, page, hkv, d), block_table (b, max_pages), lengths (b,) -> (b, h, d):
softmax(q @ k.T * scale) @ v, where the keys of sequence i are the first ``lengths[i]`` of the pages that row i
of the block table names, in order. With hkv < h, each key head serves h / hkv heads. The cache is laid out as
vLLM's and FlashAttention's ("NHD"): Kwon et al., PagedAttention, 2023.
"""

from __future__ import annotations

from typing import Any

import torch

from dks.dispatch.kernel import DTYPES, Inputs, Operator, aligned, draw_normal, row_sizes
from dks.dispatch.ops.paged_attention.serve import PagedAttentionServer
from dks.dispatch.problem import Problem, alignment

NO_PAGE = 2**30
"""What block tables hold past a sequence's end: no cache has this page, so whoever follows it is found out."""


def make_inputs(problem: Problem, generator: torch.Generator, draw: str) -> Inputs:
    """Unit-normal q, k and v in shuffled pages; the first sequence has kv keys, the others half of that or more.

    Of rows of different sizes it is v that has them, as in attention: a size for each head of each sequence.
    Whatever no kernel may read is there to be found: NaN in the keys and values past each sequence's end and in
    a page that nobody has, ``NO_PAGE`` in the block table, which is a column wider than kv asks for.
    """
    b, kv, h, hkv, d, page = (problem.dim(name) for name in ("b", "kv", "h", "hkv", "d", "page"))
    dtype = DTYPES[problem.trait("dtype")]
    lengths = torch.randint((kv + 1) // 2, kv + 1, (b,), generator=generator, dtype=torch.int32)
    lengths[0] = kv
    pages = [-(-length // page) for length in lengths.tolist()]
    order = torch.randperm(sum(pages) + 1, generator=generator, dtype=torch.int32)
    block_table = torch.full((b, max(pages) + 1), NO_PAGE, dtype=torch.int32)
    for row, mine in zip(block_table, torch.split(order[:-1], pages), strict=True):
        row[: len(mine)] = mine

    sizes = torch.ones(len(order), 1, hkv, 1)
    owners = torch.repeat_interleave(torch.arange(b), torch.tensor(pages))
    sizes[order[:-1], 0, :, 0] = row_sizes(b * hkv, draw).view(b, hkv)[owners]

    def cache(sizes: torch.Tensor | float) -> torch.Tensor:
        made = (draw_normal((len(order), page, hkv, d), generator) * sizes).to(dtype)
        made[order[-1]] = torch.nan
        for row, count, length in zip(block_table, pages, lengths.tolist(), strict=True):
            made[row[count - 1], length - (count - 1) * page :] = torch.nan
        return aligned(made, problem.align)

    q = aligned(torch.randn((b, h, d), generator=generator).to(dtype), problem.align)
    return Inputs(static=(), dynamic=(q, cache(1.0), cache(sizes), block_table, lengths, d**-0.5))


def reference(problem: Problem, inputs: Inputs) -> torch.Tensor:
    """The same in float64."""
    q, k_cache, v_cache, block_table, lengths, scale = inputs.dynamic
    page, hkv = problem.dim("page"), problem.dim("hkv")
    past = torch.arange(block_table.shape[1] * page, device=lengths.device) >= lengths[:, None]
    pages = block_table.masked_fill(past[:, ::page], 0)
    k, v = (
        cache[pages].flatten(1, 2).double().masked_fill_(past[:, :, None, None], 0).transpose(1, 2)
        for cache in (k_cache, v_cache)
    )
    scores = q.double().view(len(q), hkv, -1, q.shape[2]) @ k.transpose(2, 3) * scale
    weights = torch.softmax(scores.masked_fill_(past[:, None, None], float("-inf")), dim=-1)
    y: torch.Tensor = (weights @ v).reshape(q.shape)
    return y


def max_align(problem: Problem) -> int:
    """Heads are d elements apart."""
    return alignment(problem.dim("d") * DTYPES[problem.trait("dtype")].itemsize)


def take(dynamic: tuple[Any, ...], first: int, end: int) -> tuple[Any, ...]:
    """The sequences first..end; the cache is everybody's."""
    q, k_cache, v_cache, block_table, lengths, scale = dynamic
    return q[first:end], k_cache, v_cache, block_table[first:end], lengths[first:end], scale


OPERATOR = Operator(
    name="paged_attention",
    dims=("b", "kv", "h", "hkv", "d", "page"),
    dynamic=("b", "kv"),
    traits={"dtype": ("float32", "bfloat16", "float16")},
    default="torch.paged_gather_sdpa",
    make_inputs=make_inputs,
    reference=reference,
    max_align=max_align,
    key_bytes=lambda _: 0,
    server=PagedAttentionServer,
    batch="b",
    take=take,
    odd_dims=lambda dims: "hkv must divide h" if dims["h"] % dims["hkv"] else None,
)
