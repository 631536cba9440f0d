"""Bins, the shapes held out of them, and splitting."""

from __future__ import annotations

import pytest

from dks.dispatch.problem import Problem
from dks.profiler.findings import Finding, Findings, Round
from dks.profiler.grid import Grid
from dks.profiler.splitting import wide_bins

TRAITS = {"dtype": "float32", "bias": "yes", "epilogue": "none"}


def linear(m: int, align: int = 64) -> Problem:
    return Problem.of("linear", TRAITS, {"m": m, "n": 64, "k": 64}, align)


def attention(b: int, q: int) -> Problem:
    traits = {"dtype": "float32", "mask": "none", "causal": "no", "layout": "bshd"}
    return Problem.of("attention", traits, {"b": b, "q": q, "kv": q, "h": 2, "hkv": 2, "d": 32})


def grid(*edges: int) -> Grid:
    return Grid({linear(m): 1.0 for m in edges}, ["m"], {})


def sizes(grid: Grid) -> list[int]:
    return sorted(asked.problem.dim("m") for asked in grid.held_out())


@pytest.mark.parametrize("align", [64, 4])
def test_each_bin_with_room_has_a_ragged_shape_inside_it_of_its_own_alignment(align: int) -> None:
    one = Grid({linear(m, align): 1.0 for m in (1, 2, 4, 8, 64)}, ["m"], {})
    held = one.held_out()
    assert sorted(asked.problem.dim("m") for asked in held) == [3, 7, 25]
    for asked, corner in held.items():
        assert asked.role == "held_out" and asked.problem.align == corner.align == align
        assert asked.problem.dim("m") < corner.dim("m")


def test_tied_dims_stay_tied_and_all_free_dims_are_inside() -> None:
    corners = {attention(b, q): 1.0 for b in (4, 16) for q in (16, 64)}
    held = Grid(corners, ["b", "q"], {"kv": "q"}).held_out()
    assert len(held) == 4
    for asked, corner in held.items():
        assert asked.problem.dim("q") == asked.problem.dim("kv") < corner.dim("q")
        assert asked.problem.dim("b") < corner.dim("b")


def test_a_split_makes_a_representative_and_shares_the_weight() -> None:
    one = grid(1, 64)
    (asked,) = one.held_out()
    assert one.split(linear(64), asked.problem)
    corners = {a.problem.dim("m"): a for a in one.corners()}
    assert corners[asked.problem.dim("m")].role == "split"
    assert sum(a.weight for a in corners.values()) == pytest.approx(2.0)
    assert len(one.held_out()) == 2 and asked.problem not in [a.problem for a in one.held_out()]


def test_a_split_along_one_dim_of_two_makes_a_row_of_representatives() -> None:
    corners = {attention(b, q): 1.0 for b in (4, 16) for q in (16, 64)}
    one = Grid(corners, ["b", "q"], {"kv": "q"})
    inner = next(a.problem for a, corner in one.held_out().items() if corner == attention(16, 64))
    assert one.split(attention(16, 64), inner)
    added = {
        (a.problem.dim("b"), a.problem.dim("q"), a.problem.dim("kv")) for a in one.corners() if a.role == "split"
    }
    assert len(added) == 2 and all(q == kv for _, q, kv in added)


def test_a_bin_without_room_is_not_split_and_a_split_is_adopted_once() -> None:
    one = grid(1, 2, 64)
    assert not one.split(linear(2), linear(2))
    one.adopt(linear(13))
    one.adopt(linear(13))
    one.adopt(linear(64))
    assert [a.problem.dim("m") for a in one.corners()] == [1, 2, 64, 13]


def test_what_a_grid_holds() -> None:
    one = grid(1, 64)
    assert one.holds(linear(30)) and not one.holds(linear(65)) and not one.holds(linear(30, align=4))


def known(times: dict[str, int], jitter: int) -> Findings:
    rounds = [Round(n, n % 2, {c: ns + jitter * (n * 7 % 5) for c, ns in times.items()}) for n in range(30)]
    return Findings({c: Finding() for c in times}, rounds)


@pytest.mark.parametrize(
    ("inside", "jitter", "wide"),
    [
        ({"torch.linear": 1000, "torch.addmm": 500, "mkldnn.linear_packed": 900}, 1, False),
        ({"torch.linear": 1000, "torch.addmm": 900, "mkldnn.linear_packed": 500}, 1, True),
        ({"torch.linear": 1000, "torch.addmm": 520, "mkldnn.linear_packed": 500}, 1, False),
        ({"torch.linear": 1000, "torch.addmm": 600, "mkldnn.linear_packed": 500}, 300, False),
        ({"torch.linear": 500, "torch.addmm": 900, "mkldnn.linear_packed": 900}, 1, True),
    ],
)
def test_a_bin_is_too_wide_where_its_winner_surely_loses_inside(
    inside: dict[str, int], jitter: int, wide: bool
) -> None:
    at_corner = known({"torch.linear": 1000, "torch.addmm": 500, "mkldnn.linear_packed": 700}, 1)
    one = grid(1, 64)
    findings = {True: at_corner, False: known(inside, jitter)}
    found = wide_bins(one.held_out(), lambda p: findings[p == linear(64)], 0.1)
    assert bool(found) == wide
