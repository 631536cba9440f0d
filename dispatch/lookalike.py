"""Norms that are none of PyTorch's classes: found by what they compute, as each model library writes its own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from dks.dispatch.kernel import DTYPES
from dks.dispatch.swap import swap_note

EPS_NAMES = frozenset({"eps", "epsilon", "variance_epsilon", "layer_norm_eps", "rms_norm_eps", "norm_eps"})
"""Attributes that hold a norm's epsilon."""

OTHERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
"""PyTorch's norms of another kind than over the last dim."""

_HELD = {"rms_norm": ("weight",), "layer_norm": ("weight", "bias")}
_OF_EVERY_MODULE = {*vars(nn.Module()), "_is_hf_initialized"}
_METHODS = {"__init__", "forward", "extra_repr", "reset_parameters", "_norm", "__repr__"}
_ROUNDING = {torch.float32: 1e-5}  # sums in any order; of shorter dtypes, that of a product rounded twice

Call = Callable[[torch.Tensor], torch.Tensor]


class Lookalike(NamedTuple):
    """What a module that looks like a norm is.

    Attributes:
        eps_name: the attribute that holds its epsilon; empty where ``note`` is not None.
        note: why no table may serve it, or None.
    """

    eps_name: str
    note: str | None


def norm_like(module: nn.Module, op: str) -> Lookalike | None:
    """What ``module`` is, if it looks most like ``op``, rms_norm or layer_norm, and is none of PyTorch's own; else
    None.

    It must have a weight (and a bias) of one dim and an epsilon, nothing else that could matter, and compute in
    its own dtype what the operator does for inputs of several shapes and scales, in training and in evaluation,
    up to rounding: also where one rounds once and the other twice.
    """
    kind = type(module)
    if kind.__module__.startswith("torch.nn.modules") or isinstance(module, OTHERS):
        return None
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        subclass_of = "layer_norm" if isinstance(module, nn.LayerNorm) else "rms_norm"
        why = f"{kind.__name__} is a subclass, and means something by being one"
        return Lookalike("", why) if subclass_of == op else None
    if any(module.children()):
        return None
    held = {name for name, t in module._parameters.items() if t is not None}
    called_norm = re.search("norm", kind.__name__, re.IGNORECASE) is not None
    most_like = "layer_norm" if "bias" in held or (not held and "RMS" not in kind.__name__) else "rms_norm"
    eps_names = sorted(EPS_NAMES & {*module.__dict__})
    if most_like != op or not (called_norm or (eps_names and held == {*_HELD[op]})):
        return None
    note = _form_note(module, op, eps_names) or _behaviour_note(module, op, eps_names[0])
    if note is None:
        return Lookalike(eps_names[0], None)
    return Lookalike("", f"{kind.__name__} {note}") if called_norm else None


def _form_note(module: nn.Module, op: str, eps_names: list[str]) -> str | None:
    """What of a module could matter that calls with a few inputs don't show, or None."""
    note = swap_note(module, _HELD[op]) or _parameters_note(module, _HELD[op])
    if note is not None:
        return note
    if len(eps_names) != 1 or type(module.__dict__[eps_names[0]]) is not float:
        return "has no epsilon of its own, expected one attribute of " + ", ".join(sorted(EPS_NAMES))
    weight = module._parameters["weight"]
    n = 0 if weight is None else len(weight)
    for name, value in vars(module).items():
        if name not in _OF_EVERY_MODULE and name not in eps_names and not _is_size(value, n):
            return f"holds {name}, which may change what it computes"
    kind = type(module)
    own = {name for name, value in vars(kind).items() if callable(value) or isinstance(value, property)}
    if kind.__bases__ != (nn.Module,) or not own <= _METHODS:
        return "has methods or bases that may change what it computes"
    takes_one = len(inspect.signature(module.forward).parameters) == 1
    return None if takes_one else "takes more than one argument"


def _parameters_note(module: nn.Module, names: tuple[str, ...]) -> str | None:
    weight, *bias = (module._parameters[name] for name in names)
    if weight is None or any(t is None for t in bias):
        return "has no " + " or no ".join(names)
    if weight.dim() != 1 or any(t is None or t.shape != weight.shape for t in bias) or not len(weight):
        return f"holds a weight {tuple(weight.shape)}, expected (n,)"
    return None if weight.dtype in DTYPES.values() else f"is of {weight.dtype}"


def _is_size(value: object, n: int) -> bool:
    """Whether an attribute says no more than how many elements there are."""
    return value == n if type(value) is int else isinstance(value, tuple | list) and [*value] == [n]


def _behaviour_note(module: nn.Module, op: str, eps_name: str) -> str | None:
    """How what ``module`` computes differs from ``op``, or None."""
    weight = module._parameters["weight"]
    assert weight is not None
    n, dtype, eps = len(weight), weight.dtype, float(module.__dict__[eps_name])
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad(), _no_autocast():
        drawing = torch.Generator().manual_seed(0)
        twin = type(module).__new__(type(module))
        twin.__dict__.update(module.__dict__)
        # Other values than the module's: a weight of ones shows nothing. On the CPU, wherever the module is.
        drawn = {name: nn.Parameter(_drawn(drawing, n).to(dtype), False) for name in _HELD[op]}
        twin.__dict__["_parameters"] = drawn
        constants = [t.double() for t in drawn.values()]
        try:
            gaps = [
                _gap(twin.train(training), x, _reference(op, x.double(), eps, *constants))
                for x in _inputs(drawing, n, dtype, eps)
                for training in (True, False)
            ]
        except Exception as error:  # whatever a stranger's module raises on such input
            return f"raised {type(error).__name__} on an input of (..., {n})"
    worst = max(gaps)
    if not worst <= _ROUNDING.get(dtype, 1.25 * torch.finfo(dtype).eps):
        return f"computes something else than {op} of what it holds"
    return None


def _no_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def _drawn(drawing: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=drawing, device="cpu")


def _inputs(drawing: torch.Generator, n: int, dtype: torch.dtype, eps: float) -> list[torch.Tensor]:
    """Rows of one size, with a mean, of sizes beside each other, so small that the epsilon counts, and of zeros."""
    rows = _drawn(drawing, 4, n)
    small = rows * max(eps, 1e-12) ** 0.5
    uneven = rows * torch.tensor([[1e-2], [1.0], [30.0], [100.0]], device="cpu")
    drawn = (rows[0], rows + 2, uneven.view(2, 2, n), small, torch.zeros(2, n, device="cpu"))
    return [x.to(dtype) for x in drawn]


def _reference(op: str, x: torch.Tensor, eps: float, weight: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
    if op == "layer_norm":
        return nn.functional.layer_norm(x, weight.shape, weight, bias[0], eps)
    return nn.functional.rms_norm(x, weight.shape, weight, eps)


def _gap(norm: Call, x: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference of an output's element, relative to the larger of it and its row's root mean square;
    infinite where it is no tensor of x's form, or x changed."""
    given = x.clone()
    y = norm(given)
    if not isinstance(y, torch.Tensor) or y.dtype != x.dtype or y.shape != x.shape or not torch.equal(given, x):
        return float("inf")
    size = wanted.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    gap = (y.double() - wanted).abs() / torch.maximum(wanted.abs(), size)
    return float(gap.nan_to_num(float("inf")).max())
