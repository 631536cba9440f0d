"""What a kernel and an operator declare about themselves: the one place where either is described.

A kernel is one small file in its operator's folder that ends in ``KERNEL = Kernel(...)``; an operator is one
folder under ``dks/dispatch/ops``. The profiler measures, and the code generator selects, what is declared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dks.dispatch.gpu.cutlass.configuration import Configuration
from dks.dispatch.gpu.program import Program
from dks.dispatch.problem import Candidate, Precision, Problem
from dks.dispatch.tiles.unit import Unit

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Params = tuple[tuple[str, int], ...]
"""Names and values of one parameter set."""

Output = torch.Tensor | tuple[torch.Tensor, ...]
"""What an operator returns: a tensor, or several where its traits ask for more than one."""

Launch = Callable[..., Output]
"""Takes the operator's dynamic arguments, returns its output; the constant arguments are bound inside.

It must not write to its arguments, and no tensor of its output shares memory with anything. It raises
``Declined`` for values that it would get wrong."""

Run = Callable[..., torch.Tensor]
"""A ``Launch`` whose output is one tensor."""


def parts(output: Output) -> tuple[torch.Tensor, ...]:
    """The tensors of an output."""
    return output if isinstance(output, tuple) else (output,)


class Declined(Exception):
    """A kernel's answer to values outside its domain: the framework serves this call, the kernel the next."""


def always(*_: object) -> None:
    """The answer "no objection" of ``supports`` and ``unavailable``."""
    return None


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of one call: those that stay for the life of a model, and those that come with a request."""

    static: tuple[Any, ...]
    dynamic: tuple[Any, ...]


class Late:
    """The ``bind`` of a kernel that is told its constant arguments with each call, which is sooner than to bind.

    ``launch`` (problem, params) makes a function of the dynamic arguments and then the constant ones. That function
    serves calls without preparation, and it is what a sweep checks and times, with the constants behind.
    """

    def __init__(self, launch: Callable[[Problem, Params], Launch]) -> None:
        self.launch, self.__module__ = launch, launch.__module__

    def __call__(self, problem: Problem, params: Params, *constants: Any) -> Launch:
        run = self.launch(problem, params)
        held = [t.detach().contiguous() if isinstance(t, torch.Tensor) else t for t in constants]
        return lambda *dynamic: run(*dynamic, *held)


@dataclass(frozen=True)
class Kernel:
    """One way to compute an operator.

    Attributes:
        id: ``library.name``; unique in the pool.
        op: the operator it computes.
        precision: class of its arithmetic, by the activations' dtype; its keys are the dtypes it takes.
        bind: (problem, params, *static arguments) -> Launch. Packs weights where the kernel wants another
            form; may read the problem's traits and static dims, never a dynamic dim, so that one bound
            form serves all bins.
        form: the weight form that ``bind`` makes, in words; empty where it uses the caller's tensors as
            they are, and then the kernel can also serve a call without preparation, by binding at each call or,
            where ``bind`` is a ``Late``, once.
        form_bytes: bytes that the form adds, for a problem.
        reads_in_place: whether its form is only where the constant arguments lie, so that it sees what is written
            to them later.
        params: the parameter sets to measure; each makes one candidate.
        unit: the generated C++ function that a candidate runs, where it runs one.
        header: the file in ``dks/dispatch/tiles`` that such functions are made from.
        programs: the Triton programs that a candidate launches, where it launches any.
        sources: the files in ``dks/dispatch/gpu/kernels`` that they are in.
        files: other files in ``dks/dispatch/gpu`` that decide what it does.
        configuration: the CUTLASS kernel that a candidate runs, where it runs one; after its programs.
        search: asks its library, on the current device, which parameter sets to measure for a problem; its
            candidate without parameters stands for them in a sweep, and is measured nowhere.
        align: bytes to which it needs every pointer and row stride aligned; 0 means the element's size. Not among
            them are masks, block tables, lengths, positions, targets and losses, aligned to their own elements
            alone, and the distance of softmax's rows, which comes with a call. The halves of silu_and_mul's rows
            and of rotary's heads are rows.
        supports: why it can't take a problem, or None.
        suits: why one parameter set can't be meant for a problem, or None. It is not measured there, though it
            would be right.
        unavailable: why this machine can't run it, or None.
        rank: simplicity; a tie goes to the lowest. The framework's own kernel is 0.
        searches: what its library may search, compile or download while it serves, such as an autotuner or a
            just-in-time compiler; empty where it does nothing of the kind. Strict mode refuses it.
        devices: kinds of device that it runs on, ``cpu`` and ``cuda``; see ``runs_on`` for what empty means.
        batch_invariant: (params) -> whether the bits of a row's result depend on the row alone: not on the other
            rows, nor on how many there are, nor on its place. A sweep checks it; see ``Operator.take``.
    """

    id: str
    op: str
    precision: Mapping[str, Precision]
    bind: Callable[..., Launch]
    form: str = ""
    form_bytes: Callable[[Problem], int] = lambda _: 0
    reads_in_place: bool = False
    params: tuple[Params, ...] = ((),)
    unit: Callable[[Problem, Params], Unit] | None = None
    header: str = ""
    programs: Callable[[Problem, Params], tuple[Program, ...]] | None = None
    sources: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    configuration: Callable[[Problem, Params], Configuration] | None = None
    search: Callable[[Problem], tuple[Params, ...]] | None = None
    align: int = 0
    supports: Callable[[Problem], str | None] = always
    suits: Callable[[Problem, Params], str | None] = always
    unavailable: Callable[[], str | None] = always
    rank: int = 1
    searches: str = ""
    devices: tuple[str, ...] = ()
    batch_invariant: Callable[[Params], bool] = lambda _: False

    @property
    def unprepared(self) -> Callable[[Problem, Params], Launch] | None:
        """What serves a call without preparation, where that is not ``bind`` at each call: see ``Late``."""
        return self.bind.launch if isinstance(self.bind, Late) else None

    def runs_on(self, device: str) -> bool:
        """Whether it is meant for a kind of device, ``cpu`` or ``cuda``.

        Where it does not say, one that takes the caller's tensors as they are and compiles nothing is made of
        PyTorch's operators, which run where their tensors lie; any other runs on a CPU.
        """
        if self.devices:
            return device in self.devices
        return device == "cpu" or not (self.form or self.unit)

    @property
    def keeps_values(self) -> bool:
        """Whether what it binds holds values of the constant arguments, which later writes to them do not reach."""
        return bool(self.form) and not self.reads_in_place

    def candidates(self) -> list[Candidate]:
        """One candidate for each parameter set."""
        return [Candidate(self.id, params) for params in self.params]

    def alignment_for(self, dtype: str) -> int:
        """Required alignment in bytes for these activations; see ``align``."""
        return self.align or DTYPES[dtype].itemsize

    def objection(self, problem: Problem) -> str | None:
        """Why this kernel can't serve ``problem`` (dtype, alignment, its own limits), or None."""
        dtype = problem.trait("dtype")
        if dtype not in self.precision:
            return f"takes {' and '.join(self.precision)}, not {dtype}"
        if problem.align < self.alignment_for(dtype):
            return f"needs {self.alignment_for(dtype)}-byte alignment, the problem has {problem.align}"
        return self.supports(problem)


