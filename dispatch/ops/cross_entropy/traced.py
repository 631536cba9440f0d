"""``cross_entropy`` in graphs: ``torch.ops.dks.cross_entropy``, whose losses the graph itself reduces."""

from __future__ import annotations

from dks.dispatch.ops.cross_entropy.torch_cross_entropy import losses
from dks.dispatch.traced import define

CROSS_ENTROPY = define(
    "cross_entropy",
    "cross_entropy(Tensor logits, Tensor targets, int ignore_index, str table) -> Tensor",
    losses,
    lambda server, logits, targets, ignore_index, _table: server.call(logits, targets, ignore_index),
    lambda logits, *_: logits.new_empty(logits.shape[:1]),
)
