"""What loading refuses, and that nothing of it has run by then; strict mode; the hash that ranks compare."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import py_compile
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dks.codegen import package as packaging
from dks.codegen.package import build
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch import manifest as checks
from dks.dispatch import pool
from dks.dispatch.environment import UNKNOWN, Environment
from dks.dispatch.errors import BadInput
from dks.dispatch.kernel import Kernel
from dks.dispatch.loader import import_package, open_generation
from dks.dispatch.manifest import (
    MANIFEST,
    Manifest,
    device_of,
    examine,
    intact,
    misfits,
    read_manifest,
    seal,
    table_hash,
)
from dks.dispatch.strict import needs
from dks.dispatch.table import Table
from dks.dispatch.tiles import library
from tests.codegen.test_package import here, made_rows
from tests.volumes import as_a_volume

BOMB = "raise SystemExit('it ran')\n"
FIELDS = [field.name for field in dataclasses.fields(Environment)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of this machine without the compiled lookup, on sys.path as ``load_me``; forgotten afterwards."""
    monkeypatch.setattr(packaging, "compile_into", lambda _: "not here")
    monkeypatch.setattr(library, "_locate", library._nowhere)
    monkeypatch.syspath_prepend(tmp_path)
    rows = here(made_rows())
    yield build(select(rows, Policy(max_error=1e-5)), rows, tmp_path, "load_me").folder
    for name in [name for name in sys.modules if name.startswith("load_me")]:
        del sys.modules[name]


def refused(said: str) -> None:
    """Importing it is refused with these words, and the framework serves."""
    with pytest.warns(RuntimeWarning, match=said):
        module = importlib.import_module("load_me")
    assert "refused" in module.stats()["table"]
    x, w = torch.randn(4, 32), torch.randn(64, 32)
    assert torch.equal(module.linear(x, w), F.linear(x, w))