def take_rows(dynamic: tuple[Any, ...], first: int, end: int) -> tuple[Any, ...]:
    """Rows first..end of every tensor among the dynamic arguments of a call."""
    return tuple(each[first:end] if isinstance(each, torch.Tensor) else each for each in dynamic)


@dataclass(frozen=True)
class Operator:
    """An operator: its dims and traits, how to make a problem's inputs, and what the right answer is.

    Attributes:
        name: as users call it.
        dims: dims of a problem, in order; names in ``dynamic`` fall in bins, the others match exactly.
        dynamic: the dims that change with traffic.
        traits: allowed values of each trait; the first is what is meant where nothing is said.
        default: id of the framework's own kernel, always a candidate.
        make_inputs: (problem, generator, draw) -> Inputs, in the strides and alignment the problem names;
            ``draw`` is one of DRAWS, and makes the rows of the output as different as it says.
        reference: (problem, inputs) -> the output in float64.
        max_align: (problem) -> the best alignment in bytes that the strides of its dims allow.
        key_bytes: (problem) -> bytes of the constant arguments, which a sweep rotates to keep caches cold.
        server: (runtime) -> the object that serves this operator; see ``dks.dispatch.runtime``.
        odd_dims: (static dims) -> what is wrong with them together, or None.
        batch: the dynamic dim that counts rows which have nothing to do with each other.
        take: (dynamic arguments, first, end) -> those of these rows along ``batch`` alone, as views. By default it
            is the first dim of every tensor.
    """

    name: str
    dims: tuple[str, ...]
    dynamic: tuple[str, ...]
    traits: Mapping[str, tuple[str, ...]]
    default: str
    make_inputs: Callable[[Problem, torch.Generator, str], Inputs]
    reference: Callable[[Problem, Inputs], Output]
    max_align: Callable[[Problem], int]
    key_bytes: Callable[[Problem], int]
    server: Callable[[Any], Any]
    odd_dims: Callable[[Mapping[str, int]], str | None] = always
    batch: str = "m"
    take: Callable[[tuple[Any, ...], int, int], tuple[Any, ...]] = take_rows

    @property
    def static(self) -> tuple[str, ...]:
        """The dims that must match exactly."""
        return tuple(name for name in self.dims if name not in self.dynamic)


