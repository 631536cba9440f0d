"""What a challenger must show beyond its ratio: confirmed by processes, stable, whole on the bin's other sizes."""

from __future__ import annotations

import dataclasses
import re

import pytest

from dks.codegen.choose import FAR, choose
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch.evidence import Measurement
from dks.dispatch.intervals import block_ratio
from tests.codegen.rows import PROBLEM, problem, row

EXACT = Policy(max_error=1e-5)
PACKED = "mkldnn.linear_packed"


def by_process(candidate: str, *us: float) -> Measurement:
    """Ten rounds in each process, at one time each."""
    times = [time for time in us for _ in range(10)]
    return row(candidate, times, processes=[i // 10 for i in range(len(times))])


def is_passed_over(reason: str, why: str) -> bool:
    """Whether ``reason`` says so of the packed kernel, at five times the default's speed, with an interval."""
    return (
        re.search(rf"{PACKED} at 5\.000x \[4\.\d+, 5\.\d+\] is passed over: {re.escape(why)}", reason) is not None
    )


def test_one_process_confirms_nothing() -> None:
    rows = [by_process("torch.linear", 100), by_process("torch.addmm", 50)]
    rule = choose(PROBLEM, "prepared", rows, EXACT)
    assert rule.candidate == "torch.linear"
    assert "torch.addmm at 2.000x" in rule.reason
    assert "not confirmed: measured in 1 process, expected 2" in rule.reason
    assert choose(PROBLEM, "prepared", rows, Policy(min_processes=1)).candidate == "torch.addmm"


def test_what_was_measured_in_other_processes_than_the_default_confirms_nothing() -> None:
    late = dataclasses.replace(by_process("torch.addmm", 50, 50), rounds=[*range(10), *range(90, 100)])
    rule = choose(PROBLEM, "prepared", [by_process("torch.linear", 100, 100), late], EXACT)
    assert rule.candidate == "torch.linear" and "measured in 1 process, expected 2" in rule.reason


def test_every_process_must_agree() -> None:
    rows = [by_process("torch.linear", 100, 100, 100), by_process("torch.addmm", 50, 50, 101)]
    rule = choose(PROBLEM, "prepared", rows, EXACT)
    assert rule.candidate == "torch.linear" and "faster in 2 of 3 processes only" in rule.reason
    rows[1] = by_process("torch.addmm", 50, 50, 60)
    rule = choose(PROBLEM, "prepared", rows, EXACT)
    assert rule.candidate == "torch.addmm" and rule.processes == 3


def test_the_next_best_serves_where_the_best_is_not_confirmed() -> None:
    once = dataclasses.replace(row(PACKED, [20] * 10), processes=[0] * 10, rounds=list(range(0, 20, 2)))
    rule = choose(PROBLEM, "prepared", [row("torch.linear", 100), row("torch.addmm", 50), once], EXACT)
    assert rule.candidate == "torch.addmm"
    assert is_passed_over(rule.reason, "not confirmed: measured in 1 process, expected 2")


def test_two_percent_is_a_tie_by_default() -> None:
    """However many processes agree that there is a lead: all of its interval must be more."""
    many = list(range(20))
    for us, wins in ((981, False), (978, False), (970, True)):
        rows = [row("torch.linear", 1000, processes=many), row("torch.addmm", us, processes=many)]
        assert block_ratio([[(1000, us)]] * len(many)).low > 1.0
        assert (choose(PROBLEM, "prepared", rows, EXACT).candidate == "torch.addmm") is wins


def test_a_lead_that_processes_may_differ_by_is_a_tie() -> None:
    def winner(us: float, processes: int) -> str:
        rows = [by_process("torch.linear", *[1000] * processes), by_process("torch.addmm", *[us] * processes)]
        return choose(PROBLEM, "prepared", rows, EXACT).candidate

    assert [winner(us, 2) for us in (970, 940)] == ["torch.linear", "torch.addmm"]
    assert winner(970, 12) == "torch.addmm", "more processes make sure of a smaller lead"


def test_so_do_challengers_tie_with_each_other() -> None:
    rows = [row("torch.linear", 1000), row("torch.addmm", 515), row(PACKED, 500)]
    assert choose(PROBLEM, "prepared", rows, EXACT).candidate == "torch.addmm", "the simpler one"
    sure = [dataclasses.replace(one, processes=list(range(20))) for one in rows]
    assert choose(PROBLEM, "prepared", sure, EXACT).candidate == PACKED
    sure[1] = row("torch.addmm", 509, processes=list(range(20)))
    assert choose(PROBLEM, "prepared", sure, EXACT).candidate == "torch.addmm", "two percent again"
    rows[1] = row("torch.addmm", 530)
    rule = choose(PROBLEM, "prepared", rows, EXACT)
    assert rule.candidate == PACKED and rule.tied == ()


def test_beyond_far_an_interval_would_not_say_tie() -> None:
    apart = 1.4**0.5
    low = block_ratio([[(FAR * shift, 1.0)] * 10 for shift in (apart, 1 / apart)]).low
    assert low > 1.0, "even where two processes differ by 40 %"


def test_ties_are_on_record() -> None:
    rows = [row("torch.linear", 1000), row("torch.addmm", 985), row(PACKED, 1015)]
    rows.append(row("mkl.linear_packed/rows64", 1200))
    default = choose(PROBLEM, "prepared", rows, EXACT)
    assert default.candidate == "torch.linear"
    assert default.tied == ("torch.linear", "torch.addmm", PACKED), "the default included, the slow one not"
    rows = [row("torch.linear", 1000), row("torch.addmm", 505), row(PACKED, 500)]
    challenger = choose(PROBLEM, "prepared", rows, EXACT)
    assert challenger.candidate == "torch.addmm" and challenger.tied == ("torch.addmm", PACKED)
    clear = choose(PROBLEM, "prepared", rows[:2], EXACT)
    assert clear.tied == ()


def test_stability_can_be_required() -> None:
    rows = [row("torch.linear", 100), row(PACKED, 40, stable=False), row("torch.addmm", 50, stable=None)]
    assert choose(PROBLEM, "prepared", rows, EXACT).candidate == PACKED
    rule = choose(PROBLEM, "prepared", rows, Policy(require_stable=True))
    assert rule.candidate == "torch.linear" and "the same call gave other bits" in rule.reason
    rows[2] = row("torch.addmm", 50, stable=True)
    assert choose(PROBLEM, "prepared", rows, Policy(require_stable=True)).candidate == "torch.addmm"


def test_a_gain_below_the_cost_of_dispatching_says_so() -> None:
    rule = choose(PROBLEM, "prepared", [row("torch.linear", 10), row("torch.addmm", 8.5)], EXACT)
    assert "saves 1.5 us, and dispatching costs 2.0 us" in rule.reason and rule.tied == ()


def two_bins() -> list[Measurement]:
    rows = []
    for m in (8, 64):
        of = problem(m)
        rows += [row("torch.linear", 100, of), row("torch.addmm", 50, of), row(PACKED, 20, of)]
    return rows


def chosen(rows: list[Measurement], form: str = "prepared", policy: Policy = EXACT) -> dict[str, tuple[str, str]]:
    """Problem to (candidate, reason)."""
    rules = select(rows, policy).rules
    return {rule.problem: (rule.candidate, rule.reason) for rule in rules if rule.form == form}


@pytest.mark.parametrize(
    "status", ["wrong_result", "failed", "crashed", "timeout", "out_of_memory", "excluded", "unsupported"]
)
def test_failing_on_a_held_out_shape_rules_out_in_that_bin_alone(status: str) -> None:
    bad = row(PACKED, [], problem(32), role="held_out", status=status, reason="it did")
    found = chosen([*two_bins(), bad])
    assert found[problem(8).id][0] == PACKED
    candidate, reason = found[problem(64).id]
    assert candidate == "torch.addmm"
    assert is_passed_over(reason, f"{status} (it did) on held-out")
    assert problem(32).id in reason


@pytest.mark.parametrize(
    ("m", "ruled_out"),
    [(7, 8), (9, 64), (63, 64), (65, 64), (128, 64), (129, None)],  # past twice the last edge, the default runs
)
def test_the_bin_is_where_the_lookup_puts_the_shape(m: int, ruled_out: int | None) -> None:
    bad = row(PACKED, [], problem(m), role="held_out", status="failed", reason="it did")
    found = chosen([*two_bins(), bad])
    assert {size for size in (8, 64) if found[problem(size).id][0] != PACKED} == {ruled_out} - {None}


def test_other_traits_and_alignments_are_other_bins() -> None:
    elsewhere = [
        row(PACKED, [], problem(32, align=4), role="held_out", status="failed", reason="it did"),
        row(PACKED, [], problem(32, epilogue="relu"), role="held_out", status="failed", reason="it did"),
    ]
    assert chosen(two_bins() + elsewhere)[problem(64).id][0] == PACKED


def test_what_held_out_shapes_do_not_hold_against_a_candidate() -> None:
    missing = row(PACKED, [], problem(32), role="held_out", status="unavailable", reason="not here")
    slow = row(PACKED, 500, problem(31), role="held_out", stable=False)
    default = row("torch.linear", [], problem(30), role="held_out", status="failed", reason="it did")
    assert chosen([*two_bins(), missing, slow, default])[problem(64).id][0] == PACKED


def test_a_broken_contract_on_a_held_out_shape_counts_too() -> None:
    inexact = row(PACKED, 20, problem(32), role="held_out", error=1e-4)
    found = chosen([*two_bins(), inexact])[problem(64).id]
    assert found[0] == "torch.addmm" and "error 0.0001, above the budget of 1e-05" in found[1]
    assert chosen([*two_bins(), inexact], policy=Policy())[problem(64).id][0] == PACKED
    unstable = row(PACKED, 20, problem(32), role="held_out", stable=False)
    assert chosen([*two_bins(), unstable], policy=Policy(require_stable=True))[problem(64).id][0] == "torch.addmm"


def test_a_barred_candidate_that_would_not_have_won_is_not_mentioned() -> None:
    bad = row("torch.addmm", [], problem(32), role="held_out", status="failed", reason="it did")
    candidate, reason = chosen([*two_bins(), bad])[problem(64).id]
    assert candidate == PACKED and "passed over" not in reason


def test_an_error_of_whole_outputs_admits_no_quantised_kernel() -> None:
    """As older versions measured it: a large row hides in it what is wrong with the others."""
    rows = [
        row("torch.linear", 20),
        row("tile.i8_avx512_vnni/mr6-nv4-kc0-pf0-t1-r0", 10, error=1e-2, precision="int8"),
    ]
    policy = Policy(max_error=5e-2)
    assert choose(PROBLEM, "prepared", rows, policy).candidate == rows[1].candidate
    old = [dataclasses.replace(each, error_rows=None) for each in rows]
    assert choose(PROBLEM, "prepared", old, policy).candidate == "torch.linear"
    exact = [old[0], dataclasses.replace(old[1], precision="exact")]
    assert choose(PROBLEM, "prepared", exact, policy).candidate == rows[1].candidate
    declines = [old[0], dataclasses.replace(old[1], declines_rows=True)]
    assert choose(PROBLEM, "prepared", declines, policy).candidate == rows[1].candidate
