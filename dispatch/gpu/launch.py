"""Compiled programs as Python launches them: through ctypes, without Triton, a compiler or CUDA's headers.

library = Library(path)                      # or launcher(), where programs come from the cache
if library.lack: ...                         # no driver, no device: why
plan = Plan(library, [Step(kernel)])
plan.names                                   # what it must be told, in this order
plan(x, y, out, m, stream=stream)
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dks.dispatch.gpu.cubin import Cubin
from dks.dispatch.kernel import Declined
from dks.dispatch.manifest import GPU
from dks.dispatch.tiles.library import Missing

TYPE_CODES = {"*": 0, "i32": 1, "i64": 2, "fp32": 3}
"""``enum dks_gpu_type`` of ``gpu.h``, by Triton's types; any address is ``*``."""

MISALIGNED, FAILED, STICKY = 7, 1000, 2000
_FLOAT = TYPE_CODES["fp32"]


class Misaligned(Declined):
    """An address, stride or size is outside the program's alignment class."""


class LaunchFailed(RuntimeError):
    """The driver refused a launch; the process can go on."""


class ContextLost(LaunchFailed):
    """An error that stays: every later CUDA call of this process fails too. End the process."""


class HasAddress(Protocol):
    """A tensor."""

    def data_ptr(self) -> int:
        """Its address."""


class CInput(ctypes.Structure):
    """``struct dks_gpu_input`` of ``gpu.h``."""

    _fields_ = (("name", ctypes.c_char_p), ("type", ctypes.c_int32), ("divisor", ctypes.c_int32))


class CFactor(ctypes.Structure):
    """``struct dks_gpu_factor``."""

    _fields_ = (("size", ctypes.c_int64), ("input", ctypes.c_int32))


_FACTORS = ctypes.POINTER(CFactor)


class CCubin(ctypes.Structure):
    """``struct dks_gpu_cubin``."""

    _fields_ = (
        *((name, ctypes.c_char_p) for name in ("symbol", "program", "function")),
        ("elf", ctypes.c_void_p),
        ("inputs", ctypes.POINTER(CInput)),
        *((name, _FACTORS) for name in ("x", "y", "z")),
        *((name, ctypes.c_int32) for name in ("arguments", "input_count", "x_count", "y_count", "z_count")),
        *((name, ctypes.c_int32) for name in ("arch", "warps", "shared", "resident", "scratch", "scratch_align")),
    )


class CSource(ctypes.Structure):
    """``struct dks_gpu_source``."""

    _fields_ = (("value", ctypes.c_int64), ("slot", ctypes.c_int32))


class CStep(ctypes.Structure):
    """``struct dks_gpu_step``."""

    _fields_ = (("kernel", ctypes.c_void_p), ("sources", ctypes.POINTER(CSource)))


