"""attention: softmax(q @ k.T * scale + mask) @ v, as ``F.scaled_dot_product_attention`` defines it.

q (b, h, q, d), k and v (b, hkv, kv, d) -> (b, h, q, d). With hkv < h, each key head serves h / hkv heads.
"""

from __future__ import annotations

import torch

from dks.dispatch.kernel import DTYPES, Inputs, Operator, aligned, row_sizes
from dks.dispatch.ops.attention.serve import AttentionServer
from dks.dispatch.problem import Problem, alignment

MASKED_SHARE = 4  # a sweep's masks hide the last quarter of the keys, as padding does


def _heads(problem: Problem, heads: str, length: str, generator: torch.Generator, draw: str) -> torch.Tensor:
    """Unit normal, heads of the sizes that ``draw`` gives to rows."""
    b, h, s, d = (problem.dim(name) for name in ("b", heads, length, "d"))
    sizes = row_sizes(b * h, draw).view(b, h)
    sizes = sizes[:, None, :, None] if problem.trait("layout") == "bshd" else sizes[:, :, None, None]
    # ``bshd``: a projection's output seen as heads, which is how transformer models call attention.
    order = (b, s, h, d) if problem.trait("layout") == "bshd" else (b, h, s, d)
    t = (torch.randn(order, generator=generator) * sizes).to(DTYPES[problem.trait("dtype")])
    t = aligned(t, problem.align)
    return t.transpose(1, 2) if problem.trait("layout") == "bshd" else t


def make_inputs(problem: Problem, generator: torch.Generator, draw: str) -> Inputs:
    """Unit-normal q, k, v in the strides of ``layout``; the mask is (b, 1, q, kv).

    Of rows of different sizes it is v that has them, a size for each head of each sequence: larger scores make a
    softmax a matter of luck."""
    q = _heads(problem, "h", "q", generator, "normal")
    k, v = (_heads(problem, "hkv", "kv", generator, kind) for kind in ("normal", draw))
    mask = None
    if problem.trait("mask") != "none":
        b, length, kv = (problem.dim(name) for name in ("b", "q", "kv"))
        mask = torch.ones((b, 1, length, kv), dtype=torch.bool)
        mask[..., kv - kv // MASKED_SHARE :] = False
        if problem.trait("mask") == "float":
            mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    return Inputs(static=(), dynamic=(q, k, v, mask, problem.dim("d") ** -0.5))


def reference(problem: Problem, inputs: Inputs) -> torch.Tensor:
    """The same in float64."""
    q, k, v, mask, scale = inputs.dynamic
    groups = problem.dim("h") // problem.dim("hkv")
    wide_k, wide_v = (t.double().repeat_interleave(groups, dim=1) for t in (k, v))
    scores = (q.double() @ wide_k.transpose(-1, -2)) * scale
    if problem.trait("causal") == "yes":
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(hidden, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.double()
    y: torch.Tensor = torch.softmax(scores, dim=-1) @ wide_v
    return y


def max_align(problem: Problem) -> int:
    """Heads are d elements apart."""
    return alignment(problem.dim("d") * DTYPES[problem.trait("dtype")].itemsize)


OPERATOR = Operator(
    name="attention",
    dims=("b", "q", "kv", "h", "hkv", "d"),
    dynamic=("b", "q", "kv"),
    traits={
        "dtype": ("float32", "bfloat16", "float16"),
        "mask": ("none", "bool", "float"),
        "causal": ("no", "yes"),
        "layout": ("bshd", "bhsd"),
    },
    default="torch.sdpa",
    make_inputs=make_inputs,
    reference=reference,
    max_align=max_align,
    key_bytes=lambda _: 0,
    server=AttentionServer,
    batch="b",
    odd_dims=lambda dims: "hkv must divide h" if dims["h"] % dims["hkv"] else None,
)
