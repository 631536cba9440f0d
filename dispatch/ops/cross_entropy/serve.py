"""Serving ``cross_entropy``: the functional form alone; a loss holds nothing that could be prepared."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dks.dispatch.ambient import is_compiling, tensor_objection
from dks.dispatch.indices import bounds, plain
from dks.dispatch.ops.cross_entropy.torch_cross_entropy import losses
from dks.dispatch.ops.cross_entropy.traced import CROSS_ENTROPY
from dks.dispatch.problem import alignment
from dks.dispatch.runtime import Swap
from dks.dispatch.served import DTYPE_NAMES, Question, Server, tensors_objection
from dks.dispatch.traced import lie_beside, takes, wanted

IGNORE = -100
REDUCTIONS = ("none", "mean", "sum")


class CrossEntropyServer(Server):
    """``NAME.cross_entropy``."""

    op = "cross_entropy"

    def call(
        self, logits: torch.Tensor, targets: torch.Tensor, ignore_index: int = IGNORE, reduction: str = "none"
    ) -> torch.Tensor:
        """``F.cross_entropy`` for any tensors that it takes; dispatches rows of logits with a target each.

        Args:
            logits: (m, n). Other shapes, and other than contiguous ones, are the framework's.
            targets: (m,) int64, columns of logits. Anything else is the framework's.
            ignore_index: the target of rows whose loss is 0 and which a mean leaves out.
            reduction: ``none``, ``mean`` or ``sum``.

        Returns:
            Losses (m,), or their mean or sum (), of logits' dtype.

        Raises:
            ValueError: another reduction.
            IndexError: a target is no column; on CPUs, as of the framework.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"cross_entropy: found reduction {reduction!r}, expected {', '.join(REDUCTIONS)}")

        def framework() -> torch.Tensor:
            return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)

        reason = "compiling" if is_compiling() else _objection(self.device, logits, targets, ignore_index)
        if reason is not None:
            if wanted(reason) and _traceable(logits, targets, ignore_index):
                y: torch.Tensor = CROSS_ENTROPY(logits, targets, ignore_index, self.runtime.name)
                return _reduced(y, targets, ignore_index, reduction)
            self.count(reason)
            return framework()
        m, n = logits.shape
        columns = plain(targets)
        if columns.is_cpu and not _are_columns(columns, n, ignore_index):
            return framework()  # which raises what it always raises

        def question() -> Question:
            return Question(self.op, "direct", {"dtype": DTYPE_NAMES[logits.dtype]}, {"n": n})

        dispatch = self.direct((logits.dtype, n), question, 0)
        align = alignment(n * logits.element_size(), logits.data_ptr())
        y = dispatch.serve(losses, align, (m,), logits, columns, ignore_index)
        return _reduced(y, columns, ignore_index, reduction)

    def swap(self, _model: nn.Module) -> list[Swap]:
        """Nothing: a table serves the calls that ask it by name."""
        return []

    def passed_over(self, module: nn.Module) -> str | None:
        kind = type(module).__name__
        if "CrossEntropy" not in kind:
            return None
        return f"{kind} holds nothing to prepare: {self.runtime.name}.cross_entropy serves where it is called"


def _objection(device: str, logits: Any, targets: Any, ignore_index: object) -> str | None:
    if (reason := tensors_objection(device, logits)) is not None:
        return reason
    if (reason := tensor_objection(targets, torch.int64, device, logits)) is not None:
        return reason
    if type(ignore_index) is not int:
        return "dtype"
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        return "shape"
    if logits.numel() == 0:
        return "zero_sized"
    return None if logits.is_contiguous() else "strides"


def _traceable(logits: torch.Tensor, targets: torch.Tensor, ignore_index: object) -> bool:
    """Whether a traced call belongs in the graph as the table's operator."""
    if not takes(logits) or not lie_beside(logits, targets) or not isinstance(ignore_index, int):
        return False
    return logits.dim() == 2 and targets.dtype == torch.int64 and tuple(targets.shape) == tuple(logits.shape[:1])


def _are_columns(targets: torch.Tensor, n: int, ignore_index: int) -> bool:
    """Whether all are columns, but for those that are ignored."""
    low, high = bounds(targets)
    if low >= 0 and high < n:
        return True
    wrong = ((targets < 0) | (targets >= n)) & (targets != ignore_index)
    return not bool(wrong.any())


def _reduced(y: torch.Tensor, targets: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    """Losses (m,) as the framework reduces them: a mean is over the targets that are not ignored, NaN of none."""
    if reduction == "none":
        return y
    total = y.sum(dtype=torch.float32)
    if reduction == "mean":
        total = total / (targets != ignore_index).sum()
    return total.to(y.dtype)