class CCall(ctypes.Structure):
    """``struct dks_gpu_call``."""

    _fields_ = (
        ("steps", ctypes.POINTER(CStep)),
        ("slots", ctypes.POINTER(ctypes.c_int64)),
        ("scratch", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
        ("step_count", ctypes.c_int32),
        ("slot_count", ctypes.c_int32),
        ("device", ctypes.c_int32),
    )


class CDevice(ctypes.Structure):
    """``struct dks_gpu_device``."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("capability", "multiprocessors", "shared"))


@dataclass(frozen=True, slots=True)
class Kernel:
    """A program that a library can launch.

    Attributes:
        handle: the library's.
        symbol, program, arch: as the compiled program has them.
        inputs: names of what a launch is told of, with ``enum dks_gpu_type``.
        scratch: bytes of global memory that each of its blocks needs for itself.
    """

    handle: int
    symbol: str
    program: str
    arch: int
    inputs: tuple[tuple[str, int], ...]
    scratch: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel of a call.

    Attributes:
        bound: by the name of an input a number that is the same in every call, a tensor whose address is, or the
            call's own name for it; an input that is not here has the same name in the call.
    """

    kernel: Kernel
    bound: Mapping[str, int | float | str | HasAddress] = field(default_factory=dict)


class Library:
    """The launcher, and the programs that are embedded in it."""

    def __init__(self, path: Path, driver: str | None = None) -> None:
        """
        Args:
            path: of a library that ``embed`` made.
            driver: path of the driver's library; the system's where None.

        Raises:
            Missing: it can't be loaded.
        """
        try:
            self._library = _typed(ctypes.CDLL(str(path)))
        except (OSError, AttributeError) as error:
            raise Missing(f"{path}: {error}") from None
        why = ctypes.create_string_buffer(512)
        code = self._library.dks_gpu_open(None if driver is None else os.fsencode(driver), why, len(why))
        self.lack = why.value.decode("utf-8", "replace") if code else ""
        """Why nothing can be launched, or an empty text."""
        self._embedded: dict[tuple[str, int], Kernel] | None = None

    @classmethod
    def from_bytes(cls, data: bytes, driver: str | None = None) -> Library:
        """The same from the bytes of a library that was checked: what runs is what was checked. Raises Missing."""
        file = os.memfd_create(GPU)
        try:
            with os.fdopen(os.dup(file), "wb") as writer:
                writer.write(data)
            return cls(Path(f"/proc/self/fd/{file}"), driver)
        except Missing:
            os.close(file)  # otherwise it stays open, so that its number names this library alone
            raise

    def embedded(self) -> dict[tuple[str, int], Kernel]:
        """The programs that are in the library, by symbol and architecture."""
        if self._embedded is None:
            count = ctypes.c_int32()
            first = self._library.dks_gpu_embedded(ctypes.byref(count))
            found = [self._add(first[i], None) for i in range(count.value)]
            self._embedded = {(kernel.symbol, kernel.arch): kernel for kernel in found}
        return self._embedded

    def add(self, cubin: Cubin) -> Kernel:
        """A program that is not embedded. It stays for as long as the process."""
        made, kept = _in_c(cubin)
        return self._add(made, (made, kept))

    def _add(self, made: CCubin, kept: object) -> Kernel:
        handle = self._library.dks_gpu_add(ctypes.byref(made))
        if not handle:
            raise ValueError(f"{made.symbol.decode()}: the launcher refuses its description")
        if kept is not None:
            _FOREVER.append(kept)
        inputs = tuple((made.inputs[i].name.decode(), made.inputs[i].type) for i in range(made.input_count))
        return Kernel(handle, made.symbol.decode(), made.program.decode(), made.arch, inputs, made.scratch)

    def device(self, number: int = 0) -> CDevice:
        """What launching depends on. Raises as a launch does."""
        found = CDevice()
        self.settle(self._library.dks_gpu_device_of(number, ctypes.byref(found)))
        return found

    def settle(self, code: int) -> None:
        """Nothing where ``code`` is 0.

        Raises:
            Declined: the call is not one for this program, this device or this machine; nothing was launched.
            Misaligned: the one of these that another program may take.
            ContextLost: every later call fails too.
            LaunchFailed: the driver refused.
        """
        if code == 0:
            return
        text = ctypes.create_string_buffer(512)
        self._library.dks_gpu_text(code, text, len(text))
        said = text.value.decode("utf-8", "replace")
        declined = Misaligned if code == MISALIGNED else Declined
        raise (ContextLost if code >= STICKY else LaunchFailed if code >= FAILED else declined)(said)

    @property
    def functions(self) -> Any:
        """The functions of ``gpu.h``."""
        return self._library


_FOREVER: list[object] = []  # descriptions that kernels point to


class Plan:
    """Kernels that one call launches, in order."""

    def __init__(self, library: Library, steps: Sequence[Step]) -> None:
        """
        Raises:
            ValueError: a step binds what its kernel has not, or a value is a float for one input and none for
                another.
        """
        slots: dict[str, bool] = {}  # whether it is a float
        made = []
        for step in steps:
            if unknown := set(step.bound) - {name for name, _ in step.kernel.inputs}:
                raise ValueError(f"{step.kernel.symbol} has no {', '.join(sorted(unknown))}")
            sources = []
            for name, type_ in step.kernel.inputs:
                bound = step.bound.get(name, name)
                if not isinstance(bound, (int, float, str)):
                    bound = bound.data_ptr()
                if not isinstance(bound, str):
                    sources.append(CSource(_bits(bound, type_ == _FLOAT), -1))
                    continue
                if slots.setdefault(bound, type_ == _FLOAT) != (type_ == _FLOAT):
                    raise ValueError(f"{bound}: a float for one kernel, and none for another")
                sources.append(CSource(0, list(slots).index(bound)))
            made.append(CStep(step.kernel.handle, (CSource * len(sources))(*sources)))
        self.names = tuple(slots)
        """What a call must be told, in this order."""
        self.floats = tuple(slots.values())
        """Of each name: whether it is a float."""
        self.scratches = any(step.kernel.scratch for step in steps)
        """Whether a call may need scratch memory."""
        self._held = tuple(steps)  # tensors among them
        self._library = library
        self._launch = library.functions.dks_gpu_launch
        self._steps = (CStep * len(made))(*made)  # they hold what they point to

    @property
    def steps(self) -> tuple[int, int] | None:
        """Address and number of the ``struct dks_gpu_step``, for who launches without Python; they live as long as
        the plan."""
        return ctypes.addressof(self._steps), len(self._steps)

    @property
    def functions(self) -> tuple[int, int]:
        """Addresses of the library's ``dks_gpu_launch`` and ``dks_gpu_scratch``."""
        found = (self._library.functions.dks_gpu_launch, self._library.functions.dks_gpu_scratch)
        launch, scratch = (int(ctypes.cast(each, ctypes.c_void_p).value or 0) for each in found)
        return launch, scratch

    def settle(self, code: int) -> None:
        """Raise what a code of ``dks_gpu_launch`` means; see ``Library.settle``."""
        self._library.settle(code)

    def __call__(
        self,
        *values: int | float | HasAddress,
        device: int = 0,
        stream: int = 0,
        scratch: tuple[int, int] = (0, 0),
    ) -> None:
        """Launch them.

        Args:
            values: of ``names``; of a tensor its address is meant.
            device: its number.
            stream: its handle; 0 is the default stream.
            scratch: address and bytes of device memory, where ``scratch_bytes`` says that it takes any.

        Raises:
            Declined, ContextLost, LaunchFailed: see ``Library.settle``.
            ValueError: another number of values than of names.
        """
        if code := self._launch(ctypes.byref(self._call(values, device, stream, scratch))):
            self._library.settle(code)

    def load(self, device: int = 0) -> None:
        """Load the kernels, so that no launch has to. Raises as a launch does."""
        call = self._call((0,) * len(self.names), device, 0, (0, 0))
        self._library.settle(self._library.functions.dks_gpu_load(ctypes.byref(call)))

    def scratch_bytes(self, *values: int | float | HasAddress, device: int = 0) -> int:
        """Bytes of scratch memory that such a call needs; 0 for most programs. Raises as a launch does."""
        call = self._call(values, device, 0, (0, 0))
        found = int(self._library.functions.dks_gpu_scratch(ctypes.byref(call)))
        self._library.settle(-found if found < 0 else 0)
        return found

    def _call(
        self, values: Sequence[int | float | HasAddress], device: int, stream: int, scratch: tuple[int, int]
    ) -> CCall:
        if len(values) != len(self.names):
            raise ValueError(f"found {len(values)} values, expected {len(self.names)}: {', '.join(self.names)}")
        bits = [
            _bits(value, real) if isinstance(value, (int, float)) else value.data_ptr()
            for value, real in zip(values, self.floats, strict=True)
        ]
        slots = (ctypes.c_int64 * len(bits))(*bits)
        address, size = scratch
        return CCall(self._steps, slots, address, stream, size, len(self._steps), len(bits), device)


def _bits(value: int | float, real: bool) -> int:
    """A number as a slot holds it."""
    if real:
        return int.from_bytes(struct.pack("<f", value), "little")
    if isinstance(value, float):
        raise ValueError(f"found {value}, expected a whole number")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"found {value}, expected a number of 64 bits")
    return value


