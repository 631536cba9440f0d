"""Modules that multiply by a weight and are no ``nn.Linear``, for the report of ``optimize``."""

from __future__ import annotations

import re

from torch import nn

_NAMED = re.compile(r"(?<!Non)(?<!Bi)Linear(?!Attention)")
_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def other_linear(module: nn.Module) -> str | None:
    """Why a module that is, or holds, a linear of another kind is left as it is; None of any other module."""
    kind = type(module)
    if isinstance(module, nn.Linear):
        return f"{kind.__name__} is a subclass, and means something by being one" if kind is not nn.Linear else None
    if isinstance(module, _WHOLE):
        # Each has a path on which one function of torch's reads the weights of what is inside.
        return f"{kind.__name__} may multiply by its weights itself, past the modules in it"
    weight = module._parameters.get("weight")
    if kind.__name__ == "Conv1D" and weight is not None and weight.dim() == 2:
        return "Conv1D holds its weight as (k, n), expected an nn.Linear: prepare_linear takes weight.T"
    if _NAMED.search(kind.__name__) and not any(module.children()):
        return f"{kind.__name__} is a class of its own, expected nn.Linear"
    return None
