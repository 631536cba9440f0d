"""Walking a model to let its layers serve, and to make them plain again."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn

from dks.dispatch.disguise import disguise_note
from dks.dispatch.prepared import PreparedModule
from dks.dispatch.runtime import Swap
from dks.dispatch.served import Server


def places(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(dotted path, module) of ``model``, whose path is empty, and of all in it; a shared one comes once a name."""
    below = [
        (join(path, name), child)
        for path, parent in model.named_modules()
        for name, child in parent._modules.items()
        if child is not None
    ]
    return [("", model), *below]


def join(path: str, name: str) -> str:
    """The dotted path of a child module."""
    return f"{path}.{name}" if path else name


def attachment_note(module: nn.Module) -> str | None:
    """What a user put on ``module`` that leaves no short cut past it, or None."""
    if any(held for name, held in module.__dict__.items() if name.endswith("_hooks")):
        return "has hooks, which every call must run"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    return None if module._compiled_call_impl is None else "is compiled"


def patched_note(kind: type[nn.Module]) -> str | None:
    """What was put in the place of ``forward`` of a class of PyTorch's, for all of its modules, or None."""
    if getattr(kind.forward, "__globals__", None) is vars(sys.modules[kind.__module__]):
        return None
    return f"{kind.__name__}.forward was replaced, expected PyTorch's own"


def swap_note(
    module: nn.Module,
    parameters: Sequence[str] = ("weight", "bias"),
    kind: type[PreparedModule] = PreparedModule,
) -> str | None:
    """Why a layer must stay as it is, or None: what a user attached, state beyond ``parameters``, or a name that
    a ``kind`` needs."""
    extra = module._modules or module._buffers or set(module._parameters) != set(parameters)
    held = "holds more than a " + " and a ".join(parameters)
    return attachment_note(module) or (held if extra else disguise_note(module, kind))


def bind_again(server: Server, path: str, layer: PreparedModule) -> dict[nn.Module, Swap]:
    """Bind ``layer`` to its parameters as they are now, if it is this server's and they changed; that of another
    table is named and left."""
    if layer.server is not server:
        note = f"is served by the table {layer.server.runtime.name!r} already"
        return {layer: Swap(path, server.op, False, note)} if layer.server.op == server.op else {}
    if not layer.stale:
        return {}
    layer.refresh()
    return {layer: Swap(path, server.op, layer.bound, f"bound again: {layer.describe()}")}


def restore_layers(server: Server, found: Sequence[tuple[str, nn.Module]]) -> list[Swap]:
    """Make the layers plain again that serve by ``server``, in place."""
    held = [(path, m) for path, m in found if isinstance(m, PreparedModule) and m.server is server]
    for _, module in held:
        if isinstance(module, PreparedModule):  # it may have two names
            module.restore()
    return [_restored(server, path, module) for path, module in held]


def _restored(server: Server, path: str, module: nn.Module) -> Swap:
    if isinstance(module, PreparedModule):
        return Swap(path, server.op, False, f"{module.label()}: no layer of the framework's computes this")
    return Swap(path, server.op, True, f"{type(module).__name__} again")
