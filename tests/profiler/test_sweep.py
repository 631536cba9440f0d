"""Sweeps on a machine made of numbers: resuming, refusing, confirming, splitting, budgets, and faults on record."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from dks.dispatch import pool
from dks.dispatch.environment import UNKNOWN
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import read_rows, read_run
from dks.dispatch.problem import Problem
from dks.profiler import store as store_module
from dks.profiler import sweep as sweep_module
from dks.profiler.config import load
from dks.profiler.findings import Finding
from dks.profiler.isolation import Lost, OutOfTime
from dks.profiler.store import JOURNAL, RUN_FILE
from dks.profiler.sweep import ATTEMPTS, Event, Outcome, run_sweep
from tests.profiler.fakes import FakeMachine, by_rank

CONFIG = """
version: 1
name: small
operators:
  linear:
    bins: {m: {scheme: explicit, edges: [1, 8]}}
    problems:
      - {dims: {n: 32, k: 32}, traits: {dtype: float32, epilogue: gelu}}
    candidates: ["torch.*"]
  layer_norm:
    bins: {m: {scheme: explicit, edges: [4]}}
    problems:
      - {dims: {n: 32}}
measure: {min_rounds: 10, max_rounds: 20, processes: 2}
"""
PROBLEMS = 5  # three representatives, and held-out shapes in the two bins that have room


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def sweep(config: Path, folder: Path, machine: FakeMachine | None = None, **more: object) -> Outcome:
    return run_sweep(load(config), folder, start=(machine or FakeMachine()).start, **more)  # type: ignore[arg-type]


def test_a_sweep_leaves_one_file_a_problem_that_pandas_opens(config: Path, folder: Path) -> None:
    outcome = sweep(config, folder)
    assert (outcome.measured, outcome.reused, outcome.unfinished) == (PROBLEMS, 0, [])
    frame = pd.read_parquet(folder)
    rows = read_run(folder)
    assert len(frame) == len(rows) == len({(r.problem, r.candidate) for r in rows})
    assert Counter(row.role for row in rows if row.candidate in ("torch.linear", "torch.layer_norm")) == {
        "bin": 3,
        "held_out": 2,
    }


def test_what_still_contends_is_confirmed_in_a_fresh_process_and_what_does_not_is_not(
    config: Path, folder: Path
) -> None:
    machine = FakeMachine()
    sweep(config, folder, machine)
    timed = Counter(machine.timed)
    assert set(timed.values()) == {1}, "a process times a problem once"
    for row in read_run(folder):
        if row.candidate in ("torch.linear_inplace", "torch.native_layer_norm") and row.status == "ok":
            assert len(set(row.processes)) in (1, 2)
    linear = [row for row in read_run(folder) if row.op == "linear" and row.status == "ok"]
    best = min(linear, key=lambda row: row.median_ns or 0.0)
    assert len(set(best.processes)) == 2 and best.ratio_low is not None and best.ratio_low > 1


def test_it_resumes_where_it_stopped(config: Path, folder: Path) -> None:
    sweep(config, folder)
    gone = sorted(folder.glob("linear*.parquet"))[0]
    kept = {p: p.read_bytes() for p in folder.glob("*.parquet") if p != gone}
    gone.unlink()
    outcome = sweep(config, folder)
    assert (outcome.measured, outcome.reused) == (1, PROBLEMS - 1)
    assert gone.exists() and all(p.read_bytes() == data for p, data in kept.items())


def test_an_interrupted_sweep_repeats_nothing_that_was_acknowledged(config: Path, folder: Path) -> None:
    def stop(event: Event) -> None:
        if event.done == 2:
            raise KeyboardInterrupt

    first, second = FakeMachine(), FakeMachine()
    with pytest.raises(KeyboardInterrupt):
        sweep(config, folder, first, notify=stop)
    sweep(config, folder, second)
    assert not set(first.checked) & set(second.checked)
    assert len(first.checked) + len(second.checked) == len(read_run(folder))


def test_a_killed_sweep_s_journal_is_all_that_a_resume_needs(
    config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after kill -9: nothing was put into Parquet, and the last record is torn."""
    monkeypatch.setattr(sweep_module._Run, "close", lambda self: self._end_process())
    machine = FakeMachine()
    sweep(config, folder, machine)
    monkeypatch.undo()
    journal = folder / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-7])
    assert not list(folder.glob("*.parquet"))
    again = FakeMachine()
    outcome = sweep(config, folder, again)
    assert again.checked == [] and len(again.timed) == 1
    assert any("unfinished record" in note for note in outcome.notes)
    assert not (folder / JOURNAL).read_bytes(), "Parquet has it all now"
    for row in read_run(folder):
        assert len(set(row.rounds)) == len(row.rounds)


