"""What compiles a kernel is part of what its evidence holds for."""

from __future__ import annotations

from pathlib import Path

import pytest

from dks.dispatch import compiler, pool
from dks.dispatch.gpu import compile as gpu_compile
from dks.dispatch.gpu import embed
from dks.dispatch.gpu.cublaslt import build as cublaslt_build
from dks.dispatch.gpu.cutlass import build as cutlass_build
from dks.dispatch.problem import Problem
from dks.dispatch.tiles import build
from dks.dispatch.toolchain import holds, toolchain


def told(id: str) -> str:
    return toolchain(pool.kernels()[id])


def fake(folder: Path, name: str, said: str) -> Path:
    """A compiler that says its version and compiles nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\nprintf '{said}'\n")
    path.chmod(0o755)
    return path


def test_kernels_that_compile_something_name_what_and_no_other_does() -> None:
    for kernel in pool.kernels().values():
        compiles = any((kernel.unit, kernel.programs, kernel.configuration, kernel.search))
        assert bool(toolchain(kernel)) == compiles, kernel.id
        assert toolchain(kernel).isprintable() and len(toolchain(kernel)) < 300


def test_another_version_of_the_compiler_is_another_toolchain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = fake(tmp_path / "a", "g++", "g++ (Some 12.2.0-14) 12.2.0\\nCopyright\\n")
    monkeypatch.setenv("CXX", str(old))
    before = {id: told(id) for id in ("tile.f32_avx2", "triton.matmul", "cublaslt.matmul", "torch.linear")}
    assert before["tile.f32_avx2"].startswith("g++ (Some 12.2.0-14) 12.2.0, flags ")
    # The same one elsewhere makes the same code.
    monkeypatch.setenv("CXX", str(fake(tmp_path / "b", "g++", "g++ (Some 12.2.0-14) 12.2.0\\nCopyright\\n")))
    assert all(holds(before[id], told(id)) for id in before)
    for other in (str(fake(tmp_path / "c", "g++", "g++ (Some 13.1.0) 13.1.0\\n")), f"{old} -mtune=native"):
        monkeypatch.setenv("CXX", other)
        assert [id for id in before if holds(before[id], told(id))] == ["torch.linear"]
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    now = told("tile.f32_avx2")
    assert "there is no such program" in now and not holds(before["tile.f32_avx2"], now)


@pytest.mark.parametrize(
    ("module", "name", "kernels"),
    [
        (build, "FLAGS", {"tile.f32_avx2", "tile.softmax_avx2"}),
        (build, "LINK", {"tile.f32_avx2", "tile.softmax_avx2"}),
        (embed, "FLAGS", {"triton.matmul", "triton.rotary", "cutlass.multistage_int8"}),
        (cublaslt_build, "FLAGS", {"cublaslt.matmul"}),
        (cutlass_build, "FLAGS", {"cutlass.multistage", "cutlass.multistage_int8"}),
    ],
)
def test_other_flags_are_another_toolchain(
    module: object, name: str, kernels: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = fake(tmp_path / "bin", "nvcc", "nvcc: NVIDIA\\nBuild cuda_13.0.r13.0/compiler.1\\n").parent.parent
    monkeypatch.setenv("CUDA_HOME", str(home))
    every = ("tile.f32_avx2", "tile.softmax_avx2", "triton.matmul", "triton.rotary", "cutlass.multistage")
    every += ("cutlass.multistage_int8", "cublaslt.matmul", "torch.linear")
    before = {id: told(id) for id in every}
    assert "nvcc Build cuda_13.0.r13.0/compiler.1, flags " in before["cutlass.multistage"]
    monkeypatch.setattr(module, name, (*getattr(module, name), "-O1"))
    assert {id for id in every if told(id) != before[id]} == kernels


def test_other_versions_of_triton_nvcc_and_cutlass_are_other_toolchains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = fake(tmp_path / "bin", "nvcc", "nvcc: NVIDIA\\nBuild cuda_13.0\\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(gpu_compile, "version", lambda: "3.6.0")
    before = told("cutlass.multistage_int8"), told("triton.matmul")
    assert "triton 3.6.0" in before[0] and "triton 3.6.0" in before[1]  # it quantises by a program
    monkeypatch.setattr(gpu_compile, "version", lambda: "3.7.0")
    assert "triton 3.7.0" in told("triton.matmul") and told("cutlass.multistage_int8") != before[0]
    monkeypatch.setattr(gpu_compile, "version", lambda: "")
    assert "no Triton here" in told("triton.matmul")
    fake(tmp_path / "bin", "nvcc", "nvcc: NVIDIA\\nBuild cuda_13.1\\n")
    cutlass_build._version.cache_clear()  # asked once a process
    assert "Build cuda_13.1" in told("cutlass.multistage") and nvcc.is_file()
    monkeypatch.setattr(cutlass_build, "_cutlass_version", lambda: "9.9")
    assert "cutlass 9.9" in told("cutlass.multistage")


def test_a_compiler_that_does_not_say_its_version_equals_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = fake(tmp_path, "g++", "")
    silent.write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("CXX", str(silent))
    assert told("tile.f32_avx2") == told("triton.matmul") == "unknown"
    assert not holds("unknown", "unknown")


def test_compiled_units_are_kept_by_compiler_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pool.kernels()["tile.f32_avx2"]
    traits = {"dtype": "float32", "bias": "yes", "epilogue": "none"}
    problem = Problem.of("linear", traits, {"m": 8, "n": 64, "k": 64}, 64)
    assert kernel.unit is not None
    unit = kernel.unit(problem, kernel.params[0])
    paths = {build._path(unit, ".so")}
    for said in ("g++ 12", "g++ 13"):
        monkeypatch.setenv("CXX", str(fake(tmp_path / said[-2:], "g++", said)))
        paths.add(build._path(unit, ".so"))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
    paths.add(build._path(unit, ".so"))
    assert len(paths) == 4 and compiler.version() == "g++ 13"
