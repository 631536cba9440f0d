"""Runs programs on CPU tensors through Triton's interpreter, which ``tests/conftest.py`` switches on.

Every access is checked: to touch anything but an element of one of the tensors is an error, even if what was
read would not count.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

from dks.dispatch.gpu.program import Program

MULTIPROCESSORS = 2
"""Of the device that resident programs believe to run on."""


def function_of(program: Program) -> Any:
    """The interpreted function of a program."""
    module = importlib.import_module(f"dks.dispatch.gpu.kernels.{program.source.removesuffix('.py')}")
    return getattr(module, program.function)


def launch(programs: Iterable[Program], values: Mapping[str, Any], multiprocessors: int = MULTIPROCESSORS) -> None:
    """Launch programs in order; ``values`` holds a tensor, a number, or 0 for a null address, by argument.

    Raises:
        AssertionError: a program read or wrote outside of the tensors.
    """
    sizes = {name: value for name, value in values.items() if isinstance(value, int)}
    for program in programs:
        constants = dict(program.constants)
        if "UPCAST" in constants:
            constants["UPCAST"] = int(program.arguments[0].type == "*bf16")  # whose bits the interpreter multiplies
        given = [values[each.name] for each in program.arguments]
        with _watched([value for value in given if isinstance(value, torch.Tensor)]):
            function_of(program)[program.blocks(sizes, multiprocessors)](*given, **constants)


def surrounded(tensor: torch.Tensor, gap: int = 0) -> torch.Tensor:
    """A copy (rows, columns) or (n,) whose rows are ``gap`` elements further apart, NaN or 111 all around it."""
    rows, columns = tensor.shape if tensor.dim() == 2 else (1, tensor.shape[0])
    stride, margin = columns + gap, 64
    filler = float("nan") if tensor.dtype.is_floating_point else 111
    storage = torch.full((rows * stride + 2 * margin,), filler).to(tensor.dtype)
    view = storage.as_strided((rows, columns), (stride, 1), margin)
    view.copy_(tensor.view(rows, columns))
    return view if tensor.dim() == 2 else view[0]


@contextmanager
def _watched(tensors: list[torch.Tensor]) -> Iterator[None]:
    allowed = np.unique(np.concatenate([_addresses(each) for each in tensors]))
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def check(what: str, pointers: Any, mask: Any) -> None:
        touched = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel().astype(np.uint64)
        at = np.minimum(np.searchsorted(allowed, touched), len(allowed) - 1)
        outside = int((allowed[at] != touched).sum())
        assert not outside, f"{what} {outside} elements outside of the tensors"

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check("read", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("wrote", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store
    try:
        yield
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store


def _addresses(tensor: torch.Tensor) -> np.ndarray:
    """Of every element."""
    offsets = np.zeros((), np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size) * stride
    return (tensor.data_ptr() + offsets.ravel() * tensor.element_size()).astype(np.uint64)
