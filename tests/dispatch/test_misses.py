"""Misses: what is kept of the calls that a table serves badly, and the sweep that is written of them."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from dks.dispatch.generation import Generation
from dks.dispatch.misses import MOST_EDGES, MOST_EXPORTED, Missed, Misses, export, plan, render
from dks.dispatch.problem import Problem
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import Group, Rule, Table
from dks.profiler.config import load
from dks.profiler.problems import WeightedProblem

TRAITS = {"bias": "yes", "dtype": "float32", "epilogue": "none"}
LINEAR = tuple(TRAITS.items())
STATICS = (("n", 64), ("k", 32))
PROBLEM = Problem.of("linear", TRAITS, {"m": 1, "n": 64, "k": 32})
NEW = Problem.of("linear", TRAITS, {"m": 1, "n": 8, "k": 32})
SOFTMAX = Problem.of("softmax", {"dtype": "float32"}, {"m": 1, "n": 1})
TABLE = Table(
    (Rule("torch.linear", 4), Rule("torch.softmax", 4)),
    (
        Group("linear", "prepared", LINEAR, STATICS, ((1, 8, 64),), {64: (0, 0, 0)}),
        Group("softmax", "direct", (("dtype", "float32"),), (), ((8, 64), (16, 64)), {64: (1, -1, 1, 1)}),
    ),
)
EMPTY = Table((), ())


def noted(misses: Misses) -> dict[tuple[str, tuple[int, ...], int], int]:
    return {(m.reason, m.sizes, m.align): m.calls for m in misses.snapshot()}


def shapes(
    found: list[Missed], table: Table = TABLE, most: int = MOST_EXPORTED
) -> dict[tuple[Problem, tuple[int, ...], int], int]:
    sweep = plan(found, table, most=most)
    return {(p, *shape): sum(why.values()) for p, held in sweep.shapes.items() for shape, why in held.items()}


def test_calls_are_counted_by_shape_and_reason() -> None:
    misses = Misses()
    for _ in range(3):
        misses.of(PROBLEM)((200,), 64, "out_of_range")
    misses.of(PROBLEM)((200,), 4, "misaligned")
    assert noted(misses) == {("out_of_range", (200,), 64): 3, ("misaligned", (200,), 4): 1}
    assert misses.snapshot() == misses.snapshot() and misses.others == 0, "reading counts nothing"


@pytest.mark.parametrize("reason", ["zero_sized", "refused", "gradient", "exact"])
def test_what_measuring_would_not_change_is_left_out(reason: str) -> None:
    misses = Misses()
    misses.of(PROBLEM)((0,), 64, reason)
    assert misses.snapshot() == []


def test_shapes_beyond_the_most_are_counted_together() -> None:
    misses = Misses(most=3)
    for m in (1, 2, 3, 4, 5, 1, 4):
        misses.of(PROBLEM)((m,), 64, "unmeasured")
    assert noted(misses) == {("unmeasured", (m,), 64): n for m, n in ((1, 2), (2, 1), (3, 1))}
    assert misses.others == 3
    assert plan(misses.snapshot(), EMPTY, misses.others).left == ("3 calls of shapes beyond those that were kept",)


def test_threads_lose_nothing_and_keep_the_bound() -> None:
    misses, threads, each = Misses(most=40), 8, 4000

    def work() -> None:
        note = misses.of(PROBLEM)
        for i in range(each):
            note((i % 50,), 64, "unmeasured")

    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    while any(thread.is_alive() for thread in running):
        misses.snapshot()
    counts = noted(misses)
    assert len(counts) == 40 and set(counts.values()) == {threads * each // 50}
    assert sum(counts.values()) + misses.others == threads * each


def test_serving_notes_what_the_table_has_no_evidence_of() -> None:
    runtime = Runtime("t", Generation(TABLE))
    layer = runtime.server("linear").prepare(torch.randn(64, 32), torch.randn(64))
    for m in (8, 5, 100, 300, 300, 0):
        layer(torch.randn(m, 32))
    layer(torch.randn(5 * 32 + 1)[1:].view(5, 32))  # 4 bytes past a cache line: nothing of that class was measured
    runtime.server("linear").prepare(torch.randn(8, 32), torch.randn(8))(torch.randn(7, 32))
    runtime.server("softmax").call(torch.randn(8, 60))
    runtime.server("softmax").call(torch.randn(8, 0))
    assert noted(runtime.misses) == {
        ("out_of_range", (300,), 64): 2,
        ("nearest", (100,), 64): 1,
        ("nearest", (5,), 4): 1,
        ("unknown_shape", (7,), 32): 1,
        ("unmeasured", (8, 60), 64): 1,
    }
    assert {(m.problem.op, m.problem.dims[1]) for m in runtime.misses.snapshot()} >= {("linear", ("n", 8))}


def test_a_refused_table_notes_nothing() -> None:
    runtime = Runtime("t", Generation(TABLE, refused="threads: 2 != 4"))
    runtime.server("linear").prepare(torch.randn(64, 32), torch.randn(64))(torch.randn(300, 32))
    assert runtime.counters.snapshot() == {"linear": {"refused": 1}} and runtime.misses.snapshot() == []


def test_a_size_inside_the_bins_is_measured_at_its_edge_and_one_beyond_as_it_came() -> None:
    found = [
        Missed(PROBLEM, (5,), 4, "nearest", 3),
        Missed(PROBLEM, (7,), 4, "nearest", 4),
        Missed(PROBLEM, (100,), 64, "nearest", 5),
        Missed(SOFTMAX, (3, 60), 64, "unmeasured", 6),
        Missed(SOFTMAX, (3, 600), 64, "out_of_range", 7),
        Missed(NEW, (5,), 64, "unknown_shape", 8),
    ]
    assert shapes(found) == {
        (PROBLEM, (8,), 4): 7,
        (PROBLEM, (100,), 64): 5,
        (SOFTMAX, (8, 64), 64): 6,
        (SOFTMAX, (8, 600), 64): 7,
        (NEW, (5,), 64): 8,
    }


def test_many_sizes_fall_in_bins_and_no_call_is_lost() -> None:
    found = [Missed(NEW, (m,), 64, "unknown_shape", 1 + m % 3) for m in range(1, 401)]
    kept = shapes(found)
    sizes = sorted(sizes[0] for _, sizes, _ in kept)
    assert len(sizes) == MOST_EDGES and sizes[-1] == 400 and set(sizes) <= set(range(1, 401))
    assert sum(kept.values()) == sum(miss.calls for miss in found)
    assert max(kept.values()) < 2 * min(kept.values()), "about the same traffic in each"


def test_the_most_frequent_are_kept_and_the_rest_is_said() -> None:
    found = [Missed(NEW, (m,), 64, "unknown_shape", 10 * m) for m in range(1, 6)]
    assert shapes(found, most=2) == {(NEW, (5,), 64): 50, (NEW, (4,), 64): 40}
    assert plan(found, TABLE, most=2).left == ("60 calls of shapes less frequent than the first 2",)


def test_what_no_sweep_takes_or_the_table_serves_by_now_is_left_and_said() -> None:
    half = Problem.of("linear", TRAITS | {"dtype": "float64"}, {"m": 1, "n": 64, "k": 32})
    heads = Problem.of(
        "attention",
        {"dtype": "float32", "mask": "none", "causal": "no", "layout": "bshd"},
        {"b": 1, "q": 1, "kv": 1, "h": 3, "hkv": 2, "d": 8},
    )
    sweep = plan(
        [
            Missed(half, (5,), 64, "unknown_shape", 2),
            Missed(heads, (1, 1, 1), 64, "unknown_shape", 3),
            Missed(PROBLEM, (5,), 64, "misaligned", 4),  # before a reload
        ],
        TABLE,
    )
    assert sweep.size == 0
    left = "\n".join(sweep.left)
    assert "2 calls with dtype=float64, which no sweep of linear takes" in left
    assert "3 calls of attention" in left and "4 calls that the table serves by now" in left


def weighted(path: Path) -> dict[str, float]:
    found: list[WeightedProblem] = [each for part in load(path).operators for each in part.problems]
    return {each.problem.id: each.weight for each in found}


def test_the_written_config_is_a_sweep_with_the_same_weights(tmp_path: Path) -> None:
    found = [
        Missed(PROBLEM, (5,), 4, "misaligned", 3),
        Missed(PROBLEM, (300,), 64, "out_of_range", 41),
        Missed(NEW, (17,), 32, "unknown_shape", 2**40),
        Missed(SOFTMAX, (3, 600), 64, "out_of_range", 7),
    ]
    path = tmp_path / "misses.yaml"
    assert export(path, plan(found, TABLE), "pkg.Minilm-é") == 4
    assert weighted(path) == {
        "linear[bias=yes,dtype=float32,epilogue=none](m=8,n=64,k=32)@4": 3.0,
        "linear[bias=yes,dtype=float32,epilogue=none](m=300,n=64,k=32)@64": 41.0,
        "linear[bias=yes,dtype=float32,epilogue=none](m=17,n=8,k=32)@32": 2.0**40,
        "softmax[dtype=float32](m=8,n=600)@64": 7.0,
    }
    sweep = load(path)
    assert sweep.name == "pkg_minilm_misses" and sweep.threads == torch.get_num_threads()
    assert not sweep.measure.held_out and sweep.measure.split is None
    assert [p.name for p in tmp_path.iterdir()] == ["misses.yaml"], "nothing is left beside it"
    text = path.read_text()
    assert "# misaligned\n" in text and text == render(plan(found[::-1], TABLE), "pkg.Minilm-é"), (
        "in an order of its own"
    )


def test_the_largest_config_is_within_what_a_config_may_hold(tmp_path: Path) -> None:
    traits = {"dtype": "float32", "mask": "none", "causal": "no", "layout": "bshd"}
    found = [
        Missed(
            Problem.of("attention", traits, {"b": 1, "q": 1, "kv": 1, "h": h, "hkv": h, "d": 64}),
            (8, 100000, 100000), 64, "unknown_shape", 10**9,
        )
        for h in range(1, 400)
    ]  # fmt: skip
    assert export(tmp_path / "a.yaml", plan(found, EMPTY), "t") == MOST_EXPORTED
    assert len(weighted(tmp_path / "a.yaml")) == MOST_EXPORTED


def test_nothing_is_written_where_nothing_was_missed(tmp_path: Path) -> None:
    runtime = Runtime("t", Generation(TABLE))
    assert runtime.export_misses(tmp_path / "misses.yaml") == 0 and list(tmp_path.iterdir()) == []
    runtime.misses.of(NEW)((5,), 64, "unknown_shape")
    assert runtime.export_misses(str(tmp_path / "misses.yaml")) == 1
    with pytest.raises(OSError, match="absent"):
        runtime.export_misses(tmp_path / "absent" / "misses.yaml")


def test_reasons_of_one_shape_add_up() -> None:
    found = [Missed(PROBLEM, (100,), 64, "nearest", 5), Missed(PROBLEM, (100,), 64, "out_of_range", 2)]
    assert plan(found, TABLE).shapes == {PROBLEM: {((100,), 64): Counter(nearest=5, out_of_range=2)}}
