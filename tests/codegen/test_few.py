"""At most so many kernels an operator: the pick alone, and what it makes of a table."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dks.codegen.few import Bin, pick
from dks.codegen.lut import Lut
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch.evidence import Measurement
from dks.dispatch.problem import Problem
from tests.codegen.rows import problem, row

DEFAULT, ADDMM, PACKED = "torch.linear", "torch.addmm", "mkldnn.linear_packed"
PACKED_BF16 = "mkldnn.linear_packed_bf16"
TILES = [f"mkl.linear_packed/rows{n}" for n in (8, 16, 32, 64, 128)]
EXACT = Policy(max_error=1e-5)


def capped(limit: int | None) -> Policy:
    return dataclasses.replace(EXACT, max_kernels=limit)


def total(bins: list[Bin], names: tuple[str, ...]) -> float:
    return sum(bin.weight * min(cost for name, cost in bin.costs.items() if name in names) for bin in bins)


@st.composite
def made_bins(draw: st.DrawFn) -> list[Bin]:
    """Challengers cost at most what the default does, and each serves only some of the bins."""
    saved = st.dictionaries(st.sampled_from([ADDMM, PACKED, *TILES]), st.integers(1, 90), max_size=7)
    bins = st.builds(
        lambda weight, costs: Bin(weight, {DEFAULT: 100.0, **{k: 100.0 - v for k, v in costs.items()}}),
        st.sampled_from([0.0, 1.0, 3.0]),
        saved,
    )
    return draw(st.lists(bins, min_size=1, max_size=8))


@given(made_bins(), st.integers(1, 9), st.randoms())
def test_the_pick_is_small_good_and_the_same_in_any_order(bins: list[Bin], limit: int, rng: random.Random) -> None:
    picked = pick(bins, DEFAULT, limit)
    assert picked[0] == DEFAULT and len(set(picked)) == len(picked) <= limit
    names = sorted({name for bin in bins for name in bin.costs} - {DEFAULT})
    sizes = range(min(limit, len(names) + 1))
    best = min(total(bins, (DEFAULT, *some)) for size in sizes for some in combinations(names, size))
    alone, found = total(bins, (DEFAULT,)), total(bins, picked)
    assert alone - found >= (1 - 1 / 2.718281828) * (alone - best) - 1e-9
    if limit <= 2 or limit > len(names):
        assert found == pytest.approx(best), "one pick, or all that there are, is no heuristic"
    rng.shuffle(bins)
    assert pick(bins, DEFAULT, limit) == picked


def test_a_swap_drops_what_later_picks_made_idle() -> None:
    first = Bin(1.0, {DEFAULT: 100.0, TILES[0]: 60.0, TILES[1]: 50.0})
    second = Bin(1.0, {DEFAULT: 100.0, TILES[0]: 60.0, TILES[2]: 50.0})
    assert pick([first, second], DEFAULT, 2) == (DEFAULT, TILES[0]), "the best alone"
    assert set(pick([first, second], DEFAULT, 3)) == {DEFAULT, TILES[1], TILES[2]}


def test_equal_costs_go_to_the_simplest_then_to_the_first_id() -> None:
    names = [PACKED, TILES[4], TILES[0], ADDMM]
    assert pick([Bin(1.0, {DEFAULT: 100.0, **dict.fromkeys(names, 50.0)})], DEFAULT, 2) == (DEFAULT, ADDMM)
    assert pick([Bin(1.0, {DEFAULT: 100.0, **dict.fromkeys(TILES, 50.0)})], DEFAULT, 9) == (DEFAULT, min(TILES))


def test_traffic_decides_and_bins_without_it_only_where_it_does_not() -> None:
    rare = Bin(1.0, {DEFAULT: 100.0, TILES[0]: 10.0})
    busy = Bin(20.0, {DEFAULT: 100.0, TILES[1]: 90.0})
    assert pick([rare, busy], DEFAULT, 2) == (DEFAULT, TILES[1])
    silent = [dataclasses.replace(bin, weight=0.0) for bin in (rare, busy)]
    assert pick(silent, DEFAULT, 2) == (DEFAULT, TILES[0])
    assert pick([silent[0], busy], DEFAULT, 3) == (DEFAULT, TILES[1], TILES[0])


def bin_rows(of: Problem, times: Mapping[str, float], **more: object) -> list[Measurement]:
    return [row(id, us, of, **more) for id, us in {DEFAULT: 1000.0, **times}.items()]


def three_winners() -> list[Measurement]:
    """Each bin is won by a kernel of its own; PACKED is close behind wherever it does not win."""
    return [
        *bin_rows(problem(8), {TILES[0]: 200, PACKED: 220}),
        *bin_rows(problem(64), {TILES[1]: 200, PACKED: 210}),
        *bin_rows(problem(256), {PACKED: 300}),
    ]


def chosen(lut: Lut, form: str = "prepared") -> list[str]:
    return [rule.candidate for rule in lut.rules if rule.form == form]


def test_the_cap_keeps_what_costs_least_and_says_so() -> None:
    assert chosen(select(three_winners(), capped(4))) == [TILES[0], TILES[1], PACKED], "the default is the fourth"
    lut = select(three_winners(), capped(3))
    assert chosen(lut) == [TILES[0], PACKED, PACKED], "ten percent are kept, five given up"
    reason = lut.rules[1].reason
    assert reason.startswith(f"faster than the default: {PACKED} at 4.762x")
    assert reason.endswith(
        f"; {TILES[1]} was ahead by 5.0 %, but at most 3 kernels serve linear prepared with float32"
    )
    (few,) = lut.few
    assert (few.op, few.form, few.dtype, few.changed) == ("linear", "prepared", "float32", 1)
    assert set(few.before) == {DEFAULT, PACKED, TILES[0], TILES[1]} and set(few.after) == set(few.before) - {
        TILES[1]
    }
    assert few.weighted == pytest.approx(10 / 700, abs=1e-6)
    assert (few.worst, few.worst_problem) == (0.05, problem(64).id)
    assert json.loads(lut.to_json())["few"][0]["worst"] == 0.05
    assert json.loads(lut.to_json())["policy"]["max_kernels"] == 3


def test_one_kernel_is_the_default() -> None:
    lut = select(three_winners(), capped(1))
    assert set(chosen(lut)) == {DEFAULT}
    lost = lut.rules[0]
    assert lost.reason == (
        f"the default serves; {TILES[0]} was ahead by 400.0 %, "
        "but at most 1 kernel serves linear prepared with float32"
    )
    assert lost.ratio is not None and lost.ratio[0] == 1.0 and lost.median_us == 1000.0


def test_a_kernel_that_is_kept_must_still_be_justified_in_every_bin() -> None:
    rows = [*bin_rows(problem(8), {TILES[0]: 200, PACKED: 990}), *bin_rows(problem(64), {PACKED: 100})]
    lut = select(rows, capped(2))
    assert chosen(lut) == [DEFAULT, PACKED]
    assert lut.rules[0].reason.startswith("a tie goes to the default: the best other is mkldnn.linear_packed")
    assert lut.rules[0].reason.endswith("at most 2 kernels serve linear prepared with float32")


def test_what_was_tied_and_is_simpler_costs_nothing_to_give_up() -> None:
    """In the first bin the tile is ahead by a hair, and the simpler kernel would be chosen but for the second."""
    rows = [*bin_rows(problem(8), {TILES[0]: 500, ADDMM: 505}), *bin_rows(problem(64), {TILES[0]: 500})]
    lut = select(rows, capped(2))
    assert chosen(select(rows, capped(3))) == [ADDMM, TILES[0]]
    assert chosen(lut) == [TILES[0], TILES[0]]
    assert f"{ADDMM} was tied and is simpler, but at most 2" in lut.rules[0].reason
    assert lut.few[0].weighted == lut.few[0].worst == 0.0


def test_forms_and_dtypes_have_a_cap_each() -> None:
    def half(m: int) -> Problem:
        return problem(m, dtype="bfloat16")

    rows = [*bin_rows(problem(8), {TILES[0]: 200}), *bin_rows(problem(64), {TILES[0]: 200})]
    rows += [*bin_rows(half(8), {PACKED_BF16: 200}), *bin_rows(half(64), {PACKED_BF16: 200})]
    lut = select(rows, capped(2))
    assert lut.few == () and set(chosen(lut)) == {TILES[0], PACKED_BF16}


def test_problems_whose_default_failed_are_left_alone() -> None:
    failed = [row(DEFAULT, [], problem(16), status="failed", reason="it did"), row(TILES[3], 5, problem(16))]
    lut = select([*three_winners(), *failed], capped(2))
    (rule,) = [r for r in lut.rules if r.problem == problem(16).id and r.form == "prepared"]
    assert rule.candidate == DEFAULT and "it failed: it did" in rule.reason and "at most" not in rule.reason


def test_a_bin_of_the_default_alone_needs_no_joules() -> None:
    joules = [dataclasses.replace(r, energy_j=r.median_ns) for r in three_winners()]
    lut = select([*joules, row(DEFAULT, 90, problem(16))], dataclasses.replace(capped(3), objective="energy"))
    assert chosen(lut) == [TILES[0], DEFAULT, PACKED, PACKED] and lut.few[0].worst == 0.05


def test_no_known_traffic() -> None:
    lut = select([dataclasses.replace(r, weight=0.0) for r in three_winners()], capped(3))
    assert chosen(lut) == [TILES[0], PACKED, PACKED] and lut.few[0].weighted is None


def test_the_certificate_compares_with_what_the_cap_left_out() -> None:
    shape = [
        row(id, us, problem(50), role="held_out") for id, us in ((DEFAULT, 900), (PACKED, 230), (TILES[1], 200))
    ]
    (judged, _) = select([*three_winners(), *shape], capped(3)).certificate.shapes
    assert (judged.chosen, judged.best, judged.regret) == (PACKED, TILES[1], 0.15)


@pytest.mark.parametrize("objective", ["latency", "throughput", "energy"])
def test_every_objective_counts_in_its_own_terms(objective: str) -> None:
    """Joules and times disagree here: the first bin draws most of the energy, the second takes most of the time."""
    first = bin_rows(problem(8), {TILES[0]: 500}, energy_j=900.0)
    second = bin_rows(problem(64), {TILES[1]: 100}, energy_j=9.0)
    first[1], second[1] = (dataclasses.replace(r, energy_j=j) for r, j in ((first[1], 500.0), (second[1], 1.0)))
    lut = select(first + second, dataclasses.replace(capped(2), objective=objective))
    assert chosen(lut) == ([TILES[0], DEFAULT] if objective == "energy" else [DEFAULT, TILES[1]])


TIMES = st.dictionaries(st.sampled_from([ADDMM, PACKED, *TILES]), st.integers(100, 1100), max_size=7)


@settings(max_examples=25, deadline=None)
@given(st.lists(TIMES, min_size=2, max_size=5), st.integers(1, 5), st.randoms())
def test_tables_of_random_rows(bins: list[dict[str, float]], limit: int, rng: random.Random) -> None:
    rows = [r for i, times in enumerate(bins) for r in bin_rows(problem(4**i), times, weight=float(i + 1))]
    free, lut = select(rows, capped(None)), select(rows, capped(limit))
    kinds: dict[tuple[str, str], set[str]] = defaultdict(lambda: {DEFAULT})
    for rule, was in zip(lut.rules, free.rules, strict=True):
        kinds[rule.form, Problem.parse(rule.problem).trait("dtype")].add(rule.candidate)
        assert rule.ratio is not None and rule.ratio[0] is not None
        if rule.candidate != DEFAULT:
            assert rule.ratio[1] is not None and rule.ratio[1] > 1.0 + EXACT.tie, "justified bin by bin"
        same = dataclasses.replace(rule, others=()) == dataclasses.replace(was, others=())
        assert same is ("but at most" not in rule.reason), "what stays is kept, what changes says why"
    assert all(len(names) <= limit for names in kinds.values())
    assert all(few.worst >= (few.weighted or 0.0) >= 0.0 for few in lut.few)
    needed = max((len(few.before) for few in lut.few), default=limit)
    assert select(rows, capped(needed)).table() == free.table(), "a cap that is large enough changes nothing"
    rng.shuffle(rows)
    assert select(rows, capped(limit)).to_json() == lut.to_json()
