"""Serving ``attention``: the functional form, and what models of transformers ask for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dks.dispatch.ambient import is_compiling, tensor_objection
from dks.dispatch.ops.attention import models
from dks.dispatch.ops.attention.traced import ATTENTION, fits
from dks.dispatch.problem import alignment
from dks.dispatch.runtime import Swap
from dks.dispatch.served import DTYPE_NAMES, Question, Server, tensors_objection
from dks.dispatch.traced import wanted


class AttentionServer(Server):
    """``NAME.attention`` and the swap of a transformers model's attention."""

    op = "attention"

    def call(  # noqa: PLR0913 - as the framework has it
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

        def framework(*_: Any) -> torch.Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

        reason = "compiling" if is_compiling() else _objection(self.device, q, k, v, attn_mask, dropout_p)
        if reason is None and is_causal and attn_mask is not None:
            reason = "mask"  # the framework takes one or the other
        if reason is None and not enable_gqa and q.shape[1] != k.shape[1]:
            reason = "shape"
        if reason is not None:
            if wanted(reason) and fits(q, k, v, attn_mask, dropout_p):
                y: torch.Tensor = ATTENTION(q, k, v, attn_mask, is_causal, scale, enable_gqa, self.runtime.name)
                return y
            self.runtime.counters.add(self.op, reason)
            return framework()
        return self.attend(framework, q, k, v, attn_mask, scale, is_causal)

    def attend(
        self,
        framework: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        causal: bool,
    ) -> torch.Tensor:
        """Serve tensors to which ``_objection`` has none; ``framework()`` where the table has nothing."""
        kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "float"
        b, h, length, d = q.shape
        _, hkv, kv, _ = k.shape
        layout = _layout(k if length == 1 else q)

        def question() -> Question:
            causes = "yes" if causal else "no"
            traits = {"dtype": DTYPE_NAMES[q.dtype], "mask": kind, "causal": causes, "layout": layout}
            return Question(self.op, "direct", traits, {"h": h, "hkv": hkv, "d": d})

        dispatch = self.direct((q.dtype, kind, causal, layout, h, hkv, d), question, 0)
        return dispatch.serve(framework, _align(q, k, v, mask), (b, length, kv), q, k, v, mask, scale)

    def call_of_model(  # noqa: PLR0913, PLR0917 - as transformers has it
        self,
        framework: Callable[..., Any],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
        scale: float | None,
        causal: bool,
        groups: int,
    ) -> Any:
        """An attention of transformers: (b, h, q, d), or ``framework()`` as it is.

        Args:
            causal: whether a row sees later keys where nothing else says so; a mask, and a single row, do.
            groups: query heads to a key head, as the model says.
        """
        given = (q, k, v, mask, dropout)
        reason = "compiling" if is_compiling() else _objection(self.device, *given)
        traces = reason is not None and wanted(reason) and fits(*given)
        if reason is None or traces:
            causal = q.shape[2] > 1 and mask is None and bool(causal)
            cropped = causal and k.shape[2] != q.shape[2]  # an empty static cache: the library looks at its head
            if cropped or q.shape[1] != groups * k.shape[1] or (mask is not None and mask.dim() != 4):
                reason, traces = "special", False
        if traces:
            return ATTENTION(q, k, v, mask, causal, scale, q.shape[1] != k.shape[1], self.runtime.name)
        if reason is not None:
            self.count(reason)
            return framework()
        return self.attend(framework, q, k, v, mask, scale, causal)

    def passed_over(self, module: nn.Module) -> str | None:
        kind = type(module).__name__
        if not kind.endswith("Attention") or any(hasattr(m, "config") for m in module.modules()):
            return None  # transformers' go by their model
        return f"{kind} takes no attention by name: {self.runtime.name}.attention serves where it is called"

    def swap(self, model: nn.Module) -> list[Swap]:
        """Let a transformers model's SDPA attention ask the table."""
        return models.swap(self, model) if "transformers" in sys.modules else []

    def restore(self, model: nn.Module) -> list[Swap]:
        """Let the attention that asks this table be the model's own again."""
        return models.restore(self, model)


def _objection(device: str, q: Any, k: Any, v: Any, mask: Any, dropout: float) -> str | None:
    """Why the framework must serve these tensors, or None; what else a call asks for is the caller's part."""
    if dropout != 0.0:
        return "dropout"
    if mask is not None and not isinstance(mask, torch.Tensor):
        return "mask"
    float_mask = None if mask is None or mask.dtype == torch.bool else mask
    reason = "subclass" if k is None or v is None else tensors_objection(device, q, k, v, float_mask)
    if reason is not None:
        return reason
    if mask is not None and (reason := tensor_objection(mask, mask.dtype, device, q)) is not None:
        return "device" if reason == "device" else "mask"
    return _shape_objection(q, k, v)


def _shape_objection(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0]:
        return "shape"
    if 0 in q.shape or 0 in k.shape:
        return "zero_sized"
    if q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        return "shape"
    if any(t.stride(3) != 1 or 0 in t.stride()[:3] for t in (q, k, v)):
        return "strides"
    # One query row is laid out both ways: the cache decides.
    same = _layout(k) == _layout(v) and (q.shape[2] == 1 or _layout(q) == _layout(k))
    return None if same else "strides"


def _layout(t: torch.Tensor) -> str:
    """``bshd`` where the heads of one token lie together, as a projection leaves them; ``bhsd`` otherwise."""
    return "bshd" if t.stride(1) <= t.stride(2) else "bhsd"


def _align(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> int:
    """The class of q, k, v and the output, whose heads are d elements apart; the stride of a single row is none.

    A mask is read element by element: it counts only where its address is no element's.
    """
    elements = q.shape[3]
    bits = 0 if mask is None else mask.data_ptr() % mask.element_size()
    for t in (q, k, v):
        bits |= t.data_ptr()
        (n0, n1, n2, _), (s0, s1, s2, _) = t.shape, t.stride()
        elements |= (n0 > 1 and s0) | (n1 > 1 and s1) | (n2 > 1 and s2)
    return alignment(bits, elements * q.element_size())
