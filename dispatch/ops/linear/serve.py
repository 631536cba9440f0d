"""Serving ``linear``: the functional form, the prepared layer, and the swap inside a model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from dks.dispatch.ambient import is_compiling
from dks.dispatch.ops.linear.epilogue import EPILOGUES
from dks.dispatch.problem import alignment
from dks.dispatch.runtime import Plan, Swap
from dks.dispatch.served import (
    DTYPE_NAMES,
    PreparedModule,
    Server,
    attachment_note,
    children,
    join,
    parameter_objection,
    replace,
    swap_note,
    tensors_objection,
)


class LinearServer(Server):
    """``NAME.linear``, ``NAME.prepare_linear`` and the swap of ``nn.Linear``."""

    op = "linear"

    def call(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, epilogue: str = "none"
    ) -> torch.Tensor:
        """y = epilogue(x @ weight.T + bias) for any tensors that ``F.linear`` takes.

        Args:
            x: (..., k).
            weight: (n, k), used as it is; ``prepare`` packs it and is faster.
            bias: (n,) or None.
            epilogue: none, relu, gelu, gelu_tanh or silu.

        Returns:
            (..., n), as the framework would: same errors, same autograd.

        Raises:
            ValueError: an unknown epilogue.
        """
        _check_epilogue(epilogue)

        def framework(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return EPILOGUES[epilogue](F.linear(x, weight, bias))

        reason = "compiling" if is_compiling() else _objection(x, weight, bias)
        if reason is not None:
            self.runtime.counters.add(self.op, reason)
            return framework(x, weight, bias)
        n, k = weight.shape
        dispatch = self.direct(
            (x.dtype, bias is None, epilogue, n, k), lambda: self.plan("direct", weight, bias, epilogue), 2
        )
        bits = (k | n) * x.element_size() | x.data_ptr() | weight.data_ptr()
        align = alignment(bits if bias is None else bits | bias.data_ptr())
        return dispatch.serve(framework, align, (x.numel() // k,), x, weight, bias)

    def plan(self, form: str, weight: torch.Tensor, bias: torch.Tensor | None, epilogue: str) -> Plan:
        """The table's plan for this weight."""
        traits = {
            "dtype": DTYPE_NAMES[weight.dtype],
            "bias": "no" if bias is None else "yes",
            "epilogue": epilogue,
        }
        return self.runtime.plan(self.op, form, traits, {"n": weight.shape[0], "k": weight.shape[1]})

    def prepare(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, epilogue: str = "none"
    ) -> PreparedLinear:
        """Pack a weight once for every kernel the table may choose.

        Args:
            weight: (n, k); kept, so that the framework can serve what the table can't.
            bias: (n,) or None.
            epilogue: none, relu, gelu, gelu_tanh or silu.

        Returns:
            A module: layer(x (..., k)) -> (..., n).

        Raises:
            ValueError: an unknown epilogue, or shapes that no linear has.
        """
        _check_epilogue(epilogue)
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            found = f"weight {tuple(weight.shape)}, bias {None if bias is None else tuple(bias.shape)}"
            raise ValueError(f"prepare_linear: found {found}, expected (n, k) and (n,)")
        return PreparedLinear(self, weight, bias, epilogue)

    def swap(self, model: nn.Module) -> list[Swap]:
        """Swap every ``nn.Linear`` the table makes faster; an activation right behind it is fused."""
        if type(model) is nn.Linear:
            return [Swap("", self.op, False, "nothing holds the model itself: use prepare_linear")]
        swaps: list[Swap] = []
        for path, parent in list(model.named_modules()):
            swaps += self._swap_pair(path, parent)
        made: dict[nn.Module, PreparedLinear] = {}  # one layer under two names stays one layer
        for parent, name, where, child in children(model):
            if isinstance(child, PreparedLinear):
                swaps += self.bind_again(where, child)
            # Any other subclass means something by being one.
            elif type(child) is nn.Linear or type(child) is ActivatedLinear:
                swaps.append(self._swap_one(parent, where, name, child, made))
        return swaps

    def _swap_pair(self, path: str, parent: nn.Module) -> list[Swap]:
        found = linear_then_activation(parent)
        if found is None:
            return []
        name, linear, activation, epilogue = found
        plan = self.plan("prepared", linear.weight, linear.bias, epilogue)
        if not plan.changes_anything:
            return []
        layer = PreparedLinear(self, linear.weight, linear.bias, epilogue)
        if not layer.gains:
            return []
        replace(parent, name, linear, layer)
        setattr(parent, activation, nn.Identity())
        return [Swap(join(path, name), self.op, True, layer.describe())]

    def _swap_one(
        self,
        parent: nn.Module,
        where: str,
        name: str,
        linear: nn.Linear,
        made: dict[nn.Module, PreparedLinear],
    ) -> Swap:
        note = _swap_note(linear)
        if note is not None:
            return Swap(where, self.op, False, note)
        layer = made.get(linear)
        if layer is None:
            epilogue = linear.epilogue if isinstance(linear, ActivatedLinear) else "none"
            plan = self.plan("prepared", linear.weight, linear.bias, epilogue)
            shape = f"n={linear.weight.shape[0]} k={linear.weight.shape[1]} {linear.weight.dtype}"
            if plan.find is None:
                return Swap(where, self.op, False, f"{shape} is not in the table")
            if not plan.changes_anything:
                note = f"{shape}: the framework's own kernel is the choice everywhere"
                return Swap(where, self.op, False, note)
            layer = PreparedLinear(self, linear.weight, linear.bias, epilogue)
            if not layer.gains:
                return Swap(where, self.op, False, f"{shape}: the chosen kernels could not be bound")
            made[linear] = layer
        replace(parent, name, linear, layer)
        return Swap(where, self.op, True, layer.describe())


