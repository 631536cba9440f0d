"""Serving ``linear``: the functional form, the prepared layer, and the swap inside a model."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from dks.dispatch.ops.linear.epilogue import EPILOGUES
from dks.dispatch.problem import alignment
from dks.dispatch.runtime import Plan, Swap
from dks.dispatch.served import (
    DTYPE_NAMES,
    Dispatch,
    PreparedModule,
    Server,
    hooks_note,
    join,
    parameter_objection,
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
        """
        run = None
        reason = tensors_objection(x, weight, bias) or _shape_objection(x, weight, bias)
        if reason is None:
            plan = self.plan("direct", weight, bias, epilogue)
            n, k = weight.shape
            size = x.element_size()
            addresses = (x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr())
            # Direct kernels use the caller's tensors as they are: binding them copies nothing.
            dispatch = Dispatch(self.runtime, plan, plan.bind(weight, bias))
            run = dispatch.choose(alignment(k * size, n * size, *addresses), x.numel() // k)
        else:
            self.runtime.counters.add(self.op, reason)
        return self.dispatch_or(run, lambda: EPILOGUES[epilogue](F.linear(x, weight, bias)), x)

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
        if epilogue not in EPILOGUES:
            raise ValueError(f"epilogue: found {epilogue!r}, expected one of {', '.join(EPILOGUES)}")
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            found = f"weight {tuple(weight.shape)}, bias {None if bias is None else tuple(bias.shape)}"
            raise ValueError(f"prepare_linear: found {found}, expected (n, k) and (n,)")
        return PreparedLinear(self, weight, bias, epilogue)

    def swap(self, model: nn.Module) -> list[Swap]:
        """Swap every ``nn.Linear`` the table makes faster; an activation right behind it is fused."""
        swaps: list[Swap] = []
        for path, parent in list(model.named_modules()):
            swaps += self._swap_pair(path, parent)
        for path, parent in list(model.named_modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:  # a subclass means something by being one
                    swaps.append(self._swap_one(parent, path, name, child))
        return swaps

    def _swap_pair(self, path: str, parent: nn.Module) -> list[Swap]:
        found = linear_then_activation(parent)
        if found is None:
            return []
        name, linear, activation, epilogue = found
        layer = PreparedLinear(self, linear.weight, linear.bias, epilogue)
        if not layer.worthwhile:
            return []
        setattr(parent, name, layer.train(linear.training))
        setattr(parent, activation, nn.Identity())
        return [Swap(join(path, name), self.op, True, layer.describe())]

    def _swap_one(self, parent: nn.Module, path: str, name: str, linear: nn.Linear) -> Swap:
        where = join(path, name)
        note = hooks_note(linear) or parameter_objection(linear.weight, linear.bias)
        if note is not None:
            return Swap(where, self.op, False, note)
        plan = self.plan("prepared", linear.weight, linear.bias, "none")
        shape = f"n={linear.out_features} k={linear.in_features} {linear.weight.dtype}"
        if plan.find is None:
            return Swap(where, self.op, False, f"{shape} is not in the table")
        if not plan.changes_anything:
            return Swap(where, self.op, False, f"{shape}: the framework's own kernel is the choice everywhere")
        layer = PreparedLinear(self, linear.weight, linear.bias, "none")
        setattr(parent, name, layer.train(linear.training))
        return Swap(where, self.op, True, layer.describe())


class PreparedLinear(PreparedModule):
    """layer(x (..., k)) -> (..., n). Made by ``prepare_linear``; see ``PreparedModule``."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    _server: LinearServer

    def __init__(
        self, server: LinearServer, weight: torch.Tensor, bias: torch.Tensor | None, epilogue: str
    ) -> None:
        self.__dict__["epilogue"] = epilogue  # before the base binds, which needs it
        self.__dict__["features"] = weight.shape[1]
        super().__init__(server, weight, bias)

    @property
    def worthwhile(self) -> bool:
        """Whether the table chose another kernel than the framework's own for some size."""
        return self._dispatch is not None and self._dispatch.plan.changes_anything

    def plan(self, weight: nn.Parameter | None, bias: nn.Parameter | None) -> Plan | None:
        assert weight is not None
        if parameter_objection(weight, bias) or 0 in weight.shape:
            return None
        return self._server.plan("prepared", weight, bias, self.epilogue)

    def row_bytes(self) -> int:
        n, k = self.weight.shape
        return (n | k) * self.weight.element_size()

    def framework(self, x: torch.Tensor) -> torch.Tensor:
        return EPILOGUES[self.epilogue](F.linear(x, self.weight, self.bias))

    def extra_repr(self) -> str:
        fused = "" if self.epilogue == "none" else f" {self.epilogue}"
        return f"n={self.weight.shape[0]} k={self.features}{fused}"


def _shape_objection(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        return "shape"
    if bias is not None and bias.shape != weight.shape[:1]:
        return "shape"
    if not (x.is_contiguous() and weight.is_contiguous() and (bias is None or bias.is_contiguous())):
        return "strides"
    return "zero_sized" if 0 in weight.shape else None


def linear_then_activation(parent: nn.Module) -> tuple[str, nn.Linear, str, str] | None:
    """(linear's name, linear, activation's name, epilogue) of a module that is one after the other, or None.

    Found by behaviour, not by name: the activation must equal one of the epilogues on a grid of values, and
    the module must return, bit for bit, what the two do in turn.
    """
    children = list(parent.named_children())
    if len(children) != 2 or type(children[0][1]) is not nn.Linear:
        return None
    (name, linear), (act_name, activation) = children
    if next(itertools.chain(activation.parameters(), activation.buffers()), None) is not None:
        return None
    if parameter_objection(linear.weight, linear.bias) or any(map(hooks_note, (parent, linear, activation))):
        return None
    try:
        with torch.no_grad():
            grid = torch.linspace(-8.0, 8.0, 1024)
            seen = activation(grid.clone())
            epilogue = next((e for e, f in EPILOGUES.items() if torch.equal(f(grid), seen)), "none")
            x = torch.linspace(-1.0, 1.0, 2 * linear.in_features, dtype=linear.weight.dtype)
            x = x.view(2, linear.in_features)
            if epilogue == "none" or not torch.equal(parent(x), activation(linear(x))):
                return None
    except Exception:  # whatever a stranger's module raises on such input, it is then no such pair
        return None
    return name, linear, act_name, epilogue
