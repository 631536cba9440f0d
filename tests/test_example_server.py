"""The example server: built from a generated package's folder without Python, then asked, swapped and misled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dks.codegen import package as packaging
from dks.codegen.launch import LIBRARY
from dks.codegen.lut import Lut
from dks.codegen.package import build
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch import pool
from dks.dispatch.compiler import find_compiler
from dks.dispatch.evidence import Measurement
from dks.dispatch.manifest import KERNELS, MANIFEST, file_digest
from tests.codegen.rows import problem, row
from tests.codegen.test_package import here

SERVER = Path(__file__).parent.parent / "examples" / "server"
FAMILIES = (
    "tile.f32_avx512",
    "tile.f32_avx2",
    "tile.w16_avx512",
    "tile.w16_avx2",
    "tile.w8_avx512",
    "tile.i8_avx512_vnni",
)
RUNS = {id: pool.kernels()[id].candidates()[0].id for id in FAMILIES if pool.kernels()[id].unavailable() is None}
BUDGETS = {"f32": 1e-5, "w16": 1e-2, "w8": 5e-2, "i8": 5e-2}

pytestmark = [
    pytest.mark.skipif(bool(find_compiler()[1]), reason=f"no compiler: {find_compiler()[1]}"),
    pytest.mark.skipif(not RUNS, reason="no generated linear runs on this machine"),
]


def rows_of(candidate: str) -> list[Measurement]:
    """The candidate wins up to 16 rows, the framework beyond."""
    rows = []
    for m in (1, 16, 64):
        rows.append(row("torch.linear", 100, problem(m)))
        rows.append(row(candidate, 50 if m < 64 else 300, problem(m), error=1e-7))
    return here(rows)


def made(out: Path, name: str, family: str) -> Path:
    rows = rows_of(RUNS[family])
    budget = BUDGETS[family.removeprefix("tile.").partition("_")[0]]
    lut: Lut = select(rows, Policy(max_error=budget))
    assert RUNS[family] in lut.candidates()
    return build(lut, rows, out, name).folder


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("it's a package é")
    with pytest.MonkeyPatch.context() as patch:  # Python's fast path is not asked here
        patch.setattr(packaging, "compile_into", lambda _: "left out")
        return {family: made(out, f"served_{i}", family) for i, family in enumerate(RUNS)}


@pytest.fixture(scope="module")
def server(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a server é")
    shutil.copy(SERVER / "main.cpp", folder)
    shutil.copy(SERVER / "Makefile", folder)
    compiler, _ = find_compiler()
    strict = "-O1 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror"
    done = subprocess.run(
        [
            "make",
            "-C",
            folder,
            f"PACKAGE={next(iter(packages.values()))}",
            f"CXX={' '.join(compiler)}",
            f"CXXFLAGS={strict}",
        ],
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find -lgomp" in done.stderr or "omp.h" in done.stderr:
        pytest.skip("this compiler has no OpenMP")
    assert done.returncode == 0, done.stderr
    return folder / "server"


def ask(
    server: Path, package: Path, lines: Sequence[str], threads: int = 0
) -> tuple[list[dict[str, Any]], list[str]]:
    """Statistics and the other lines that the server prints; it must end well."""
    done = subprocess.run(
        [server, package, "3", str(threads or torch.get_num_threads())],
        input="".join(f"{line}\n" for line in lines),
        env={"PATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout.splitlines()
    return [json.loads(line) for line in printed if line[0] == "{"], [line for line in printed if line[0] != "{"]


@pytest.mark.parametrize("family", RUNS)
def test_its_kernels_are_right_within_the_tables_error(
    server: Path, packages: dict[str, Path], family: str
) -> None:
    """Weights packed in C++ give what the server's own loop does."""
    stats, _ = ask(server, packages[family], ["1", "16", *(str(m) for m in range(1, 17)), "trace 100"])
    assert stats[-1]["exact"] >= 2 and stats[-1]["kernels"] >= 18
    assert stats[-1]["checked"] >= 2 and stats[-1]["wrong"] == 0


def test_each_request_is_served_and_counted_once(server: Path, packages: dict[str, Path]) -> None:
    first = next(iter(packages.values()))
    stats, _ = ask(server, first, ["1", "9", "16", "64", "100", "0", "129", "1000"])
    wanted = {"exact": 3, "bin": 1, "nearest": 1, "zero_sized": 1, "out_of_range": 2, "unsupported": 2}
    assert {name: n for name, n in stats[-1].items() if n and name in wanted} == wanted
    assert (stats[-1]["kernels"], stats[-1]["default"]) == (3, 5)