DRAWS = ("normal", "outliers", "rows")
"""``normal``: unit Gaussian. ``outliers``: the same with one feature in 64 made 20 times larger, as
activations of transformers have them (Dettmers et al., LLM.int8(), 2022). ``rows``: rows of very different sizes,
one of them massive, as the first token of a language model is (Sun et al., Massive Activations, 2024). Kernels that
quantise activations pass the first and may fail the others, so a candidate's error is the largest of all."""

MASSIVE = 1000.0
"""Size of the one massive row of the draw ``rows``; the others are spread from 0.01 to 100."""

SHORT = 16
"""Numbers of a row below which its own size says little: it may be near zero by cancellation."""


PERIOD = 4_194_301
"""Of drawn numbers: a prime, so that no two rows or columns of a large tensor are alike."""


def draw_normal(
    shape: tuple[int, ...], generator: torch.Generator, over: float = 1.0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Normal numbers of ``shape``, drawn in float32 and divided by ``over``; they repeat after ``PERIOD`` of them:
    drawing a large weight, as each check does, would take longer than all that is done with it."""
    count = math.prod(shape)
    drawn = torch.randn((min(count, PERIOD),), generator=generator).div_(over).to(dtype)
    return drawn.repeat(-(-count // PERIOD))[:count].view(shape) if count > PERIOD else drawn.view(shape)


def row_sizes(count: int, draw: str, power: float = 1.0) -> torch.Tensor:
    """Float32 sizes (count,) of rows, to be multiplied with them: equal in all draws but ``rows``.

    They depend on ``count`` alone, so that other values of the same sizes can be drawn.

    Args:
        power: what the sizes are raised to; 0.5 when the rows' numbers are multiplied with each other, which would
            overflow float16.
    """
    if draw != "rows":
        return torch.ones(count)
    sizes = 10.0 ** (torch.arange(1, count + 1, dtype=torch.float64) * 0.6180339887 % 1.0 * 4.0 - 2.0)
    sizes[count // 3 : count // 3 + 1] = MASSIVE  # neighbours on both sides
    return (sizes**power).float()


def draw_activations(
    shape: tuple[int, int], generator: torch.Generator, draw: str, mean: float = 0.0, power: float = 1.0
) -> torch.Tensor:
    """Float32 activations of ``shape`` (rows, features) around ``mean``; see DRAWS and ``row_sizes``."""
    x = draw_normal(shape, generator)
    if draw == "outliers":
        x[..., ::64] *= 20.0
    return (x + mean) * row_sizes(shape[0], draw, power)[:, None]


def aligned(tensor: torch.Tensor, align: int) -> torch.Tensor:
    """A contiguous copy whose address is divisible by ``align`` and by no larger power of two up to 64.

    ``align`` is in bytes and at least the element's size; 64 means 64 or better.
    """
    spare = 128 // tensor.element_size()
    storage = torch.empty(tensor.numel() + spare, dtype=tensor.dtype)
    wanted = 0 if align >= 64 else align
    offset = (wanted - storage.data_ptr()) % 64 // tensor.element_size()
    view = storage[offset : offset + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def row_length(shape: torch.Size) -> int:
    """Numbers of a row of an output: its last dim; one where it is the only dim, as of losses."""
    return shape[-1] if len(shape) > 1 else 1


def relative_error(y: Output, reference: Output) -> float:
    """The worst row's ||y - reference|| / ||reference|| in float64; NaN where y has NaN, inf where shapes differ.

    A row of fewer than SHORT numbers is held against all rows' size if that is larger. Of several tensors the
    largest error, with NaN above all.
    """
    errors = [_relative_error(*pair) for pair in zip(parts(y), parts(reference), strict=True)]
    return next((error for error in errors if math.isnan(error)), max(errors))


def _relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    if y.shape != reference.shape:
        return float("inf")
    if not reference.numel():
        return 0.0
    n = row_length(reference.shape)
    wanted = reference.reshape(-1, n)
    norm = torch.linalg.vector_norm(wanted, dim=1)
    usual = norm.square().mean().sqrt()
    norm = norm.clamp_min(usual) if n < SHORT else torch.where(norm > 0, norm, usual)
    error = torch.linalg.vector_norm(y.reshape(-1, n).double() - wanted, dim=1)
    return float((error / torch.where(norm > 0, norm, 1.0)).max())
