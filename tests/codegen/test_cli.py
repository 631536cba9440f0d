"""The command: building, checking, explaining, and what it says to bad input."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dks.codegen.cli import main
from dks.dispatch.evidence import Measurement, write_rows
from tests.codegen.rows import ENVIRONMENT, problem
from tests.codegen.test_package import here, made_rows
from tests.commands import Done, run


def command(*words: object) -> Done:
    return run(main, *words)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run directory as if measured here."""
    path = tmp_path / "run"
    path.mkdir()
    by_problem: dict[str, list[Measurement]] = {}
    for r in here(made_rows()):
        by_problem.setdefault(r.problem, []).append(r)
    for index, rows in enumerate(by_problem.values()):
        write_rows(path / f"{index}.parquet", rows, "plan")
    return path


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A run directory of another machine."""
    path = tmp_path / "foreign"
    path.mkdir()
    write_rows(path / "all.parquet", made_rows(), "plan")
    return path


def test_build_check_explain(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    built = command("build", folder, "-o", out, "--name", "small_table", "--max-error", "1e-5")
    assert built.returncode == 0, built.stderr
    assert "torch.addmm" in built.stdout and "lookup: " in built.stdout and "dtype=float32" in built.stdout
    assert command("check", out).returncode == 0
    told = command("explain", out, "linear", "m=17", "n=64", "k=32")
    assert told.returncode == 0 and "mkldnn.linear_packed" in told.stdout and "bin match" in told.stdout
    less = command("explain", out, "linear", "m=16", "n=64", "k=32", "align=4")
    assert "torch.linear" in less.stdout and "exact match" in less.stdout
    assert "unchanged" in command("build", folder, "-o", out, "--name", "small_table", "--max-error", "1e-5").stdout


def test_check_names_what_does_not_fit(foreign: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        command("build", foreign, "-o", out, "--name", "small_table", "--device", ENVIRONMENT.arch).returncode == 0
    )
    done = command("check", out)
    assert done.returncode == 2 and "arch: TestVendor 1 2 3 != " in done.stderr
    assert "refused" in command("explain", out, "linear", "m=1", "n=64", "k=32").stdout


def test_results_of_another_device_need_an_explicit_choice(foreign: Path, tmp_path: Path) -> None:
    done = command("build", foreign, "-o", tmp_path / "out", "--name", "small_table")
    assert done.returncode == 2 and "another device" in done.stderr and "--device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_truncated_parquet(folder: Path, tmp_path: Path) -> None:
    path = folder / "0.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    done = command("build", folder, "-o", tmp_path / "out", "--name", "small_table")
    assert done.returncode == 2 and str(path) in done.stderr and "Traceback" not in done.stderr


def test_another_schema_version(folder: Path, tmp_path: Path) -> None:
    path = folder / "0.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"dks.schema": b"99"}), path)
    done = command("build", folder, "-o", tmp_path / "out", "--name", "small_table")
    assert done.returncode == 2 and "schema version 99, expected 1" in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("build", "{empty}", "-o", "{out}", "--name", "small_table"), "no measurements"),
        (("build", "{run}/none", "-o", "{out}", "--name", "small_table"), "no such directory"),
        (("build", "{run}", "-o", "{out}", "--name", "class"), "'class'"),
        (("build", "{run}", "-o", "{out}", "--name", "a-b"), "'a-b'"),
        (("build", "{run}", "-o", "{run}/0.parquet", "--name", "small_table"), "found a file"),
        (("build", "{run}", "-o", "/proc/none", "--name", "small_table"), "can't be written"),
        (("build", "{run}", "-o", "{out}", "--name", "small_table", "--objective", "speed"), "speed"),
        (("build", "{run}", "-o", "{out}", "--name", "small_table", "--max-error", "-1"), "max_error"),
        (("build", "{run}", "-o", "{out}"), "--name"),
        (("check", "{empty}"), "no package"),
        (("explain", "{built}", "linear", "m=1"), "found no n, k"),
        (("explain", "{built}", "conv", "m=1"), "conv"),
        (("explain", "{built}", "linear", "m=1", "n=1", "k=1", "dtype=int3"), "int3"),
        (("explain", "{built}", "linear", "m:1"), "'m:1'"),
        (("explain", "{built}", "linear", "op=1"), "found op"),
        (("explain", "{built}", "linear", "self=1"), "found self"),
        (("explain", "{built}", "linear", "m=1", "n=1", "k=1", "align=3"), "power of two"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    words: tuple[str, ...], expected: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    known = {"run": folder, "empty": tmp_path / "empty", "out": tmp_path / "out", "built": tmp_path / "built"}
    if "{built}" in words:
        assert command("build", folder, "-o", tmp_path / "built", "--name", "small_table").returncode == 0
    done = command(*(word.format(**known) for word in words))
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists(), "nothing is half-written"


def test_problems_have_one_home(folder: Path) -> None:
    """The same problem in two run directories is a contradiction, not more evidence."""
    done = command("build", folder, folder, "-o", folder / "out", "--name", "small_table")
    assert done.returncode == 2 and "two measurements" in done.stderr and problem(1).id in done.stderr
