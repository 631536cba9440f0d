"""``silu_and_mul`` in graphs: ``torch.ops.dks.silu_and_mul``."""

from __future__ import annotations

from dks.dispatch.ops.silu_and_mul.torch_silu_and_mul import silu_and_mul
from dks.dispatch.traced import define

SILU_AND_MUL = define(
    "silu_and_mul",
    "silu_and_mul(Tensor x, str table) -> Tensor",
    silu_and_mul,
    lambda server, x, _table: server.call(x),
    lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
)
