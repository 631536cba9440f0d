"""rotary: q (tokens, h, d), k (tokens, hkv, d), cos, sin (positions, d / 2), positions (tokens,) -> q_out, k_out.

Rotary position embedding (Su et al., RoFormer, 2021): of each head, the pair of elements i and i + d / 2 is turned
by the angle whose cosine and sine the token's position finds in the caches, as GPT-NeoX and Llama have it. Both
outputs have the inputs' shapes and dtype, and are computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch

from dks.dispatch.kernel import DTYPES, Inputs, Operator, Output, aligned, row_sizes
from dks.dispatch.ops.rotary.serve import RotaryServer
from dks.dispatch.problem import Problem, alignment


def make_inputs(problem: Problem, generator: torch.Generator, draw: str) -> Inputs:
    """Unit-normal q and k; cosines and sines of any angles, every second one at a position that no token has.

    Those are NaN: whoever reads them is found out.
    """
    tokens, h, hkv, d = (problem.dim(name) for name in ("tokens", "h", "hkv", "d"))
    dtype = DTYPES[problem.trait("dtype")]
    cache = torch.float32 if problem.trait("cache") == "float32" else dtype
    positions = torch.randperm(2 * tokens, generator=generator)[:tokens]
    angles = torch.full((2 * tokens, d // 2), torch.nan)
    angles[positions] = torch.rand((tokens, d // 2), generator=generator) * (2 * torch.pi)
    q, k = (
        aligned(
            (torch.randn((tokens, n, d), generator=generator) * _sizes(tokens, n, draw)).to(dtype), problem.align
        )
        for n in (h, hkv)
    )
    least = max(problem.align, cache.itemsize)
    cos, sin = (aligned(t.to(cache), least) for t in (angles.cos(), angles.sin()))
    return Inputs(static=(), dynamic=(q, k, cos, sin, positions))


def _sizes(tokens: int, heads: int, draw: str) -> torch.Tensor:
    return row_sizes(tokens * heads, draw).view(tokens, heads, 1)


def reference(_problem: Problem, inputs: Inputs) -> Output:
    """The same in float64."""
    q, k, cos, sin, positions = inputs.dynamic
    cosine, sine = (t.double()[positions, None] for t in (cos, sin))

    def turned(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[2] // 2
        y = x.double()
        y[..., :half], y[..., half:] = (
            x[..., :half] * cosine - x[..., half:] * sine,
            x[..., half:] * cosine + x[..., :half] * sine,
        )
        return y

    return turned(q), turned(k)


def max_align(problem: Problem) -> int:
    """Halves of heads are d / 2 elements apart, and rows of the caches at least as many."""
    return alignment(problem.dim("d") // 2 * DTYPES[problem.trait("dtype")].itemsize)


def take(dynamic: tuple[Any, ...], first: int, end: int) -> tuple[Any, ...]:
    """The tokens first..end; the caches are everybody's."""
    q, k, cos, sin, positions = dynamic
    return q[first:end], k[first:end], cos, sin, positions[first:end]


OPERATOR = Operator(
    name="rotary",
    dims=("tokens", "h", "hkv", "d"),
    dynamic=("tokens",),
    # Of the caches: models compute them in float32; ``same`` is q's and half as large.
    traits={"dtype": ("float32", "bfloat16", "float16"), "cache": ("float32", "same")},
    default="torch.rotary",
    make_inputs=make_inputs,
    reference=reference,
    max_align=max_align,
    key_bytes=lambda _: 0,
    server=RotaryServer,
    batch="tokens",
    take=take,
    odd_dims=lambda dims: "d must be even" if dims["d"] % 2 else None,
)
