"""Generated kernels in a sweep: what does not compile is on record with the compiler's words, the rest goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dks.dispatch import pool
from dks.dispatch.evidence import read_run
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.tiles import build
from dks.dispatch.tiles.isa import ISAS
from dks.profiler import compiling
from dks.profiler.cli import main
from tests.commands import Done, run

ROOT = Path(__file__).parent.parent.parent
CONFIG = """
version: 1
name: broken
threads: 1
operators:
  linear:
    bins: {m: {scheme: explicit, edges: [4]}}
    problems:
      - {dims: {n: 32, k: 32}, traits: {dtype: float32}}
    candidates: ["torch.linear", "unit.*"]
measure: {seconds: 0.02, min_rounds: 6, max_rounds: 6, processes: 1, held_out: false}
"""
PROBLEM = Problem.of("linear", {"dtype": "float32", "bias": "yes", "epilogue": "none"}, {"m": 4, "n": 32, "k": 32})


@pytest.fixture(autouse=True)
def broken_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(pool.MORE_KERNELS, "tests.profiler.broken_units")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT / "src"), str(ROOT))))
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    pool.kernels.cache_clear()
    yield
    pool.kernels.cache_clear()


def sweep(folder: Path) -> tuple[Done, dict[str, tuple[str, str]]]:
    (folder / "broken.yaml").write_text(CONFIG)
    done = run(main, "run", folder / "broken.yaml", "-o", folder / "run")
    return done, {row.candidate: (row.status, row.reason) for row in read_run(folder / "run")}


def test_a_unit_that_does_not_compile_is_a_status(tmp_path: Path) -> None:
    done, found = sweep(tmp_path)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr  # 1: a bin has no other winner
    status, reason = found["unit.broken"]
    assert status == "not_compiled" and "error: 'NoSuch' is not a member of 'dks'" in reason, reason
    status, reason = found["unit.raises"]
    assert status == "failed" and "no unit today" in reason, reason
    assert found["torch.linear"][0] == "ok"
    if ISAS["avx2"].lack() is None:
        assert found["unit.good"] == ("ok", "")
    assert "not compiled: dks_test_sweep_broken" in done.stdout + done.stderr


def test_without_a_compiler_the_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    done, found = sweep(tmp_path)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr  # 1: a bin has no other winner
    for name in ("unit.broken", "unit.good"):
        status, reason = found[name]
        assert status == "not_compiled" and "no C++ compiler: $CXX is '/nonexistent'" in reason, reason
    assert found["torch.linear"][0] == "ok"


def test_only_what_can_run_here_is_compiled() -> None:
    asked = [
        (PROBLEM, Candidate.parse(name)) for name in ("torch.linear", "unit.good", "unit.raises", "unit.elsewhere")
    ]
    assert [unit.symbol for unit in compiling.units(asked)] == ["dks_test_sweep_good"]
    assert [unit.symbol for unit in compiling.units([*asked, *asked])] == ["dks_test_sweep_good"]


def test_doctor_says_what_each_kernel_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "amx_bf16"})
    monkeypatch.setattr("dks.dispatch.tiles.isa.cpu_flags", lambda: flags)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("CXX", "/nonexistent")
    said = run(main, "doctor").stdout
    lines = {line.split("│")[2].strip(): line for line in said.splitlines() if line.count("│") > 4}
    assert "no: this CPU has no amx_tile" in lines["tile.bf16_amx_bf16"]
    assert "no: this CPU has no amx_tile, amx_int8" in lines["tile.i8_amx_int8"]
    assert "no: this CPU has no avx512_vnni" in lines["tile.i8_avx512_vnni"]
    assert "yes" in lines["tile.f32_avx512"].rsplit("│", 2)[1]
    assert "$CXX is '/nonexistent'" in said and "generated kernels can not be measured" in said
    assert str(build.cache()) in said


def test_a_cache_that_others_write_to_is_said_before_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "distrust", lambda: "others may write there")
    problem = Problem.of("softmax", {"dtype": "float32"}, {"m": 4, "n": 8})
    said: list[str] = []
    compiling.compile_for([(problem, c) for c in pool.candidates_for("softmax", "cpu")], said.append)
    kernel = any(k.unit is not None and k.unavailable() is None for k in pool.kernels_for("softmax", "cpu"))
    assert said == (["no generated kernel is measured: others may write there"] if kernel else [])
