"""Serving ``attention``: the functional form, and the attention registry of transformers."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dks.dispatch.problem import alignment
from dks.dispatch.runtime import Swap
from dks.dispatch.served import DTYPE_NAMES, Dispatch, Server, tensors_objection


class AttentionServer(Server):
    """``NAME.attention`` and the swap of a transformers model's attention."""

    op = "attention"

    def __init__(self, runtime: Any) -> None:
        super().__init__(runtime)
        self._dispatches: dict[int, Dispatch] = {}

    def call(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """``F.scaled_dot_product_attention`` for any tensors that it takes.

        Args:
            q: (b, h, q, d).
            k: (b, hkv, kv, d), likewise v; hkv divides h if ``enable_gqa``.
            attn_mask: bool (True takes part) or of q's dtype (added), broadcastable to (b, h, q, kv).
            dropout_p: above zero, the framework serves.
            is_causal: upper-left causal mask.
            scale: None means 1 / sqrt(d).
        """
        run = None
        float_mask = None if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask
        reason = tensors_objection(q, k, v, float_mask) or _objection(q, k, v, attn_mask, dropout_p, enable_gqa)
        if reason is None:
            dispatch = self._dispatch(q, k, attn_mask, is_causal)
            # The class covers q, k, v and the output. A mask is read element by element.
            run = dispatch.choose(_align(q, k, v), q.shape[0], q.shape[2], k.shape[2])
        else:
            self.runtime.counters.add(self.op, reason)

        def framework() -> torch.Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

        return self.dispatch_or(run, framework, q, k, v, attn_mask, scale)

    def _dispatch(
        self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, causal: bool
    ) -> Dispatch:
        traits = {
            "dtype": DTYPE_NAMES[q.dtype],
            "mask": "none" if mask is None else "bool" if mask.dtype == torch.bool else "float",
            "causal": "yes" if causal else "no",
            "layout": _layout(q),
        }
        plan = self.runtime.plan(self.op, "direct", traits, {"h": q.shape[1], "hkv": k.shape[1], "d": q.shape[3]})
        dispatch = self._dispatches.get(id(plan))
        if dispatch is None:  # plans live as long as the runtime, so their ids stay theirs
            dispatch = self._dispatches[id(plan)] = Dispatch(self.runtime, plan, plan.bind())
        return dispatch

    def swap(self, model: nn.Module) -> list[Swap]:
        """Route a transformers model's SDPA attention through the table, by its attention registry."""
        config = getattr(model, "config", None)
        if "transformers" not in sys.modules or not hasattr(model, "set_attn_implementation"):
            return []
        path = type(model).__name__
        if getattr(config, "_attn_implementation", None) != "sdpa":
            found = getattr(config, "_attn_implementation", None)
            return [Swap(path, self.op, False, f"attention is {found!r}, expected 'sdpa'")]
        groups = [group for group in self.runtime.table.groups if group.op == self.op]
        heads = getattr(config, "num_attention_heads", 0)
        plans = [
            self.runtime.plan(self.op, g.form, dict(g.traits), dict(g.statics))
            for g in groups
            if dict(g.statics)["h"] == heads
        ]
        if not plans:
            return [Swap(path, self.op, False, f"{heads} heads are not in the table")]
        if not any(plan.changes_anything for plan in plans):
            return [Swap(path, self.op, False, "the framework's own kernel is the choice everywhere")]
        name = _register(self)
        model.set_attn_implementation(name)  # type: ignore[operator]
        return [Swap(path, self.op, True, f"registered as {name!r}")]


def _register(server: AttentionServer) -> str:
    """Register the server with transformers under a name of its own; returns the name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and query.shape[2] > 1 and attention_mask is None
        # Caches, position biases and cropped prefills stay with the library that defines them.
        special = any(kwargs.get(name) is not None for name in ("cache", "position_bias", "softcap"))
        if special or (causal and key.shape[2] != query.shape[2]):
            out: tuple[torch.Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
            )
            return out
        gqa = query.shape[1] != key.shape[1]
        y = server.call(
            query, key, value, attention_mask, dropout, causal, scale=scaling, enable_gqa=gqa
        )
        return y.transpose(1, 2).contiguous(), None

    name = f"dks_{server.runtime.name}"
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _objection(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
) -> str | None:
    if dropout_p > 0.0:
        return "dropout"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0]:
        return "shape"
    if q.shape[3] != k.shape[3] or (q.shape[1] != k.shape[1] and not enable_gqa):
        return "shape"
    if 0 in q.shape or 0 in k.shape:
        return "zero_sized"
    if q.shape[1] % k.shape[1]:
        return "shape"
    if any(t.stride(3) != 1 or 0 in t.stride()[:3] for t in (q, k, v)) or not _layout(q) == _layout(k) == _layout(v):
        return "strides"
    if mask is not None and (mask.device != q.device or type(mask) is not torch.Tensor):
        return "mask"
    return None


def _layout(t: torch.Tensor) -> str:
    """``bshd`` where the heads of one token lie together, as a projection leaves them; ``bhsd`` otherwise."""
    return "bshd" if t.stride(1) <= t.stride(2) else "bhsd"


def _align(*tensors: torch.Tensor) -> int:
    bits = [t.data_ptr() for t in tensors]
    bits += [stride * t.element_size() for t in tensors for stride in t.stride()[:3]]
    return alignment(*bits)
