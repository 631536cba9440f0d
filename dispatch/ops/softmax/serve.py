"""Serving ``softmax``: the functional form alone; a module in front of it would have nothing to prepare."""

from __future__ import annotations

import torch
from torch import nn

from dks.dispatch.ambient import is_compiling
from dks.dispatch.ops.softmax.traced import SOFTMAX
from dks.dispatch.problem import alignment
from dks.dispatch.runtime import Swap
from dks.dispatch.served import DTYPE_NAMES, Question, Server, tensors_objection
from dks.dispatch.traced import takes, wanted


class SoftmaxServer(Server):
    """``NAME.softmax``."""

    op = "softmax"

    def call(self, x: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``torch.softmax`` for any tensor that it takes; dispatches over the last dim.

        Args:
            x: (..., n).
            dim: what to sum over.
            dtype: what x is first converted to; the framework serves one that is not x's own.
        """

        def framework(x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x, dim, dtype)

        reason = "compiling" if is_compiling() else _objection(self.device, x, dim)
        if reason is None and dtype is not None and dtype is not x.dtype:
            reason = "dtype"
        if reason is not None:
            if wanted(reason) and dtype is None and takes(x) and type(dim) is int and -x.dim() <= dim < x.dim():
                y: torch.Tensor = SOFTMAX(x, dim, self.runtime.name)
                return y
            self.runtime.counters.add(self.op, reason)
            return framework(x)
        n = x.shape[-1]
        dispatch = self.direct((x.dtype,), lambda: self._question(x.dtype), 0)
        return dispatch.serve(framework, alignment(x.data_ptr()), (x.numel() // n, n), x)

    def _question(self, dtype: torch.dtype) -> Question:
        return Question(self.op, "direct", {"dtype": DTYPE_NAMES[dtype]}, {})

    def swap(self, model: nn.Module) -> list[Swap]:  # noqa: ARG002 - as the base has it
        """Nothing: a table serves the calls that ask it by name."""
        return []

    def passed_over(self, module: nn.Module) -> str | None:
        kind = type(module).__name__
        if not kind.endswith("Softmax") or kind.endswith("LogSoftmax") or any(module.children()):
            return None
        return f"{kind} holds nothing to prepare: {self.runtime.name}.softmax serves where it is called"


def _objection(device: str, x: torch.Tensor, dim: object) -> str | None:
    if (reason := tensors_objection(device, x)) is not None:
        return reason
    if x.dim() < 1:
        return "shape"
    if type(dim) is not int or dim not in (-1, x.dim() - 1):
        return "dim"
    if x.shape[-1] == 0:
        return "zero_sized"
    return None if x.is_contiguous() else "strides"
