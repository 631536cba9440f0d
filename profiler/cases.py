"""The inputs of the checks with their references: made once for a weight, and once for a problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dks.dispatch import pool
from dks.dispatch.kernel import SHORT, Inputs, Kernel, Launch, parts, row_length
from dks.dispatch.problem import MAX_ALIGNMENT, Precision, Problem
from dks.profiler.device import moved
from dks.profiler.draws import (
    HOST,
    NOT_FINITE,
    SCALED,
    Slot,
    flipped,
    has_values,
    noisy,
    place,
    redrawn,
    tensors,
)
from dks.profiler.gaps import Gap, gap, gap_beside_non_finite, size_of
from dks.profiler.trial import NOBODY, Case, Draw

OUTLIER_SIZE = 64  # of each dynamic dim in the outlier check: enough rows to show the range of a whole tensor
SIZES = (1, 2, 3, 17, 65)  # of each dynamic dim: one row, odd ones, one more than whole blocks
ROWS_SIZE = 33  # of each dynamic dim where rows differ in size: one more than whole blocks
FLIPS = 4  # of all signs, which say how large a short row usually is
BATCH = 70  # rows of the batch that single rows are compared with: more than several whole tiles
BATCH_BESIDE = 33  # of the other dynamic dims there
ALONE = ((0, 1), (5, 6), (BATCH - 1, BATCH), (1, 3), (30, 37), (6, BATCH))
"""Rows first..end that are compared: single ones in several places, few and many."""
EXTREME_SIZE = 17  # of each dynamic dim where values are extreme: a middle row with neighbours on both sides
NEAR_LIMIT = 2**26  # product of dims beyond which the sizes beside a problem's own are left to held-out shapes
FORGIVEN = 10.0  # class limits that the framework's own error on normal data may lift a bound by

Ones = tuple[str, ...]
"""Dynamic dims that stay 1 whatever size a case would give them."""


@dataclass(frozen=True, slots=True)
class Alone:
    """Rows first..end of a batch by themselves, as dynamic arguments."""

    first: int
    end: int
    args: tuple[Any, ...]


@dataclass
class Group:
    """What is shared by the problems of one weight: its values, and the cases."""

    static: tuple[Any, ...]
    framework: Launch | None = None
    least: tuple[float, ...] = ()  # root mean square of each tensor of its output on normal data
    placed: dict[int, tuple[list[Slot], tuple[Any, ...]]] = field(default_factory=dict)
    cases: dict[tuple[str, Ones, int], list[Case]] = field(default_factory=dict)
    batches: dict[tuple[int, ...], tuple[Case, list[Alone]]] = field(default_factory=dict)


def always_one(problem: Problem, kernel: Kernel) -> Ones:
    """The dynamic dims of a problem that it takes which a kernel takes at 1 alone, as decoding takes one query."""
    return tuple(
        name
        for name in pool.operator(problem.op).dynamic
        if problem.dim(name) == 1 and all(kernel.objection(_changed(problem, {name: size})) for size in SIZES[1:])
    )


def _changed(problem: Problem, sizes: Mapping[str, int]) -> Problem:
    return replace(problem, dims=tuple((name, sizes.get(name, size)) for name, size in problem.dims))


class Cases:
    """Keeps what the candidates of the last weight and the last problem share.

    Args:
        seed: of all inputs. The weights are those that ``make_inputs`` draws first from this seed.
        device: where kernels run. Values are drawn on the host, so that they are the same everywhere.
    """

    def __init__(self, seed: int, device: torch.device = HOST) -> None:
        self._seed, self._device = seed, device
        self._group_of: tuple[object, ...] = ()
        self._group = Group(())
        self._problem: Problem | None = None
        self._own: list[Case] = []
        self._fresh: tuple[list[torch.Tensor], tuple[torch.Tensor, ...]] | None = None

    def enter(self, problem: Problem) -> Group:
        """The group of a problem; another one than before frees what was kept. Call it first."""
        operator = pool.operator(problem.op)
        statics = tuple(problem.dim(name) for name in operator.static)
        key = (problem.op, problem.traits, statics, problem.align)
        if key != self._group_of:
            self._problem, self._own, self._fresh = None, [], None
            self._group_of = key
            static = self._inputs(problem, self._seed, "normal").static
            self._group = group = Group(moved(static, self._device))
            default = pool.kernels()[operator.default]
            if default.unavailable() is None and default.objection(problem) is None:
                group.framework = default.bind(problem, default.candidates()[0].params, *group.static)
            big = max(self.named(problem, "small"), key=lambda case: case.draws[0].reference[0].numel())
            group.least = tuple(map(size_of, big.draws[0].reference))
            for case in self.named(problem, "small"):  # their bounds waited for it
                for draw in case.draws:
                    draw.allowed = self._framework_gap(case, draw)
        return self._group

    def _inputs(self, problem: Problem, seed: int, draw: str) -> Inputs:
        return pool.operator(problem.op).make_inputs(problem, torch.Generator().manual_seed(seed), draw)

    def placed_static(self, problem: Problem, kernel: Kernel) -> tuple[list[Slot], tuple[Any, ...]]:
        """(slots, constant arguments in them), as this kernel is to be bound."""
        # A weight is prepared from its best alignment; a kernel without a form reads the caller's as it is.
        align = MAX_ALIGNMENT if kernel.form else problem.align
        if align not in self._group.placed:
            self._group.placed[align] = place(self._group.static, align, device=self._device)
        return self._group.placed[align]

    def mend(self) -> str:
        """Give the constant arguments their values again; says what a rejected kernel did to them, or ""."""
        faults = [slot.fault() for slots, _ in self._group.placed.values() for slot in slots]
        return next(filter(None, faults), "")

    def named(self, problem: Problem, name: str, ones: Ones = (), align: int = 0) -> list[Case]:
        """The cases of that name: small, low (less aligned: ``align`` bytes), extreme, outliers or rows.

        Args:
            ones: dynamic dims that are 1 in all of them; see ``always_one``.
        """
        key = (name, ones, align)
        if key not in self._group.cases:
            placed = replace(problem, align=align or problem.align)
            self._group.cases[key] = list(_MAKERS[name](self, placed, ones))
        return self._group.cases[key]

    def _sized(self, problem: Problem, sizes: Sequence[int], ones: Ones = ()) -> Problem:
        changed = dict(zip(pool.operator(problem.op).dynamic, sizes, strict=True))
        return _changed(problem, {**changed, **dict.fromkeys(ones, 1)})

    def _case(self, problem: Problem, seed: int, turn: int = 0, draws: int = 1, draw: str = "normal") -> Case:
        """A case whose first draw is the operator's own, and the others its values redrawn."""
        dynamic = self._inputs(problem, seed, draw).dynamic
        slots, args = place(dynamic, problem.align, turn, self._device)
        case = Case(problem, slots, args, [])
        generator = torch.Generator().manual_seed(seed + 1)
        for i in range(draws):
            values = tensors(dynamic) if i == 0 else [redrawn(t, generator) for t in tensors(dynamic)]
            case.draws.append(self._drawn(case, draw, values))
        return case

    def _drawn(self, case: Case, kind: str, values: Sequence[torch.Tensor]) -> Draw:
        images = [slot.image(v) for slot, v in zip(case.slots, values, strict=True)]
        drawn = Draw(kind, images, self._reference(case))
        if kind == "rows":
            drawn.usual = self._usual(case, values, drawn.reference)
        drawn.allowed = self._framework_gap(case, drawn)
        return drawn

    def _usual(
        self, case: Case, values: Sequence[torch.Tensor], reference: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor | None, ...]:
        """How large short rows usually are, from other signs of their values; the slots then hold those."""
        if all(row_length(part.shape) >= SHORT for part in reference):
            return (None,) * len(reference)
        generator = torch.Generator().manual_seed(self._seed)
        squares = [part.square() for part in reference]
        for _ in range(FLIPS):
            for slot, v in zip(case.slots, values, strict=True):
                slot.image(flipped(v, generator))
            for square, part in zip(squares, self._reference(case), strict=True):
                square.add_(part.square())
        rows = (square.reshape(-1, row_length(square.shape)) for square in squares)
        return tuple((row.mean(dim=1) / (1 + FLIPS)).sqrt() for row in rows)

    def _reference(self, case: Case) -> tuple[torch.Tensor, ...]:
        operator = pool.operator(case.problem.op)
        return parts(operator.reference(case.problem, Inputs(self._group.static, case.args)))

    def _framework_gap(self, case: Case, draw: Draw) -> tuple[Gap | None, ...]:
        """Twice what the framework's own kernel gets wrong, so that none is held to more than it can do."""
        if self._group.framework is None:
            return (None,) * len(draw.reference)
        case.load(draw)
        try:
            ys = parts(self._group.framework(*case.args))
        except Exception:  # a size that the framework refuses is not asked of others
            return (NOBODY,) * len(draw.reference)
        least = self._group.least or (0.0,) * len(draw.reference)  # not yet known for the first draws of all
        usual = draw.usual or (None,) * len(draw.reference)
        each = zip(ys, draw.reference, least, usual, strict=True)
        return tuple(self._allowed(case, draw, *one) for one in each)

    def _allowed(
        self,
        case: Case,
        draw: Draw,
        y: torch.Tensor,
        reference: torch.Tensor,
        least: float,
        usual: torch.Tensor | None,
    ) -> Gap:
        if not draw.extreme:
            wrong, found = "", gap(y, reference, least, draw.ignored, usual)
        else:
            wrong, found = gap_beside_non_finite(y, reference, least, draw.ignored)
            return NOBODY if wrong or not math.isfinite(found.total) else found.times(2.0)
        default = pool.kernels()[pool.operator(case.problem.op).default]
        return found.times(2.0).at_most(default.precision[case.problem.trait("dtype")], FORGIVEN)

    def _small(self, problem: Problem, ones: Ones) -> list[Case]:
        """Each dynamic dim takes each size, and they meet as equals."""
        count, many = len(SIZES), len(pool.operator(problem.op).dynamic)
        mixed = [tuple(SIZES[(i + 2 * j) % count] for j in range(many)) for i in range(count)]
        equal = [(size,) * many for size in (1, 3, 17)]
        extra = [sizes for sizes in equal if sizes not in mixed] or [mixed[3]]  # at one more address
        return [
            self._case(self._sized(problem, sizes, ones), self._seed + 10 * i, turn=i, draws=3)
            for i, sizes in enumerate((*mixed, *extra))
        ]

    def _low(self, problem: Problem, ones: Ones) -> list[Case]:
        many = len(pool.operator(problem.op).dynamic)
        return [
            self._case(self._sized(problem, (size,) * many, ones), self._seed + size, turn=i, draws=2)
            for i, size in enumerate((3, 17))
        ]

    def _extreme(self, problem: Problem, ones: Ones) -> list[Case]:
        many = len(pool.operator(problem.op).dynamic)
        sized = self._sized(problem, (EXTREME_SIZE,) * many, ones)
        case = self._case(sized, self._seed + 7)
        normal = [t.cpu().clone() for t in tensors(case.args)]
        case.draws = []
        for kind, change in SCALED.items():
            values = [change(t) if has_values(t) else t for t in normal]
            draw = self._drawn(case, kind, values)
            draw.unfit = self._unfit(case, draw, values)
            case.draws.append(draw)
        for kind, change in NOT_FINITE.items():
            case.draws.append(self._drawn(case, kind, [change(normal[0]), *normal[1:]]))
        return [case]

    def _unfit(self, case: Case, draw: Draw, values: Sequence[torch.Tensor]) -> frozenset[Precision]:
        """Classes for which the answer is a matter of luck: a softmax of huge scores picks one by a hair."""
        generator = torch.Generator().manual_seed(self._seed)
        unfit = set()
        for precision in [precision for precision in Precision for _ in range(3)]:
            for slot, v in zip(case.slots, values, strict=True):
                slot.image(noisy(v, precision.limit / 2, generator))
            compared = zip(self._reference(case), draw.reference, self._group.least, strict=True)
            if any(gap(*each, draw.ignored).over(precision, each[0].shape) for each in compared):
                unfit.add(precision)
        return frozenset(unfit)

    def _outliers(self, problem: Problem, ones: Ones) -> list[Case]:
        sizes = (OUTLIER_SIZE,) * len(pool.operator(problem.op).dynamic)
        return [self._case(self._sized(problem, sizes, ones), self._seed, draw="outliers")]

    def _rows(self, problem: Problem, ones: Ones) -> list[Case]:
        sizes = (ROWS_SIZE,) * len(pool.operator(problem.op).dynamic)
        return [self._case(self._sized(problem, sizes, ones), self._seed, draw="rows")]

    def batch(self, problem: Problem) -> tuple[Case, list[Alone]]:
        """A batch, and some of its rows by themselves, each at an address of its own.

        Other dynamic dims are the problem's own, at most ``BATCH_BESIDE``.
        """
        operator = pool.operator(problem.op)
        sizes = tuple(
            BATCH if name == operator.batch else min(BATCH_BESIDE, problem.dim(name)) for name in operator.dynamic
        )
        if sizes not in self._group.batches:
            case = self._case(self._sized(problem, sizes), self._seed)
            alone = [
                Alone(first, end, place(operator.take(case.args, first, end), problem.align, turn, self._device)[1])
                for turn, (first, end) in enumerate(ALONE)
            ]
            self._group.batches[sizes] = (case, alone)
        return self._group.batches[sizes]

    def at_own_size(self, problem: Problem) -> list[Case]:
        """The problem itself, one less of each dynamic dim, and a size that the bin below would hold."""
        if problem != self._problem:
            self._problem, self._own, self._fresh = None, [], None  # frees the last ones first
            sizes = [problem.dim(name) for name in pool.operator(problem.op).dynamic]
            wanted = [sizes]
            if math.prod(size for _, size in problem.dims) <= NEAR_LIMIT:
                wanted += [[max(1, size - 1) for size in sizes], [max(1, int(size * 0.7) | 1) for size in sizes]]
            kept = [list(s) for s in dict.fromkeys(tuple(w) for w in wanted)]
            self._own = [self._case(self._sized(problem, s), self._seed, turn=i) for i, s in enumerate(kept)]
            self._problem = problem
        return self._own

    def fresh_values(self, problem: Problem) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """(other values of each dynamic tensor, their reference), at the problem's own size."""
        (own, *_) = self.at_own_size(problem)
        if self._fresh is None:
            generator = torch.Generator().manual_seed(self._seed + 2)
            for slot, image in zip(own.slots, own.draws[0].images, strict=True):
                slot.load(image)
            values = [redrawn(t.cpu(), generator) for t in tensors(own.args)]
            drawn = self._drawn(own, "after timing", values)
            self._fresh = (values, drawn.reference)
        return self._fresh


_MAKERS: dict[str, Callable[[Cases, Problem, Ones], list[Case]]] = {
    "small": Cases._small,
    "low": Cases._low,
    "extreme": Cases._extreme,
    "outliers": Cases._outliers,
    "rows": Cases._rows,
}
