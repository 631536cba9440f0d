"""Attention inside models of transformers: which modules ask the table, and which of their calls it serves.

A model finds its attention by a name in its config, and that name decides more: how masks are made, what else is
passed. So the name stays ``sdpa``. What is registered under it asks the table for marked modules. Every other call,
and all that is not plain attention of q, k, v, a mask and a scale, goes to transformers' own function, with the
arguments as they came.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dks.dispatch.runtime import Swap

if TYPE_CHECKING:
    from dks.dispatch.ops.attention.serve import AttentionServer

NAME = "sdpa"
MARK = "_dks_attention"
REGISTRY = frozenset({"ALL_ATTENTION_FUNCTIONS", "AttentionInterface"})
"""The names by which code reaches transformers' registry."""

SERVED = "its plain calls ask the table"

PARAMETERS = {
    "module": inspect.Parameter.empty, "query": inspect.Parameter.empty, "key": inspect.Parameter.empty,
    "value": inspect.Parameter.empty, "attention_mask": inspect.Parameter.empty, "dropout": 0.0, "scaling": None,
    "is_causal": None,
}  # fmt: skip
"""What transformers' function must begin with, and the defaults, for the table to know what a call means."""

BOOKKEEPING = frozenset({
    "position_ids", "cache_position", "use_cache", "logits_to_keep", "output_router_logits", "output_hidden_states",
})  # fmt: skip
"""Arguments of a whole model that it hands down to every attention: where its tokens stand, which keys, queries and
mask hold already, and what else it keeps and returns. ``sdpa`` reads none of them."""

OFF = frozenset({"output_attentions", "deterministic"})
"""Arguments that ask for nothing when they are False."""


class Mark:
    """Says of an attention module which server its calls go to.

    A copy or a pickle of it is None, made by Python alone: a model that is copied, saved or sent is a plain one.
    """

    def __init__(self, server: AttentionServer) -> None:
        self.server = server

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def swap(server: AttentionServer, model: nn.Module) -> list[Swap]:
    """Let every attention of transformers in ``model`` ask the server's table; what is left alone says why."""
    kinds = {kind for kind in {type(module) for module in model.modules()} if _asks_registry(kind)}
    attentions = [(path, module) for path, module in model.named_modules() if type(module) in kinds]
    swaps: list[Swap] = []
    for path, module in attentions:
        mark = module.__dict__.get(MARK)
        if mark is not None and mark.server is server:
            continue
        note = _note(server, module, mark) or _register()
        if note is None:
            module.__dict__[MARK] = Mark(server)
        swaps.append(Swap(path or type(module).__name__, server.op, note is None, note or SERVED))
    return swaps + _without_registry(server, model, [path for path, _ in attentions])


def restore(server: AttentionServer, model: nn.Module) -> list[Swap]:
    """Make plain again what ``swap`` let ask the server's table in ``model``."""
    swaps: list[Swap] = []
    for path, module in model.named_modules():
        mark = module.__dict__.get(MARK)
        if mark is not None and mark.server is server:
            del module.__dict__[MARK]
            swaps.append(Swap(path or type(module).__name__, server.op, True, "the model's own again"))
    return swaps


def _asks_registry(kind: type) -> bool:
    """Whether a method of ``kind`` looks an attention up by its config's name."""
    own = (base for base in kind.__mro__ if base.__module__ != "transformers.modeling_utils")
    methods = (
        inspect.unwrap(method) for base in own for method in vars(base).values() if inspect.isfunction(method)
    )
    return any(REGISTRY & set(method.__code__.co_names) for method in methods)


def _without_registry(server: AttentionServer, model: nn.Module, attentions: list[str]) -> list[Swap]:
    """A line for each model of transformers that has heads and holds none of ``attentions``: the outermost."""
    note = "the model does not take its attention from the registry"
    left: list[Swap] = []
    seen: list[str] = []
    for path, module in model.named_modules():
        config, inside = getattr(module, "config", None), f"{path}." if path else ""
        if not hasattr(module, "set_attn_implementation") or any(path.startswith(outer) for outer in seen):
            continue
        if getattr(config, "num_attention_heads", 0) and not any(at.startswith(inside) for at in attentions):
            left.append(Swap(path or type(module).__name__, server.op, False, note))
            seen.append(inside)
    return left


