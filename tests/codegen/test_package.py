"""Packages on disk: golden text, reproducible bytes, and destinations that are not ours."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dks.codegen import package as packaging
from dks.codegen.cli import check
from dks.codegen.lut import Lut
from dks.codegen.package import build, check_destination, check_package_name, render
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch import manifest, pool
from dks.dispatch.environment import Environment
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement
from dks.dispatch.manifest import damaged, read_manifest
from tests.codegen.rows import problem, row

GOLDEN = Path(__file__).parent.parent / "golden"


def made_rows() -> list[Measurement]:
    rows = []
    for m in (1, 16, 256):
        rows.append(row("torch.linear", 100 + m, problem(m)))
        rows.append(row("torch.addmm", 200 if m == 1 else 60, problem(m)))
        rows.append(row("mkldnn.linear_packed", 80 if m < 256 else 30, problem(m)))
    rows.append(row("torch.linear", 90, problem(16, align=4)))
    return rows


def made_lut() -> Lut:
    return select(made_rows(), Policy(max_error=1e-5))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds without the compiled forms: a compiler run costs a second and is tested on its own."""
    absent = "no C++ compiler: tried g++"
    monkeypatch.setattr(packaging, "compile_into", lambda folder: absent)
    monkeypatch.setattr(packaging, "compile_library", lambda folder: absent)


@pytest.mark.parametrize("file", ["__init__.py", "_table.py", "table.hpp", "lut.json"])
def test_generated_text_is_as_accepted(file: str) -> None:
    """To accept a change: DKS_ACCEPT=1 pytest tests/codegen/test_package.py, and read the diff."""
    text = render(made_lut(), "golden")[file]
    path = GOLDEN / f"{file}.expected"
    if os.environ.get("DKS_ACCEPT") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path} differs; DKS_ACCEPT=1 accepts the new text"


def test_generated_python_is_clean() -> None:
    for file in ("__init__.py", "_table.py"):
        compile(render(made_lut(), "golden")[file], file, "exec")


@pytest.mark.usefixtures("no_compiler")
def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = made_rows()
    one = build(select(rows, Policy()), rows, tmp_path / "a", "same").folder
    two = build(select(rows[::-1], Policy()), rows[::-1], tmp_path / "b" / "c", "same").folder
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_text_does_not_depend_on_the_hash_seed() -> None:
    script = (
        "from tests.codegen.test_package import made_lut; from dks.codegen.package import render;"
        "import hashlib; print(hashlib.sha256(repr(render(made_lut(), 'x')).encode()).hexdigest())"
    )
    root = Path(__file__).parent.parent.parent
    digests = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": "C" if seed == "1" else "C.UTF-8"}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=root, env=env, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout)
    assert len(digests) == 1


def test_a_build_compiles_checks_out_and_is_left_alone_when_nothing_changed(tmp_path: Path) -> None:
    rows, lut = made_rows(), made_lut()
    built = build(lut, rows, tmp_path, "fresh")
    read = read_manifest(built.folder)
    assert built.changed and damaged(built.folder, read) == []
    assert set(read.kernels) == {"torch.linear", "torch.addmm", "mkldnn.linear_packed"} & set(read.kernels)
    before = {path: path.stat().st_mtime_ns for path in built.folder.iterdir()}
    assert not build(lut, rows, tmp_path, "fresh").changed
    assert before == {path: path.stat().st_mtime_ns for path in built.folder.iterdir()}
    (built.folder / "lut.json").write_text("{}")
    assert build(lut, rows, tmp_path, "fresh").changed, "a tampered package is replaced"
    assert [path.name for path in tmp_path.iterdir()] == ["fresh"], "nothing half-written is left"


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_python_form_is_built_and_says_so(tmp_path: Path) -> None:
    built = build(made_lut(), made_rows(), tmp_path, "plain")
    assert built.lookup == "no C++ compiler: tried g++"
    assert not (built.folder / "_dispatch.abi3.so").exists()


@pytest.mark.usefixtures("no_compiler")
def test_a_failed_write_leaves_the_old_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(made_lut(), made_rows(), tmp_path, "kept").folder
    old = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packaging, "_fill", full)
    with pytest.raises(BadInput, match="No space left"):
        build(made_lut(), made_rows(), tmp_path, "kept")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "1st",
        "a-b",
        "class",
        "match",
        "namespace",
        "torch",
        "abc",
        "std",
        "__x",
        "ä",
        "a" * 65,
        "../up",
        "a b",
    ],
)
def test_names_that_no_language_takes_are_refused(name: str) -> None:
    with pytest.raises(BadInput, match="name: found"):
        check_package_name(name)