def reseal(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(seal(data))


def test_the_manifest_binds_files_environment_policy_and_tools(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert manifest.environment == Environment.current() and manifest.policy["max_error"] == 1e-5
    assert set(manifest.tools) == {"python", "torch", "jinja2", "compiler", "dks"}
    assert all("/" not in text for text in manifest.tools.values())
    assert set(manifest.kernels) <= set(pool.kernels()) and len(manifest.digest) == 64
    assert intact(folder) == (manifest, []) and examine(folder) == (manifest, [])


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", ["other", UNKNOWN])
def test_each_field_of_the_environment_is_refused_by_name(folder: Path, name: str, value: str) -> None:
    said = name
    if name == "switches" and value != UNKNOWN:
        said, value = "OMP_PLACES", "OMP_PLACES=CORES"
    reseal(folder, lambda data: data["environment"].update({name: value}))  # type: ignore[attr-defined]
    _, found = examine(folder)
    assert any(line.startswith(f"{said}: ") for line in found), found
    if name != "device":  # of another device nothing else can be compared
        assert found == misfits(read_manifest(folder)) and len(found) == 1


def test_a_field_that_differs_refuses_the_import(folder: Path) -> None:
    reseal(folder, lambda data: data["environment"].update(libraries="mkl-1"))  # type: ignore[attr-defined]
    refused("libraries: mkl-1 != ")


def test_a_table_of_gpus_is_refused_where_there_is_none_and_keeps_its_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that calls with tensors on a GPU are counted as refused, and others as on another device."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    reseal(folder, lambda data: data["environment"].update(device="cuda"))  # type: ignore[attr-defined]
    assert device_of(folder) == "cuda"
    with pytest.warns(RuntimeWarning, match="PyTorch sees no NVIDIA GPU"):
        package = importlib.import_module("load_me")
    package.linear(torch.randn(2, 32), torch.randn(64, 32))
    assert package.stats()["ops"]["linear"]["fallbacks"] == {"device": 1}
    (folder / MANIFEST).unlink()
    assert device_of(folder) == "cpu"


def test_a_table_of_gpus_serves_them_and_none_of_a_cpus_kernels(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reseal(folder, lambda data: data["environment"].update(device="cuda"))  # type: ignore[attr-defined]
    measured = read_manifest(folder).environment
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(Environment, "current", lambda _: measured)
    generation = open_generation(folder)
    assert generation.device == "cuda" and generation.refused is None
    assert set(generation.dead.values()) == {"it is no kernel for cuda"}


@pytest.mark.parametrize(
    "name", ["_table.cpython-311-x86_64-linux-gnu.so", "_dispatch.abi3.so", "extra.py", "torch.so"]
)
def test_a_file_that_could_be_imported_and_is_not_its_own_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text(BOMB)
    refused(f"{name}: not a file of this package")


def test_a_folder_that_could_be_imported_is_refused(folder: Path) -> None:
    (folder / "_table").mkdir()
    (folder / "_table" / "__init__.py").write_text(BOMB)
    (folder / "notes.txt").write_text("what is no module may lie there")
    refused("_table: not a file of this package")


def test_planted_bytecode_does_not_run(folder: Path) -> None:
    """Neither of the table, nor of the package where a command opens it."""
    source = folder.parent / "planted.py"
    source.write_text(BOMB)
    for name in ("_table", "__init__"):
        cached = Path(importlib.util.cache_from_source(str(folder / f"{name}.py")))
        py_compile.compile(
            str(source), cfile=str(cached), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )
    assert import_package(folder).stats()["table"] == "serving"
    Path(importlib.util.cache_from_source(str(folder / "__init__.py"))).unlink()
    assert importlib.import_module("load_me").stats()["table"] == "serving"
    assert "load_me._table" not in sys.modules


def test_a_table_that_is_code_does_not_run(folder: Path) -> None:
    """Even where the manifest was made to fit."""
    (folder / "_table.py").write_text(
        f'"""x"""\nfrom dks.dispatch.table import Table\n{BOMB}TABLE = Table((), ())\n'
    )
    reseal(folder, lambda data: data["files"].update({"_table.py": checks.file_digest(folder / "_table.py")}))  # type: ignore[attr-defined]
    refused("_table.py: found no table")


def test_files_of_two_generations_are_refused(folder: Path) -> None:
    rows = here(made_rows())
    other = build(select(rows, Policy(max_error=1e-2, max_kernels=1)), rows, folder.parent / "b", "load_me").folder
    shutil.copy(other / "table.hpp", folder / "table.hpp")
    refused("damaged: table.hpp: changed since it was built")


@pytest.mark.parametrize("which", ["folder", "file", "above"])
def test_what_others_may_write_is_refused(folder: Path, which: str) -> None:
    {"folder": folder, "file": folder / "lut.json", "above": folder.parent}[which].chmod(0o777)
    refused("others may write")
    with pytest.raises(BadInput, match=r"not trusted: .*others may write"):
        import_package(folder)


def test_a_link_is_as_good_as_what_it_leads_through(folder: Path) -> None:
    real = folder.parent / "real"
    folder.rename(real)
    folder.symlink_to(real)
    assert examine(folder)[1] == []
    real.chmod(0o777)
    refused("others may write")


def test_a_package_in_a_volume_of_links_serves(folder: Path) -> None:
    as_a_volume(folder)
    assert examine(folder)[1] == []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*refused")
        assert importlib.import_module("load_me").stats()["table"] == "serving"


def test_a_package_is_loadable_whatever_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaging, "compile_into", lambda _: "not here")
    rows = here(made_rows())
    before = os.umask(0)
    try:
        built = build(select(rows, Policy()), rows, tmp_path / "new" / "out", "load_open")
    finally:
        os.umask(before)
    assert built.caution == "" and examine(built.folder)[1] == []
    (tmp_path / "new").chmod(0o777)
    assert (
        "others may write there"
        in build(select(rows, Policy()), rows, tmp_path / "new" / "out", "load_open").caution
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"version": 1}', '{"version": 3}', '{"version": 2}'])
def test_no_manifest_is_refused_with_the_reason(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    manifest, found = examine(folder)
    assert manifest is None and len(found) == 1 and MANIFEST in found[0]
    (folder / MANIFEST).unlink()
    assert "No such file" in examine(folder)[1][0]


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("no such kernel", lambda kernels, id: kernels.pop(id)),
        ("source changed", None),
        ("not on this machine", lambda kernels, id: kernels.update({id: absent(kernels[id])})),
    ],
)
def test_a_kernel_loses_its_own_entries_alone(
    folder: Path, why: str, change: Callable[..., object] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = dict(pool.kernels())
    if change is None:
        reseal(folder, lambda data: data["kernels"].update({"mkldnn.linear_packed": "0" * 16}))  # type: ignore[attr-defined]
    else:
        change(kernels, "mkldnn.linear_packed")
        monkeypatch.setattr(checks.pool, "kernels", lambda: kernels)
    with pytest.warns(RuntimeWarning, match=rf"mkldnn\.linear_packed are switched off: .*{why}"):
        module = importlib.import_module("load_me")
    assert module.stats()["table"] == "serving"
    assert "may not run" in module.explain("linear", m=256, n=64, k=32).reason
    assert module.explain("linear", m=16, n=64, k=32).candidate == "torch.addmm"


def absent(kernel: Kernel) -> Kernel:
    return dataclasses.replace(kernel, unavailable=lambda: "not on this machine")


def held(folder: Path) -> Table:
    return import_package(folder)._runtime.generation.table


def test_the_proof_holds_for_a_table_of_libraries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert needs(held(folder), {}) == []
    monkeypatch.setenv("DKS_STRICT", "1")
    assert importlib.import_module("load_me").stats()["table"] == "serving"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda k: dataclasses.replace(k, searches="its library times variants"), "its library times variants"),
        (lambda k: dataclasses.replace(k, unavailable=lambda: "no such CPU"), "no such CPU"),
        (lambda k: dataclasses.replace(k, op="softmax"), "it computes softmax, not linear"),
    ],
)
def test_strict_names_the_entries_that_break_the_proof(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Kernel], Kernel], said: str
) -> None:
    table, kernels = held(folder), dict(pool.kernels())
    kernels["torch.addmm"] = change(kernels["torch.addmm"])
    monkeypatch.setattr(checks.pool, "kernels", lambda: kernels)
    lines = needs(table, {})
    assert lines and all(line.startswith("torch.addmm (linear") and said in line for line in lines)
    monkeypatch.setenv("DKS_STRICT", "1")
    with pytest.raises(RuntimeError, match=f"can't be served without a search here: .*{said}"):
        importlib.import_module("load_me")


