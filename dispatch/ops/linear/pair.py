"""Finding a linear and the activation behind it, to fuse the two."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dks.dispatch.disguise import disguise_note
from dks.dispatch.ops.linear.epilogue import ACTIVATIONS
from dks.dispatch.ops.linear.layers import Pair, PairedLinear
from dks.dispatch.prepared import parameter_note
from dks.dispatch.swap import attachment_note, patched_note, swap_note


def linear_note(linear: nn.Linear, device: str) -> str | None:
    """Why a linear must stay as it is under a table for this kind of device, or None."""
    note = patched_note(nn.Linear) or swap_note(linear, kind=PairedLinear)
    note = note or parameter_note(device, linear.weight, linear.bias)
    return note or ("shape" if linear.weight.dim() != 2 else None)


class LinearAndActivation(NamedTuple):
    """What a module was found to be; ``name``: the linear's, among its children."""

    name: str
    linear: nn.Linear
    activation: nn.Module
    epilogue: str


def linear_then_activation(parent: nn.Module, device: str = "cpu") -> LinearAndActivation | None:
    """What a module calls that is no more than one after the other, or None.

    Found by behaviour, not by name: the activation must equal one of ACTIVATIONS on a grid of values, and
    the module must call what the two call in turn, and return the same, in training and in evaluation. What
    that can't show is ruled out by form: the module has nothing else that could matter, now or later.
    """
    held = list(parent._modules.items())
    if len(held) != 2 or not _only_forwards(parent) or disguise_note(parent, Pair) is not None:
        return None
    (name, linear), (_, activation) = held
    if type(linear) is not nn.Linear or linear_note(linear, device) is not None:
        return None
    if activation is None or attachment_note(activation) is not None or _holds_anything(activation):
        return None
    modes = [(module, module.training) for module in parent.modules()]
    try:
        drawing = [linear.weight.device] if linear.weight.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices=drawing):
            epilogue = _epilogue_of(activation)
            is_pair = all(_equal(parent.train(mode), linear, activation) for mode in (True, False))
    except Exception:  # whatever a stranger's module raises on such input, it is then no such pair
        return None
    finally:
        for module, training in modes:
            module.training = training
    return LinearAndActivation(name, linear, activation, epilogue) if epilogue is not None and is_pair else None


def _only_forwards(parent: nn.Module) -> bool:
    """Whether ``parent`` has no state of its own, and one method of one argument that uses its children."""
    if attachment_note(parent) is not None or parent._parameters or parent._buffers:
        return False
    own = (value for name, value in vars(parent).items() if name != "training" and not name.startswith("_"))
    if any(isinstance(value, (bool, int, float, torch.Tensor)) for value in own):
        return False
    kind = type(parent)
    if kind is nn.Sequential:
        return True
    methods = {name for name, value in vars(kind).items() if callable(value) or isinstance(value, property)}
    if kind.__bases__ != (nn.Module,) or not methods <= {"__init__", "forward"}:
        return False
    return len(inspect.signature(parent.forward).parameters) == 1


def _holds_anything(module: nn.Module) -> bool:
    """Whether it has state or children, which may change later."""
    return bool(module._parameters or module._buffers or module._modules)


def _epilogue_of(activation: nn.Module) -> str | None:
    """The name in ACTIVATIONS of what equals ``activation`` from the smallest to the largest float32, or None."""
    tail = torch.logspace(-38.0, 38.0, 512, dtype=torch.float32, device="cpu")
    middle = torch.linspace(-16.0, 16.0, 2049, dtype=torch.float32, device="cpu")
    grid = torch.cat((middle, tail, -tail))
    seen = activation(grid.clone())
    return next((e for e, f in ACTIVATIONS.items() if e != "none" and torch.equal(f(grid), seen)), None)


def _equal(parent: nn.Module, linear: nn.Linear, activation: nn.Module) -> bool:
    """Whether ``parent`` calls just what the two in turn call, and returns what they return."""
    weight = linear.weight
    k = weight.shape[1]
    x = torch.linspace(-1.0, 1.0, 2 * k, dtype=weight.dtype, device=weight.device).view(2, k)
    with _Calls() as of_parent:
        found = parent(x)
    with _Calls() as of_pair:
        wanted = activation(linear(x))
    return of_parent.seen == of_pair.seen and torch.equal(found, wanted)


class _Calls(TorchFunctionMode):
    """Notes every function of torch that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))
