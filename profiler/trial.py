"""Single calls of a kernel, watched: what it returns, when that changes, and what it does to its arguments."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from dks.dispatch import pool
from dks.dispatch.gpu.launch import ContextLost
from dks.dispatch.kernel import DTYPES, Declined, Launch
from dks.dispatch.problem import Precision, Problem
from dks.profiler.draws import FLUSHED, NOT_FINITE, SCALED, Lent, Slot, same
from dks.profiler.gaps import FEW, Gap, gap, gap_beside_non_finite

POISONED_NUMEL = 2**20  # of an output: larger blocks go back to the system, and come back as zeros
SETTLE_S = 0.001  # time given to work that was hidden on another thread
NOBODY = Gap(math.inf, math.inf, math.inf, math.inf)  # allowed where the framework itself is wrong


HARMLESS = (
    "out of memory",
    "invalid argument",
    "invalid configuration",
    "invalid device function",
    "invalid resource handle",
    "no kernel image",
    "too many resources requested",
    "not supported",
    "captur",
    "CUBLAS_STATUS_NOT_SUPPORTED",
    "CUBLAS_STATUS_INVALID_VALUE",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""In the errors of CUDA after which a process goes on."""

Tensors = tuple[torch.Tensor, ...]


class Rejected(Exception):
    """A candidate is out: its status and the reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass
class Draw:
    """Values of one call and what the answer must be; shared by all candidates.

    Attributes:
        kind: one of DRAWS, or a name in SCALED or NOT_FINITE.
        images: bytes for each slot of its case.
        reference: in float64, each tensor of the output.
        allowed: for each of them, errors that are the framework's as well; NOBODY where nobody is to be judged
            by this draw.
        unfit: classes whose own noise changes the answer; finite where it should be is then enough.
        usual: of each tensor, the root mean square that each of its rows usually has; None where rows are alike.
    """

    kind: str
    images: list[torch.Tensor]
    reference: tuple[torch.Tensor, ...]
    allowed: tuple[Gap | None, ...] = ()
    unfit: frozenset[Precision] = frozenset()
    usual: tuple[torch.Tensor | None, ...] = ()

    @property
    def extreme(self) -> bool:
        """Whether the values are so large, small or few that the framework itself may be at a loss."""
        return self.kind in SCALED or self.kind in NOT_FINITE

    @property
    def may_be_declined(self) -> bool:
        """Whether a kernel may decline these values: the framework then serves such calls."""
        return self.extreme or self.kind == "rows"

    @property
    def ignored(self) -> float:
        """Absolute error that counts as none."""
        return FLUSHED if self.kind == "subnormal" else 0.0

    def __str__(self) -> str:
        if self.kind == "rows":
            return "rows of very different sizes"
        return f"{self.kind} values" if self.extreme else f"{self.kind} data"


@dataclass(frozen=True, slots=True)
class _Judged:
    """One tensor of an output, and what it is judged by; see ``Draw``, ``Trial`` and ``gap``."""

    y: torch.Tensor
    reference: torch.Tensor
    least: float
    allowed: Gap | None
    usual: torch.Tensor | None


@dataclass
class Case:
    """One problem at one address: the arguments of a call, and the draws that fill them."""

    problem: Problem
    slots: Sequence[Slot]
    args: tuple[Any, ...]
    draws: list[Draw]

    def load(self, draw: Draw) -> None:
        """Fill the arguments, in place."""
        for slot, image in zip(self.slots, draw.images, strict=True):
            slot.load(image)


class Trial:
    """One bound kernel under test.

    Args:
        run: the kernel.
        precision: its class for these activations.
        dtype: name of the activations' dtype, which the output must have.
        least: root mean square of each tensor of its output on normal data; see ``gap``.
        static: its constant arguments, watched.
    """

    def __init__(
        self,
        run: Launch,
        precision: Precision,
        dtype: str,
        least: tuple[float, ...],
        static: Sequence[Slot | Lent],
    ) -> None:
        self._run = run
        self._precision = precision
        self._dtype = DTYPES[dtype]
        self._least = least
        self._static = static
        self._kept: list[tuple[Tensors, Tensors, str]] = []
        self._right: dict[int, Tensors] = {}
        self.declined: set[str] = set()
        """Kinds of draws that the kernel declined."""

    def call(self, case: Case, draw: Draw, judge: bool = True) -> Tensors:
        """Run once on ``draw``; the output stays alive, and must stay as it was returned, until ``settle``.

        Returns:
            A copy of the output's tensors, made at once.

        Raises:
            Rejected: the call failed, or what it returned or did is wrong.
        """
        case.load(draw)
        where = f"on {draw}, {_sizes(case.problem)}"
        for part in draw.reference:
            _poison(part, self._dtype)
        try:
            output = self._run(*case.args)
        except Declined as why:
            if draw.may_be_declined:
                self.declined.add(draw.kind)
                return tuple(torch.full_like(part, math.nan, dtype=self._dtype) for part in draw.reference)
            raise Rejected("failed", f"declined {where}: {why}") from None
        except BaseException as error:
            rejected(error, f" {where}")
        ys = self._fresh_tensors(output, draw, case.slots, where)
        copy = tuple(y.clone() for y in ys)
        expect_untouched([*case.slots], where)
        if self._kept and not all(map(same, *self._kept[-1][:2])):
            raise Rejected("wrong_result", f"a call overwrote the output of the one before, {self._kept[-1][2]}")
        self._kept.append((ys, copy, where))
        if judge:
            self.judge(case, draw, copy)
        return copy

    def judge(self, case: Case, draw: Draw, ys: Tensors, *, strict_total: bool = False) -> float:
        """Compare an output with its reference, tensor by tensor.

        Args:
            strict_total: whether the total error must be inside the class's limit, to the letter; else it is
                given what chance and the framework's own error take.

        Returns:
            The error of the worst row, ||y - reference|| / ||reference||; 0 where there was nothing to compare.

        Raises:
            Rejected: the class does not allow the gap.
        """
        known = self._right.get(id(draw))
        if known is not None and equal(ys, known):
            return 0.0
        where = f"on {draw}, {_sizes(case.problem)}"
        usual = draw.usual or (None,) * len(ys)
        judged = zip(ys, draw.reference, self._least, draw.allowed, usual, strict=True)
        worst = [
            self._judge_one(draw, _Judged(*each), strict_total, _named(i, ys) + where)
            for i, each in enumerate(judged)
        ]
        self._right[id(draw)] = ys
        return max(worst)

    def _judge_one(self, draw: Draw, part: _Judged, strict_total: bool, where: str) -> float:
        if part.allowed is NOBODY:
            return 0.0
        # Infinity less infinity is NaN by accident; the bf16 attention of torch has numbers there.
        strict = self._precision is Precision.EXACT or draw.kind == "nan"
        if draw.extreme:
            said, found = gap_beside_non_finite(part.y, part.reference, part.least, draw.ignored, strict)
        else:  # its reference is finite
            said, found = "", gap(part.y, part.reference, part.least, draw.ignored, part.usual)
            if draw.kind == "rows":  # columns and the whole are hardly more than their largest row, which is judged
                found = replace(found, column=0.0, total=0.0)
        limit = self._precision.limit
        if strict_total and part.y.numel() >= FEW and not found.total <= limit:
            said = f"error {found.total:.2e}, its class allows {limit:g}"
        elif self._precision in draw.unfit:
            said = said or ("" if math.isfinite(found.total) else "not finite")
        else:
            said = said or found.over(self._precision, part.y.shape, part.allowed)
        if said:
            raise Rejected("wrong_result", f"{said}, {where}")
        return found.row

    def settle(self) -> None:
        """Wait for hidden work; then every output must still be what it was when it was returned."""
        time.sleep(SETTLE_S)
        for ys, copy, where in self._kept:
            if not all(map(same, ys, copy)):
                raise Rejected("wrong_result", f"its output changed after it was returned, {where}")
        self._kept.clear()

    def finish(self) -> None:
        """After the last call: the constant arguments must be what they were. Raises Rejected."""
        expect_untouched(self._static, "")

    def _fresh_tensors(self, output: object, draw: Draw, slots: Sequence[Slot], where: str) -> Tensors:
        """The tensors of an output, each of them sound and with memory of its own."""
        if len(draw.reference) == 1:
            output = (output,)
        elif type(output) is not tuple or len(output) != len(draw.reference):
            expected = f"expected a tuple of {len(draw.reference)} tensors"
            raise Rejected("wrong_result", f"its output: found {type(output).__name__}, {expected}, {where}")
        found: list[torch.Tensor] = []
        for i, (y, right) in enumerate(zip(output, draw.reference, strict=True)):
            self._expect_a_fresh_tensor(y, right, slots, found, _named(i, draw.reference) + where)
            found.append(y)
        return tuple(found)

    def _expect_a_fresh_tensor(
        self, y: object, right: torch.Tensor, slots: Sequence[Slot], beside: Sequence[torch.Tensor], where: str
    ) -> None:
        kind = f"{tuple(right.shape)} of {self._dtype} on {right.device}"
        expected = f"expected a torch.Tensor {kind} with memory of its own"
        if type(y) is not torch.Tensor:
            raise Rejected("wrong_result", f"its output: found {type(y).__name__}, {expected}, {where}")
        found = ""
        if y.device != right.device or y.layout is not torch.strided or y._is_zerotensor():
            found = f"device {y.device}, layout {y.layout}"
        elif y.dtype is not self._dtype:
            found = str(y.dtype)
        elif y.shape != right.shape:
            found = f"shape {tuple(y.shape)}"
        elif y.requires_grad or y.is_neg():
            found = "a tensor with work left to do"
        elif any(size > 1 and stride == 0 for size, stride in zip(y.shape, y.stride(), strict=True)):
            found = "elements that share memory"
        else:
            storage = y.untyped_storage()
            low, high = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
            if any(slot.overlaps(low, high) for slot in (*slots, *self._static)):
                found = "memory of an input"
            elif any(_overlap(low, high, other) for other in beside):
                found = "memory of another tensor of the same output"
            elif any(_overlap(low, high, y) for kept, _, _ in self._kept for y in kept):
                found = "memory of an earlier output that is still in use"
        if found:
            raise Rejected("wrong_result", f"its output: found {found}, {expected}, {where}")


def expect_untouched(watched: Sequence[Slot | Lent], where: str) -> None:
    """Raise Rejected where a kernel wrote to an argument or beside it."""
    for each in watched:
        if fault := each.fault():
            raise Rejected("wrong_result", f"{fault} {where}".rstrip())


def rejected(error: BaseException, where: str) -> NoReturn:
    """Turn what a kernel raised into Rejected; a person's interrupt stays one."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    if why := stays(error):
        raise Rejected("crashed", f"{why}{where}") from error
    status = "out_of_memory" if is_out_of_memory(error) else "failed"
    raise Rejected(status, f"{describe(error)}{where}") from error


