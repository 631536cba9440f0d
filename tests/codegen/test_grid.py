"""Which measured problem answers for a cell, with splits."""

from __future__ import annotations

from dks.codegen.grid import Grid
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch.problem import Problem
from tests.codegen.rows import problem, row

TRAITS = {"dtype": "float32", "mask": "none", "causal": "no", "layout": "bshd"}


def attention(b: int, q: int) -> Problem:
    return Problem.of("attention", TRAITS, {"b": b, "q": q, "kv": q, "h": 4, "hkv": 4, "d": 32})


def test_a_split_makes_a_bin() -> None:
    rows = [row("torch.linear", 100, problem(m), role=role) for m, role in ((16, "bin"), (12, "split"))]
    rows.append(row("torch.addmm", 50, problem(12), role="split"))
    table = select(rows, Policy()).table()
    group = next(g for g in table.groups if g.form == "prepared")
    assert group.edges == ((12, 16),)
    assert [table.rules[i].candidate for i in group.cells[64]] == ["torch.addmm", "torch.linear"]


def test_a_split_of_one_cell_leaves_no_hole_in_the_others() -> None:
    bins = [attention(b, q) for b in (1, 8) for q in (16, 64)]
    grid = Grid.of({**dict.fromkeys(bins, "bin"), attention(8, 48): "split"})
    assert grid.edges == ((1, 8), (16, 48, 64), (16, 48, 64))
    assert grid.answer(64, (8, 48, 48)) == attention(8, 48)
    assert grid.answer(64, (1, 48, 48)) == attention(1, 64), "nothing was measured there: the bin it was split from"
    assert grid.answer(64, (8, 48, 64)) == attention(8, 64)
    assert grid.answer(64, (8, 16, 64)) is None, "never measured is never claimed"
    assert grid.answer(4, (8, 48, 48)) is None
    held_out = [(attention(1, 40), attention(1, 64)), (attention(7, 40), attention(8, 48))]
    assert [grid.bin_of(shape) for shape, _ in held_out] == [answer for _, answer in held_out]


def test_the_table_has_one_rule_for_the_cells_of_one_bin() -> None:
    roles = {problem(16): "bin", problem(16, align=4): "bin", problem(12): "split"}
    rows = [row("torch.linear", 100, of, role=role, weight=2.0) for of, role in roles.items()]
    lut = select(rows, Policy())
    group = lut.groups[0]
    assert group.cells == {64: (0, 1), 4: (2, 2)}
    assert lut.expected_us == {"float32": 400.0}, "each measured problem counts once"
