"""From tensors to launches: where each number of a call comes from, and what is allocated for it.

A kernel says it as data, a ``Recipe``, and ``bound`` makes a function of tensors of it: compiled where the process
has the fast path (``native/gpu_kernel.hpp``), else in Python. Both launch through ``gpu/launch.py``'s library.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dks.dispatch import native
from dks.dispatch.gpu import library
from dks.dispatch.gpu.launch import Misaligned, Plan
from dks.dispatch.gpu.program import Program
from dks.dispatch.kernel import Declined, Launch, Output


@dataclass(frozen=True, slots=True)
class Source:
    """Where a number comes from when a call is made.

    Attributes:
        kind: ``input`` or ``buffer``, whose address; ``size`` or ``stride`` of an input, in elements; ``rows`` of
            an input, its elements over those of its last dim; ``number``, an input that is one;
            ``buffer_stride``, in elements; ``constant``, the same in every call.
        index: of the input or buffer.
        dim: of sizes and strides; negative ones count from the last.
        default: of a ``number`` that is None in a call; the ``constant``.
    """

    kind: str
    index: int
    dim: int = 0
    default: float = 0.0


KINDS = ("input", "buffer", "size", "stride", "rows", "number", "buffer_stride", "constant")
"""In the order of ``enum Kind`` of ``native/gpu_kernel.hpp``."""


def given(index: int) -> Source:
    """The address of an input."""
    return Source("input", index)


def buffer(index: int) -> Source:
    """The address of a buffer."""
    return Source("buffer", index)


def size(index: int, dim: int) -> Source:
    """Of an input, in elements."""
    return Source("size", index, dim)


def stride(index: int, dim: int) -> Source:
    """Of an input, in elements; 0 where the dim has one element: whatever a tensor says there means nothing."""
    return Source("stride", index, dim)


def buffer_stride(index: int, dim: int) -> Source:
    """The same of a buffer."""
    return Source("buffer_stride", index, dim)


def rows(index: int) -> Source:
    """Elements of an input over those of its last dim."""
    return Source("rows", index)


def number(index: int, default: float) -> Source:
    """An input that is a number, or None for the default."""
    return Source("number", index, 0, default)


Value = Source | torch.Tensor | int | float
"""Of an argument: a number of each call, or one for all; a tensor's address. An address of 0 is a null pointer."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory that a call allocates, in one piece, on its first input's device.

    Attributes:
        like: the input that has its leading dims.
        last: size of its last dim in the place of the input's; None for that very size, 0 to leave the dim out.
        leading: False for a buffer of ``last`` elements and no other dims.
        dtype: name of its elements' dtype, as torch has it; the input's where empty.
        returned: whether it is an output; else it is free again when the call has been launched, which is safe,
            since what uses the memory next runs on the same stream.
        swapped: whether its dims 1 and 2 lie in memory the other way round; else it is contiguous.
    """

    like: int = 0
    last: int | None = None
    dtype: str = ""
    returned: bool = True
    leading: bool = True
    swapped: bool = False


Steps = tuple[tuple[Program, Mapping[str, Value]], ...]
"""What is launched, in order, and the values of the arguments by their names."""


@dataclass(frozen=True, slots=True)
class Function:
    """A C function of a library that launches by itself, after the programs of a recipe.

    It is ``int run(const void* constant, const int64_t* values)``: 0, or a code that ``settle`` knows. The values
    are those named here, then address and bytes of its workspace, the stream's handle and the device's number.
    ``int64_t workspace(constant, values)`` is asked before anything is launched: bytes, or minus a code.

    Attributes:
        run, workspace: their addresses.
        constant: the address of what stays the same from call to call.
        values: an address, or a whole number.
        settle: raises what a code means. 1 is a call outside of the alignment class: nothing was launched.
        keep: what must live as long: tensors and libraries that addresses point to.
    """

    run: int
    workspace: int
    constant: int
    values: tuple[Source | int, ...]
    settle: Callable[[int], None]
    keep: object = None


MISALIGNED = 1
"""The code of a ``Function`` outside of its alignment class."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A call.

    Attributes:
        inputs: of each argument: the name of its dtype as torch has it; ``number`` for a number or None; ``none``
            where it must be None.
        steps: what is launched.
        buffers: in the order in which outputs are returned.
        most: numbers of the inputs, and what each may be at most for the programs to be right.
        function: what is launched last.
    """

    inputs: tuple[str, ...]
    steps: Steps
    buffers: tuple[Buffer, ...]
    most: tuple[tuple[Source, int], ...] = ()
    function: Function | None = None

    @property
    def programs(self) -> tuple[Program, ...]:
        """What it launches."""
        return tuple(program for program, _ in self.steps)


DEVICE = "cuda"
"""Kind of device that tensors must lie on."""


def bound(recipe: Recipe, *otherwise: Recipe, device: torch.device | str | None = None) -> Launch:
    """run(*inputs) -> the outputs, enqueued on the inputs' device's current stream.

    The code is loaded here, so that no request waits for that: onto ``device``, and onto another of its kind with
    the first call there.

    Args:
        otherwise: of the same inputs and outputs; the first of them that can is launched where a call is outside
            the alignment class of the recipe's programs, or beyond what they take at most.
        device: the current one of its kind, where it has no number; ``DEVICE`` where None. All tensors of a call
            must lie on one device of this kind.

    Raises:
        Missing: a program has no compiled form here.
        Declined, ContextLost, LaunchFailed: the code can't be loaded; see ``launch.Library.settle``.
    """
    device = torch.device(device or DEVICE)
    second = bound(*otherwise, device=device) if otherwise else None
    plan, sources = planned(recipe)
    if device.type == "cuda" and plan is not None:
        plan.load(torch.cuda.current_device() if device.index is None else device.index)
    if native.module is not None and (plan is None or plan.steps is not None):
        made: Launch = _native(recipe, sources, plan, second, device.type)
        return made
    return _Python(recipe, sources, plan, second, device.type)


def planned(recipe: Recipe) -> tuple[Plan | None, tuple[Source, ...]]:
    """The plan of a recipe's programs, and where each of the numbers that it must be told comes from. Raises
    Missing."""
    if not recipe.steps:
        return None, ()
    named: dict[str, Source] = {}
    steps = []
    for program, values in recipe.steps:
        values_of: dict[str, int | float | str | torch.Tensor] = {}
        for name, value in values.items():
            if isinstance(value, Source):
                values_of[name] = _name(value)
                named[_name(value)] = value
            else:
                values_of[name] = value
        steps.append((program, values_of))
    plan = library.plan(steps)
    return plan, tuple(named[name] for name in plan.names)


def _name(source: Source) -> str:
    return f"{source.kind} {source.index} {source.dim} {source.default!r}"


def current_stream(device: torch.device) -> int:
    """The handle of PyTorch's current stream on a device; 0 on one that has none."""
    if device.type != "cuda":
        return 0
    return int(torch._C._cuda_getCurrentRawStream(device.index))