def describe(error: BaseException) -> str:
    """Type and first line of an error."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in Python or in torch's allocator."""
    text = str(error)
    signs = ("can't allocate", "not enough memory", "Cannot allocate memory", "out of memory", "bad_alloc")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(s in text for s in signs))


def stays(error: BaseException) -> str:
    """The name of an error of a device that ends all work in its process; empty for any other.

    An unknown one is taken for such: what it left undone is not known either.
    """
    text = next(iter(str(error).splitlines()), "")[:200]
    if isinstance(error, ContextLost):
        return text
    of_device = isinstance(error, RuntimeError) and any(
        each in text for each in ("CUDA error", "CUDA driver error")
    )
    return text if of_device and not any(each in text for each in HARMLESS) else ""


def _poison(like: torch.Tensor, dtype: torch.dtype) -> None:
    """Leave blocks of an output's size where it will lie, full of NaN, to whoever allocates next.

    Small blocks come back to a kernel's ``torch.empty``, so what it does not write is NaN. Large ones may
    come fresh from the system, all zero; there only the comparison with new values finds what was not written.
    """
    if like.numel() <= POISONED_NUMEL:
        for block in [torch.full_like(like, math.nan, dtype=dtype) for _ in range(2)]:
            del block


def equal(ys: Tensors, others: Tensors) -> bool:
    """Whether all numbers of two outputs are equal; NaN is not."""
    return all(map(torch.equal, ys, others))


def _named(index: int, outputs: Sequence[object]) -> str:
    """Which of several tensors is meant, before the rest of a message."""
    return f"output {index + 1} of {len(outputs)} " if len(outputs) > 1 else ""


def _overlap(low: int, high: int, other: torch.Tensor) -> bool:
    storage = other.untyped_storage()
    return low < storage.data_ptr() + storage.nbytes() and storage.data_ptr() < high


def _sizes(problem: Problem) -> str:
    dynamic = pool.operator(problem.op).dynamic
    return " ".join(f"{name}={problem.dim(name)}" for name in dynamic) + f"@{problem.align}"
