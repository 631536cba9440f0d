"""The command: building, checking, explaining, and what it says to bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dks.codegen.cli import main
from dks.dispatch import pool
from dks.dispatch.evidence import Measurement, write_rows
from dks.dispatch.manifest import seal
from tests.codegen.rows import ENVIRONMENT, problem, row
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
        write_rows(path / f"{index}.parquet", rows)
    return path


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A run directory of another machine."""
    path = tmp_path / "foreign"
    path.mkdir()
    write_rows(path / "all.parquet", made_rows())
    return path


def test_build_check_explain(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    built = command("build", folder, "-o", out, "--name", "small_table", "--max-error", "1e-5")
    assert built.returncode == 0, built.stderr
    assert "torch.addmm" in built.stdout and "lookup: " in built.stdout and "dtype=float32" in built.stdout
    assert command("check", out).returncode == 0
    told = command("explain", out, "linear", "m=17", "n=64", "k=32")
    assert told.returncode == 0 and "mkldnn.linear_packed" in told.stdout and "bin match" in told.stdout
    assert "m=17..256" in told.stdout and "runner-up" in told.stdout
    assert "ahead of the default, behind the choice\n" in told.stdout and "torch.addmm" in told.stdout
    less = command("explain", out, "linear", "m=16", "n=64", "k=32", "align=4")
    assert "torch.linear" in less.stdout and "exact match" in less.stdout
    assert "unchanged" in command("build", folder, "-o", out, "--name", "small_table", "--max-error", "1e-5").stdout


def test_batch_invariance_is_priced_explained_and_missed_by_name(folder: Path, tmp_path: Path) -> None:
    done = command("build", folder, "-o", tmp_path / "none", "--name", "small_table", "--batch-invariant")
    assert done.returncode == 1 and "not batch-invariant: linear prepared n=64 k=32 bias=yes" in done.stderr
    found = [k for k in pool.kernels_for("linear", "cpu") if k.id.startswith("tile.f32_") and not k.unavailable()]
    if not found:
        pytest.skip("no generated fp32 linear runs here")
    tile = next(c.id for c in found[0].candidates() if dict(c.params)["t"] == 1)
    rows = [row("torch.linear", 20), row("torch.addmm", 5), row(tile, 10)]
    write_rows(folder / "0.parquet", here(rows))
    (folder / "1.parquet").unlink()
    for path in folder.glob("[2-9].parquet"):
        path.unlink()
    out = tmp_path / "out"
    done = command("build", folder, "-o", out, "--name", "small_table", "--batch-invariant")
    assert done.returncode == 0, done.stderr
    assert "batch invariance costs 100.0 % weighted by traffic, over 1 of 2 layers and forms" in done.stdout
    assert "not batch-invariant: linear direct" in done.stderr and "calls without preparation" in done.stderr
    assert json.loads((out / "small_table" / "manifest.json").read_text())["policy"]["batch_invariant"] is True
    told = command("explain", out, "linear", "m=100000", "n=64", "k=32").stdout
    assert tile.partition("/")[0] in told and "batch-invariant: one kernel for every size" in told


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
    assert done.returncode == 2 and "schema version 99, expected 2 or 3 or 4" in done.stderr


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


def with_held_out(folder: Path) -> None:
    """A held-out shape of the bin m <= 256: what was chosen there is 50 % behind the best."""
    times = {"torch.linear": 300, "mkldnn.linear_packed": 60, "torch.addmm": 40}
    rows = [row(id, us, problem(200), role="held_out") for id, us in times.items()]
    write_rows(folder / "held_out.parquet", here(rows))


def test_the_certificate_is_printed_kept_and_checked(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plain = command("build", folder, "-o", out, "--name", "small_table")
    assert "no certificate: the run has no held-out shapes" in plain.stdout
    assert "no certificate: the run has no held-out shapes" in command("check", out).stdout
    with_held_out(folder)
    built = command("build", folder, "-o", out, "--name", "small_table")
    assert built.returncode == 0 and "linear prepared" in built.stdout and "50.0 %" in built.stdout
    assert "m=200" in built.stdout and "epilogue=none](m=200" in built.stdout, "no markup is made of the traits"
    manifest = json.loads((out / "small_table" / "manifest.json").read_text())
    assert manifest["certificate"]["overall"]["max"] == 0.5 and manifest["certificate_note"] == ""
    lut = json.loads((out / "small_table" / "lut.json").read_text())
    assert lut["certificate"] == manifest["certificate"] and len(lut["held_out"]) == 2
    checked = command("check", out)
    assert checked.returncode == 0 and "regret on 1 held-out shapes" in checked.stdout
    assert "exact match" in command("explain", out, "linear", "m=256", "n=64", "k=32").stdout


def test_a_limit_on_the_regret_refuses_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("build", folder, "-o", out, "--name", "small_table", "--max-regret")
    blind = command(*words, 0.05)
    assert blind.returncode == 2 and "no held-out shapes" in blind.stderr
    with_held_out(folder)
    done = command(*words, 0.05)
    assert done.returncode == 2 and problem(200).id in done.stderr and "Traceback" not in done.stderr
    assert not out.exists()
    assert command(*words, 0.5).returncode == 0
    odd = command(*words, -1)
    assert odd.returncode == 2 and "max_regret" in odd.stderr


def test_a_limit_on_kernels_is_printed_and_kept(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("build", folder, "-o", out, "--name", "small_table")
    assert "kernels kept" not in command(*words).stdout
    capped = command(*words, "--max-kernels", 1)
    assert capped.returncode == 0, capped.stderr
    assert (
        "linear prepared with float32: 1 of 3 kernels kept, at most 1; that changed 3 rules and costs"
        in capped.stdout
    )
    assert f"({problem(256).id})" in capped.stdout
    assert json.loads((out / "small_table" / "manifest.json").read_text())["policy"]["max_kernels"] == 1
    odd = command(*words, "--max-kernels", 0)
    assert odd.returncode == 2 and "max_kernels: found 0, expected a whole number from 1" in odd.stderr


def test_a_manifest_of_another_version_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command("build", folder, "-o", out, "--name", "small_table").returncode == 0
    path = out / "small_table" / "manifest.json"
    path.write_text(seal({**json.loads(path.read_text()), "version": 1}))
    done = command("check", out)
    assert done.returncode == 2 and "found version 1, expected 2; build the package again" in done.stderr


def test_a_manifest_with_an_odd_certificate_is_refused_in_words(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command("build", folder, "-o", out, "--name", "small_table").returncode == 0
    path = out / "small_table" / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(seal({**data, "certificate": [1]}))
    assert "certificate is list" in command("check", out).stderr
    path.write_text(seal({**data, "certificate": {}}))
    odd = command("check", out)
    assert odd.returncode == 2 and "Traceback" not in odd.stderr