def described(cubin: Cubin) -> list[tuple[str, int, int]]:
    """Name, type and divisor of each input, as ``struct dks_gpu_input`` has them: what only the grid names last."""
    found = [
        (each.name, TYPE_CODES.get(each.type, TYPE_CODES["*"]), divisor)
        for each, divisor in zip(cubin.arguments, cubin.divisors(), strict=True)
    ]
    return found + [(name, TYPE_CODES["i64"], 1) for name in cubin.inputs()[len(found) :]]


def _in_c(cubin: Cubin) -> tuple[CCubin, object]:
    """Its description, and what that points to."""
    found = [CInput(name.encode(), type_, divisor) for name, type_, divisor in described(cubin)]
    inputs = (CInput * len(found))(*found)
    index = {name: i for i, name in enumerate(cubin.inputs())} | {"": -1}
    axes = [(CFactor * len(axis))(*(CFactor(size, index[name]) for name, size in axis)) for axis in cubin.grid]
    elf = ctypes.create_string_buffer(cubin.elf, len(cubin.elf))
    made = CCubin(
        *(text.encode() for text in (cubin.symbol, cubin.program, cubin.function)),
        ctypes.addressof(elf),
        inputs,
        *(ctypes.cast(axis, _FACTORS) for axis in axes),
        *(len(cubin.arguments), len(inputs), *map(len, axes)),
        *(cubin.arch, cubin.warps, cubin.shared, cubin.resident, cubin.scratch, cubin.scratch_align),
    )
    return made, (inputs, axes, elf)


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    call, text, number = ctypes.POINTER(CCall), ctypes.c_char_p, ctypes.c_int32
    for name, result, arguments in (
        ("open", number, (text, text, ctypes.c_size_t)),
        ("device_of", number, (number, ctypes.POINTER(CDevice))),
        ("embedded", ctypes.POINTER(CCubin), (ctypes.POINTER(number),)),
        ("add", ctypes.c_void_p, (ctypes.POINTER(CCubin),)),
        ("load", number, (call,)),
        ("scratch", ctypes.c_int64, (call,)),
        ("launch", number, (call,)),
        ("text", None, (number, text, ctypes.c_size_t)),
    ):
        function = getattr(library, f"dks_gpu_{name}")
        function.argtypes, function.restype = arguments, result
    return library
