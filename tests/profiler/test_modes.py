"""Sweeps of two execution modes on a machine made of numbers, and what a GPU adds to them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from dks.dispatch import pool
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement, read_run
from dks.dispatch.problem import Candidate, Problem
from dks.profiler import isolation, journal
from dks.profiler import sweep as sweep_module
from dks.profiler.cli import cli
from dks.profiler.config import load
from dks.profiler.findings import UNREAD, Finding
from dks.profiler.isolation import environment_of
from dks.profiler.replay import replay
from dks.profiler.store import JOURNAL
from dks.profiler.sweep import STRIKES, Outcome, run_sweep
from dks.profiler.timing import StoppingRule
from tests.codegen.rows import ENVIRONMENT
from tests.profiler.fakes import FakeMachine

CONFIG = """
version: 1
name: graphs
device: cuda:0
operators:
  linear:
    bins: {m: {scheme: explicit, edges: [1, 8]}}
    candidates: [torch.*]
    problems:
      - {dims: {n: 32, k: 32}, traits: {dtype: float32, epilogue: gelu}}
measure: {min_rounds: 10, max_rounds: 20, processes: 2, modes: [eager, graph], held_out: false}
"""
INPLACE = "torch.linear_inplace"
FAST = {("eager", INPLACE): 0.5, ("graph", INPLACE): 1.5}


def times(mode: str) -> object:
    return lambda problem, name: 1e5 * problem.dims[0][1] * FAST.get((mode, name), 1.0)


def machine(**more: object) -> FakeMachine:
    return FakeMachine(times("eager"), graph_times=times("graph"), **more)  # type: ignore[arg-type]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sweep_module, "environment_of", lambda device: ENVIRONMENT)
    monkeypatch.setattr(sweep_module, "compile_for", lambda *_: None)
    path = tmp_path / "graphs.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def sweep(config: Path, folder: Path, machine: FakeMachine, **more: object) -> Outcome:
    return run_sweep(load(config), folder, start=machine.start, **more)  # type: ignore[arg-type]


def rows(folder: Path, mode: str, name: str = INPLACE) -> list[Measurement]:
    return [row for row in read_run(folder) if (row.mode, row.candidate) == (mode, name)]


def test_each_mode_is_raced_by_itself_and_has_a_file(config: Path, folder: Path) -> None:
    outcome = sweep(config, folder, machine())
    assert (outcome.measured, outcome.unfinished) == (4, [])
    assert Counter(row.mode for row in read_run(folder)) == {"eager": 4, "graph": 4}
    assert sum(path.name.endswith(".graph.parquet") for path in folder.glob("*.parquet")) == 2
    assert all((row.ratio_low or 0) > 1 for row in rows(folder, "eager"))
    assert all((row.ratio_high or 9) < 1 for row in rows(folder, "graph"))
    for path in folder.glob("*.parquet"):
        assert len({row.mode for row in read_run(folder) if row.problem in path.name}) <= 1


def test_what_is_not_meant_for_a_problem_is_said_without_asking_a_process(config: Path, folder: Path) -> None:
    config.write_text(
        CONFIG.replace("candidates: [torch.*]", "candidates: [torch.*, triton.*]").replace("float32", "bfloat16")
    )
    asked = machine()
    asked.times = asked.graph_times = lambda problem, name: 1e5
    sweep(config, folder, asked)
    unsuited = {row.candidate for row in read_run(folder) if row.status in ("unsuited", "unsupported")}
    assert len(unsuited) > 100 and all(row.reason for row in read_run(folder) if row.status == "unsuited")
    for problem, name in asked.checked:
        kernel, candidate = pool.kernels()[Candidate.parse(name).kernel], Candidate.parse(name)
        assert not (
            kernel.objection(Problem.parse(problem)) or kernel.suits(Problem.parse(problem), candidate.params)
        )


def test_a_resume_tells_the_modes_apart(config: Path, folder: Path) -> None:
    sweep(config, folder, machine())
    gone = next(folder.glob("*.graph.parquet"))
    gone.unlink()
    again = machine()
    outcome = sweep(config, folder, again)
    assert (outcome.measured, outcome.reused) == (1, 3) and gone.exists() and len(again.checked) == 2


def test_graphs_that_are_asked_for_later_leave_the_eager_rows_as_they_are(config: Path, folder: Path) -> None:
    config.write_text(CONFIG.replace("[eager, graph]", "[eager]"))
    sweep(config, folder, machine())
    held = {path: path.read_bytes() for path in folder.glob("*.parquet")}
    config.write_text(CONFIG)
    outcome = sweep(config, folder, machine())
    assert (outcome.measured, outcome.reused) == (2, 2)
    assert all(path.read_bytes() == data for path, data in held.items())
    config.write_text(CONFIG.replace("[eager, graph]", "[eager]"))
    stale = sweep(config, folder, machine(), whole=load(config)).stale
    assert len(stale) == 2 and all("graph" in name for name in stale), "no table may take what is not wanted"


def test_a_killed_sweep_s_journal_tells_the_modes_apart(
    config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module._Run, "close", lambda self: self._end_process())
    sweep(config, folder, machine())
    monkeypatch.undo()
    monkeypatch.setattr(sweep_module, "environment_of", lambda device: ENVIRONMENT)
    monkeypatch.setattr(sweep_module, "compile_for", lambda *_: None)
    assert {record["mode"] for record in journal.read(folder / JOURNAL).records} == {"eager", "graph"}
    again = machine()
    sweep(config, folder, again)
    assert again.checked == [] and again.timed == []
    assert len(read_run(folder)) == 8


def test_a_journal_of_before_modes_is_eager(config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text(CONFIG.replace("[eager, graph]", "[eager]"))
    with monkeypatch.context() as patch:
        patch.setattr(sweep_module._Run, "close", lambda self: self._end_process())
        sweep(config, folder, machine())
    records = [{k: v for k, v in r.items() if k != "mode"} for r in journal.read(folder / JOURNAL).records]
    journal.replace(folder / JOURNAL, records)
    again = machine()
    assert sweep(config, folder, again).unfinished == [] and again.checked == []
    assert {row.mode for row in read_run(folder)} == {"eager"}


UNCAPTURABLE = Finding("failed", "Uncapturable: can't be captured in a CUDA graph: RuntimeError: it synchronises")


def test_what_no_graph_holds_fails_in_graphs_alone_and_is_not_tried_for_ever(config: Path, folder: Path) -> None:
    config.write_text(CONFIG.replace("[1, 8]", "[1, 2, 4, 8, 16]"))
    numbers = machine(graph_faults={INPLACE: UNCAPTURABLE})
    outcome = sweep(config, folder, numbers)
    found = rows(folder, "graph")
    assert Counter(row.status for row in found) == {"failed": STRIKES, "excluded": 5 - STRIKES}
    assert "in graph mode" in next(row.reason for row in found if row.status == "excluded")
    assert {row.status for row in rows(folder, "eager")} == {"ok"}
    assert len(outcome.winnerless) == STRIKES and all("graph" in id for id in outcome.winnerless)


def test_where_nothing_can_be_captured_the_device_is_not_to_blame(config: Path, folder: Path) -> None:
    numbers = machine(graph_faults={INPLACE: UNCAPTURABLE, "torch.linear": UNCAPTURABLE})
    outcome = sweep(config, folder, numbers)
    assert outcome.unfinished == [] and {row.status for row in rows(folder, "eager")} == {"ok"}


CRASH = Finding("crashed", "CUDA error: an illegal memory access was encountered")


def test_the_same_device_error_on_every_candidate_stops_the_sweep(config: Path, folder: Path) -> None:
    numbers = machine(faults={INPLACE: CRASH, "torch.linear": CRASH})
    with pytest.raises(BadInput, match=r"same fault on all 2 candidates.*illegal memory"):
        sweep(config, folder, numbers)


def test_a_device_error_costs_its_process_and_nothing_else(config: Path, folder: Path) -> None:
    numbers = machine(faults={INPLACE: CRASH})
    outcome = sweep(config, folder, numbers)
    assert {row.status for row in rows(folder, "eager")} == {"crashed"}
    assert all(row.samples_ns for row in rows(folder, "eager", "torch.linear"))
    assert outcome.unfinished == [] and numbers.started > 2


def test_a_device_error_while_timing_sends_the_others_to_another_process(config: Path, folder: Path) -> None:
    numbers = machine()
    numbers.crashes = {INPLACE: CRASH}
    sweep(config, folder, numbers)
    for row in rows(folder, "eager"):
        assert row.status == "crashed" and "illegal" in row.reason
    of_one = [process for id, process in numbers.timed if id == numbers.timed[0][0]]
    assert len(set(of_one[:2])) == 2, "the process that met the error timed nothing after it"
    assert all(row.samples_ns for row in rows(folder, "eager", "torch.linear"))


def test_joules_of_a_gpu_are_read_where_they_are_asked_for_once_all_is_timed(config: Path, folder: Path) -> None:
    unread = Finding(errors={"normal": 1e-7, "outliers": 1e-7, "rows": 1e-7}, stable=True, energy_note=UNREAD)
    read = {"watts": 2.0, "faults": {INPLACE: unread, "torch.linear": unread}}
    sweep(config, folder, numbers := machine(**read))
    assert numbers.read == [], "ten seconds a finalist are not taken unasked"
    config.write_text(CONFIG.replace("held_out", "energy: true, held_out"))
    sweep(config, folder, numbers := machine(**read))
    assert numbers.checked == [] and len(set(numbers.read)) == len(numbers.read)
    assert {mode for *_, mode in numbers.read} == {"eager", "graph"}
    for row in rows(folder, "eager"):
        assert row.energy_j == pytest.approx(1e5 * Problem.parse(row.problem).dim("m"))
    assert sweep(config, folder, machine(**read)).measured == 0


def test_the_finalists_are_few_and_the_default_among_them() -> None:
    names = [f"k{i}" for i in range(9)]
    ns = {"default": 100, **{name: 50 + i for i, name in enumerate(names)}}
    rounds = [sweep_module.Round(i, 0, ns) for i in range(6)]
    assert sweep_module.finalists(rounds, ["default", *reversed(names)], "default") == ["default", "k0", "k1", "k2"]


def test_a_refused_counter_is_asked_once(config: Path, folder: Path) -> None:
    config.write_text(CONFIG.replace("held_out", "energy: true, held_out"))
    unread = Finding(errors={"normal": 1e-7, "outliers": 1e-7, "rows": 1e-7}, stable=True, energy_note=UNREAD)
    faults = {INPLACE: unread, "torch.linear": unread}
    numbers = machine(faults=faults)
    assert sweep(config, folder, numbers).unfinished == []
    assert numbers.read and max(Counter(numbers.read).values()) == 1
    assert sweep(config, folder, machine(faults=faults)).measured == 0


def test_show_prints_the_mode_and_replay_takes_each_by_itself(config: Path, folder: Path) -> None:
    config.write_text(CONFIG.replace("held_out", "racing: false, held_out"))
    sweep(config, folder, machine(graph_faults={"torch.addmm": UNCAPTURABLE}))
    shown = CliRunner().invoke(cli, ["show", str(folder)])
    assert shown.exit_code == 0, shown.output
    assert "mode" in shown.output and "eager" in shown.output and "graph" in shown.output
    assert replay(read_run(folder), StoppingRule()).problems == 4


def test_a_gpu_s_environment_is_asked_for_outside_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_described", lambda device: ENVIRONMENT)
    assert environment_of("cuda:0") is ENVIRONMENT
    monkeypatch.undo()
    assert environment_of("cpu").device == "cpu"
    isolation._described.cache_clear()
    with pytest.raises(ValueError, match="PyTorch sees no NVIDIA GPU"):
        environment_of("cuda:0")
    with monkeypatch.context() as patch:
        patch.setattr(isolation, "_DESCRIBE", "raise SystemExit('the driver is broken')")
        with pytest.raises(BadInput, match="device cuda:1: found the driver is broken, expected its description"):
            environment_of("cuda:1")
