"""Serving ``paged_attention``: the functional form. No model is swapped: who pages a cache calls it himself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dks.dispatch.ambient import is_compiling, tensor_objection, transform_objection
from dks.dispatch.ops.paged_attention.gather import attend
from dks.dispatch.ops.paged_attention.traced import PAGED_ATTENTION
from dks.dispatch.problem import alignment
from dks.dispatch.runtime import Swap
from dks.dispatch.served import DTYPE_NAMES, Question, Server, tensors_objection
from dks.dispatch.traced import lie_beside, takes, wanted

INTS = (torch.int32, torch.int64)


class PagedAttentionServer(Server):
    """``NAME.paged_attention``."""

    op = "paged_attention"

    def call(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        lengths: torch.Tensor,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attention of one query row a sequence over a paged cache.

        Args:
            q: (b, h, d).
            k_cache: (pages, page, hkv, d), likewise v_cache; hkv divides h. Other than contiguous ones are the
                framework's.
            block_table: (b, max_pages), int32 or int64: indices of the pages of each sequence, in order; what
                lies past a sequence's end is not read.
            lengths: (b,), int32 or int64: keys of each sequence, 1 to max_pages * page.
            scale: None means 1 / sqrt(d).

        Returns:
            (b, h, d), of q's dtype.

        Raises:
            TypeError: an argument is no tensor, or block_table or lengths hold no int32 or int64.
            ValueError: shapes that do not fit each other, a length or a page that is not there. Under
                function transforms and on a GPU, values are not looked at: that would wait for all that was
                queued before. In a graph on a CPU they are when it runs.

        A table is asked with the longest of the lengths; on a GPU, where that is not known here, with as many
        keys as a row of ``block_table`` has room for.
        """
        if not _fit(q, k_cache, v_cache, block_table, lengths):
            raise _misfit(q, k_cache, v_cache, block_table, lengths)
        b, h, d = q.shape
        _, page, hkv, _ = k_cache.shape
        if q.numel() == 0:
            self.count("zero_sized")
            return q.clone()
        given = (q, k_cache, v_cache, block_table, lengths)
        reason = "compiling" if is_compiling() else _objection(self.device, *given)
        traces = reason is not None and wanted(reason) and takes(q, k_cache, v_cache)
        if traces and lie_beside(q, block_table, lengths):
            y: torch.Tensor = PAGED_ATTENTION(q, k_cache, v_cache, block_table, lengths, scale, self.runtime.name)
            return y
        readable = _are_readable(block_table, lengths) if reason is not None else lengths.is_cpu
        room = (0, block_table.shape[1] * page)
        bounds = _check_values(k_cache, block_table, lengths) if readable else room

        def framework(*_: Any) -> torch.Tensor:
            return attend(q, k_cache, v_cache, block_table, lengths, scale, bounds)

        if reason is not None:
            self.count(reason)
            return framework()

        def question() -> Question:
            statics = {"h": h, "hkv": hkv, "d": d, "page": page}
            return Question(self.op, "direct", {"dtype": DTYPE_NAMES[q.dtype]}, statics)

        dispatch = self.direct((q.dtype, h, hkv, d, page), question, 0)
        # These are small: kernels see one form of them. The class covers q, the caches and the output.
        rows = q.contiguous()
        table, counts = _plain(block_table), _plain(lengths)
        align = alignment(rows.data_ptr() | k_cache.data_ptr() | v_cache.data_ptr() | d * q.element_size())
        return dispatch.serve(framework, align, (b, bounds[1]), rows, k_cache, v_cache, table, counts, scale)

    def swap(self, _model: nn.Module) -> list[Swap]:
        """Nothing: no module of torch or transformers has a paged cache."""
        return []


def _plain(t: torch.Tensor) -> torch.Tensor:
    """As int32 in one piece, at an address of whole elements."""
    if t.dtype is torch.int32 and t.is_contiguous() and t.data_ptr() % 4 == 0:
        return t
    return t.to(torch.int32, memory_format=torch.contiguous_format, copy=True)


