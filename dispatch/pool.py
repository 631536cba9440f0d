"""The pool: every operator and kernel there is, found by looking into the folders under ``ops``."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType

from dks.dispatch import ops
from dks.dispatch.kernel import Kernel, Operator
from dks.dispatch.problem import Candidate


def _modules(package: ModuleType) -> list[ModuleType]:
    found = []
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        found.append(importlib.import_module(f"{package.__name__}.{info.name}"))
    return found


@lru_cache(maxsize=1)
def operators() -> dict[str, Operator]:
    """Every operator by name: each folder under ``ops`` whose package has an ``OPERATOR``."""
    found = [module.OPERATOR for module in _modules(ops)]
    return {operator.name: operator for operator in found}


MORE_KERNELS = "DKS_KERNELS"
"""Environment variable: modules with kernels of one's own, separated by commas; each has a list ``KERNELS``.
Profiling, generating and serving must name the same ones."""


@lru_cache(maxsize=1)
def kernels() -> dict[str, Kernel]:
    """Every kernel by id: the ``KERNEL`` or ``KERNELS`` of each module in an operator's folder, and those of
    ``DKS_KERNELS``.

    Raises:
        ValueError: two kernels share an id.
        ImportError: a module that ``DKS_KERNELS`` names can't be imported.
    """
    pool: dict[str, Kernel] = {}
    for _, kernel in _found():
        if kernel.id in pool:
            raise ValueError(f"kernel {kernel.id}: declared twice, expected unique ids")
        pool[kernel.id] = kernel
    return pool


def homes() -> dict[str, str]:
    """The module that declares each kernel, by the kernel's id."""
    return _homes(os.environ.get(MORE_KERNELS, ""))


@lru_cache(maxsize=8)
def _homes(_more: str) -> dict[str, str]:
    return {kernel.id: name for name, kernel in _found()}


def _found() -> Iterator[tuple[str, Kernel]]:
    """Every kernel, with the module that declares it."""
    for folder in _modules(ops):
        for module in _modules(folder):
            if hasattr(module, "KERNEL"):
                yield module.__name__, module.KERNEL
            yield from ((module.__name__, kernel) for kernel in getattr(module, "KERNELS", ()))
    for name in filter(None, os.environ.get(MORE_KERNELS, "").split(",")):
        yield from ((name, kernel) for kernel in importlib.import_module(name).KERNELS)


def operator(name: str) -> Operator:
    """The operator of that name. Raises KeyError with the names there are."""
    try:
        return operators()[name]
    except KeyError:
        raise KeyError(f"operator: found {name!r}, expected one of {', '.join(operators())}") from None


def kernels_for(op: str, device: str = "") -> list[Kernel]:
    """The kernels of one operator, the framework's own first, then by rank and id.

    Args:
        device: ``cpu`` or ``cuda``: those that run there; all where nothing is said.
    """
    found = (k for k in kernels().values() if k.op == op and (not device or k.runs_on(device)))
    return sorted(found, key=lambda k: (k.rank, k.id))


def candidates_for(op: str, device: str = "") -> list[Candidate]:
    """Every candidate of one operator, the framework's own first; ``device`` as of ``kernels_for``."""
    return [candidate for kernel in kernels_for(op, device) for candidate in kernel.candidates()]
