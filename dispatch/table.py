"""The dispatch table: what a generated package holds, and the lookup in it.

``find`` is the Python form of ``lookup.hpp``; a differential test holds the two to the same answer. Both
return one whole number: ``rule << 2 | match`` for a hit, ``-1 - miss`` for a miss.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import prod

from dks.dispatch.bins import Bins
from dks.dispatch.problem import MAX_ALIGNMENT, MAX_DIM

NEAREST_REACH = 2
"""A size up to this many times the last edge takes the last bin's kernel: the nearest evidence there is."""

MAX_DYNAMIC = 8
"""Most dynamic dims of a group: the compiled lookup holds a call's sizes in a buffer of this many."""

ALIGNMENTS = tuple(1 << bit for bit in range(MAX_ALIGNMENT.bit_length()))
"""The alignments there are, in bytes."""


class Match(IntEnum):
    """How good a hit is."""

    EXACT = 0  # this very size was measured
    BIN = 1  # a size in the bin of one that was measured
    NEAREST = 2  # past the last edge, or less aligned than anything measured for this cell


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
        form: ``prepared`` (weights packed ahead) or ``direct`` (the caller's own tensors); for calls in CUDA graphs
            ``prepared_graph`` or ``direct_graph``, see ``dks.dispatch.modes``.
        traits: (name, value) pairs sorted by name.
        statics: (name, size) pairs in the operator's order.
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
            ValueError: two groups of one key, a dim, edge or alignment out of range, a cell count that does
                not fit the bins, a rule that does not exist, or one that needs more alignment than the
                class it stands in gives.
        """
        for rule in self.rules:
            _check_alignment(rule.align, rule.candidate)
        seen = set()
        for group in self.groups:
            if group.key in seen:
                raise ValueError(f"table: found {group.key} twice, expected one group a key")
            seen.add(group.key)
            _check_key(group)
            _check_cells(group, self.rules)

    def find(self, group: int, align: int, *sizes: int) -> int:
        """Look up ``sizes`` (the dynamic dims, in order) at an alignment in bytes; see the module's text.

        Raises:
            IndexError: no such group.
            TypeError: another number of sizes than the group has dynamic dims.
        """
        if not 0 <= group < len(self.groups):  # a tuple would count a negative one from its end
            raise IndexError(f"found group {group}, expected 0..{len(self.groups) - 1}")
        return find(self.groups[group], self.rules, sizes, align)


def find(group: Group, rules: Sequence[Rule], sizes: Sequence[int], align: int) -> int:
    """The lookup. Line for line the same as ``lookup.hpp``."""
    if len(sizes) != len(group.edges):
        raise TypeError(f"found {len(sizes)} sizes, expected {len(group.edges)}")
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
    # Below every class that was measured, the loosest class whose kernel takes such a call all the same.
    willing, why = -1, Miss.UNMEASURED
    for least, cells in group.cells.items():
        rule = cells[cell]
        if rule < 0:
            continue
        if least <= align:
            match = Match.NEAREST if nearest else Match.EXACT if exact else Match.BIN
            return rule << 2 | match
        why = Miss.MISALIGNED
        if rules[rule].align <= align:
            willing = rule
    return -1 - why if willing < 0 else willing << 2 | Match.NEAREST


def _check_alignment(align: int, what: str) -> None:
    if align not in ALIGNMENTS:
        raise ValueError(f"table: {what} has alignment {align!r}, expected a power of two from 1 to 64")


def _check_key(group: Group) -> None:
    if list(group.traits) != sorted(group.traits):
        raise ValueError(f"table: {group.key} has unsorted traits, expected them by name")
    for name, size in group.statics:
        if not 1 <= size <= MAX_DIM:
            raise ValueError(f"table: {group.key} has {name}={size}, expected 1..2^40")


def _check_cells(group: Group, rules: Sequence[Rule]) -> None:
    if len(group.edges) > MAX_DYNAMIC:
        raise ValueError(f"table: {group.key} has {len(group.edges)} dims, expected at most {MAX_DYNAMIC}")
    try:
        wanted = prod(len(Bins(edges)) for edges in group.edges)
    except ValueError as error:
        raise ValueError(f"table: {group.key}: {error}") from error
    if not group.cells or list(group.cells) != sorted(group.cells, reverse=True):
        raise ValueError(f"table: {group.key} has classes {list(group.cells)}, expected largest first")
    for align, cells in group.cells.items():
        _check_alignment(align, f"a class of {group.key}")
        if len(cells) != wanted:
            raise ValueError(f"table: {group.key} has {len(cells)} cells, expected {wanted}")
        for rule in set(cells):
            if not -1 <= rule < len(rules):
                raise ValueError(f"table: {group.key} names rule {rule} of {len(rules)}")
            if rule >= 0 and rules[rule].align > align:
                raise ValueError(
                    f"table: {group.key} sends {align}-byte aligned calls to "
                    f"{rules[rule].candidate}, which needs {rules[rule].align}"
                )