def _fit(*args: Any) -> bool:
    """Whether these are tensors whose dtypes and shapes fit each other; ``_misfit`` says why not."""
    if not all([isinstance(t, torch.Tensor) for t in args]):  # noqa: C419 - a list is quicker than a generator
        return False
    q, k_cache, v_cache, block_table, lengths = args
    query, keys, table = q.shape, k_cache.shape, block_table.shape
    return (
        len(query) == 3
        and len(keys) == 4
        and keys == v_cache.shape
        and keys[3] == query[2]
        and keys[2] > 0
        and query[1] % keys[2] == 0
        and len(table) == 2
        and table[0] == query[0]
        and lengths.shape == query[:1]
        and block_table.dtype in INTS
        and lengths.dtype in INTS
    )


def _misfit(*args: Any) -> Exception:
    """What is wrong with arguments that the framework could do nothing with."""
    names = ("q", "k_cache", "v_cache", "block_table", "lengths")
    for name, t in zip(names, args, strict=True):
        if not isinstance(t, torch.Tensor):
            return TypeError(f"paged_attention: found {name} of {type(t).__name__}, expected a torch.Tensor")
        if name in ("block_table", "lengths") and t.dtype not in INTS:
            return TypeError(f"paged_attention: found {name} of {t.dtype}, expected torch.int32 or torch.int64")
    q, keys, values, table, counts = (tuple(t.shape) for t in args)
    if len(q) != 3:
        said = f"found q {q}, expected (b, h, d)"
    elif len(keys) != 4 or keys != values:
        said = f"found k_cache {keys}, v_cache {values}, expected both (pages, page, hkv, d)"
    elif keys[3] != q[2]:
        said = f"found q {q}, k_cache {keys}, expected one d, their last dim"
    elif keys[2] == 0 or q[1] % keys[2]:
        said = f"found {q[1]} heads and {keys[2]} key heads, expected a multiple"
    elif len(table) != 2 or table[0] != q[0]:
        said = f"found block_table {table}, expected ({q[0]}, max_pages)"
    else:
        said = f"found lengths {counts}, expected ({q[0]},)"
    return ValueError(f"paged_attention: {said}")


def _objection(
    device: str, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *ints: torch.Tensor
) -> str | None:
    """Why the framework must serve these tensors, or None."""
    if (reason := tensors_objection(device, q, k_cache, v_cache)) is not None:
        return reason
    for t in ints:
        if (reason := tensor_objection(t, t.dtype, device, q)) is not None:
            return reason
    return None if k_cache.is_contiguous() and v_cache.is_contiguous() else "strides"


def _are_readable(*ints: torch.Tensor) -> bool:
    """Whether the values of these can be looked at here and now."""
    if is_compiling() or transform_objection() is not None:
        return False
    return all(tensor_objection(t, t.dtype, "cpu") is None for t in ints)


def _check_values(k_cache: torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor) -> tuple[int, int]:
    """The shortest and the longest length. Raises ValueError for a length or a page that is not there."""
    pages, page = k_cache.shape[:2]
    counts = lengths.tolist()  # in Python: operators on so few numbers take longer
    shortest, longest = min(counts), max(counts)
    room = block_table.shape[1] * page
    if shortest < 1 or longest > room:
        found = shortest if shortest < 1 else longest
        raise ValueError(
            f"paged_attention: found {found} in lengths, expected 1 to {room}: block_table has room for "
            f"{block_table.shape[1]} pages of {page} a sequence"
        )
    for row, count in zip(block_table[:, : -(-longest // page)].tolist(), counts, strict=True):
        used = row[: -(-count // page)]
        lowest, highest = min(used), max(used)
        if lowest < 0 or highest >= pages:
            found = lowest if lowest < 0 else highest
            raise ValueError(
                f"paged_attention: found page {found} in block_table, before the end of its sequence; the cache "
                f"has {pages} pages, expected 0 to {pages - 1}"
            )
    return shortest, longest
