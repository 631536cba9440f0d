"""Serving ``rotary``: the functional form. No model is swapped: each has its own rotation and caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dks.dispatch.ambient import grad_enabled, is_compiling, tensor_objection, wants_gradient
from dks.dispatch.indices import bounds, plain
from dks.dispatch.ops.rotary.torch_rotary import rotate
from dks.dispatch.ops.rotary.traced import ROTARY
from dks.dispatch.problem import alignment
from dks.dispatch.runtime import Swap
from dks.dispatch.served import DTYPE_NAMES, Question, Server, tensors_objection
from dks.dispatch.traced import lie_beside, takes, wanted

INTS = (torch.int32, torch.int64)

Pair = tuple[torch.Tensor, torch.Tensor]


class RotaryServer(Server):
    """``NAME.rotary``."""

    op = "rotary"

    def call(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
    ) -> Pair:
        """q and k, turned to their tokens' positions; the caches are not read elsewhere.

        Args:
            q: (tokens, h, d), d even: the pairs are i and i + d / 2. Tokens and heads may lie apart, as in the
                output of one projection; elements that do are the framework's.
            k: (tokens, hkv, d), likewise.
            cos: (positions, d / 2), of float32 or q's dtype; others are the framework's.
            sin: likewise, rows as far apart as those of cos: two halves of one cache will do.
            positions: (tokens,), int32 or int64: rows of the caches.

        Returns:
            (q_out, k_out), contiguous, of the shapes and dtypes of q and k.

        Raises:
            TypeError: an argument is no tensor, or positions hold no int32 or int64.
            ValueError: shapes that do not fit each other; a position that is not there. Under function
                transforms and on other devices values are not looked at; in a graph they are when it runs.
        """
        if not _fit(q, k, cos, sin, positions):
            raise _misfit(q, k, cos, sin, positions)
        reason = "compiling" if is_compiling() else _objection(self.device, q, k, cos, sin, positions)
        if reason is not None:
            if wanted(reason) and takes(q, k) and takes(cos, sin) and lie_beside(q, cos, positions):
                both: Pair = ROTARY(q, k, cos, sin, positions, self.runtime.name)
                return both
            self.count(reason)
            return rotate(q, k, cos, sin, positions)
        (tokens, h, d), hkv, size = q.shape, k.shape[1], q.element_size()
        rows = plain(positions)
        if rows.is_cpu:
            _check_values(rows, len(cos))

        def question() -> Question:
            cache = "float32" if cos.dtype is torch.float32 else "same"
            return Question(
                self.op, "direct", {"dtype": DTYPE_NAMES[q.dtype], "cache": cache}, {"h": h, "hkv": hkv, "d": d}
            )

        dispatch = self.direct((q.dtype, cos.dtype, h, hkv, d), question, 0)
        bits = d // 2 * size | q.data_ptr() | k.data_ptr() | cos.data_ptr() | sin.data_ptr()
        for t, heads in ((q, h), (k, hkv)):
            token, head, _ = t.stride()
            bits |= (token * size if tokens > 1 else 0) | (head * size if heads > 1 else 0)
        if len(cos) > 1:
            bits |= cos.stride(0) * cos.element_size()
        return dispatch.serve(rotate, alignment(bits), (tokens,), q, k, cos, sin, rows)

    def swap(self, _model: nn.Module) -> list[Swap]:
        """Nothing: torch has no module of it, and those of transformers come with a model's own conventions."""
        return []

    def passed_over(self, module: nn.Module) -> str | None:
        kind = type(module).__name__
        if any(module.children()) or not any(name in kind for name in ("Rotary", "RoPE", "Rope")):
            return None
        return f"{kind} keeps to its model's conventions: {self.runtime.name}.rotary serves where it is called"


def _fit(*args: Any) -> bool:
    """Whether these are tensors whose dtypes and shapes fit each other; ``_misfit`` says why not."""
    if not all([isinstance(t, torch.Tensor) for t in args]):  # noqa: C419 - a list is quicker than a generator
        return False
    queries, keys, rows, others, places = (t.shape for t in args)
    return (
        len(queries) == len(keys) == 3
        and len(rows) == 2
        and queries[0] == keys[0]
        and queries[2] == keys[2] == 2 * rows[1]
        and rows == others
        and places == queries[:1]
        and args[4].dtype in INTS
    )


def _misfit(*args: Any) -> Exception:
    """What is wrong with arguments that the framework could do nothing with."""
    for name, t in zip(("q", "k", "cos", "sin", "positions"), args, strict=True):
        if not isinstance(t, torch.Tensor):
            return TypeError(f"rotary: found {name} of {type(t).__name__}, expected a torch.Tensor")
        if name == "positions" and t.dtype not in INTS:
            return TypeError(f"rotary: found positions of {t.dtype}, expected torch.int32 or torch.int64")
    q, k, cos, sin, positions = (tuple(t.shape) for t in args)
    if len(q) != 3:
        said = f"found q {q}, expected (tokens, h, d)"
    elif q[2] % 2:
        said = f"found q {q}, expected an even d, its last dim"
    elif len(k) != 3 or (k[0], k[2]) != (q[0], q[2]):
        said = f"found k {k}, expected ({q[0]}, hkv, {q[2]}) beside q {q}"
    elif len(cos) != 2 or cos != sin or 2 * cos[1] != q[2]:
        said = f"found cos {cos}, sin {sin}, expected both (positions, {q[2] // 2})"
    else:
        said = f"found positions {positions}, expected ({q[0]},)"
    return ValueError(f"rotary: {said}")


def _objection(
    device: str, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> str | None:
    """Why the framework must serve these tensors, or None."""
    if (reason := tensors_objection(device, q, k)) is not None:
        return reason
    dtype = q.dtype if cos.dtype is q.dtype else torch.float32
    for t, expected in ((cos, dtype), (sin, dtype), (positions, positions.dtype)):
        if (reason := tensor_objection(t, expected, device, q)) is not None:
            return reason
    if grad_enabled() and wants_gradient(cos, sin):
        return "gradient"
    return _layout_objection(q, k, cos, sin)


def _layout_objection(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    if q.numel() == 0 or k.numel() == 0:
        return "zero_sized"
    whole = q.stride(2) == k.stride(2) == cos.stride(1) == sin.stride(1) == 1
    return None if whole and (cos.stride(0) == sin.stride(0) or len(cos) == 1) else "strides"


def _check_values(positions: torch.Tensor, rows: int) -> None:
    """Raises ValueError for a position that is not there."""
    low, high = bounds(positions)
    if low < 0 or high >= rows:
        found = low if low < 0 else high
        raise ValueError(
            f"rotary: found position {found}, expected 0 to {rows - 1}: the caches have {rows} positions"
        )
