"""Why the other candidates of a bin were not chosen: each in one place, and in few words for a whole table."""

from __future__ import annotations

import dataclasses
import json

from dks.codegen.lut import Evidence
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch.evidence import Measurement
from tests.codegen.rows import PROBLEM, problem, row

EXACT = Policy(max_error=1e-5)
PACKED, ADDMM, INPLACE = "mkldnn.linear_packed", "torch.addmm", "torch.linear_inplace"
ROWS8, ROWS16, ROWS32 = (f"mkl.linear_packed/rows{n}" for n in (8, 16, 32))


def rule(rows: list[Measurement], form: str = "prepared", policy: Policy = EXACT, of: str = PROBLEM.id) -> Evidence:
    """The rule of one problem and form in a table of these rows."""
    return next(r for r in select(rows, policy).rules if r.form == form and r.problem == of)


def told(made: Evidence) -> dict[str, dict[str, int]]:
    return {other.reason: other.kernels for other in made.others}


def failed(candidate: str, status: str, reason: str = "") -> Measurement:
    return row(candidate, [], status=status, reason=reason, error=None, stable=None)


def test_each_reason_the_nearest_first() -> None:
    once = dataclasses.replace(row(ROWS8, [20] * 10), processes=[0] * 10, rounds=list(range(0, 20, 2)))
    dropped = dataclasses.replace(row(ROWS16, [900] * 10), processes=[0] * 10, rounds=list(range(0, 20, 2)))
    rows = [
        row("torch.linear", 100),
        row(PACKED, 50),
        row(ADDMM, 70),
        once,
        dropped,
        row(ROWS32, 300),
        row("mkldnn.linear_packed_bf16", 10, error=3e-3),
        failed("onednn.qlinear", "crashed", "its process died: signal 11"),
        failed("quantized.dynamic_x86", "unavailable", "no such engine"),
        failed("quantized.dynamic_onednn", "excluded"),
    ]
    made = rule(rows)
    assert made.candidate == PACKED
    assert [(other.reason, other.kernels) for other in made.others] == [
        ("not confirmed: measured in 1 process, expected 2", {"mkl.linear_packed": 1}),
        ("ahead of the default, behind the choice", {ADDMM: 1}),
        ("slower than the default", {"mkl.linear_packed": 1}),
        ("slower than the default: racing dropped it in the first process", {"mkl.linear_packed": 1}),
        ("error above the budget of 1e-05", {"mkldnn.linear_packed_bf16": 1}),
        ("crashed: its process died: signal 11", {"onednn.qlinear": 1}),
        ("excluded", {"quantized.dynamic_onednn": 1}),
        ("unavailable: no such engine", {"quantized.dynamic_x86": 1}),
    ]


def test_candidates_of_one_kernel_are_counted() -> None:
    rows = [row("torch.linear", 100), row(PACKED, 50), *(row(each, 300) for each in (ROWS8, ROWS16, ROWS32))]
    assert told(rule(rows)) == {"slower than the default": {"mkl.linear_packed": 3}}


def test_a_form_and_a_limit_keep_candidates_out() -> None:
    rows = [row("torch.linear", 100), row(PACKED, 50), row(INPLACE, 99)]
    assert told(rule(rows, "direct")) == {
        "is torch.linear itself": {INPLACE: 1},
        "packs its weight: prepared calls alone": {PACKED: 1},
    }
    small = dataclasses.replace(EXACT, max_form_bytes=10)
    assert "packed weight above max_form_bytes of 10" in told(rule(rows, policy=small))
    memory = dataclasses.replace(EXACT, objective="memory")
    assert "packs its weight, and the objective is memory" in told(rule(rows, policy=memory))


def test_too_little_is_saved_or_it_is_tied_or_not_stable() -> None:
    rows = [row("torch.linear", 10), row(ADDMM, 8.5)]
    assert told(rule(rows)) == {"ahead of the default by less than dispatching costs": {ADDMM: 1}}
    rows = [row("torch.linear", 1000), row(ADDMM, 505), row(PACKED, 500)]
    made = rule(rows)
    assert made.candidate == ADDMM and told(made) == {"as fast as the choice, and less simple": {PACKED: 1}}
    rows = [row("torch.linear", 100), row(ADDMM, 50, stable=False)]
    stable = dataclasses.replace(EXACT, require_stable=True)
    assert told(rule(rows, policy=stable)) == {"barred: not stable: the same call gave other bits": {ADDMM: 1}}


def test_a_failure_on_a_held_out_shape_bars_the_bin() -> None:
    inner = problem(5)
    rows = [row("torch.linear", 100), row(ADDMM, 50), row("torch.linear", 100, inner, role="held_out")]
    rows.append(dataclasses.replace(failed(ADDMM, "crashed", "signal 11"), problem=inner.id, role="held_out"))
    assert told(rule(rows)) == {f"barred: crashed (signal 11) on held-out {inner.id}": {ADDMM: 1}}


def test_one_kernel_too_many() -> None:
    rows = []
    for m, best in ((1, PACKED), (8, PACKED), (64, ADDMM)):
        rows += [row("torch.linear", 100, problem(m)), row(PACKED, 30 if best == PACKED else 60, problem(m))]
        rows.append(row(ADDMM, 40 if best == ADDMM else 60, problem(m)))
    made = rule(rows, policy=dataclasses.replace(EXACT, max_kernels=2), of=problem(64).id)
    assert made.candidate == PACKED
    assert told(made) == {"not behind the choice, but one kernel too many: at most 2": {ADDMM: 1}}


def test_without_the_default_nothing_can_be_compared() -> None:
    rows = [failed("torch.linear", "timeout"), row(ADDMM, 50)]
    assert told(rule(rows)) == {"not comparable: it shares no round with the default": {ADDMM: 1}}


def test_rules_share_what_they_say() -> None:
    rows = []
    for m in (1, 2, 4, 8, 16, 32):
        rows += [row("torch.linear", 100, problem(m)), row(ADDMM, 300, problem(m))]
    lut = json.loads(select(rows, EXACT).to_json())
    assert lut["version"] == 3
    assert lut["others"] == [
        {"reason": "slower than the default", "kernels": {ADDMM: 1}},
        {"reason": "packs its weight: prepared calls alone", "kernels": {ADDMM: 1}},
    ]
    assert {tuple(each["others"]) for each in lut["rules"]} == {(0,), (1,)}
