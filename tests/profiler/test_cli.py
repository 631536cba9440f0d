"""The command as users run it, with worker processes of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dks.dispatch import pool
from dks.dispatch.evidence import read_run
from dks.profiler.cli import cli, main
from tests.commands import Done, run

ROOT = Path(__file__).parent.parent.parent
CONFIG = """
version: 1
name: small
threads: 1
operators:
  linear:
    bins: {m: {scheme: explicit, edges: [1, 8]}}
    problems:
      - {dims: {n: 32, k: 32}, traits: {dtype: float32}}
    candidates: ["torch.*", "fault.segfault"]
measure: {seconds: 0.02, min_rounds: 6, max_rounds: 6, processes: 2}
"""


def command(*words: object) -> Done:
    return run(main, *words)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A config with a kernel that crashes, and its sweep."""
    home = tmp_path_factory.mktemp("a b é")
    (home / "small.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(pool.MORE_KERNELS, "tests.profiler.fault_kernels")
        patch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{ROOT}")
        pool.kernels.cache_clear()
        first = command("run", home / "small.yaml", "-o", home / "run")
        assert first.returncode == 0, first.stderr
        (home / "first").write_text(first.stdout)
        yield home
    pool.kernels.cache_clear()


def test_the_command_measures_and_says_what_it_cost(home: Path) -> None:
    said = (home / "first").read_text()
    assert "3 problems measured, 0 reused, 0 unfinished" in said and "[1/3] process" in said
    assert "isolation and storage took" in said and "next: dks-codegen build" in said


def test_a_segfault_is_a_row_and_its_neighbours_have_samples(home: Path) -> None:
    rows = read_run(home / "run")
    bad = [row for row in rows if row.candidate == "fault.segfault"]
    assert {row.status for row in bad} == {"crashed"} and "SIGSEGV" in bad[0].reason
    default = [row for row in rows if row.candidate == "torch.linear"]
    assert len(default) == 3 and all(len(row.samples_ns) >= 6 for row in default)
    measured = [row.peak_bytes for row in rows if row.status == "ok"]
    assert all(peak is None or peak >= 0 for peak in measured)
    assert all(row.energy_j is None and row.energy_note for row in rows) or all(row.energy_j for row in default), (
        "joules, or why not"
    )


def test_a_second_run_reuses_and_show_says_what_was_found_and_thrown_away(home: Path) -> None:
    again = command("run", home / "small.yaml", "-o", home / "run")
    assert "0 problems measured, 3 reused" in again.stdout
    shown = command("show", home / "run", "--op", "linear")
    assert shown.returncode == 0 and "torch.linear" in shown.stdout and "dtype=float32" in shown.stdout
    assert "fault.segfault: crashed on 3 problems" in shown.stdout
    assert "rounds were disturbed" in shown.stdout and "held out" in shown.stdout


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
        (("replay", "{empty}"), "no measurements"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(words: tuple[str, ...], expected: str, home: Path) -> None:
    (home / "empty").mkdir(exist_ok=True)
    known = {"config": home / "small.yaml", "empty": home / "empty", "run": home / "run"}
    done = command(*(word.format(**known) for word in words))
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr


def test_a_budget_in_the_config_holds_unless_the_command_says_another(tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(CONFIG.replace(', "fault.segfault"', "") + "budget: 0.001s\n")
    assert "unfinished: linear" in command("run", config, "-o", tmp_path / "run").stdout
    assert " 0 unfinished" in command("run", config, "-o", tmp_path / "run", "--budget", "1m").stdout


def test_doctor_names_every_kernel_and_what_can_be_watched() -> None:
    done = command("doctor")
    assert done.returncode == 0
    assert "mkl.linear_packed" in done.stdout and "threads" in done.stdout
    assert "energy" in done.stdout and "interference" in done.stdout


def test_help_has_examples() -> None:
    assert "dks-profile" in command("--help").stdout
    for name in cli.commands:
        done = command(name, "--help")
        assert done.returncode == 0 and f"dks-profile {name}" in done.stdout
