"""Generated kernels in packages: the winners alone, bound by digests, served without a compiler or not at all."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from dks.codegen.kernels import HEADER, chosen_units
from dks.codegen.lut import Lut
from dks.codegen.package import build
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch import pool
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement
from dks.dispatch.manifest import KERNELS, MANIFEST, file_digest, seal
from dks.dispatch.problem import Candidate
from dks.dispatch.tiles import build as compiling
from dks.dispatch.tiles import library
from tests.codegen.rows import problem, row
from tests.codegen.test_package import here

ROOT = Path(__file__).parent.parent.parent
GENERATED = next(
    (id for id in ("tile.f32_avx512", "tile.f32_avx2") if pool.kernels()[id].unavailable() is None), None
)
pytestmark = pytest.mark.skipif(GENERATED is None, reason="no generated linear runs on this machine")


def candidates() -> list[str]:
    """Two candidates of other code."""
    assert GENERATED is not None
    one_thread = [c for c in pool.kernels()[GENERATED].candidates() if dict(c.params)["t"] == 1]
    return [c.id for c in one_thread[:2]]


def made_rows() -> list[Measurement]:
    """The first of them wins small problems, the framework large ones, and the second nothing."""
    winner, loser = candidates()
    rows = []
    for m in (1, 16, 256):
        rows.append(row("torch.linear", 100, problem(m)))
        rows.append(row(winner, 50 if m < 256 else 300, problem(m)))
        rows.append(row(loser, 200, problem(m)))
    return here(rows)


def made_lut() -> Lut:
    return select(made_rows(), Policy(max_error=1e-5))


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on sys.path; what is imported from it is forgotten, and only what is shipped can be called."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(library, "_shipped", {})
    monkeypatch.setattr(library, "_locate", library._nowhere)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.startswith("tiles_"):
            del sys.modules[name]


def assert_serves(module: ModuleType, hits: int) -> None:
    """The right answer, by the kernel ``hits`` times."""
    x, w, b = torch.randn(9, 32), torch.randn(64, 32), torch.randn(64)
    with torch.inference_mode():
        assert torch.allclose(module.prepare_linear(w, b)(x), F.linear(x, w, b), atol=1e-4)
    assert sum(module.stats()["ops"]["linear"]["hits"].values()) == hits, module.stats()


def test_the_winners_and_nothing_else_are_shipped(importable: Path) -> None:
    built = build(made_lut(), made_rows(), importable, "tiles_fit")
    units = chosen_units(made_lut())
    assert [unit.symbol for unit in units] == [
        unit.symbol
        for c in candidates()[:1]
        if (unit := pool.kernels()[str(GENERATED)].unit(problem(), Candidate.parse(c).params))
    ]
    assert f"int {units[0].symbol}(" in (built.folder / HEADER).read_text()
    assert "1 generated kernels" in built.kernels
    if (nm := shutil.which("nm")) is None:
        pytest.skip("no nm on this machine")
    listed = subprocess.run(
        [nm, "-D", "--defined-only", "--format=posix", built.folder / KERNELS],
        capture_output=True,
        text=True,
        check=True,
    )
    exported = {line.split()[0] for line in listed.stdout.splitlines()}
    assert exported == {name for unit in units for name in (unit.symbol, f"{unit.symbol}_source")}
    assert_serves(importlib.import_module("tiles_fit"), 1)


def test_the_header_is_c_and_its_functions_link(importable: Path) -> None:
    folder = build(made_lut(), made_rows(), importable, "tiles_c").folder
    if (cc := shutil.which("gcc") or shutil.which("cc")) is None:
        pytest.skip("no C compiler on this machine")
    symbol = chosen_units(made_lut())[0].symbol
    (importable / "main.c").write_text(
        f'#include "{HEADER}"\n#include <stddef.h>\n'
        "int main(void) {\n"
        "  float weight[64 * 4] = {0}, bias[1] = {5}, x[2] = {1, 2}, y[1] = {0};\n"
        "  struct dks_linear w = {weight, bias, NULL, NULL, 1, 2, DKS_NONE, 1, 0};\n"
        f"  return {symbol}(&w, x, NULL, y, 1) == DKS_OK && y[0] == 5 ? 0 : 1;\n"
        "}\n"
    )
    command = [cc, "-std=c99", "-Wall", "-Werror", "-iquote", folder, importable / "main.c", folder / KERNELS]
    subprocess.run([*command, f"-Wl,-rpath,{folder}", "-o", importable / "main"], check=True)
    subprocess.run([importable / "main"], check=True)


def test_a_library_that_was_tampered_with_is_not_loaded(importable: Path) -> None:
    folder = build(made_lut(), made_rows(), importable, "tiles_changed").folder
    with (folder / KERNELS).open("ab") as file:
        file.write(b"\0")
    with pytest.warns(RuntimeWarning, match=r"_kernels\.so: changed since it was built"):
        module = importlib.import_module("tiles_changed")
    assert library._shipped == {} and "refused" in module.stats()["table"]
    x, w = torch.randn(9, 32), torch.randn(64, 32)
    assert torch.equal(module.linear(x, w), F.linear(x, w))


def test_strict_serves_what_is_shipped_and_nothing_else(importable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DKS_STRICT", "1")
    folder = build(made_lut(), made_rows(), importable, "tiles_strict").folder
    assert_serves(importlib.import_module("tiles_strict"), 1)
    monkeypatch.setattr(library, "_shipped", {})
    del sys.modules["tiles_strict"]
    (folder / KERNELS).unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][KERNELS]
    (folder / MANIFEST).write_text(seal(manifest))
    symbol = chosen_units(made_lut())[0].symbol
    with pytest.raises(RuntimeError, match=f"{GENERATED}.*no loaded library has {symbol} made from this source"):
        importlib.import_module("tiles_strict")


def test_without_the_library_the_framework_serves_and_says_why(importable: Path) -> None:
    """A package whose table asks for kernels that it does not bring."""
    folder = build(made_lut(), made_rows(), importable, "tiles_gone").folder
    (folder / KERNELS).unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][KERNELS]
    (folder / MANIFEST).write_text(seal(manifest))
    module = importlib.import_module("tiles_gone")
    assert_serves(module, 0)
    stats = module.stats()["ops"]["linear"]["fallbacks"]
    assert stats == {"kernel_failed": 1}, stats
    assert "ships it" in str(module.explain("linear", m=9, n=64, k=32))


def test_a_library_that_can_not_be_loaded_is_a_warning(importable: Path) -> None:
    folder = build(made_lut(), made_rows(), importable, "tiles_half").folder
    (folder / KERNELS).write_bytes(b"\x7fELF half")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][KERNELS] = file_digest(folder / KERNELS)
    (folder / MANIFEST).write_text(seal(manifest))
    with pytest.warns(RuntimeWarning) as said:
        assert_serves(importlib.import_module("tiles_half"), 0)
    assert "_kernels.so can't be loaded" in str(said[0].message)


def test_without_a_compiler_the_build_is_refused_and_the_old_package_stays(
    importable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(made_lut(), made_rows(), importable, "tiles_kept").folder
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv(compiling.CACHE, str(importable / "cache"))
    with pytest.raises(BadInput, match=r"chose 1 generated kernels.*'/nonexistent'.*install a C\+\+ compiler"):
        build(made_lut(), made_rows(), importable, "tiles_kept")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old


def test_the_same_input_gives_the_same_library_anywhere(importable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = build(made_lut(), made_rows(), importable, "tiles_one").folder / KERNELS
    monkeypatch.setenv(compiling.CACHE, str(importable / "another cache"))
    two = build(made_lut(), made_rows(), importable / "there", "tiles_one").folder / KERNELS
    assert one.read_bytes() == two.read_bytes()


def test_serving_runs_no_other_program(importable: Path) -> None:
    build(made_lut(), made_rows(), importable, "tiles_alone")
    script = """
        import os, sys
        sys.path.insert(0, sys.argv[1])
        import torch
        torch.set_num_threads(int(sys.argv[2]))

        def audit(event, args):
            programs = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork")
            assert event not in programs, (event, args)

        sys.addaudithook(audit)
        import tiles_alone as served
        x, w = torch.randn(9, 32), torch.randn(64, 32)
        with torch.inference_mode():
            y = served.prepare_linear(w, torch.zeros(64))(x)
        assert torch.allclose(y, x @ w.T, atol=1e-4)
        assert served.stats()["ops"]["linear"]["hits"], served.stats()
    """
    env = {**os.environ, "PATH": "", "CXX": "/nonexistent", "PYTHONPATH": str(ROOT / "src")}
    env[compiling.CACHE] = str(importable / "nothing")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), importable, str(torch.get_num_threads())],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (importable / "nothing").exists()
