"""Run directories: resuming, refusing, budgets, and the command itself."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import read_run
from dks.profiler.cli import cli, main
from dks.profiler.config import load
from dks.profiler.sweep import RUN_FILE, Event, run_sweep
from tests.commands import Done, run

CONFIG = """
version: 1
name: small
operators:
  linear:
    bins: {m: {scheme: explicit, edges: [1, 8]}}
    problems:
      - {dims: {n: 32, k: 32}, traits: {dtype: float32}}
    candidates: ["torch.*"]
  layer_norm:
    bins: {m: {scheme: explicit, edges: [4]}}
    problems:
      - {dims: {n: 32}}
measure: {seconds: 0.02, min_rounds: 6, max_rounds: 6}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_sweep_leaves_one_file_a_problem_that_pandas_opens(config: Path, folder: Path) -> None:
    outcome = run_sweep(load(config), folder)
    assert (outcome.measured, outcome.reused, outcome.unfinished) == (3, 0, [])
    frame = pd.read_parquet(folder)
    rows = read_run(folder)
    assert len(frame) == len(rows) == len({(r.problem, r.candidate) for r in rows})
    assert set(frame["status"]) <= {"ok", "unsupported", "unavailable"}


def test_it_resumes_where_it_stopped(config: Path, folder: Path) -> None:
    run_sweep(load(config), folder)
    gone = sorted(folder.glob("linear*.parquet"))[0]
    kept = {p: p.read_bytes() for p in folder.glob("*.parquet") if p != gone}
    gone.unlink()
    outcome = run_sweep(load(config), folder)
    assert (outcome.measured, outcome.reused) == (1, 2)
    assert gone.exists() and all(p.read_bytes() == data for p, data in kept.items())


def test_an_interrupted_sweep_keeps_what_it_measured(config: Path, folder: Path) -> None:
    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(load(config), folder, notify=stop)
    assert len(list(folder.glob("*.parquet"))) == 1
    assert run_sweep(load(config), folder).reused == 1


def test_a_changed_config_measures_only_what_it_changed(config: Path, folder: Path) -> None:
    run_sweep(load(config), folder)
    config.write_text(CONFIG.replace("edges: [1, 8]", "edges: [1, 8, 16]").replace("[4]", "[4, 5]"))
    assert run_sweep(load(config), folder).measured >= 2
    assert run_sweep(load(config), folder).measured == 0


def test_a_truncated_file_is_measured_again(config: Path, folder: Path) -> None:
    run_sweep(load(config), folder)
    path = sorted(folder.glob("*.parquet"))[0]
    path.write_bytes(path.read_bytes()[:-9])
    assert run_sweep(load(config), folder).measured == 1
    read_run(folder)


def test_fresh_forgets(config: Path, folder: Path) -> None:
    run_sweep(load(config), folder)
    assert run_sweep(load(config), folder, fresh=True).measured == 3


def test_a_budget_of_nothing_lists_what_is_unfinished(config: Path, folder: Path) -> None:
    outcome = run_sweep(load(config), folder, budget_s=0.0)
    assert outcome.measured == 0 and len(outcome.unfinished) == 3


def test_a_budget_in_the_config_holds_unless_the_command_says_another(config: Path, folder: Path) -> None:
    config.write_text(CONFIG + "budget: 0.001s\n")
    assert "unfinished: layer_norm" in command("run", config, "-o", folder).stdout
    assert " 0 unfinished" in command("run", config, "-o", folder, "--budget", "1m").stdout


def test_results_of_another_environment_are_never_mixed(config: Path, folder: Path) -> None:
    run_sweep(load(config), folder)
    data = json.loads((folder / RUN_FILE).read_text())
    data["environment"]["torch"] = "1.0"
    (folder / RUN_FILE).write_text(json.dumps(data))
    with pytest.raises(BadInput, match=r"torch: 1\.0 != .*--fresh"):
        run_sweep(load(config), folder)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["thesis.txt", "years.parquet"])
def test_a_stranger_s_directory_is_refused_and_untouched(
    config: Path, folder: Path, name: str, fresh: bool
) -> None:
    folder.mkdir()
    (folder / name).write_text("years of work")
    with pytest.raises(BadInput, match=name):
        run_sweep(load(config), folder, fresh=fresh)
    assert [p.name for p in folder.iterdir()] == [name]
    assert (folder / name).read_text() == "years of work"


def test_fresh_drops_what_a_sweep_wrote_and_nothing_else(config: Path, folder: Path) -> None:
    run_sweep(load(config), folder)
    (folder / "mine.parquet").write_text("not a measurement")
    run_sweep(load(config), folder, fresh=True)
    assert (folder / "mine.parquet").read_text() == "not a measurement"


def test_another_config_s_results_are_never_mixed(config: Path, folder: Path) -> None:
    run_sweep(load(config), folder)
    config.write_text(CONFIG.replace("name: small", "name: other"))
    with pytest.raises(BadInput, match=r"config 'small', expected 'other'.*--fresh"):
        run_sweep(load(config), folder)


def test_a_problem_the_config_no_longer_has_is_set_aside(config: Path, folder: Path) -> None:
    assert command("run", config, "-o", folder).returncode == 0
    config.write_text(CONFIG.replace("edges: [1, 8]", "edges: [1, 16]"))
    done = command("run", config, "-o", folder, "--ops", "linear")
    assert done.returncode == 0 and "set aside" in done.stdout
    assert sorted({row.problem.split("(")[1][:4] for row in read_run(folder)}) == ["m=1,", "m=16", "m=4,"]
    assert len(list(folder.glob("_stale-linear*m8*.parquet"))) == 1


def test_two_sweeps_never_share_a_directory(config: Path, folder: Path) -> None:
    def second(event: Event) -> None:
        with pytest.raises(BadInput, match="another sweep"):
            run_sweep(load(config), folder)

    run_sweep(load(config), folder, notify=second)


def command(*words: object) -> Done:
    return run(main, *words)


def test_the_command_measures_shows_and_resumes(config: Path, folder: Path) -> None:
    first = command("run", config, "-o", folder)
    assert first.returncode == 0 and "3 problems measured" in first.stdout and "[1/3]" in first.stdout
    assert "0 problems measured, 3 reused" in command("run", config, "-o", folder).stdout
    shown = command("show", folder, "--op", "linear")
    assert shown.returncode == 0 and "torch.linear" in shown.stdout and "dtype=float32" in shown.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("run", "nothing.yaml"), "nothing.yaml"),
        (("show", "nowhere"), "nowhere"),
        (("run", "{config}", "--budget", "5"), "90s or 5m"),
        (("run", "{config}", "--ops", "conv"), "conv"),
        (("run", "{config}", "--device", "tpu"), "tpu"),
        (("run", "{config}", "-o", "/proc/nowhere"), "/proc/nowhere"),
        (("run",), "CONFIG"),
        (("show", "{empty}"), "no measurements"),
        (("show", "{run}", "--op", "conv"), "conv"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    words: tuple[str, ...], expected: str, config: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    run_sweep(load(config), folder)
    known = {"config": config, "empty": tmp_path / "empty", "run": folder}
    done = command(*(word.format(**known) for word in words))
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr


def test_doctor_names_every_kernel() -> None:
    done = command("doctor")
    assert done.returncode == 0
    assert "mkl.linear_packed" in done.stdout and "threads" in done.stdout


def test_help_has_examples() -> None:
    for name in cli.commands:
        assert "dks-profile" in command("--help").stdout
        assert command(name, "--help").returncode == 0