class _Python:
    """The call where no compiled fast path is loaded."""

    def __init__(
        self,
        recipe: Recipe,
        sources: tuple[Source, ...],
        plan: Plan | None,
        second: Launch | None,
        device: str,
    ) -> None:
        self._recipe, self._plan = recipe, plan
        self._second, self._device = second, device
        self._most = tuple((_READERS[source.kind], source, most) for source, most in recipe.most)
        self._sources, self._values = sources, _sources(recipe.function)
        if recipe.function is not None:
            self._run = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER)(recipe.function.run)
            self._needs = ctypes.CFUNCTYPE(ctypes.c_int64, _POINTER, _POINTER)(recipe.function.workspace)

    def __call__(self, *inputs: Any) -> Output:
        inputs += (None,) * (len(self._recipe.inputs) - len(inputs))
        self._check(inputs)
        for read, source, most in self._most:
            if read(source, inputs, ()) > most:
                if self._second is None:
                    raise Declined(f"a {source.kind} above {most}, which is the most that the programs take")
                return self._second(*inputs)
        buffers = [_made(each, inputs) for each in self._recipe.buffers]
        function = self._recipe.function
        try:
            # What may refuse the call is asked before anything is launched.
            ready = None if function is None else self._ready(function, inputs, buffers)
            if self._plan is not None:
                self._launch(self._plan, inputs, buffers)
        except Misaligned:
            if self._second is None:
                raise
            return self._second(*inputs)
        if function is not None and ready is not None:
            function.settle(self._run(function.constant, ready[0]))
        outputs = tuple(t for t, each in zip(buffers, self._recipe.buffers, strict=True) if each.returned)
        return outputs[0] if len(outputs) == 1 else outputs

    def _launch(self, plan: Plan, inputs: Sequence[Any], buffers: Sequence[torch.Tensor]) -> None:
        device = inputs[0].device
        values = [_READERS[source.kind](source, inputs, buffers) for source in self._sources]
        index = device.index or 0
        scratch, room = (0, 0), None
        if plan.scratches and (needed := plan.scratch_bytes(*values, device=index)):
            room = torch.empty(needed, dtype=torch.uint8, device=device)
            scratch = (room.data_ptr(), needed)
        plan(*values, device=index, stream=current_stream(device), scratch=scratch)

    def _ready(
        self, function: Function, inputs: Sequence[Any], buffers: Sequence[torch.Tensor]
    ) -> tuple[ctypes.Array[ctypes.c_int64], torch.Tensor | None]:
        """Its values, and the workspace that they point to."""
        device = inputs[0].device
        found = (_READERS[source.kind](source, inputs, buffers) for source in self._values)
        values = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in found]
        own = (ctypes.c_int64 * (len(values) + 4))(*values, 0, 0, current_stream(device), device.index or 0)
        needed = self._needs(function.constant, own)
        if needed < 0:
            function.settle(-needed)
        room = torch.empty(needed, dtype=torch.uint8, device=device) if needed > 0 else None
        if room is not None:
            own[len(values)], own[len(values) + 1] = room.data_ptr(), needed
        return own, room

    def _check(self, inputs: Sequence[Any]) -> None:
        """Raises Declined where they are not what the recipe takes, or not on one device."""
        device: torch.device | None = getattr(inputs[0], "device", None)
        for position, (kind, value) in enumerate(zip(self._recipe.inputs, inputs, strict=True)):
            if kind == "number" or (kind == "none" and value is None):
                continue
            fits = isinstance(value, torch.Tensor) and value.dtype is getattr(torch, kind, None)
            strided = fits and value.layout is torch.strided
            if not strided or device is None or value.device != device or device.type != self._device:
                raise Declined(f"argument {position}: of another dtype, or not on the first one's device")