def test_packages_are_swapped_and_rolled_back_while_it_serves(server: Path, packages: dict[str, Path]) -> None:
    one, *_, two = packages.values()
    generations = [json.loads((p / MANIFEST).read_text())["generation"] for p in (one, two)]
    lines = ["rollback", "trace 200", f"reload {two}", "trace 200", "rollback", "trace 200", "stats", "rollback"]
    stats, said = ask(server, one, lines * 3)
    assert said[:4] == ["refused: nothing to go back to", *(f"serving {generations[i]}" for i in (1, 0, 1))]
    assert stats[-1]["generation"] == generations[1] and stats[-1]["wrong"] == 0
    assert stats[-1]["kernels"] + stats[-1]["default"] == 1800


def test_a_package_that_was_replaced_at_its_path_is_the_new_one(
    server: Path, packages: dict[str, Path], tmp_path: Path
) -> None:
    """Loading by path would find the library that is loaded already."""
    one, *_, two = packages.values()
    generations = [json.loads((p / MANIFEST).read_text())["generation"] for p in (one, two)]
    link = tmp_path / "package"
    shutil.copytree(one, link)
    process = subprocess.Popen(
        [server, link, "1", str(torch.get_num_threads())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("stats\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["generation"] == generations[0]
    shutil.rmtree(link)
    shutil.copytree(two, link)
    out, _ = process.communicate(f"reload {link}\nrollback\n5\n", timeout=60)
    assert out.splitlines()[:2] == [f"serving {generations[1]}", f"serving {generations[0]}"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def no_library(folder: Path) -> None:
    (folder / LIBRARY).unlink()


def linked(folder: Path) -> None:
    (folder / LIBRARY).rename(folder.parent / "elsewhere.so")
    (folder / LIBRARY).symlink_to(folder.parent / "elsewhere.so")


def another_cpu(folder: Path) -> None:
    """A package that says it was measured elsewhere, and is whole."""
    data = (folder / LIBRARY).read_bytes()
    arch = json.loads((folder / MANIFEST).read_text())["environment"]["arch"].encode()
    assert arch in data
    (folder / LIBRARY).write_bytes(data.replace(arch, b"Q" + arch[1:]))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][LIBRARY] = file_digest(folder / LIBRARY)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


FAULTS = {
    "no such folder": (no_folder, "No such file"),
    "no library": (no_library, "_server.so: found No such file"),
    "library is a link": (linked, "_server.so: found"),
    "library changed": (lambda p: flip(p / LIBRARY), "_server.so: found digest"),
    "library cut short": (lambda p: os.truncate(p / LIBRARY, 5000), "_server.so: found digest"),
    "kernels changed": (lambda p: flip(p / KERNELS), "_kernels.so: found digest"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "manifest.json: found No such file"),
    "others may write the folder": (lambda p: p.chmod(0o777), "others may write"),
    "others may write a file": (lambda p: (p / KERNELS).chmod(0o666), "_kernels.so: found that others may write"),
    "another CPU": (another_cpu, "arch: found"),
}
if os.geteuid() == 0:  # nobody else can give files away
    FAULTS["another owner"] = (lambda p: os.chown(p, 12345, -1), "found owner 12345")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_package_never_replaces_what_serves(
    server: Path, packages: dict[str, Path], fault: str, tmp_path: Path
) -> None:
    good = next(iter(packages.values()))
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    change, expected = FAULTS[fault]
    change(bad)
    stats, said = ask(server, good, ["5", f"reload {bad}", "5", "rollback"])
    assert len(said) == 2 and said[0].startswith("refused: ") and expected in said[0], said
    assert said[1] == "refused: nothing to go back to"
    assert stats[-1]["kernels"] == 2


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OMP_WAIT_POLICY": "passive"}, "OMP_WAIT_POLICY: found PASSIVE, expected its default"),
        ({"OMP_PLACES": " {0}, {1} "}, "OMP_PLACES: found {0},_{1}, expected its default"),
        ({"OMP_PROC_BIND": "false", "OMP_DYNAMIC": "0", "MKL_CBWR": "COMPATIBLE"}, ""),  # no MKL here
    ],
)
def test_openmp_as_it_was_not_when_the_table_was_measured_is_refused_by_name(
    server: Path, packages: dict[str, Path], variables: dict[str, str], said: str
) -> None:
    words = [server, next(iter(packages.values())), "3", str(torch.get_num_threads())]
    done = subprocess.run(
        words, input="16\n", env={"PATH": "", **variables}, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == (2 if said else 0) and said in done.stderr, done.stderr


def test_other_threads_than_were_measured_with_are_refused(server: Path, packages: dict[str, Path]) -> None:
    wrong = torch.get_num_threads() + 1
    done = subprocess.run(
        [server, next(iter(packages.values())), "1", str(wrong)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and f"threads: found {wrong}, expected {torch.get_num_threads()}" in done.stderr
