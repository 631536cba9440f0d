"""Selection, fed with rows made up to a number: no kernel runs here."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from dks.codegen.choose import choose
from dks.codegen.policy import Policy, load_policy
from dks.codegen.select import select
from dks.dispatch.errors import BadInput
from dks.dispatch.table import Match
from tests.codegen.rows import PROBLEM, problem, row

EXACT = Policy(max_error=1e-5)
WIDE = Policy(max_error=1e-2)


def test_a_clear_winner_replaces_the_default() -> None:
    rule = choose(PROBLEM, "prepared", [row("torch.linear", 100), row("torch.addmm", 50)], EXACT)
    assert rule.candidate == "torch.addmm"
    assert rule.ratio is not None
    value, low, high = rule.ratio
    assert value == 2.0 and low is not None and high is not None and 1.9 < low < 2.0 < high < 2.1
    assert rule.default_us == 100.0 and rule.median_us == 50.0
    assert rule.reason.startswith("faster than the default")


def test_a_tie_goes_to_the_default_and_names_the_other() -> None:
    rule = choose(PROBLEM, "prepared", [row("torch.linear", 100), row("torch.addmm", 99)], EXACT)
    assert rule.candidate == "torch.linear"
    assert "tie" in rule.reason and "torch.addmm" in rule.reason and rule.runner_up == "torch.addmm"


def test_noise_that_straddles_one_is_a_tie() -> None:
    noise = random.Random(3)
    default = row("torch.linear", [100 * noise.lognormvariate(0, 0.3) for _ in range(40)])
    other = row("torch.addmm", [97 * noise.lognormvariate(0, 0.3) for _ in range(40)])
    assert choose(PROBLEM, "prepared", [default, other], EXACT).candidate == "torch.linear"


def test_too_few_rounds_prove_nothing() -> None:
    rows = [row("torch.linear", [100] * 5), row("torch.addmm", [50] * 5)]
    assert choose(PROBLEM, "prepared", rows, EXACT).candidate == "torch.linear"


def test_a_gain_smaller_than_the_dispatch_itself_is_no_gain() -> None:
    rows = [row("torch.linear", 10), row("torch.addmm", 8)]
    assert choose(PROBLEM, "prepared", rows, EXACT).candidate == "torch.linear"
    free = dataclasses.replace(EXACT, overhead_ns=0.0)
    assert choose(PROBLEM, "prepared", rows, free).candidate == "torch.addmm"


def test_tied_challengers_go_to_the_simplest() -> None:
    rows = [row("torch.linear", 100), row("mkl.linear_packed/rows64", 50), row("torch.addmm", 50.2)]
    rule = choose(PROBLEM, "prepared", rows, EXACT)
    assert rule.candidate == "torch.addmm" and "tied with mkl.linear_packed/rows64" in rule.reason


def test_the_budget_decides_who_may_win() -> None:
    rows = [
        row("torch.linear", 100),
        row("mkldnn.linear_packed_bf16", 20, error=3e-3),
        row("torch.addmm", 60),
    ]
    assert choose(PROBLEM, "prepared", rows, EXACT).candidate == "torch.addmm"
    assert choose(PROBLEM, "prepared", rows, WIDE).candidate == "mkldnn.linear_packed_bf16"
    nobody = dataclasses.replace(EXACT, max_error=1e-9)
    assert "no other candidate is inside" in choose(PROBLEM, "prepared", rows, nobody).reason


def test_a_direct_call_never_gets_a_kernel_that_packs() -> None:
    rows = [row("torch.linear", 100), row("torch.addmm", 20)]
    assert choose(PROBLEM, "direct", rows, EXACT).candidate == "torch.linear"


@pytest.mark.parametrize("status", ["failed", "wrong_result", "unsupported", "unavailable"])
def test_what_is_not_ok_never_wins(status: str) -> None:
    rows = [row("torch.linear", 100), row("torch.addmm", 1, status=status)]
    assert choose(PROBLEM, "prepared", rows, WIDE).candidate == "torch.linear"


def test_a_default_that_failed_is_still_emitted_and_says_so() -> None:
    rows = [row("torch.linear", [], status="failed", reason="out of memory"), row("torch.addmm", 1)]
    rule = choose(PROBLEM, "prepared", rows, EXACT)
    assert rule.candidate == "torch.linear" and "out of memory" in rule.reason and rule.median_us is None


def test_objectives() -> None:
    steady = row("torch.addmm", [60.0] * 40)
    tailed = row("mkl.linear_packed/rows64", [50.0, 50.0, 50.0, 50.0, 300.0] * 8)
    rows = [row("torch.linear", [100.0] * 40), steady, tailed]
    assert choose(PROBLEM, "prepared", rows, EXACT).candidate == "mkl.linear_packed/rows64"
    throughput = dataclasses.replace(EXACT, objective="throughput")
    assert choose(PROBLEM, "prepared", rows, throughput).candidate == "torch.addmm"
    memory = dataclasses.replace(EXACT, objective="memory")
    assert choose(PROBLEM, "prepared", rows, memory).candidate == "torch.linear"
    capped = dataclasses.replace(EXACT, max_form_bytes=1)
    assert choose(PROBLEM, "prepared", rows, capped).candidate == "torch.linear"
    with pytest.raises(BadInput, match="no measured joules"):
        choose(PROBLEM, "prepared", rows, dataclasses.replace(EXACT, objective="energy"))


def test_energy_selects_on_joules() -> None:
    frugal = row("torch.addmm", 90, energy_j=1.0)
    rows = [row("torch.linear", 100, energy_j=2.0), frugal]
    joules = dataclasses.replace(EXACT, objective="energy")
    assert choose(PROBLEM, "prepared", rows, joules).candidate == "torch.addmm"


def test_what_was_dropped_before_joules_were_read_does_not_win_and_stops_nothing() -> None:
    rows = [row("torch.linear", 100, energy_j=2.0), row("torch.addmm", 90, energy_j=1.0)]
    rows.append(row("mkl.linear_packed/rows64", 50, energy_note="of finalists alone"))
    lut = select(rows, dataclasses.replace(EXACT, objective="energy"))
    (rule,) = [rule for rule in lut.rules if rule.form == "prepared"]
    assert rule.candidate == "torch.addmm"
    assert any("its joules were not read" in other.reason for other in rule.others)


def test_bins_classes_and_holes_become_a_table() -> None:
    rows = []
    for m, align in ((1, 64), (16, 64), (16, 4)):
        rows += [row("torch.linear", 100, problem(m, align)), row("torch.addmm", 50, problem(m, align))]
    table = select(rows, EXACT).table()
    (prepared,) = [g for g in table.groups if g.form == "prepared"]
    assert prepared.edges == ((1, 16),) and list(prepared.cells) == [64, 4]
    assert prepared.cells[4][0] == -1, "never measured is never claimed"
    index = table.groups.index(prepared)
    code = table.find(index, 64, 9)
    assert table.rules[code >> 2].candidate == "torch.addmm" and code & 3 == Match.BIN
    (direct,) = [g for g in table.groups if g.form == "direct"]
    assert {table.rules[i].candidate for i in direct.cells[64]} == {"torch.linear"}


def test_the_order_of_rows_changes_nothing() -> None:
    rows = [row(c, t, problem(m)) for m in (1, 8, 64) for c, t in (("torch.linear", 90), ("torch.addmm", 50))]
    shuffled = rows[:]
    random.Random(5).shuffle(shuffled)
    assert select(rows, EXACT).to_json() == select(shuffled, EXACT).to_json()


def test_expected_time_weighs_the_shared_problems() -> None:
    rows = [
        row("torch.linear", 100, problem(8), weight=3.0),
        row("torch.linear", 40, problem(8, dtype="bfloat16"), weight=3.0, error=2e-3),
        row("torch.linear", 7, problem(64), weight=1.0),  # float32 alone: compares nothing
    ]
    assert select(rows, WIDE).expected_us == {"bfloat16": 120.0, "float32": 300.0}


def test_rows_that_do_not_belong_together_are_refused() -> None:
    one = row("torch.linear", 100)
    other = dataclasses.replace(
        row("torch.linear", 100, problem(99)), environment=one.environment.replace("2.", "9.")
    )
    with pytest.raises(BadInput, match="several environments"):
        select([one, other], EXACT)
    with pytest.raises(BadInput, match="two measurements"):
        select([one, one], EXACT)
    with pytest.raises(BadInput, match="expected at least one"):
        select([], EXACT)
    with pytest.raises(BadInput, match="measured with another source"):
        select([dataclasses.replace(one, kernel_digest="0" * 16)], EXACT)
    with pytest.raises(BadInput, match="expected an operator and kernel of this version"):
        select([dataclasses.replace(one, candidate="gone.kernel")], EXACT)


def test_parameters_may_have_other_values_than_those_declared_and_no_other_names() -> None:
    rows = [row("torch.linear", 100), row("mkl.linear_packed/rows48", 50)]
    assert {rule.candidate for rule in select(rows, EXACT).rules} >= {"mkl.linear_packed/rows48"}
    with pytest.raises(BadInput, match=r"parameters of mkl\.linear_packed/lines48"):
        select([rows[0], row("mkl.linear_packed/lines48", 50)], EXACT)


def test_policies_from_files(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("objective: throughput\nmax_form_bytes: 1000\nmax_error: 0.001\n")
    assert load_policy(str(path), None) == Policy(0.001, "throughput", max_form_bytes=1000)
    assert load_policy(str(path), 1e-5).max_error == 1e-5
    path.write_text("min_processes: 3\nrequire_stable: true\nmax_regret: 0.1\n")
    assert load_policy(str(path)) == Policy(min_processes=3, require_stable=True, max_regret=0.1)
    assert load_policy(str(path), max_regret=0.2).max_regret == 0.2
    path.write_text("max_kernels: 7\n")
    assert load_policy(str(path)).max_kernels == 7 and load_policy(str(path), max_kernels=2).max_kernels == 2
    path.write_text("max_kernels: null\n")
    assert load_policy(str(path)).max_kernels is None and Policy().max_kernels == 8
    for text in (
        "max_kernels: 0",
        "max_kernels: true",
        "max_kernels: 2.5",
        "min_processes: 0",
        "min_processes: true",
        "require_stable: 1",
        "max_regret: -1",
        "tie: x",
    ):
        path.write_text(text)
        with pytest.raises(BadInput, match=text.partition(":")[0]):
            load_policy(str(path))
    for text in ("objective: speed\n", "surprise: 1\n", "max_error: -1\n", "[]", "max_error: .nan", ": ["):
        path.write_text(text)
        with pytest.raises(BadInput, match=r"policy\.yaml"):
            load_policy(str(path), None)
    with pytest.raises(BadInput, match="speed"):
        load_policy("speed", None)
    with pytest.raises(BadInput, match="max_error"):
        load_policy("latency", float("nan"))