def _sources(function: Function | None) -> tuple[Source, ...]:
    """Of each of its values."""
    values = () if function is None else function.values
    return tuple(each if isinstance(each, Source) else Source("constant", 0, 0, _exact(each)) for each in values)


def _exact(value: int) -> float:
    if int(float(value)) != value:
        raise ValueError(f"found {value}, expected a whole number that a double holds; addresses are constants")
    return float(value)


def _made(each: Buffer, inputs: Sequence[Any]) -> torch.Tensor:
    like: torch.Tensor = inputs[each.like]
    leading = like.shape[:-1] if each.leading else ()
    shape = [*like.shape] if each.last is None else [*leading, *([each.last] if each.last else [])]
    swaps = each.swapped and len(shape) > 2
    if swaps:
        shape[1], shape[2] = shape[2], shape[1]
    made = like.new_empty(shape, dtype=getattr(torch, each.dtype) if each.dtype else like.dtype)
    return made.transpose(1, 2) if swaps else made


def _rows(t: torch.Tensor) -> int:
    return math.prod(t.shape[:-1])


def _stride(t: torch.Tensor, dim: int) -> int:
    return t.stride(dim) if t.shape[dim] != 1 else 0


_Read = Callable[[Source, Sequence[Any], Sequence[torch.Tensor]], Any]
_READERS: Mapping[str, _Read] = {
    "input": lambda source, inputs, _: inputs[source.index],
    "buffer": lambda source, _, buffers: buffers[source.index],
    "size": lambda source, inputs, _: inputs[source.index].shape[source.dim],
    "stride": lambda source, inputs, _: _stride(inputs[source.index], source.dim),
    "rows": lambda source, inputs, _: _rows(inputs[source.index]),
    "number": lambda source, inputs, _: source.default if inputs[source.index] is None else inputs[source.index],
    "buffer_stride": lambda source, _, buffers: _stride(buffers[source.index], source.dim),
    "constant": lambda source, *_: int(source.default),
}
_POINTER = ctypes.c_void_p

_DEVICES = {"cpu": 1, "cuda": 2}
_CODES = {
    **{"bool": (6, 8), "uint8": (1, 8), "int8": (0, 8), "int32": (0, 32), "int64": (0, 64)},
    **{"float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16), "float8_e4m3fn": (10, 8)},
    **{"number": (-1, 0), "none": (-2, 0)},
}
"""DLPack's (code, bits) of inputs; of those that are no tensors, ``native/gpu_kernel.hpp``'s."""


def _native(
    recipe: Recipe,
    sources: tuple[Source, ...],
    plan: Plan | None,
    second: Launch | None,
    device: str,
) -> Any:
    assert native.module is not None
    inputs = tuple(_CODES[kind] for kind in recipe.inputs)
    own_sources = _sources(recipe.function)
    floats = (*(() if plan is None else plan.floats), *(False for _ in own_sources))
    slots = tuple(_slot(*each) for each in zip((*sources, *own_sources), floats, strict=True))
    most = tuple((_slot(source, False), number) for source, number in recipe.most)
    buffers = tuple(
        (
            each.like,
            -1 if each.last is None else each.last,
            getattr(torch, each.dtype) if each.dtype else None,
            each.returned,
            each.leading,
            each.swapped,
        )
        for each in recipe.buffers
    )
    program: tuple[int, ...] = (0, 0, 0, 0)
    settle = function = None
    if plan is not None and plan.steps is not None:
        launch, scratch = plan.functions
        program = (launch, scratch if plan.scratches else 0, *plan.steps)
        settle = plan.settle
    if (own := recipe.function) is not None:
        function = (own.run, own.workspace, own.constant, len(own.values), own.settle)
    keep = (plan, own)
    return native.module.GpuKernel(
        _DEVICES[device], inputs, slots, buffers, most, program, function, second, settle, keep
    )


def _slot(source: Source, real: bool) -> tuple[int, int, int, float, bool]:
    return KINDS.index(source.kind), source.index, source.dim, source.default, real


def steps(programs: Sequence[Program], values: Mapping[str, Value]) -> Steps:
    """Programs with those of the values that each of them names."""
    found = []
    for each in programs:
        named = {argument.name for argument in each.arguments}
        named |= {name for axis in each.grid for name, _ in axis if name}
        found.append((each, {name: values[name] for name in values if name in named}))
    return tuple(found)