def _note(server: AttentionServer, module: nn.Module, mark: Mark | None) -> str | None:
    """Why an attention stays as it is, or None."""
    if mark is not None:
        return f"asks the table {mark.server.runtime.name!r} already"
    config = getattr(module, "config", None)
    found = getattr(config, "_attn_implementation", None)
    if found != NAME:
        return f"attention is {found!r}, expected {NAME!r}"
    held = {parameter.device.type for parameter in module.parameters()}
    if held in ({"cpu"}, {"cuda"}) and held != {server.device}:
        return f"device: its parameters are on {held.pop()}, not {server.device}"
    generation, heads = server.runtime.generation, _heads(module, config)
    groups = [group for group in generation.table.groups if group.op == server.op]
    fitting = [g for g in groups if not heads or dict(g.statics)["h"] in heads]
    if not fitting:
        return f"{' or '.join(map(str, heads)) or 'its'} heads are not in the table"
    plans = (generation.plan(server.op, g.form, dict(g.traits), dict(g.statics)) for g in fitting)
    usual = "the framework's own kernel is the choice everywhere"
    return None if any(plan.changes_anything for plan in plans) else usual


def _heads(module: nn.Module, config: Any) -> list[int]:
    """How many heads an attention may have, by what it and its config say; none if they say nothing."""
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head")
    found = [getattr(holder, name, None) for holder in (module, config) for name in names]
    return sorted({heads for heads in found if isinstance(heads, int)})


def _register() -> str | None:
    """Put ``attend`` in the place of transformers' function, once a process; why it can't be, or None."""
    try:
        from transformers import AttentionInterface
    except ImportError:
        return "this transformers has no registry of attention"
    original = AttentionInterface()[NAME]  # type: ignore[no-untyped-call]
    if original.__module__ == __name__:
        return None
    if (note := _unknown(original)) is None:
        AttentionInterface.register(NAME, _attend_or(original))
    return note


def _unknown(original: Callable[..., Any]) -> str | None:
    """Why calls of what is registered can't be read here, or None."""
    where = f"{original.__module__}.{getattr(original, '__qualname__', type(original).__name__)}"
    if where != "transformers.integrations.sdpa_attention.sdpa_attention_forward":
        return f"{NAME!r} is registered as {where}, expected transformers' own"
    found = {name: parameter.default for name, parameter in inspect.signature(original).parameters.items()}
    first = dict(list(found.items())[: len(PARAMETERS)])
    if list(first.items()) != list(PARAMETERS.items()):
        expected = ", ".join(PARAMETERS)
        return f"transformers' {NAME} takes {', '.join(first)}, expected {expected} with the usual defaults"
    return None


def _attend_or(original: Callable[..., Any]) -> Callable[..., Any]:
    """What serves under ``NAME`` from now on, ``original`` wherever no table does."""
    # What a later transformers reads is no bookkeeping.
    code = inspect.unwrap(original).__code__
    bookkeeping = BOOKKEEPING - {*code.co_consts, *code.co_varnames}

    def attend(  # noqa: PLR0913, PLR0917 - transformers' signature
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        *more: Any,
        **others: Any,
    ) -> Any:
        def framework(*_: Any) -> Any:
            return original(module, query, key, value, attention_mask, dropout, scaling, is_causal, *more, **others)

        mark = getattr(module, MARK, None)
        if mark is None:
            return framework()
        if more or not _understood(others, bookkeeping, key):
            mark.server.count("argument")
            return framework()
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        groups = getattr(module, "num_key_value_groups", 1)
        given = (query, key, value, attention_mask, dropout, scaling)
        y = mark.server.call_of_model(framework, *given, causal, groups)
        return y if isinstance(y, tuple) else (y.transpose(1, 2).contiguous(), None)

    return attend


def _understood(others: Mapping[str, Any], bookkeeping: frozenset[str], keys: torch.Tensor) -> bool:
    """Whether further arguments of a call, by name and value, leave it plain attention."""
    for name, value in others.items():
        if value is None or name in bookkeeping:
            continue
        if name in OFF and value is False:
            continue
        if name == "sliding_window" and type(value) is int and value >= keys.shape[2]:
            continue  # it hides no key
        return False
    return True
