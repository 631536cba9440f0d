"""Running programs in Triton's interpreter, which is slow and knows neither warps nor pipelines, but whose every
address can be looked at: nothing but elements of the tensors may be read, nothing but those of outputs written."""

from __future__ import annotations

import importlib
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from dks.dispatch.gpu.program import Program

SOAK = os.environ.get("DKS_SOAK") == "1"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Twice that of one rounding.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def some(step: int, *axes: Iterable[Any]) -> list[Any]:
    """Every ``step``-th of all combinations; all of them with DKS_SOAK=1. The interpreter is slow."""
    return list(itertools.product(*axes))[:: 1 if SOAK else step]


def launch(
    programs: Sequence[Program], values: Mapping[str, Any], outputs: Iterable[str], multiprocessors: int = 132
) -> None:
    """Run them in order with these values of their arguments; ``outputs`` names the tensors that they may write.

    A tensor of no elements, or 0, stands for a null pointer.

    Raises:
        Exception: a program read or wrote outside of the tensors.
    """
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    readable = [places(value) for value in tensors.values()]
    writable = [places(tensors[name]) for name in outputs if name in tensors]
    watched = _watched(np.unique(np.concatenate(readable)), np.unique(np.concatenate(writable)))
    with watched, _as_a_gpu(), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of NaN
        for program in programs:
            kernel = kernel_of(program)
            numbers = {name: value for name, value in values.items() if isinstance(value, int)}
            constants = dict(program.constants)
            if "UPCAST" in constants:  # whose bits the interpreter multiplies
                constants["UPCAST"] = int(program.arguments[0].type == "*bf16")
            arguments = [values[argument.name] for argument in program.arguments]
            for argument, value in zip(program.arguments, arguments, strict=True):
                assert fits(argument.type, value), (argument, value)
            with _patched_once():
                kernel[program.blocks(numbers, multiprocessors)](*arguments, **constants)


def kernel_of(program: Program) -> Any:
    """The function, whose arguments are those that the program says, constants last."""
    module = importlib.import_module(f"dks.dispatch.gpu.kernels.{program.source.removesuffix('.py')}")
    kernel = getattr(module, program.function)
    named = [argument.name for argument in program.arguments] + [name for name, _ in program.constants]
    assert kernel.arg_names == named
    return kernel


ELEMENTS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8e4nv": torch.float8_e4m3fn,
    "i8": torch.int8,
    "i32": torch.int32,
    "i64": torch.int64,
}


def fits(type: str, value: Any) -> bool:
    """Whether an argument of this type may have the value."""
    if not type.startswith("*"):
        return isinstance(value, float if type.startswith("fp") else int)
    return (value.dtype is ELEMENTS[type[1:]]) if isinstance(value, torch.Tensor) else value == 0


def places(t: torch.Tensor) -> Any:
    """Addresses of a tensor's elements."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    return (offsets.flatten() * t.element_size() + t.data_ptr()).numpy().astype(np.uint64)


@contextmanager
def _watched(readable: Any, writable: Any) -> Iterator[None]:
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def check(what: str, pointers: Any, mask: Any, allowed: Any) -> None:
        mask = mask if isinstance(mask, np.ndarray) else mask.data  # a descriptor has a bare one
        wanted = pointers.data[np.broadcast_to(mask, pointers.data.shape).astype(bool)]  # some are integers
        at = np.minimum(np.searchsorted(allowed, wanted), len(allowed) - 1)
        outside = int((allowed[at] != wanted).sum())
        assert not outside, f"{what} {outside} elements outside of the tensors"

    def checked_load(pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        check("read", pointers, mask, readable)
        return load(pointers, mask, *rest, **more)

    def checked_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("wrote", pointers, mask, writable)
        return store(pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    try:
        yield
    finally:
        del builder.create_masked_load, builder.create_masked_store


@contextmanager
def _as_a_gpu() -> Iterator[None]:
    """Where the interpreter cuts digits off, a GPU rounds to even: of fp8's three that is half the error. And of a
    number and NaN the maximum is the number there."""
    builder, cut = interpreter.interpreter_builder, interpreter._convert_float

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source.name != "fp32" or target.name not in ("bf16", "fp8e4nv"):
            return cut(values, source, target, mode)
        wide = torch.from_numpy(np.ascontiguousarray(values).view(np.float32).reshape(-1))
        narrow = wide.to(ELEMENTS[target.name])
        bits = narrow.view(torch.int16 if narrow.element_size() == 2 else torch.int8).numpy()
        return bits.view(np.uint16 if bits.itemsize == 2 else np.uint8).reshape(values.shape)

    interpreter._convert_float = rounded
    builder.create_maxnumf = lambda a, b: builder.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda a, b: builder.binary_op(a, b, np.fmin)
    try:
        yield
    finally:
        interpreter._convert_float = cut
        del builder.create_maxnumf, builder.create_minnumf


@contextmanager
def _patched_once() -> Iterator[None]:
    """The interpreter changes Triton's modules anew for each function that a kernel calls, which takes most of its
    time; once for each set of modules that functions see is enough."""
    patch, done = interpreter._patch_lang, dict[Any, Any]()

    def patch_once(function: Any) -> Any:
        seen = frozenset(id(value) for value in function.__globals__.values() if isinstance(value, ModuleType))
        if seen not in done:
            done[seen] = patch(function)
        return done[seen]

    interpreter._patch_lang = patch_once
    try:
        yield
    finally:
        interpreter._patch_lang = patch


def placed(t: torch.Tensor, gap: int = 0, offset: int = 0) -> torch.Tensor:
    """A copy amid NaN: ``offset`` elements after the start of memory, rows of the last dim ``gap`` apart."""
    *outer, n = t.shape
    count = t[..., :1].numel() * (n + gap)
    storage = torch.full((offset + count + 8,), torch.nan, dtype=t.dtype)
    view = storage[offset : offset + count].view(*outer, n + gap)[..., :n]
    return view.copy_(t)


def blank(*shape: int, dtype: torch.dtype, gap: int = 0) -> torch.Tensor:
    """An output: NaN, amid NaN."""
    return placed(torch.full(shape, torch.nan, dtype=dtype), gap, 3)


def null(dtype: torch.dtype) -> torch.Tensor:
    """What stands for a null pointer: nothing can be read there."""
    return torch.empty(0, dtype=dtype)


def assert_close(y: torch.Tensor, reference: torch.Tensor, slack: float = 1.0, dtype: Any = None) -> None:
    """Within a rounding of the float64 ``reference``, as ``dtype`` rounds, else y's; ``slack`` times that."""
    tolerance = slack * TOLERANCE[dtype or y.dtype]
    torch.testing.assert_close(y.double(), reference, rtol=tolerance, atol=tolerance, equal_nan=True)


def check_family(programs: Iterable[Program]) -> None:
    """What holds of every program: its kernel takes what it says, its grid is known, its name is its own."""
    found = list(programs)
    assert len({program.symbol for program in found}) == len(found) == len(set(found))
    assert {program.align for program in found} == {2, 16}
    for program in found:
        kernel_of(program)
        assert program.symbol.isidentifier()
        names = {argument.name for argument in program.arguments}
        assert {name for axis in program.grid for name, _ in axis if name} <= names
