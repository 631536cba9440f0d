"""The certificate, on rows made up to a number."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest

from dks.codegen.certificate import Certificate, certify, check_regret, describe
from dks.codegen.lut import Lut
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement
from dks.dispatch.problem import Problem
from tests.codegen.rows import problem, row

EXACT = Policy(max_error=1e-5)
PACKED = "mkldnn.linear_packed"


def bin_rows(m: int = 16) -> list[Measurement]:
    """A bin that torch.addmm wins, prepared; direct, the default is alone."""
    of = problem(m)
    return [row("torch.linear", 100, of), row("torch.addmm", 50, of), row(PACKED, 60, of)]


def held_out(m: int, times: dict[str, object], **more: object) -> list[Measurement]:
    return [row(id, us, problem(m), role="held_out", **more) for id, us in times.items()]  # type: ignore[arg-type]


def judged(rows: list[Measurement], policy: Policy = EXACT) -> Certificate:
    return select(rows, policy).certificate


def prepared(certificate: Certificate) -> list[float | None]:
    return [shape.regret for shape in certificate.shapes if shape.form == "prepared"]


def test_no_regret_where_the_choice_is_the_best() -> None:
    found = judged(bin_rows() + held_out(12, {"torch.linear": 90, "torch.addmm": 40, PACKED: 50}))
    assert [(s.form, s.chosen, s.best, s.regret) for s in found.shapes] == [
        ("prepared", "torch.addmm", "torch.addmm", 0.0),
        ("direct", "torch.linear", "torch.linear", 0.0),
    ]
    assert found.overall is not None and found.overall.max == found.overall.p95 == found.weighted == 0.0


def test_ten_percent_where_the_shape_prefers_another() -> None:
    found = judged(bin_rows() + held_out(12, {"torch.linear": 90, "torch.addmm": 55, PACKED: 50}))
    assert prepared(found) == [0.1]
    overall = found.overall
    assert overall is not None and (overall.shapes, overall.n, overall.max) == (1, 2, 0.1)
    assert overall.worst == {
        "problem": problem(12).id,
        "form": "prepared",
        "chosen": "torch.addmm",
        "best": PACKED,
    }
    assert overall.geomean == [pytest.approx(math.sqrt(1.1) - 1, abs=1e-6), None, None], "one shape has no interval"
    assert found.operators["linear prepared"].geomean[0] == 0.1
    assert found.operators["linear direct"].geomean[0] == 0.0
    assert set(found.operators) == {"linear", "linear prepared", "linear direct"}


def test_held_out_shapes_make_no_rule() -> None:
    lut = select(bin_rows() + held_out(12, {"torch.linear": 90, PACKED: 10}), EXACT)
    assert {group.edges for group in lut.groups} == {((16,),)}
    assert {rule.problem for rule in lut.rules} == {problem(16).id}
    with pytest.raises(BadInput, match="held-out shapes alone"):
        select(held_out(12, {"torch.linear": 90}), EXACT)
    mixed = [row("torch.linear", 90), row("torch.addmm", 90, role="held_out")]
    with pytest.raises(BadInput, match="roles bin and held_out"):
        select(mixed, EXACT)


def test_the_default_runs_where_the_lookup_misses() -> None:
    wide = held_out(33, {"torch.linear": 90, "torch.addmm": 60})  # past twice the last edge
    elsewhere = Problem.of("linear", dict(problem().traits), {"m": 8, "n": 128, "k": 32})
    unknown = [row(c, t, elsewhere, role="held_out") for c, t in (("torch.linear", 80), ("torch.addmm", 40))]
    found = judged(bin_rows() + wide + unknown)
    assert prepared(found) == [0.5, 1.0]
    assert not any(shape.hit for shape in found.shapes)
    assert found.to_json()["certificate"]["missed"] == 4
    assert judged(bin_rows() + held_out(32, {"torch.linear": 90, "torch.addmm": 60})).shapes[0].hit


def halves(odd: float, even: float, rounds: int = 40) -> list[float]:
    return [odd if number % 2 else even for number in range(rounds)]


PROCESSES = [0] * 20 + [1] * 20


def test_the_best_is_picked_on_odd_rounds_and_compared_on_even_ones() -> None:
    lucky = {"torch.linear": halves(90, 90), "torch.addmm": halves(50, 50), PACKED: halves(30, 62.5)}
    found = judged(bin_rows() + held_out(12, lucky, processes=PROCESSES))
    assert prepared(found) == [pytest.approx(50 / 62.5 - 1)], "luck that picked it says nothing of its time"
    assert found.shapes[0].best == PACKED and found.shapes[0].pairs == 20 and found.shapes[0].split
    unlucky = {"torch.linear": halves(90, 90), "torch.addmm": halves(50, 50), PACKED: halves(60, 30)}
    assert prepared(judged(bin_rows() + held_out(12, unlucky, processes=PROCESSES))) == [0.0]


def test_the_choice_s_own_time_comes_from_the_even_rounds() -> None:
    times = {"torch.linear": halves(90, 90), "torch.addmm": halves(70, 60), PACKED: halves(50, 50)}
    assert prepared(judged(bin_rows() + held_out(12, times, processes=PROCESSES))) == [0.2]


def test_few_rounds_are_not_split_and_fewer_are_not_judged() -> None:
    def times(rounds: int) -> dict[str, object]:
        return {"torch.linear": [90] * rounds, "torch.addmm": [55] * rounds, PACKED: [50] * rounds}

    found = judged(bin_rows() + held_out(12, times(10)))
    assert prepared(found) == [0.1] and not found.shapes[0].split
    assert found.to_json()["certificate"]["unsplit"] == 1
    few = judged(bin_rows() + held_out(12, times(5)))
    assert prepared(few) == [None] and "fewer than 6 rounds" in few.shapes[0].note
    assert few.overall is not None and few.overall.n == 1, "the direct form has the default alone"
    assert few.to_json()["certificate"]["unmeasured"] == [f"{problem(12).id} prepared: {few.shapes[0].note}"]


def test_a_rival_that_stopped_early_counts_only_if_it_was_ahead() -> None:
    times = {"torch.linear": [90] * 20, "torch.addmm": [55] * 20}
    assert prepared(judged(bin_rows() + held_out(12, {**times, PACKED: [80] * 4}))) == [0.0]
    # A little ahead in a few rounds says nothing, and nothing is claimed; far ahead in each is a regret.
    assert prepared(judged(bin_rows() + held_out(12, {**times, PACKED: [45] * 4}))) == [None]
    assert prepared(judged(bin_rows() + held_out(12, {**times, PACKED: [20] * 4}))) == [1.75]


def test_a_table_of_shapes_that_cannot_be_judged_is_refused() -> None:
    times = {"torch.linear": [90] * 20, "torch.addmm": [55] * 20, PACKED: [45] * 4}
    found = judged(bin_rows() + held_out(12, times))
    with pytest.raises(BadInput, match="can't be judged"):
        check_regret(found, 0.05)


def test_a_choice_that_was_not_timed_there_is_not_judged() -> None:
    absent = judged(bin_rows() + held_out(12, {"torch.linear": 90}))
    assert prepared(absent) == [None] and "torch.addmm was not measured there" in absent.shapes[0].note
    gone = held_out(12, {"torch.linear": 90})
    gone.append(row("torch.addmm", [], problem(12), role="held_out", status="unavailable", reason="no MKL"))
    assert "unavailable there: no MKL" in judged(bin_rows() + gone).shapes[0].note


def test_a_table_of_the_default_alone_has_no_regret() -> None:
    rows = [row("torch.linear", 100, problem(16)), *held_out(12, {"torch.linear": 90})]
    found = judged(rows)
    assert [shape.regret for shape in found.shapes] == [0.0, 0.0]


def test_only_what_the_policy_admits_can_be_the_best() -> None:
    times: dict[str, object] = {"torch.linear": 90, "torch.addmm": 50}
    shape = held_out(12, times)
    inexact = row("mkldnn.linear_packed_bf16", 10, problem(12), role="held_out", error=3e-3)
    assert prepared(judged([*bin_rows(), *shape, inexact])) == [0.0]
    assert prepared(judged([*bin_rows(), *shape, inexact], Policy(max_error=1e-2))) == [4.0]
    unstable = row(PACKED, 10, problem(12), role="held_out", stable=False)
    assert prepared(judged([*bin_rows(), *shape, unstable])) == [4.0]
    assert prepared(judged([*bin_rows(), *shape, unstable], Policy(require_stable=True))) == [0.0]


def test_what_saves_less_than_dispatching_costs_is_no_better() -> None:
    rows = [row("torch.linear", 10, problem(16)), row("torch.addmm", 8, problem(16))]
    rows += held_out(12, {"torch.linear": 10, "torch.addmm": 8})
    assert prepared(judged(rows)) == [0.0]
    assert judged(rows, dataclasses.replace(EXACT, overhead_ns=0.0)).shapes[0].chosen == "torch.addmm"


def test_traffic_weighs_the_times() -> None:
    rows = bin_rows(16)
    rows += held_out(12, {"torch.linear": 90, "torch.addmm": 60, PACKED: 50}, weight=3.0)
    rows += held_out(10, {"torch.linear": 90, "torch.addmm": 40, PACKED: 50}, weight=1.0)
    assert judged(rows).weighted == pytest.approx((3 * 60 + 40) / (3 * 50 + 40) - 1, abs=1e-6)
    assert judged([*bin_rows(), *held_out(12, {"torch.linear": 90}, weight=0.0)]).weighted is None


def test_throughput_is_judged_by_totals() -> None:
    times = {"torch.linear": 90, "torch.addmm": 55, PACKED: [40, 40, 40, 40, 140] * 4}
    rows = bin_rows() + held_out(12, times)  # type: ignore[arg-type]
    assert prepared(judged(rows)) == [pytest.approx(0.375)]
    assert prepared(judged(rows, dataclasses.replace(EXACT, objective="throughput"))) == [0.0]


def many() -> list[Measurement]:
    rows = bin_rows(64)
    for m in range(41, 61):  # 20 shapes, of which one has 20 % regret, one 10 %
        behind = {41: 60.0, 42: 55.0}.get(m, 50.0)
        rows += held_out(m, {"torch.linear": 90, "torch.addmm": behind, PACKED: 50})
    return rows


def test_percentiles_and_the_interval() -> None:
    found = judged(many()).operators["linear prepared"]
    assert (found.shapes, found.n, found.p95, found.max) == (20, 20, 0.1, 0.2)
    value, low, high = found.geomean
    assert value == pytest.approx(math.expm1((math.log(1.2) + math.log(1.1)) / 20), abs=1e-6)
    assert low is not None and high is not None and value is not None
    assert 0.0 <= low < value < high < 0.05


def test_the_interval_covers_the_truth() -> None:
    """Of the mean log of shapes drawn anew; the percentile bootstrap is a little narrow at 20."""
    rng = random.Random(8)
    rows = [r for r in bin_rows(64) if r.candidate != PACKED]
    table = select(rows, EXACT).table()
    inside = 0
    for _ in range(60):
        shapes = {}
        for m in range(41, 61):
            behind = 100.0 * math.exp(abs(rng.gauss(0, 0.1)))
            shapes[problem(m)] = held_out(m, {"torch.linear": 900, "torch.addmm": behind, PACKED: 100})
        _, low, high = certify(table, {"eager": shapes}, EXACT).operators["linear prepared"].geomean
        assert low is not None and high is not None
        inside += low <= math.expm1(0.1 * math.sqrt(2 / math.pi)) <= high
    assert inside >= 50


def test_the_order_of_rows_changes_no_byte() -> None:
    rows = many() + held_out(33, {"torch.linear": 80, "torch.addmm": [], PACKED: 70})
    rng = random.Random(5)
    text = select(rows, EXACT).to_json()
    for _ in range(3):
        rng.shuffle(rows)
        assert select(rows, EXACT).to_json() == text


def test_the_lut_holds_the_certificate_and_every_shape() -> None:
    data = json.loads(select(many(), EXACT).to_json())
    assert data["certificate"]["operators"]["linear prepared"]["max"] == 0.2 and data["certificate_note"] == ""
    assert len(data["held_out"]) == 40
    none = json.loads(select(bin_rows(), EXACT).to_json())
    assert none["certificate"] is None and "no held-out shapes" in none["certificate_note"]
    joules = [dataclasses.replace(r, energy_j=1.0) for r in many()]
    energy = json.loads(select(joules, dataclasses.replace(EXACT, objective="energy")).to_json())
    assert energy["certificate"] is None and "joules" in energy["certificate_note"]


def lut_with(limit: float | None, rows: list[Measurement]) -> Lut:
    return select(rows, dataclasses.replace(EXACT, max_regret=limit))


def test_a_limit_on_the_regret() -> None:
    rows = bin_rows() + held_out(12, {"torch.linear": 90, "torch.addmm": 55, PACKED: 50})
    found = lut_with(None, rows).certificate
    check_regret(found, None)
    check_regret(found, 0.1)
    with pytest.raises(BadInput) as refused:
        check_regret(found, 0.09)
    text = str(refused.value)
    assert "found a regret of 10.0 %" in text and "expected at most 9.0 %" in text and "measure again" in text
    assert f"{problem(12).id} prepared: torch.addmm is 10.0 % behind {PACKED}" in text
    assert "direct" not in text, "what is within the limit is not named"
    with pytest.raises(BadInput, match="no held-out shapes"):
        check_regret(lut_with(5.0, bin_rows()).certificate, 5.0)
    few = bin_rows() + held_out(12, {"torch.linear": [90] * 3}, status="failed")
    with pytest.raises(BadInput, match="none of 1 held-out shapes can be judged"):
        check_regret(lut_with(5.0, few).certificate, 5.0)


def test_one_line() -> None:
    stored = judged(bin_rows() + held_out(12, {"torch.linear": 90, "torch.addmm": 55, PACKED: 50})).to_json()
    line = describe(stored["certificate"], stored["certificate_note"])
    assert line.startswith("regret on 1 held-out shapes: 4.9 %, 95th percentile 10.0 %, at most 10.0 %")
    assert "\n" not in line and PACKED in line and line.endswith(")"), "nothing to add"
    missed = judged(bin_rows() + held_out(99, {"torch.linear": [90] * 8, "torch.addmm": [55] * 8})).to_json()
    assert "; 2 not in the table" in describe(missed["certificate"], "")
    assert "; 1 with too few rounds" in describe(missed["certificate"], "")
    assert describe(None, "why not") == "no certificate: why not"
    for odd in ({}, {"overall": None}, {"overall": {"worst": {}}}):
        with pytest.raises(BadInput, match="certificate: found none that reads"):
            describe(odd, "")