def test_a_changed_config_measures_only_what_it_changed(config: Path, folder: Path) -> None:
    sweep(config, folder)
    config.write_text(
        CONFIG.replace("edges: [1, 8]", "edges: [1, 8, 16]").replace(
            "layer_norm:\n    bins", "layer_norm:\n    alignments: [64, 4]\n    bins"
        )
    )
    machine = FakeMachine()
    sweep(config, folder, machine)
    assert {Problem.parse(id).dims[0][1] for id, _ in machine.checked if id.startswith("linear")} == {13, 16}
    assert {Problem.parse(id).align for id, _ in machine.checked if id.startswith("layer")} == {4}
    assert sweep(config, folder).measured == 0


def test_a_weight_that_changed_reaches_the_rows_without_measuring(config: Path, folder: Path) -> None:
    sweep(config, folder)
    config.write_text(CONFIG.replace("epilogue: gelu}", "epilogue: gelu}, count: 7"))
    assert sweep(config, folder).measured == 0
    assert max(row.weight for row in read_run(folder)) == 3.5


def test_a_kernel_whose_source_changed_is_measured_again_and_nothing_else(
    config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(config, folder)
    real = store_module.source_digest
    monkeypatch.setattr(
        store_module, "source_digest", lambda k: "another" if k.id == "torch.linear_inplace" else real(k)
    )
    machine = FakeMachine()
    outcome = sweep(config, folder, machine)
    assert {candidate for _, candidate in machine.checked} == {"torch.linear_inplace"}
    assert any("torch.linear_inplace: its source changed" in note for note in outcome.notes)
    assert sweep(config, folder).measured == 0


def test_a_kernel_that_another_compiler_would_make_is_measured_again_and_nothing_else(
    config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = "torch.linear_inplace"  # stands for one that compiles something

    def compile_with(tools: str) -> None:
        monkeypatch.setattr(store_module, "toolchain", lambda kernel: tools if kernel.id == compiled else "")

    compile_with("g++ 12.2")
    sweep(config, folder)
    assert sweep(config, folder).measured == 0
    compile_with("g++ 13.1")
    machine = FakeMachine()
    outcome = sweep(config, folder, machine)
    assert {candidate for _, candidate in machine.checked} == {compiled}
    assert any(f"{compiled}: measured with g++ 12.2, found g++ 13.1; its " in note for note in outcome.notes)
    assert {(row.candidate == compiled, row.toolchain) for row in read_run(folder)} == {
        (True, "g++ 13.1"),
        (False, ""),
    }
    assert sweep(config, folder).measured == 0
    compile_with(UNKNOWN)
    for _ in range(2):
        assert any("found unknown" in note for note in sweep(config, folder).notes), "unknown equals nothing"


def test_another_environment_begins_a_new_session_and_keeps_the_old_one(config: Path, folder: Path) -> None:
    sweep(config, folder)
    data = json.loads((folder / RUN_FILE).read_text())
    data["environment"]["torch"] = "1.0"
    (folder / RUN_FILE).write_text(json.dumps(data))
    outcome = sweep(config, folder)
    assert outcome.measured == PROBLEMS and outcome.reused == 0
    assert "torch: 1.0 != " in outcome.notes[0] and "_session-0" in outcome.notes[0]
    assert len(list((folder / "_session-0").glob("*.parquet"))) == PROBLEMS
    assert len(pd.read_parquet(folder)) == len(read_run(folder)), "pandas doesn't see the old session"


def test_another_cache_state_begins_a_new_session(config: Path, folder: Path) -> None:
    sweep(config, folder)
    config.write_text(CONFIG.replace("processes: 2", "processes: 2, cache: warm"))
    assert "cache: cold != warm" in sweep(config, folder).notes[0]
    assert {row.cache for row in read_run(folder)} == {"warm"}


@pytest.mark.parametrize("which", ["parquet", "journal"])
def test_a_flipped_byte_is_quarantined_and_said_and_the_next_run_mends_it(
    config: Path, folder: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if which == "journal":
        monkeypatch.setattr(sweep_module._Run, "close", lambda self: self._end_process())
    sweep(config, folder)
    monkeypatch.undo()
    path = sorted(folder.glob("linear*.parquet"))[0] if which == "parquet" else folder / JOURNAL
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"(?s)(digest|does not read).*_quarantine"):
        sweep(config, folder)
    assert len(list(folder.glob("_quarantine-*"))) == 1
    assert sweep(config, folder).measured == 1
    assert sweep(config, folder).measured == 0


def test_fresh_forgets(config: Path, folder: Path) -> None:
    sweep(config, folder)
    assert sweep(config, folder, fresh=True).measured == PROBLEMS


def test_a_budget_of_nothing_lists_what_is_unfinished(config: Path, folder: Path) -> None:
    outcome = sweep(config, folder, budget_s=0.0)
    assert (outcome.measured, outcome.reused, len(outcome.unfinished)) == (0, 0, PROBLEMS)
    assert {lack for _, lack in outcome.unfinished} == {"not measured"}


HEAVY = """
version: 1
name: heavy
operators:
  linear:
    bins: {m: {scheme: multiples, of: 16, min: 16, max: 320}}
    problems:
      - {dims: {n: 32, k: 32}, count: 1}
      - {dims: {n: 64, k: 64}, count: 50}
    candidates: ["torch.*", "mkl*"]
measure: {min_rounds: 10, max_rounds: 100, processes: 3, precision: 0.001}
"""


@pytest.mark.parametrize("budget", [30.0, 90.0])
def test_a_budget_is_kept_within_a_tenth_and_goes_to_the_heaviest_traffic_first(
    config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, budget: float
) -> None:
    now = [0.0]
    monkeypatch.setattr(sweep_module.time, "monotonic", lambda: now[0])

    def tick(seconds: float) -> None:
        now[0] += seconds

    config.write_text(HEAVY)
    machine = FakeMachine(lambda problem, name: 10 * by_rank(problem, name), noise=0.05, tick=tick)
    outcome = sweep(config, folder, machine, budget_s=budget)
    assert 0.9 * budget <= now[0] <= 1.1 * budget
    assert outcome.unfinished
    samples: Counter[int] = Counter()
    for row in read_run(folder):
        samples[Problem.parse(row.problem).dim("n")] += len(row.samples_ns)
    assert samples[64] > 1.2 * samples[32]
    listed = {id for id, _ in outcome.unfinished}
    assert len([id for id in listed if "n=32" in id]) >= len([id for id in listed if "n=64" in id])


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["thesis.txt", "years.parquet"])
def test_a_stranger_s_directory_is_refused_and_untouched(
    config: Path, folder: Path, name: str, fresh: bool
) -> None:
    folder.mkdir()
    (folder / name).write_text("years of work")
    with pytest.raises(BadInput, match=name):
        sweep(config, folder, fresh=fresh)
    assert [p.name for p in folder.iterdir()] == [name]
    assert (folder / name).read_text() == "years of work"


@pytest.mark.parametrize("fresh", [False, True])
def test_what_no_sweep_wrote_is_left_alone(config: Path, folder: Path, fresh: bool) -> None:
    sweep(config, folder)
    (folder / "mine.parquet").write_text("not a measurement")
    sweep(config, folder, fresh=fresh)
    assert (folder / "mine.parquet").read_text() == "not a measurement"


def test_another_config_s_results_are_never_mixed(config: Path, folder: Path) -> None:
    sweep(config, folder)
    config.write_text(CONFIG.replace("name: small", "name: other"))
    with pytest.raises(BadInput, match=r"config 'small', expected 'other'.*--fresh"):
        sweep(config, folder)


def test_a_problem_the_config_no_longer_has_is_set_aside(config: Path, folder: Path) -> None:
    sweep(config, folder)
    config.write_text(CONFIG.replace("edges: [1, 8]", "edges: [1, 4]"))
    whole = load(config)
    outcome = run_sweep(whole.restrict(["linear"]), folder, whole=whole, start=FakeMachine().start)
    assert [name.split(".")[2] for name in outcome.stale] == ["m5-n32-k32", "m8-n32-k32"]
    assert {row.problem.split("(")[1][:4] for row in read_run(folder) if row.role == "bin"} == {"m=1,", "m=4,"}


def test_two_sweeps_never_share_a_directory(config: Path, folder: Path) -> None:
    def second(event: Event) -> None:
        with pytest.raises(BadInput, match="another sweep"):
            sweep(config, folder)

    sweep(config, folder, notify=second)


def test_a_stale_lock_file_blocks_nobody(config: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / store_module.LOCK_FILE).write_text("of a process that is gone")
    assert sweep(config, folder).measured == PROBLEMS


def crashed(name: str) -> Lost:
    return Lost(name, "crashed", "killed by signal 11 (SIGSEGV)")


def test_a_crash_costs_its_candidate_alone_and_a_fresh_process_goes_on(config: Path, folder: Path) -> None:
    machine = FakeMachine(faults={"torch.linear_inplace": crashed("torch.linear_inplace")})
    outcome = sweep(config, folder, machine)
    rows = read_run(folder)
    bad = [row for row in rows if row.candidate == "torch.linear_inplace" and row.status != "unsupported"]
    assert bad and all(row.status == "crashed" and "signal 11" in row.reason and not row.samples_ns for row in bad)
    assert all(row.status in ("ok", "unsupported") for row in rows if row.candidate != "torch.linear_inplace")
    assert not outcome.unfinished and machine.started >= 1 + len(bad)


def test_a_crash_while_timing_costs_its_candidate_alone(config: Path, folder: Path) -> None:
    machine = FakeMachine(timing_faults={"torch.addmm": crashed("torch.addmm")})
    sweep(config, folder, machine)
    rows = [row for row in read_run(folder) if row.op == "linear"]
    assert {row.status for row in rows if row.candidate == "torch.addmm"} == {"crashed"}
    assert all(row.samples_ns for row in rows if row.candidate == "torch.linear")


def test_a_repeat_offender_is_excluded_on_record(config: Path, folder: Path) -> None:
    config.write_text(CONFIG.replace("edges: [1, 8]", "edges: [1, 2, 3, 4, 5, 6]"))
    machine = FakeMachine(faults={"torch.addmm": crashed("torch.addmm")})
    sweep(config, folder, machine)
    statuses = Counter(row.status for row in read_run(folder) if row.candidate == "torch.addmm")
    assert statuses == {"crashed": 3, "excluded": 3}
    assert sum(candidate == "torch.addmm" for _, candidate in machine.checked) == 3


def test_a_candidate_that_ends_every_sweep_is_excluded_after_some(config: Path, folder: Path) -> None:
    """Not its process alone: the whole sweep dies, as when the machine goes down with it."""

    class Fatal(FakeMachine):
        pass

    machine = FakeMachine()
    real = machine.start

    def start(number: int, setting: object) -> object:
        process = real(number, setting)  # type: ignore[arg-type]
        check = process.check

        def fatal(problem: Problem, candidate: object, mode: str) -> object:
            if candidate.id == "torch.addmm":  # type: ignore[attr-defined]
                raise SystemError("the machine is gone")
            return check(problem, candidate)  # type: ignore[arg-type]

        process.check = fatal  # type: ignore[method-assign,assignment]
        return process

    machine.start = start  # type: ignore[method-assign,assignment]
    for _ in range(ATTEMPTS):
        with pytest.raises(SystemError):
            sweep(config, folder, machine)
    with pytest.raises(SystemError):  # the next problem's turn
        sweep(config, folder, machine)
    rows = [row for path in folder.glob("linear*m1-*.parquet") for row in read_rows(path)]
    (row,) = [row for row in rows if row.candidate == "torch.addmm"]
    assert row.status == "excluded" and f"began {ATTEMPTS} times" in row.reason


def test_out_of_memory_is_tried_once_more_in_a_fresh_process(config: Path, folder: Path) -> None:
    machine = FakeMachine(faults={"torch.addmm": Finding("out_of_memory", "asked for 1 PB")})
    sweep(config, folder, machine)
    per_problem = Counter(problem for problem, candidate in machine.checked if candidate == "torch.addmm")
    assert set(per_problem.values()) == {2}
    rows = [row for row in read_run(folder) if row.candidate == "torch.addmm"]
    assert {row.status for row in rows} == {"out_of_memory"}


def test_an_unknown_device_error_ends_its_process(config: Path, folder: Path) -> None:
    finding = Finding("failed", "RuntimeError: CUDA error: an illegal memory access was encountered")
    machine = FakeMachine(faults={"torch.addmm": finding})
    sweep(config, folder, machine)
    plain = FakeMachine(faults={"torch.addmm": Finding("failed", "RuntimeError: no such instruction")})
    sweep(config, folder, plain, fresh=True)
    assert machine.started > plain.started


@pytest.mark.parametrize(
    "reason",
    [
        "LaunchFailed: the driver answered 1 CUDA_ERROR_INVALID_VALUE: invalid argument on normal data, m=3@64",
        "declined on normal data, m=3@64: a value is outside the range of its argument",
        "Misaligned: an address is not aligned as the program needs it in bind",
    ],
)
def test_what_the_launcher_refuses_costs_no_process(config: Path, folder: Path, reason: str) -> None:
    refused, plain = (
        FakeMachine(faults={"torch.addmm": Finding("failed", why)})
        for why in (reason, "RuntimeError: no such thing")
    )
    sweep(config, folder, refused)
    sweep(config, folder, plain, fresh=True)
    assert refused.started == plain.started


def test_the_same_fault_on_every_candidate_stops_the_sweep(config: Path, folder: Path) -> None:
    all_of_them = {c.id: crashed(c.id) for c in pool.candidates_for("linear", "cpu")}
    with pytest.raises(BadInput, match=r"same fault on all .* broken"):
        sweep(config, folder, FakeMachine(faults=all_of_them))  # type: ignore[arg-type]


def test_a_bin_that_is_too_wide_is_split_and_its_halves_are_measured(config: Path, folder: Path) -> None:
    config.write_text(CONFIG.replace("edges: [1, 8]", "edges: [1, 64]"))

    def crossing(problem: Problem, name: str) -> float:
        if problem.op != "linear":
            return by_rank(problem, name)
        m = problem.dim("m")
        return {
            "torch.linear": 1e5,
            "torch.linear_inplace": 5e4 if m > 20 else 2e5,
            "torch.addmm": 2e5 if m > 20 else 5e4,
        }.get(name, 3e5)

    machine = FakeMachine(crossing)
    outcome = sweep(config, folder, machine)
    assert [Problem.parse(id).dim("m") for id in outcome.split] == [11]
    rows = {(Problem.parse(r.problem).dim("m"), r.role) for r in read_run(folder) if r.op == "linear"}
    assert rows == {(1, "bin"), (64, "bin"), (11, "split"), (5, "held_out"), (29, "held_out")}
    again = FakeMachine(crossing)
    assert sweep(config, folder, again).measured == 0, "a resume splits alike"


def test_a_bin_whose_best_is_the_best_inside_is_not_split(config: Path, folder: Path) -> None:
    assert sweep(config, folder).split == []


def test_a_time_of_zero_is_no_time_and_its_candidate_is_out(config: Path, folder: Path) -> None:
    def frozen(problem: Problem, name: str) -> float:
        return float("-inf") if name == "torch.addmm" else by_rank(problem, name)

    machine = FakeMachine(frozen)
    machine.sample = lambda ns: 0 if ns == float("-inf") else max(1, int(ns))
    sweep(config, folder, machine)
    rows = [row for row in read_run(folder) if row.candidate == "torch.addmm"]
    assert rows and all(row.status == "failed" and "clock" in row.reason and row.median_ns is None for row in rows)
    assert all(row.samples_ns for row in read_run(folder) if row.candidate == "torch.linear")


def test_a_full_disk_stops_the_sweep_and_loses_nothing(
    config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.fsync, [25]

    def fsync(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    first = FakeMachine()
    with pytest.raises(OSError, match="No space"):
        sweep(config, folder, first)
    monkeypatch.undo()
    second = FakeMachine()
    sweep(config, folder, second)
    repeated = set(first.checked) & set(second.checked)
    assert len(repeated) <= 1, "at most the one in flight"
    assert {(row.problem, row.candidate) for row in read_run(folder)} == {*first.checked, *second.checked}


def test_a_wall_clock_that_steps_changes_nothing(
    config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stepping() -> float:
        raise AssertionError("only monotonic time is asked")

    monkeypatch.setattr(time, "time", stepping)
    monkeypatch.setattr(time, "time_ns", stepping)
    assert sweep(config, folder, budget_s=100.0).measured == PROBLEMS


@pytest.mark.parametrize(
    ("text", "said"), [('{"config": "small"}', "found no 'environment'"), ("{", "found Expecting")]
)
def test_a_run_of_another_version_is_refused_by_name(config: Path, folder: Path, text: str, said: str) -> None:
    sweep(config, folder)
    (folder / RUN_FILE).write_text(text)
    with pytest.raises(BadInput, match=f"{said}.*--fresh"):
        sweep(config, folder)


@pytest.mark.parametrize("changed", ["torch.linear_inplace", "torch.linear"])
def test_a_kill_after_a_source_changed_leaves_no_old_time_under_the_new_source(
    config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    sweep(config, folder, FakeMachine(lambda problem, name: 1e6))
    real = store_module.source_digest
    monkeypatch.setattr(store_module, "source_digest", lambda k: "another" if k.id == changed else real(k))
    with monkeypatch.context() as killed:
        killed.setattr(sweep_module._Run, "close", lambda self: self._end_process())
        sweep(config, folder, FakeMachine(lambda problem, name: 1e5))
    with pytest.raises(BadInput, match=r"not in Parquet yet.*run dks-profile run again"):
        read_run(folder)
    sweep(config, folder, FakeMachine(lambda problem, name: 1e5))
    rows = [row for row in read_run(folder) if row.candidate == changed and row.status == "ok"]
    assert rows and all(row.kernel_digest == "another" for row in rows)
    assert all(ns < 5e5 for row in rows for ns in row.samples_ns)


def test_what_hangs_when_the_time_is_up_is_unfinished_and_no_fault(config: Path, folder: Path) -> None:
    class Hanging(FakeMachine):
        def start(self, number: int, setting: object) -> object:  # type: ignore[override]
            process = super().start(number, setting)  # type: ignore[arg-type]

            def check(problem: Problem, candidate: object, mode: str) -> object:
                assert process.hard_stop is not None
                raise OutOfTime

            process.check = check  # type: ignore[method-assign,assignment]
            return process

    outcome = sweep(config, folder, Hanging(), budget_s=0.3)
    assert len(outcome.unfinished) == PROBLEMS and not list(folder.glob("*.parquet"))
