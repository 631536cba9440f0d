"""Enumeration: which problems a plan has, in what order, at which alignment and with what weight."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dks.dispatch import pool
from dks.dispatch.bins import explicit
from dks.profiler.problems import Axis, Entry, Plan, read_histogram

LINEAR, ATTENTION = pool.operator("linear"), pool.operator("attention")
TRAITS = {"dtype": ("float32",), "bias": ("yes",), "epilogue": ("none",)}
MASKED = {"dtype": ("float32",), "mask": ("none", "bool"), "causal": ("no",), "layout": ("bshd",)}


def linear(*entries: Entry, edges: tuple[int, ...] = (1, 8), alignments: tuple[int, ...] = (64,)) -> Plan:
    return Plan(LINEAR, entries, {"m": Axis.of(explicit(edges))}, {}, alignments)


def attention(tie: dict[str, str]) -> Plan:
    axes = {"b": Axis.of(explicit((1, 2))), "q": Axis.of(explicit((8, 16))), "kv": Axis.of(explicit((8, 16)))}
    return Plan(ATTENTION, (Entry({"h": 4, "hkv": 2, "d": 32}, MASKED, 3),), axes, tie, (64,))


def ids(plan: Plan) -> list[str]:
    return [each.problem.id for each in plan.problems()]


def test_a_bin_is_measured_at_its_upper_edge_in_the_operator_s_order_of_dims() -> None:
    assert ids(linear(Entry({"k": 64, "n": 32}, TRAITS, 1))) == [
        "linear[bias=yes,dtype=float32,epilogue=none](m=1,n=32,k=64)@64",
        "linear[bias=yes,dtype=float32,epilogue=none](m=8,n=32,k=64)@64",
    ]


def test_weight_shapes_and_traits_come_in_one_piece_each_with_sizes_ascending() -> None:
    both = {**TRAITS, "dtype": ("float32", "bfloat16")}
    entries = [Entry({"n": n, "k": 64}, both, 1) for n in (128, 64)]
    found = [each.problem for each in linear(*entries, edges=(1, 8, 32)).problems()]
    groups = [
        (key, [p.dim("m") for p in group])
        for key, group in groupby(found, key=lambda p: (p.dim("n"), p.trait("dtype")))
    ]
    assert [key for key, _ in groups] == [(n, d) for n in (128, 64) for d in ("float32", "bfloat16")]
    assert all(sizes == [1, 8, 32] for _, sizes in groups)


def test_every_combination_of_bins_is_a_problem_unless_dims_are_tied() -> None:
    free, tied = attention({}), attention({"kv": "q"})
    assert len(free.problems()) == free.size == 2 * 2 * 2 * 2
    assert len(tied.problems()) == tied.size == 2 * 2 * 2
    assert all(each.problem.dim("q") == each.problem.dim("kv") for each in tied.problems())
    sizes = [tuple(each.problem.dim(d) for d in ("b", "q", "kv")) for each in tied.problems()][:4]
    assert sizes == [(1, 8, 8), (1, 16, 16), (2, 8, 8), (2, 16, 16)]


def test_weights_are_calls_times_the_bins_share() -> None:
    for plan in (attention({}), attention({"kv": "q"})):
        masked = [each.weight for each in plan.problems() if each.problem.trait("mask") == "bool"]
        assert sum(masked) == pytest.approx(3)
    traffic = Axis.of(explicit((8, 16)), ((1, 2.0), (8, 1.0), (9, 1.0)))
    plan = Plan(LINEAR, (Entry({"n": 8, "k": 8}, TRAITS, 4),), {"m": traffic}, {}, (64,))
    assert [each.weight for each in plan.problems()] == [3.0, 1.0]


def test_a_problem_of_two_entries_comes_once_with_both_weights() -> None:
    entry = Entry({"n": 64, "k": 64}, TRAITS, 2)
    found = linear(entry, Entry({"n": 32, "k": 64}, TRAITS, 1), entry, edges=(4,)).problems()
    assert [(each.problem.dim("n"), each.weight) for each in found] == [(64, 4.0), (32, 1.0)]


@pytest.mark.parametrize(
    ("dims", "dtype", "wanted", "effective"),
    [
        ({"n": 64, "k": 64}, "float32", (64, 16, 4), [64, 16, 4]),
        ({"n": 64, "k": 6}, "float32", (64, 16, 8), [8]),  # rows of x are 24 bytes apart
        ({"n": 3, "k": 64}, "float32", (64, 32), [4]),  # rows of y are 12 bytes apart
        ({"n": 3, "k": 64}, "bfloat16", (64, 1), [2]),
        ({"n": 64, "k": 64}, "float32", (1, 2, 4), [4]),  # no float lies on an odd byte
    ],
)
def test_an_alignment_is_lowered_to_the_strides_and_raised_to_the_element(
    dims: dict[str, int], dtype: str, wanted: tuple[int, ...], effective: list[int]
) -> None:
    entry = Entry(dims, {**TRAITS, "dtype": (dtype,)}, 1)
    found = linear(entry, edges=(4,), alignments=wanted).problems()
    assert [each.problem.align for each in found] == effective
    assert all(each.weight == 1.0 for each in found)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5, unique=True), st.integers(1, 64), st.integers(1, 64))
def test_problems_are_unique_and_within_the_size_told_before(edges: list[int], n: int, k: int) -> None:
    plan = linear(Entry({"n": n, "k": k}, TRAITS, 1), edges=tuple(sorted(edges)), alignments=(64, 8, 4))
    found = ids(plan)
    assert len(set(found)) == len(found) <= plan.size


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=9, unique=True),
    st.lists(st.tuples(st.integers(1, 150), st.floats(1e-3, 1e6)), max_size=30),
)
def test_shares_sum_to_one(edges: list[int], histogram: list[tuple[int, float]]) -> None:
    axis = Axis.of(explicit(sorted(edges)), tuple(histogram))
    assert len(axis.shares) == len(axis.bins)
    assert sum(axis.shares) == pytest.approx(1.0)


def test_traffic_past_the_last_edge_counts_for_the_last_bin() -> None:
    assert Axis.of(explicit((1, 4)), ((1, 1.0), (9, 3.0))).shares == (0.25, 0.75)


def test_a_histogram_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "traffic.csv"
    path.write_text("value,weight\r\n16,3\n32,0.5\n")
    assert read_histogram(path) == ((16, 3.0), (32, 0.5))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "found nothing in line 1, expected value,weight"),
        ("a,b\n1,1\n", "found 'a,b' in line 1"),
        ("value,weight\n", "found a header alone"),
        ("value,weight\n1,1\n0,1\n", "found '0,1' in line 3"),
        ("value,weight\n-1,1\n", "in line 2"),
        ("value,weight\n1.5,1\n", "in line 2"),
        ("value,weight\n1,nan\n", "in line 2"),
        ("value,weight\n1,inf\n", "in line 2"),
        ("value,weight\n1,0\n", "in line 2"),
        ("value,weight\n1\n", "in line 2"),
        ("value,weight\n1,2,3\n", "in line 2"),
        ("value,weight\n" + "9" * 5000 + ",1\n", "in line 2"),
        ("value,weight\n" + "1,1\n" * 300_000, "more than 1 MiB"),
    ],
)
def test_a_bad_histogram_is_named_with_its_line(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "traffic.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=found):
        read_histogram(path)
