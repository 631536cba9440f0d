"""Walking a model and putting prepared layers in the place of the framework's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dks.dispatch.prepared import PreparedModule
from dks.dispatch.runtime import Swap
from dks.dispatch.served import Server


def children(model: nn.Module) -> list[tuple[nn.Module, str, str, nn.Module]]:
    """(parent, name, dotted path, child) of every child in ``model``; a shared one comes once a name."""
    return [
        (parent, name, join(path, name), child)
        for path, parent in model.named_modules()
        for name, child in parent._modules.items()
        if child is not None
    ]


def join(path: str, name: str) -> str:
    """The dotted path of a child module."""
    return f"{path}.{name}" if path else name


def attachment_note(module: nn.Module) -> str | None:
    """What a user put on ``module`` that a swap would drop, or None."""
    if any(held for name, held in module.__dict__.items() if name.endswith("_hooks")):
        return "has hooks, which a swap would drop"
    if "forward" in module.__dict__:
        return "has a forward of its own, which a swap would drop"
    return None if module._compiled_call_impl is None else "is compiled"


def swap_note(module: nn.Module, parameters: Sequence[str] = ("weight", "bias")) -> str | None:
    """Why a layer must stay as it is: what a user attached, or state beyond ``parameters``; or None."""
    extra = module._modules or module._buffers or set(module._parameters) != set(parameters)
    held = "holds more than a " + " and a ".join(parameters)
    return attachment_note(module) or (held if extra else None)


def replace(parent: nn.Module, name: str, old: nn.Module, new: PreparedModule) -> None:
    """Put ``new`` where ``old`` is, with what else ``old`` carries: its mode and a user's attributes."""
    for key, value in old.__dict__.items():
        new.__dict__.setdefault(key, value)
    setattr(parent, name, new.train(old.training))


def bind_again(server: Server, path: str, layer: PreparedModule) -> list[Swap]:
    """Bind ``layer`` to its parameters as they are now, if it is this server's and they changed."""
    if layer.server is not server or not layer.stale:
        return []
    layer.refresh()
    return [Swap(path, server.op, layer.bound, f"bound again: {layer.describe()}")]
