"""Attention inside models of transformers: which modules ask the table, and which of their calls it serves.

A model finds its attention by a name in its config, and that name decides more: how masks are made, what else is
passed. So the name stays ``sdpa``. What is registered under it asks the table for marked modules; every other call,
and all that is not plain attention of q, k, v, a mask and a scale, is transformers' own function, with the arguments
as they came.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dks.dispatch.runtime import Swap

if TYPE_CHECKING:
    from dks.dispatch.ops.attention.serve import AttentionServer

NAME = "sdpa"
MARK = "_dks_attention"

PARAMETERS = {
    "module": inspect.Parameter.empty, "query": inspect.Parameter.empty, "key": inspect.Parameter.empty,
    "value": inspect.Parameter.empty, "attention_mask": inspect.Parameter.empty, "dropout": 0.0, "scaling": None,
    "is_causal": None,
}  # fmt: skip
"""What transformers' function must begin with, and the defaults, for the table to know what a call means."""

BOOKKEEPING = frozenset({"position_ids", "position_embeddings", "cache_position", "use_cache"})
"""Arguments that say nothing which mask, keys and queries don't hold already: ``sdpa`` reads none of them."""


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
    swaps: list[Swap] = []
    refusal: str | None = None
    for path, module in model.named_modules():
        if not _asks_registry(type(module)):
            continue
        mark = module.__dict__.get(MARK)
        if mark is not None and mark.server is server:
            continue
        note = _note(server, module, mark) or (refusal := refusal or _register())
        if note is None:
            module.__dict__[MARK] = Mark(server)
        where = path or type(module).__name__
        swaps.append(Swap(where, server.op, note is None, note or "its plain calls ask the table"))
    return swaps or list(_without_registry(server, model))


def restore(server: AttentionServer, model: nn.Module) -> list[str]:
    """Take the marks of ``server`` off ``model``; returns the paths of the modules that had one."""
    marked = [
        (path or type(module).__name__, module)
        for path, module in model.named_modules()
        if getattr(module.__dict__.get(MARK), "server", None) is server
    ]
    for _, module in marked:
        del module.__dict__[MARK]
    return [path for path, _ in marked]


@lru_cache(maxsize=4096)
def _asks_registry(kind: type) -> bool:
    """Whether a method of ``kind`` looks an attention up by its config's name."""
    own = (base for base in kind.__mro__ if base.__module__ != "transformers.modeling_utils")
    methods = (inspect.unwrap(method) for base in own for method in vars(base).values() if inspect.isfunction(method))
    return any("ALL_ATTENTION_FUNCTIONS" in method.__code__.co_names for method in methods)


def _without_registry(server: AttentionServer, model: nn.Module) -> Iterator[Swap]:
    """A line for each model of transformers in which no module asks the registry, unless it has no heads at all."""
    above = ""
    for path, module in model.named_modules():
        if above and path.startswith(above):
            continue
        config = getattr(module, "config", None)
        if hasattr(module, "set_attn_implementation") and getattr(config, "num_attention_heads", None):
            above = f"{path}." if path else "."
            note = "the model does not take its attention from the registry"
            yield Swap(path or type(module).__name__, server.op, False, note)
            if not path:
                return


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
    from transformers import AttentionInterface

    original = AttentionInterface()[NAME]
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
        return f"transformers' {NAME} takes {', '.join(first)}, expected {', '.join(PARAMETERS)}, by the usual defaults"
    return None


def _attend_or(original: Callable[..., Any]) -> Callable[..., Any]:
    """What serves under ``NAME`` from now on, ``original`` wherever no table does."""
    # What a later transformers reads is no bookkeeping.
    read = {*original.__code__.co_consts, *original.__code__.co_varnames}
    bookkeeping = BOOKKEEPING - read

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
            return original(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, *more, **others
            )

        mark = getattr(module, MARK, None)
        if mark is None:
            return framework()
        if more or not _understood(others, bookkeeping, key):
            mark.server.count("argument")
            return framework()
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        groups = getattr(module, "num_key_value_groups", 1)
        y = mark.server.call_of_model(
            framework, query, key, value, attention_mask, dropout, scaling, causal, groups
        )
        return y if isinstance(y, tuple) else (y.transpose(1, 2).contiguous(), None)

    return attend


def _understood(others: Mapping[str, Any], bookkeeping: frozenset[str], keys: torch.Tensor) -> bool:
    """Whether further arguments of a call, by name and value, leave it plain attention."""
    for name, value in others.items():
        if value is None or name in bookkeeping:
            continue
        if name == "output_attentions" and value is False:
            continue
        if name == "sliding_window" and type(value) is int and value >= keys.shape[2]:
            continue  # it hides no key
        return False
    return True
