"""Rows of two execution modes in one table: each mode chosen by its own rows, and nothing counted twice."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from dks.codegen.lut import Lut
from dks.codegen.package import render
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement
from dks.dispatch.explain import Known, explain
from dks.dispatch.problem import Problem
from tests.codegen.rows import problem as problem_of
from tests.codegen.rows import row

POLICY = Policy(max_error=1e-5, overhead_ns=0.0)
TIMES = {
    "eager": {"torch.linear": 100.0, "torch.linear_inplace": 50.0},
    "graph": {"torch.linear": 40.0, "torch.linear_inplace": 60.0},
}
"""Microseconds: what is best at once is not best in a graph."""


def problem(m: int = 8) -> Problem:
    return problem_of(m, epilogue="gelu")


def rows(mode: str, of: Problem | None = None, **more: object) -> list[Measurement]:
    of = of or problem()
    return [row(name, us, of, mode=mode, **more) for name, us in TIMES[mode].items()]


def lut_of(*modes: str) -> Lut:
    held = [problem(m) for m in (3, 4, 5)]
    found = [each for mode in modes for each in rows(mode)]
    found += [each for mode in modes for of in held for each in rows(mode, of, role="held_out")]
    return select(found, POLICY)


def chosen(lut: Lut) -> dict[str, str]:
    return {group.form: lut.rules[group.cells[64][0]].candidate for group in lut.groups}


def test_each_mode_is_chosen_by_its_own_rows() -> None:
    assert chosen(lut_of("eager", "graph")) == {
        "prepared": "torch.linear_inplace",
        "direct": "torch.linear_inplace",
        "prepared_graph": "torch.linear",
        "direct_graph": "torch.linear",
    }


def test_where_only_eager_was_measured_there_is_nothing_of_graphs() -> None:
    lut = lut_of("eager")
    assert set(chosen(lut)) == {"prepared", "direct"} and "graph" not in lut.to_json()


def test_eager_choices_do_not_depend_on_graphs_and_come_first() -> None:
    alone, both = lut_of("eager"), lut_of("graph", "eager")
    assert both.groups[:2] == alone.groups and both.rules[: len(alone.rules)] == alone.rules
    assert both.expected_us == alone.expected_us == {"float32": 50.0}, "a problem counts once"
    assert both.certificate.weighted == alone.certificate.weighted
    assert [s for s in both.certificate.shapes if "graph" not in s.form] == list(alone.certificate.shapes)


def test_a_run_of_graphs_alone_counts_in_graphs() -> None:
    lut = lut_of("graph")
    assert set(chosen(lut)) == {"prepared_graph", "direct_graph"}
    assert lut.expected_us == {"float32": 40.0} and lut.certificate.weighted == 0.0


def test_the_certificate_says_how_many_problems_and_how_many_regrets() -> None:
    alone, both = lut_of("eager").certificate, lut_of("eager", "graph").certificate
    assert alone.overall is not None and both.overall is not None
    assert (alone.overall.shapes, alone.overall.n) == (3, 6)
    assert (both.overall.shapes, both.overall.n) == (3, 12)
    assert {"linear prepared", "linear direct_graph"} <= both.operators.keys()
    assert both.operators["linear direct_graph"].n == 3


def test_a_candidate_that_fails_in_graphs_alone_still_serves_eager_calls() -> None:
    failed: dict[str, Any] = {"mode": "graph", "status": "failed", "reason": "can't be captured", "error": None}
    graph = [
        row("torch.linear", 90.0, problem(), mode="graph"),
        row("torch.linear_inplace", [], problem(), **failed),
        row("torch.linear", 9.0, problem(5), mode="graph", role="held_out"),
        row("torch.linear_inplace", [], problem(5), role="held_out", **failed),
    ]
    lut = select([*rows("eager"), *graph], POLICY)
    assert chosen(lut)["direct"] == "torch.linear_inplace" and chosen(lut)["direct_graph"] == "torch.linear"
    (told,) = [rule for rule in lut.rules if rule.form == "direct_graph"]
    assert any("can't be captured" in other.reason for other in told.others)


def test_a_limit_on_kernels_holds_in_each_mode() -> None:
    lut = select([*rows("eager"), *rows("graph", problem(8))], dataclasses.replace(POLICY, max_kernels=1))
    assert {few.form for few in lut.few} == {"direct", "prepared"}
    assert set(chosen(lut).values()) == {"torch.linear"}


def test_the_same_rows_twice_in_a_mode_are_refused() -> None:
    with pytest.raises(BadInput, match=r"two measurements of torch\.linear in graph mode"):
        select([*rows("eager"), *rows("graph"), *rows("graph")], POLICY)


def test_the_lut_and_every_rendering_name_the_forms() -> None:
    lut = lut_of("eager", "graph")
    assert [group["form"] for group in json.loads(lut.to_json())["groups"]] == [
        "prepared",
        "direct",
        "prepared_graph",
        "direct_graph",
    ]
    files = render(lut, "two_modes")
    for name in ("_table.py", "table.hpp"):
        assert "direct_graph" in files[name] and "prepared_graph" in files[name]


def known(lut: Lut) -> Known:
    return Known(lut.table(), None, {}, {}, lut.to_json())


def test_explain_tells_the_choice_of_a_mode_and_whose_it_is() -> None:
    asked: dict[str, int | str] = {"m": 8, "n": 64, "k": 32, "form": "direct", "epilogue": "gelu"}
    both = known(lut_of("eager", "graph"))
    assert explain("linear", asked, 64, both).candidate == "torch.linear_inplace"
    choice = explain("linear", {**asked, "mode": "graph"}, 64, both)
    assert choice.candidate == "torch.linear" and ("mode", "graph") in choice.story
    borrowed = explain("linear", {**asked, "mode": "graph"}, 64, known(lut_of("eager")))
    assert borrowed.candidate == "torch.linear_inplace" and "eager mode" in str(borrowed)
    missed = explain("linear", asked, 64, known(lut_of("graph")))
    assert missed.match == "default" and "no entry for" in missed.reason
    with pytest.raises(ValueError, match="found mode=lazy, expected eager or graph"):
        explain("linear", {**asked, "mode": "lazy"}, 64, both)