def test_a_stranger_s_directory_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(BadInput, match="did not write"):
        check_destination(tmp_path, "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="expected a directory"):
        check_destination(tmp_path / "file", "x")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(BadInput, match="link"):
        check_destination(tmp_path, "link")
    (tmp_path / "mine" / "manifest.json").write_text('{"origin": "somebody"}')
    with pytest.raises(BadInput, match="did not write"):
        check_destination(tmp_path, "mine")


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on sys.path whose packages are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.startswith("pack_"):
            del sys.modules[name]


def here(rows: list[Measurement]) -> list[Measurement]:
    """The rows as if measured on this machine."""
    text = json.dumps(Environment.current().to_dict(), sort_keys=True)
    return [dataclasses.replace(r, environment=text) for r in rows]


def test_a_package_of_another_environment_is_refused_by_name(importable: Path) -> None:
    build(made_lut(), made_rows(), importable, "pack_other")
    with pytest.warns(RuntimeWarning, match="arch: TestVendor"):
        module = importlib.import_module("pack_other")
    assert "refused" in module.stats()["table"] and "pack_other._table" not in sys.modules
    x, w = torch.randn(4, 32), torch.randn(64, 32)
    assert torch.equal(module.linear(x, w), torch.nn.functional.linear(x, w))


def test_strict_makes_a_refusal_an_error(importable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(made_lut(), made_rows(), importable, "pack_strict")
    monkeypatch.setenv("DKS_STRICT", "1")
    with pytest.raises(RuntimeError, match="TestVendor"):
        importlib.import_module("pack_strict")


@pytest.mark.parametrize("file", ["_table.py", "table.hpp", "lut.json", "manifest.json"])
def test_a_changed_file_is_refused_before_it_runs(importable: Path, file: str) -> None:
    rows = here(made_rows())
    name = "pack_changed_" + file.split(".", maxsplit=1)[0]
    folder = build(select(rows, Policy()), rows, importable, name).folder
    (folder / file).write_text("raise SystemExit('it ran')\n")
    with pytest.warns(RuntimeWarning, match=file.replace(".", r"\.")):
        module = importlib.import_module(name)
    assert "refused" in module.stats()["table"]


def test_a_fitting_package_serves_with_the_compiled_lookup(importable: Path) -> None:
    rows = here(made_rows())
    built = build(select(rows, Policy()), rows, importable, "pack_fits")
    module = importlib.import_module("pack_fits")
    stats = module.stats()
    assert stats["table"] == "serving"
    assert set(stats["lookup"].values()) == {built.lookup} == {"compiled"}
    choice = module.explain("linear", m=17, n=64, k=32)
    assert (choice.match, choice.candidate) == ("bin", "mkldnn.linear_packed")
    assert choice.rule is not None and choice.rule["problem"] == problem(256).id
    layer = module.prepare_linear(torch.randn(64, 32), torch.randn(64))
    with torch.no_grad():
        layer(torch.randn(16, 32))
        layer(torch.randn(17, 32))
    assert module.stats()["ops"]["linear"]["hits"] == {"bin": 1, "exact": 1}


def test_a_kernel_whose_source_changed_loses_its_entries_alone(
    importable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = here(made_rows())
    build(select(rows, Policy()), rows, importable, "pack_dead")
    real = manifest.source_digest
    monkeypatch.setattr(manifest, "source_digest", lambda k: "other" if k.id == "mkldnn.linear_packed" else real(k))
    with pytest.warns(RuntimeWarning, match=r"mkldnn\.linear_packed.*source changed"):
        module = importlib.import_module("pack_dead")
    assert "may not run" in module.explain("linear", m=256, n=64, k=32).reason
    assert module.explain("linear", m=16, n=64, k=32).match == "exact", "torch.addmm is as it was"


def compiled_rows() -> list[Measurement]:
    """A table of them chooses a generated kernel."""
    return here([row("torch.linear", 100.0), row(COMPILED, 10.0)])


COMPILED = pool.kernels()["tile.f32_avx2"].candidates()[0].id


@pytest.mark.usefixtures("no_compiler")
def test_a_choice_is_shipped_only_as_the_compiler_made_it_that_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "g++"
    fake.write_text("#!/bin/sh\necho 'g++ (Some) 99.1'\n")
    fake.chmod(0o755)
    rows = compiled_rows()
    lut = select(rows, Policy())
    assert COMPILED in lut.candidates() and list(lut.toolchains) == ["tile.f32_avx2"]
    measured = lut.toolchains["tile.f32_avx2"]
    with monkeypatch.context() as other:
        other.setenv("CXX", str(fake))
        with pytest.raises(BadInput) as refused:
            build(lut, rows, tmp_path / "out", "pack_other")
        said = str(refused.value)
        assert f"tile.f32_avx2: found it measured with {measured}, expected what would compile it here" in said
        assert "g++ (Some) 99.1, flags " in said and "run dks-profile again" in said
        assert not (tmp_path / "out").exists()
        # A table that chooses nothing compiled asks nobody.
        build(made_lut(), made_rows(), tmp_path / "out", "pack_plain")
    old = [dataclasses.replace(each, toolchain="unknown") for each in rows]
    with pytest.raises(BadInput, match="measured with unknown"):
        build(select(old, Policy()), old, tmp_path / "out", "pack_old")
    more = [row("torch.linear", 100.0, problem(16)), row(COMPILED, 10.0, problem(16), toolchain="g++ 9")]
    mixed = [*rows, *here(more)]
    with pytest.raises(BadInput, match=r"results measured with .* and with g\+\+ 9, expected one"):
        select(mixed, Policy())


def test_a_package_says_what_compiled_it_and_serving_asks_for_no_compiler(
    importable: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if pool.kernels()["tile.f32_avx2"].unavailable():
        pytest.skip("no such kernels here")
    rows = compiled_rows()
    lut = select(rows, Policy())
    folder = build(lut, rows, importable, "pack_tools").folder
    assert read_manifest(folder).toolchains == lut.toolchains
    monkeypatch.setenv("CXX", str(importable / "gone"))
    monkeypatch.setenv("PATH", "")
    module = importlib.import_module("pack_tools")
    explained = str(module.explain("linear", m=8, n=64, k=32))
    assert f"compiled     measured and shipped with {lut.toolchains['tile.f32_avx2']}" in explained
    assert check.callback(folder) == 0  # type: ignore[misc]
    assert f"tile.f32_avx2: measured and compiled with {lut.toolchains['tile.f32_avx2']}" in capsys.readouterr().out