def test_the_default_counts_since_it_serves_the_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = dict(pool.kernels())
    kernels["torch.softmax"] = dataclasses.replace(kernels["torch.softmax"], searches="it downloads")
    monkeypatch.setattr(checks.pool, "kernels", lambda: kernels)
    assert needs(Table((), ()), {}) == ["torch.softmax, the default of softmax: it downloads"]


def test_a_process_that_compiles_on_demand_is_no_strict_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_locate", lambda unit: Path("/nowhere"))
    assert needs(Table((), ()), {}) == ["this process compiles kernels when they are asked for, as profiling does"]


def test_dead_entries_break_the_proof(folder: Path) -> None:
    lines = needs(held(folder), {"mkldnn.linear_packed": "its source changed"})
    assert lines and all("mkldnn.linear_packed" in line and "its source changed" in line for line in lines)


def test_the_hash_is_of_the_table_and_of_what_is_alive(folder: Path) -> None:
    manifest = read_manifest(folder)
    same = table_hash(read_manifest(folder), ["b", "a"])
    assert table_hash(manifest, {"a": "why", "b": "another why"}) == same and len(same) == 64
    others = {table_hash(manifest), same, table_hash(manifest, ["a"]), table_hash(manifest, ["ab"])}
    others |= {table_hash(dataclasses.replace(manifest, digest="0" * 64)), table_hash(manifest, (), "refused")}
    assert len(others) == 6
    assert table_hash(None) == table_hash(manifest, ["a"], "for whatever reason"), "the framework serves both"


def test_the_digest_of_a_manifest_covers_each_field(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    for name in json.loads(text):
        if name in ("digest", "version"):
            continue
        data = {**json.loads(text), name: "other"}
        with pytest.raises(BadInput, match="differs from its digest"):
            checks.parse_manifest((json.dumps(data, indent=2) + "\n").encode())
    assert {field.name for field in dataclasses.fields(Manifest)} <= set(json.loads(text))
