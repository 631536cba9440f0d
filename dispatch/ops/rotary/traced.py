"""``rotary`` in graphs: ``torch.ops.dks.rotary``."""

from __future__ import annotations

from typing import Any

from dks.dispatch.ops.rotary.torch_rotary import rotate
from dks.dispatch.traced import define


def _serve(server: Any, *arguments: Any) -> Any:
    return server.call(*arguments[:-1])


ROTARY = define(
    "rotary",
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, str table) -> (Tensor, Tensor)",
    rotate,
    _serve,
    lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
)
