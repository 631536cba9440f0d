"""Serving ``silu_and_mul``: the functional form. No model is swapped: each writes its own gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dks.dispatch.ambient import is_compiling
from dks.dispatch.ops.silu_and_mul.torch_silu_and_mul import silu_and_mul
from dks.dispatch.ops.silu_and_mul.traced import SILU_AND_MUL
from dks.dispatch.problem import alignment
from dks.dispatch.runtime import Swap
from dks.dispatch.served import DTYPE_NAMES, Question, Server, tensors_objection
from dks.dispatch.traced import takes, wanted


class SiluAndMulServer(Server):
    """``NAME.silu_and_mul``."""

    op = "silu_and_mul"

    def call(self, x: torch.Tensor) -> torch.Tensor:
        """silu(x[..., :n]) * x[..., n:], for any dtype that the framework takes.

        Args:
            x: (..., 2n). Other than contiguous ones are the framework's.

        Returns:
            (..., n), of x's dtype.

        Raises:
            TypeError: x is no tensor.
            ValueError: its last dim is odd, or it has none.
        """
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"silu_and_mul: found x of {type(x).__name__}, expected a torch.Tensor")
        if x.dim() < 1 or x.shape[-1] % 2:
            raise ValueError(f"silu_and_mul: found x {tuple(x.shape)}, expected (..., 2n)")
        reason = "compiling" if is_compiling() else _objection(self.device, x)
        if reason is not None:
            if wanted(reason) and takes(x):
                y: torch.Tensor = SILU_AND_MUL(x, self.runtime.name)
                return y
            self.count(reason)
            return silu_and_mul(x)
        n = x.shape[-1] // 2

        def question() -> Question:
            return Question(self.op, "direct", {"dtype": DTYPE_NAMES[x.dtype]}, {"n": n})

        dispatch = self.direct((x.dtype, n), question, 0)
        align = alignment(n * x.element_size(), x.data_ptr())
        return dispatch.serve(silu_and_mul, align, (x.numel() // (2 * n),), x)

    def swap(self, _model: nn.Module) -> list[Swap]:
        """Nothing: torch has no module of it."""
        return []

    def passed_over(self, module: nn.Module) -> str | None:
        kind, held = type(module).__name__, {*module._modules}
        activations = [module._modules.get(name) or getattr(module, name, None) for name in _ACTIVATIONS]
        is_silu = any("silu" in _name_of(activation).lower() for activation in activations)
        if "SwiGLU" not in kind and not (is_silu and any(names <= held for names in _GATED)):
            return None
        return f"{kind} multiplies by its gate itself: {self.runtime.name}.silu_and_mul serves where it is called"


_ACTIVATIONS = ("act_fn", "act", "activation", "activation_fn", "silu")
_GATED = ({"gate_proj", "up_proj"}, {"gate_up_proj"}, {"w1", "w3"}, {"w12"}, {"wi_0", "wi_1"}, {"gate", "up"})
"""What gated MLPs call their activation, and the linears in front of it."""


def _name_of(activation: object) -> str:
    return getattr(activation, "__name__", type(activation).__name__)


def _objection(device: str, x: Any) -> str | None:
    if (reason := tensors_objection(device, x)) is not None:
        return reason
    if x.shape[-1] == 0:
        return "zero_sized"
    return None if x.is_contiguous() else "strides"
