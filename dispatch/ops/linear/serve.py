"""Serving ``linear``: the functional form, the prepared layer, and the swap inside a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dks.dispatch import native
from dks.dispatch.ambient import is_compiling
from dks.dispatch.generation import Generation
from dks.dispatch.kernel import DTYPES
from dks.dispatch.modes import EAGER
from dks.dispatch.ops.linear.epilogue import ACTIVATIONS, EPILOGUES, finish
from dks.dispatch.ops.linear.layers import Pair, PreparedLinear, fuse, made_linear, unpair
from dks.dispatch.ops.linear.others import other_linear
from dks.dispatch.ops.linear.pair import LinearAndActivation, linear_note, linear_then_activation
from dks.dispatch.ops.linear.traced import LINEAR, fits
from dks.dispatch.prepared import prepare
from dks.dispatch.problem import alignment
from dks.dispatch.runtime import Swap
from dks.dispatch.served import DTYPE_NAMES, Dispatch, Question, Server, residual_objection, tensors_objection
from dks.dispatch.swap import bind_again, join, places, restore_layers
from dks.dispatch.traced import wanted


class LinearServer(Server):
    """``NAME.linear``, ``NAME.prepare_linear`` and the swap of ``nn.Linear``."""

    op = "linear"

    def call(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        epilogue: str = "none",
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """y = epilogue(x @ weight.T + bias), or that plus a residual, for any tensors that ``F.linear`` takes.

        Args:
            x: (..., k).
            weight: (n, k), used as it is; ``prepare`` packs it and is faster.
            bias: (n,) or None.
            epilogue: none, relu, gelu, gelu_tanh or silu.
            residual: (..., n), added last; the table knows it as the epilogue ``add``. One of another shape or
                dtype, or not contiguous, is added by the framework, by its rules.

        Returns:
            (..., n), as the framework would: same errors, same autograd.

        Raises:
            ValueError: an unknown epilogue, or a residual with another one than none.
        """
        if epilogue == "none" and residual is None and not is_compiling() and self.mode() == EAGER:
            fast = self.runtime.generation.fast.get(self.op)
            if fast is not None and (served := fast.call(x, weight, bias)) is not NotImplemented:
                return served  # type: ignore[no-any-return]
        _check_epilogue(epilogue, ACTIVATIONS)
        asked = epilogue
        if residual is not None:
            if epilogue != "none":
                raise ValueError(f"linear: found a residual and epilogue={epilogue!r}, expected one of the two")
            epilogue = "add"

        def framework(*_: Any) -> torch.Tensor:
            return finish(F.linear(x, weight, bias), epilogue, residual)

        reason = "compiling" if is_compiling() else _objection(self.device, x, weight, bias)
        if reason is None and residual is not None:
            reason = residual_objection(residual, x, weight.shape[0])
        if reason is not None:
            if wanted(reason) and fits(x, weight, bias, residual):
                y: torch.Tensor = LINEAR(x, weight, bias, asked, residual, False, self.runtime.name)
                return y
            self.runtime.counters.add(self.op, reason)
            return framework()
        n, k = weight.shape
        asked_form = partial(self.question, "direct", weight, bias, epilogue)
        is_plain = epilogue == "none"
        dispatch = self.direct(
            (x.dtype, bias is None, epilogue, n, k), asked_form, 2, self._quicken if is_plain else None
        )
        bits = (k | n) * x.element_size() | x.data_ptr() | weight.data_ptr()
        if bias is not None:
            bits |= bias.data_ptr()
        sizes = (x.numel() // k,)
        if residual is None:
            return dispatch.serve(framework, alignment(bits), sizes, x, weight, bias)
        bits |= residual.data_ptr()
        return dispatch.serve(framework, alignment(bits), sizes, x, residual, weight, bias)

    def _quicken(self, generation: Generation, dispatch: Dispatch) -> None:
        """Let the fast path serve what ``dispatch`` does, from the next call on."""
        if dispatch.native is None or native.module is None:
            return
        problem = dispatch.plan.problem
        fast = generation.fast.get(self.op)
        if fast is None:
            made = native.module.Direct(F.linear, native.DEVICES[generation.device])
            fast = generation.fast.setdefault(self.op, made)

        def failed(
            rule: int, error: Exception, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
        ) -> torch.Tensor:
            return dispatch.failed(rule, error, F.linear, x, weight, bias)

        codes, has_bias = native.CODES[DTYPES[problem.trait("dtype")]], problem.trait("bias") == "yes"
        fast.add(codes, has_bias, problem.dim("n"), problem.dim("k"), dispatch.native, failed)

    def question(self, form: str, weight: torch.Tensor, bias: torch.Tensor | None, epilogue: str) -> Question:
        """What to ask a table for, for this weight."""
        traits = {
            "dtype": DTYPE_NAMES[weight.dtype],
            "bias": "no" if bias is None else "yes",
            "epilogue": epilogue,
        }
        return Question(self.op, form, traits, {"n": weight.shape[0], "k": weight.shape[1]})

    def prepare(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, epilogue: str = "none"
    ) -> PreparedLinear:
        """Pack a weight once for every kernel the table may choose.

        Args:
            weight: (n, k); kept, so that the framework can serve what the table can't.
            bias: (n,) or None.
            epilogue: none, relu, gelu, gelu_tanh, silu or add.

        Returns:
            A module: layer(x (..., k)) -> (..., n); with ``add``, layer(x, residual (..., n)).

        Raises:
            ValueError: an unknown epilogue, or shapes that no linear has.
        """
        _check_epilogue(epilogue, EPILOGUES)
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            found = f"weight {tuple(weight.shape)}, bias {None if bias is None else tuple(bias.shape)}"
            raise ValueError(f"prepare_linear: found {found}, expected (n, k) and (n,)")
        return made_linear(self, weight, bias, epilogue)

    def swap(self, model: nn.Module) -> list[Swap]:
        """Let every ``nn.Linear`` serve that the table makes faster; an activation right behind it is fused."""
        found = places(model)
        counts = Counter(id(module) for _, module in found)
        swaps: dict[nn.Module, Swap] = {}  # one layer under two names stays one layer
        for path, module in found:
            if isinstance(module, Pair) and not module.intact and module.server is self:
                unpair(module)
            pair = linear_then_activation(module, self.device)
            if pair is not None and counts[id(pair.linear)] == 1:
                swap = self._swap_pair(join(path, pair.name), module, pair)
                if swap is not None:
                    swaps[pair.linear] = swap
        for path, module in found:
            if isinstance(module, PreparedLinear) and module not in swaps:
                swaps |= bind_again(self, path, module)
            # Any other subclass means something by being one.
            elif type(module) is nn.Linear:
                swaps[module] = self._swap_one(path, module)
        return [replace(swaps[module], path=path) for path, module in found if module in swaps]

    def passed_over(self, module: nn.Module) -> str | None:
        return other_linear(module)

    def restore(self, model: nn.Module) -> list[Swap]:
        """Make plain again what ``swap`` and ``prepare`` let serve in ``model``, in place."""
        found = places(model)
        for _, module in found:
            if isinstance(module, Pair) and module.server is self:
                module.restore()
        return restore_layers(self, found)

    def _swap_pair(self, path: str, parent: nn.Module, pair: LinearAndActivation) -> Swap | None:
        linear = pair.linear
        if not self.changes_anything(self.question("prepared", linear.weight, linear.bias, pair.epilogue)):
            return None
        made = fuse(self, parent, linear, pair.activation, pair.epilogue)
        if made.linear.gains:
            return Swap(path, self.op, True, made.linear.describe())
        unpair(made)
        return None

    def _swap_one(self, path: str, linear: nn.Linear) -> Swap:
        note = linear_note(linear, self.device)
        if note is not None:
            return Swap(path, self.op, False, note)
        question = self.question("prepared", linear.weight, linear.bias, "none")
        shape = f"n={linear.weight.shape[0]} k={linear.weight.shape[1]} {linear.weight.dtype}"
        if self.plan(question).find is None:
            return Swap(path, self.op, False, f"{shape} is not in the table")
        if not self.changes_anything(question):
            return Swap(path, self.op, False, f"{shape}: the framework's own kernel is the choice everywhere")
        layer = prepare(linear, PreparedLinear, self, {})
        if not layer.gains:
            layer.restore()
            return Swap(path, self.op, False, f"{shape}: the chosen kernels could not be bound")
        return Swap(path, self.op, True, layer.describe())


def _check_epilogue(epilogue: str, allowed: Collection[str]) -> None:
    if epilogue not in allowed:
        also = "" if "add" in allowed else "; what is to be added goes in residual="
        raise ValueError(f"epilogue: found {epilogue!r}, expected one of {', '.join(allowed)}{also}")


def _objection(device: str, x: Any, weight: Any, bias: Any) -> str | None:
    if not isinstance(weight, torch.Tensor):
        return "subclass"
    if (reason := tensors_objection(device, x, weight, bias)) is not None:
        return reason
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        return "shape"
    if bias is not None and bias.shape != weight.shape[:1]:
        return "shape"
    if not (x.is_contiguous() and weight.is_contiguous() and (bias is None or bias.is_contiguous())):
        return "strides"
    return "zero_sized" if 0 in weight.shape else None
