"""Modules that serve in their own place: one takes on a class made of its own class, and nothing else changes.

It stays the very object that others refer to, an instance of what it was, with parameters, attributes and hooks.
Copies of it, pickles and classes that tools make of its class are the plain module's.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, cast

from torch import nn

_D = TypeVar("_D", bound="Disguised")

_TAKEN = ("__call__", "__copy__", "__deepcopy__", "__init_subclass__", "__slots__")
"""What a class may define that a class made of it would take from it, or break."""


class Disguised(nn.Module):
    """What a module's class is made of, beside its own, while it serves. See ``disguise``.

    Attributes:
        plain_class: the module's own class.
        own: names of the attributes that serving puts on the module; they neither copy nor travel.
    """

    plain_class: type[nn.Module]
    own: frozenset[str] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A class that a tool makes of one that was made here, as parametrizations and sharding do, or a user who
        # writes class Mine(type(module)), is to be one of the plain class.
        super().__init_subclass__(**kwargs)
        bases = tuple(dict.fromkeys(map(_plain, cls.__bases__)))
        if bases != cls.__bases__:
            cls.__bases__ = bases
            if cls.__new__ is object.__new__:  # Python remembers ours, and gives this one no arguments for it
                cls.__new__ = staticmethod(_new)  # type: ignore[method-assign, assignment]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # type(module)(...), as a slice of an nn.Sequential is made, or the bare object of a copy made by hand.
        try:
            return cls.plain_class(*args, **kwargs)
        except TypeError:
            if args or kwargs:
                raise
            return cls.plain_class.__new__(cls.plain_class)

    def restore(self) -> None:
        """Become the plain module again, in place. Not while it is called."""
        own = self.own
        object.__setattr__(self, "__class__", self.plain_class)
        for name in own:
            self.__dict__.pop(name, None)

    def plain(self) -> nn.Module:
        """Another module, with the same parameters, children, hooks and attributes, that does not serve."""
        twin = self.plain_class.__new__(self.plain_class)
        twin.__dict__.update(self._attributes())
        return twin

    def _attributes(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if k not in self.own}
        return {k: v.copy() if isinstance(v, dict) else v for k, v in kept.items()}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":  # a tool that gives a module another class has the last word
            self.restore()
            object.__setattr__(self, name, _plain(value))
            return
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # For copy, pickle and torch.save. Later protocols insist on the class of what is pickled, here another.
        return self.plain().__reduce_ex__(min(protocol, 1))

    def __prepare_scriptable__(self) -> nn.Module:
        return self.plain()

    def _replicate_for_data_parallel(self) -> Any:
        return self.plain()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]


def serves(module: nn.Module) -> bool:
    """Whether a method of ours may go on with ``module``: tools keep ``module.forward``, and call it when the
    module was restored or copied since."""
    return isinstance(module, Disguised)


def _new(kind: type, *_: Any, **__: Any) -> Any:
    return object.__new__(kind)


def _plain(kind: type) -> type:
    """The class that ``kind`` was made of, if it is one that was made here."""
    return vars(kind).get("plain_class", kind) if issubclass(kind, Disguised) else kind


def disguise(module: nn.Module, kind: type[_D], attributes: Mapping[str, Any]) -> _D:
    """Let ``module`` serve as a ``kind``, in place.

    Args:
        attributes: what ``kind.own`` names, as far as it is known.
    """
    module.__dict__.update(attributes)
    object.__setattr__(module, "__class__", _class(kind, type(module)))  # type: ignore[arg-type] # they hash
    return cast(_D, module)


@cache
def _class(kind: type[Disguised], plain: type[nn.Module]) -> type[Disguised]:
    # Named as the module's own class: tools go by names as well.
    named = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    made = types.new_class(
        plain.__name__, (kind, plain), exec_body=lambda names: names.update(named, plain_class=plain)
    )
    return cast(type[Disguised], made)


def disguise_note(module: nn.Module, kind: type[Disguised]) -> str | None:
    """Why ``module`` can't take on a ``kind``, or None: its class has a say in what serving changes."""
    ours = {name for name in _names(kind) if not name.startswith("__")} | kind.own | {*_TAKEN}
    clash = (_names(type(module)) | {*module.__dict__}) & ours - {"forward", "extra_repr"}
    return f"has {min(clash)}, a name that serving needs" if clash else None


def _names(kind: type[nn.Module]) -> set[str]:
    """What a class defines beyond ``nn.Module``."""
    return {name for c in kind.__mro__ if c not in nn.Module.__mro__ for name in vars(c)}