class PreparedLinear(PreparedModule):
    """layer(x (..., k)) -> (..., n). Made by ``prepare_linear``; see ``PreparedModule``."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    epilogue: str
    _server: LinearServer

    def __init__(
        self, server: LinearServer, weight: torch.Tensor, bias: torch.Tensor | None, epilogue: str
    ) -> None:
        self.__dict__["epilogue"] = epilogue  # before the base binds, which needs it
        self.__dict__["features"] = weight.shape[1]
        super().__init__(server, weight, bias)

    def plan(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Plan:
        return self._server.plan("prepared", weight, bias, self.epilogue)

    def row_bytes(self) -> int:
        n, k = self.weight.shape
        return (n | k) * self.weight.element_size()

    def framework(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.epilogue == "none" else EPILOGUES[self.epilogue](y)

    def plain(self) -> nn.Linear:
        kind = nn.Linear if self.epilogue == "none" else ActivatedLinear
        layer = kind.__new__(kind)
        n, k = self.weight.shape
        layer.__dict__.update(self._attributes() | {"in_features": k, "out_features": n})
        return layer

    def extra_repr(self) -> str:
        fused = "" if self.epilogue == "none" else f" {self.epilogue}"
        return f"n={self.weight.shape[0]} k={self.features}{fused}"


class ActivatedLinear(nn.Linear):
    """A linear and its epilogue, as the framework computes them: what a fused layer is once it is pickled."""

    epilogue: str

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input (..., k) -> (..., n)."""
        return EPILOGUES[self.epilogue](super().forward(input))


def _check_epilogue(epilogue: str) -> None:
    if epilogue not in EPILOGUES:
        raise ValueError(f"epilogue: found {epilogue!r}, expected one of {', '.join(EPILOGUES)}")


def _objection(x: Any, weight: Any, bias: Any) -> str | None:
    if not isinstance(weight, torch.Tensor):
        return "subclass"
    if (reason := tensors_objection(x, weight, bias)) is not None:
        return reason
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        return "shape"
    if bias is not None and bias.shape != weight.shape[:1]:
        return "shape"
    if not (x.is_contiguous() and weight.is_contiguous() and (bias is None or bias.is_contiguous())):
        return "strides"
    return "zero_sized" if 0 in weight.shape else None


def _swap_note(linear: nn.Linear) -> str | None:
    note = swap_note(linear) or parameter_objection(linear.weight, linear.bias)
    return note or ("shape" if linear.weight.dim() != 2 else None)


def linear_then_activation(parent: nn.Module) -> tuple[str, nn.Linear, str, str] | None:
    """(linear's name, linear, activation's name, epilogue) of a module that is one after the other, or None.

    Found by behaviour, not by name: the activation must equal one of the epilogues on a grid of values, and
    the module must call what the two call in turn, and return the same, in training and in evaluation. What
    that can't show is ruled out by form: the module has nothing else that could matter, now or later.
    """
    held = list(parent._modules.items())
    if len(held) != 2 or not _only_forwards(parent):
        return None
    (name, linear), (act_name, activation) = held
    if type(linear) is not nn.Linear or _swap_note(linear) is not None:
        return None
    if activation is None or attachment_note(activation) is not None or _holds_tensors(activation):
        return None
    modes = [(module, module.training) for module in parent.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            epilogue = _epilogue_of(activation)
            is_pair = all(_equal(parent.train(mode), linear, activation) for mode in (True, False))
    except Exception:  # whatever a stranger's module raises on such input, it is then no such pair
        return None
    finally:
        for module, training in modes:
            module.training = training
    return (name, linear, act_name, epilogue) if epilogue is not None and is_pair else None


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


def _holds_tensors(module: nn.Module) -> bool:
    return bool([*module.parameters(), *module.buffers()])


def _epilogue_of(activation: nn.Module) -> str | None:
    """The epilogue that equals ``activation`` from the smallest to the largest float32, or None."""
    tail = torch.logspace(-38.0, 38.0, 512, dtype=torch.float32, device="cpu")
    middle = torch.linspace(-16.0, 16.0, 2049, dtype=torch.float32, device="cpu")
    grid = torch.cat((middle, tail, -tail))
    seen = activation(grid.clone())
    return next((e for e, f in EPILOGUES.items() if e != "none" and torch.equal(f(grid), seen)), None)


def _equal(parent: nn.Module, linear: nn.Linear, activation: nn.Module) -> bool:
    """Whether ``parent`` calls just what the two in turn call, and returns what they return."""
    k = linear.weight.shape[1]
    x = torch.linspace(-1.0, 1.0, 2 * k, dtype=linear.weight.dtype, device="cpu").view(2, k)
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
