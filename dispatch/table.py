"""The dispatch table: what a generated package holds, and the lookup in it.

``find`` is the Python form of ``lookup.hpp``; a differential test holds the two to the same answer. Both
return one whole number: ``rule << 2 | match`` for a hit, ``-1 - miss`` for a miss.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

NEAREST_REACH = 2
"""A size up to this many times the last edge takes the last bin's kernel, as the nearest evidence there is."""


class Match(IntEnum):
    """How good a hit is."""

    EXACT = 0  # this very size was measured
    BIN = 1  # a size in the bin of one that was measured
    NEAREST = 2  # past the last edge, or less aligned than anything measured


class Miss(IntEnum):
    """Why a group has no rule for a call."""

    ZERO_SIZED = 0
    OUT_OF_RANGE = 1
    UNMEASURED = 2
    MISALIGNED = 3


@dataclass(frozen=True, slots=True)
class Rule:
    """One choice of the table: a candidate's id, and the alignment in bytes that it needs."""

    candidate: str
    align: int


@dataclass(frozen=True, slots=True)
class Group:
    """All choices of one (operator, form, traits, static dims).

    Attributes:
        form: ``prepared`` (weights packed ahead) or ``direct`` (the caller's own tensors).
        edges: upper edges of the bins, one sequence a dynamic dim, in the operator's order.
        cells: by alignment class in bytes, largest first: a rule's index or -1 for each combination of
            bins, the last dim running fastest.
    """

    op: str
    form: str
    traits: tuple[tuple[str, str], ...]
    statics: tuple[tuple[str, int], ...]
    edges: tuple[tuple[int, ...], ...]
    cells: Mapping[int, tuple[int, ...]]

    @property
    def key(self) -> tuple[object, ...]:
        """What must match exactly."""
        return (self.op, self.form, self.traits, self.statics)


@dataclass(frozen=True)
class Table:
    """Rules, and the groups that point at them by position."""

    rules: tuple[Rule, ...]
    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        """Check that no cell can send a call to a kernel that its class does not satisfy.

        Raises:
            ValueError: a cell count that does not fit the bins, a rule that does not exist, or one that
                needs more alignment than the class it stands in gives.
        """
        for group in self.groups:
            wanted = 1
            for edges in group.edges:
                wanted *= len(edges)
            if list(group.cells) != sorted(group.cells, reverse=True) or not group.cells:
                raise ValueError(f"table: {group.key} has classes {list(group.cells)}, expected largest first")
            for align, cells in group.cells.items():
                if len(cells) != wanted:
                    raise ValueError(f"table: {group.key} has {len(cells)} cells, expected {wanted}")
                for rule in cells:
                    if not -1 <= rule < len(self.rules):
                        raise ValueError(f"table: {group.key} names rule {rule} of {len(self.rules)}")
                    if rule >= 0 and self.rules[rule].align > align:
                        raise ValueError(
                            f"table: {group.key} sends {align}-byte aligned calls to "
                            f"{self.rules[rule].candidate}, which needs {self.rules[rule].align}"
                        )

    def find(self, group: int, align: int, *sizes: int) -> int:
        """Look up ``sizes`` (the dynamic dims, in order) at an alignment in bytes; see the module's text."""
        return find(self.groups[group], self.rules, sizes, align)


def find(group: Group, rules: Sequence[Rule], sizes: Sequence[int], align: int) -> int:
    """The lookup. Line for line the same as ``lookup.hpp``."""
    cell, exact, nearest = 0, True, False
    for edges, size in zip(group.edges, sizes, strict=True):
        if size < 1:
            return -1 - Miss.ZERO_SIZED
        index = bisect_left(edges, size)
        if index == len(edges):
            if size > NEAREST_REACH * edges[-1]:
                return -1 - Miss.OUT_OF_RANGE
            index -= 1
            nearest = True
        exact = exact and edges[index] == size
        cell = cell * len(edges) + index
    measured = False
    for least, cells in group.cells.items():
        rule = cells[cell]
        if rule < 0:
            continue
        if least <= align:
            match = Match.NEAREST if nearest else Match.EXACT if exact else Match.BIN
            return rule << 2 | match
        measured = True
        if least == min(group.cells) and rules[rule].align <= align:
            return rule << 2 | Match.NEAREST
    return -1 - (Miss.MISALIGNED if measured else Miss.UNMEASURED)
