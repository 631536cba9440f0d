"""The dispatch table: every kind of hit, every kind of miss, and what a table refuses to hold."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dks.dispatch.table import MAX_DYNAMIC, NEAREST_REACH, Group, Match, Miss, Rule, Table

ANY, WORD, VECTOR, LINE = range(4)  # rules, by the alignment that they need
RULES = (Rule("any", 1), Rule("word", 4), Rule("vector", 16), Rule("line", 64))

# Bins 1, 2, 3..8. The second has no entry at 64, the third none below 64.
GROUP = Group(
    op="linear",
    form="direct",
    traits=(("bias", "yes"), ("dtype", "float32")),
    statics=(("n", 384), ("k", 384)),
    edges=((1, 2, 8),),
    cells={64: (LINE, -1, LINE), 16: (VECTOR, VECTOR, -1), 4: (ANY, WORD, -1)},
)
GRID = replace(
    GROUP,
    op="attention",
    edges=((1, 4), (16, 32, 64)),
    cells={64: (ANY, WORD, VECTOR, -1, LINE, ANY)},
)
TABLE = Table(RULES, (GROUP, GRID))


def outcome(code: int) -> tuple[int, Match] | Miss:
    return Miss(-1 - code) if code < 0 else (code >> 2, Match(code & 3))


@pytest.mark.parametrize(
    ("size", "align", "expected"),
    [
        (1, 64, (LINE, Match.EXACT)),
        (8, 64, (LINE, Match.EXACT)),
        (3, 64, (LINE, Match.BIN)),
        (7, 64, (LINE, Match.BIN)),
        (9, 64, (LINE, Match.NEAREST)),
        (8 * NEAREST_REACH, 64, (LINE, Match.NEAREST)),
        (8 * NEAREST_REACH + 1, 64, Miss.OUT_OF_RANGE),
        (2**80, 64, Miss.OUT_OF_RANGE),
        (0, 64, Miss.ZERO_SIZED),
        (-1, 64, Miss.ZERO_SIZED),
        (-(2**80), 64, Miss.ZERO_SIZED),
    ],
)
def test_sizes(size: int, align: int, expected: object) -> None:
    assert outcome(TABLE.find(0, align, size)) == expected


@pytest.mark.parametrize(
    ("size", "align", "expected"),
    [
        (1, 128, (LINE, Match.EXACT)),
        (1, 63, (VECTOR, Match.EXACT)),  # an alignment that is no power of two counts as what it reaches
        (1, 16, (VECTOR, Match.EXACT)),
        (1, 15, (ANY, Match.EXACT)),
        (1, 4, (ANY, Match.EXACT)),
        (1, 2, (ANY, Match.NEAREST)),  # below every class, and the kernel takes it all the same
        (1, 1, (ANY, Match.NEAREST)),
        (2, 64, (VECTOR, Match.EXACT)),  # nothing at 64: the next class serves
        (2, 4, (WORD, Match.EXACT)),
        (2, 2, Miss.MISALIGNED),
        (8, 32, Miss.MISALIGNED),  # measured at 64 alone, and the kernel needs it
        (16, 32, Miss.MISALIGNED),
    ],
)
def test_alignments(size: int, align: int, expected: object) -> None:
    assert outcome(TABLE.find(0, align, size)) == expected


def test_loosest_class_of_the_cell_serves_below_itself() -> None:
    # Class 4 holds nothing for this cell; what class 64 holds needs no alignment at all.
    group = replace(GROUP, cells={64: (ANY, ANY, ANY), 4: (-1, -1, -1)})
    assert outcome(Table(RULES, (group,)).find(0, 1, 8)) == (ANY, Match.NEAREST)


def test_a_stricter_kernel_in_a_looser_class_hides_no_willing_one() -> None:
    group = replace(GROUP, cells={64: (ANY, WORD, ANY), 16: (WORD, VECTOR, VECTOR)})
    table = Table(RULES, (group,))
    assert outcome(table.find(0, 2, 1)) == (ANY, Match.NEAREST), "class 16 holds what needs 4 bytes"
    assert outcome(table.find(0, 8, 1)) == (WORD, Match.NEAREST), "of two that take it, the looser class"
    assert outcome(table.find(0, 4, 2)) == (WORD, Match.NEAREST)
    assert outcome(table.find(0, 2, 2)) == Miss.MISALIGNED


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 16), (ANY, Match.EXACT)),
        ((1, 17), (WORD, Match.BIN)),
        ((1, 128), (VECTOR, Match.NEAREST)),
        ((2, 16), Miss.UNMEASURED),
        ((4, 32), (LINE, Match.EXACT)),
        ((3, 32), (LINE, Match.BIN)),
        ((8, 64), (ANY, Match.NEAREST)),
        ((8, 128), (ANY, Match.NEAREST)),
        ((9, 0), Miss.OUT_OF_RANGE),  # the first dim that misses names the miss
        ((0, 129), Miss.ZERO_SIZED),
    ],
)
def test_last_dim_runs_fastest(sizes: tuple[int, int], expected: object) -> None:
    assert outcome(TABLE.find(1, 64, *sizes)) == expected


def test_group_without_dynamic_dims() -> None:
    table = Table(RULES, (replace(GROUP, edges=(), cells={16: (VECTOR,)}),))
    assert outcome(table.find(0, 16)) == (VECTOR, Match.EXACT)
    assert outcome(table.find(0, 8)) == Miss.MISALIGNED


@pytest.mark.parametrize("group", [-1, 2, 2**80])
def test_group_that_does_not_exist(group: int) -> None:
    with pytest.raises(IndexError):
        TABLE.find(group, 64, 1)


@pytest.mark.parametrize("sizes", [(), (0, 1), (1, 1)])
def test_number_of_sizes_that_does_not_fit(sizes: tuple[int, ...]) -> None:
    with pytest.raises(TypeError, match="expected 1"):
        TABLE.find(0, 64, *sizes)


@given(
    edges=st.lists(st.integers(1, 2**40), min_size=1, max_size=12, unique=True).map(sorted),
    size=st.integers(-2, 2**42),
    align=st.integers(0, 128),
)
def test_a_hit_is_the_bin_that_holds_the_size(edges: list[int], size: int, align: int) -> None:
    rules = tuple(Rule(f"kernel{i}", 16) for i in range(len(edges)))
    group = replace(GROUP, edges=(tuple(edges),), cells={64: tuple(range(len(edges)))})
    found = outcome(Table(rules, (group,)).find(0, align, size))
    if size < 1:
        assert found == Miss.ZERO_SIZED
    elif size > 2 * edges[-1]:
        assert found == Miss.OUT_OF_RANGE
    elif align < 16:
        assert found == Miss.MISALIGNED
    else:
        assert isinstance(found, tuple)
        rule, match = found
        assert rule == min(bisect_left(edges, size), len(edges) - 1)
        assert (match == Match.NEAREST) == (align < 64 or size > edges[-1])
        assert (match == Match.EXACT) == (align >= 64 and size in edges)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"edges": ((1, 2),)}, "has 3 cells, expected 2"),
        ({"edges": ((1, 2, 2),)}, "strictly increasing"),
        ({"edges": ((2, 1, 8),)}, "strictly increasing"),
        ({"edges": ((0, 1, 2),)}, "found edges 0..2"),
        ({"edges": ((1, 2, 2**40 + 1),)}, "expected 1..2\\^40"),
        ({"edges": ((),), "cells": {64: ()}}, "found no edge"),
        ({"edges": ((1,),) * (MAX_DYNAMIC + 1), "cells": {64: (0,)}}, "expected at most 8"),
        ({"cells": {}}, "has classes \\[\\], expected largest first"),
        ({"cells": {4: (-1,) * 3, 16: (-1,) * 3}}, "expected largest first"),
        ({"cells": {128: (-1,) * 3}}, "has alignment 128, expected a power of two"),
        ({"cells": {3: (-1,) * 3}}, "has alignment 3, expected a power of two"),
        ({"cells": {64: (-1, -1, 4)}}, "names rule 4 of 4"),
        ({"cells": {64: (-1, -1, -2)}}, "names rule -2 of 4"),
        ({"cells": {16: (-1, -1, LINE)}}, "sends 16-byte aligned calls to line, which needs 64"),
        ({"statics": (("n", 0),)}, "has n=0, expected 1..2\\^40"),
        ({"statics": (("n", 2**63),)}, "expected 1..2\\^40"),
        ({"traits": (("dtype", "float32"), ("bias", "yes"))}, "unsorted traits"),
    ],
)
def test_group_that_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Table(RULES, (replace(GROUP, **changed),))  # type: ignore[arg-type]


def test_two_groups_of_one_key_are_refused() -> None:
    with pytest.raises(ValueError, match="twice, expected one group a key"):
        Table(RULES, (GROUP, replace(GROUP, edges=((1, 2, 4),))))


@pytest.mark.parametrize("align", [0, -1, 3, 128])
def test_rule_whose_alignment_is_none(align: int) -> None:
    with pytest.raises(ValueError, match="odd has alignment"):
        Table((Rule("odd", align),), ())
