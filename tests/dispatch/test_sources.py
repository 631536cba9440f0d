"""A kernel's digest is that of every file that it rests on, whatever a process has loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from dks.dispatch import pool, sources
from dks.dispatch.gpu import program
from dks.dispatch.kernel import DTYPES, Kernel
from dks.dispatch.problem import Problem
from dks.dispatch.sources import HERE, files_of, source_digest
from dks.dispatch.tiles import unit

KERNELS = list(pool.kernels().values())

DISTINCT = list({frozenset(files_of(kernel)): kernel for kernel in KERNELS}.values())
"""Of the kernels that rest on the same files, one."""

DECLARING = {"kernel", "problem", "environment", "errors", "manifest", "plain", "trust", "forks"}
"""Modules at the top that kernels import from: none of them computes what a kernel returns, or calls it."""


def relative(kernel: Kernel) -> set[str]:
    return {path.relative_to(HERE).as_posix() for path in files_of(kernel).values()}


def test_an_edit_of_any_file_that_a_kernel_reads_changes_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: dict[Path, bytes] = {}
    edited: list[Path] = []

    def read(path: Path) -> bytes:
        text = texts.setdefault(path, path.read_bytes())
        return text + b"\n" if path in edited else text

    monkeypatch.setattr(sources, "_read", read)
    for kernel in DISTINCT:
        edited[:] = []
        before = source_digest(kernel)
        for path in files_of(kernel).values():
            edited[:] = [path]
            assert source_digest(kernel) != before, (kernel.id, path)
        edited[:] = [HERE / "ops" / kernel.op / "serve.py"]
        assert source_digest(kernel) == before


@pytest.mark.parametrize(
    ("id", "files"),
    [
        ("torch.linear", {"ops/linear/torch_linear.py", "ops/linear/epilogue.py"}),
        ("quantized.dynamic_x86", {"ops/linear/quantized_dynamic_x86.py", "ops/linear/quantized_dynamic.py"}),
        ("torch.paged_gather_sdpa", {"ops/paged_attention/gather.py"}),
        ("tile.f32_avx2", {"tiles/simd.hpp", "tiles/units.cpp.j2", "tiles/isa.py", "native/tensor.hpp"}),
        ("triton.gemv", {"gpu/kernels/epilogue.py", "gpu/worker.py", "gpu/driver.hpp", "native/gpu_kernel.hpp"}),
        ("triton.paged", {"gpu/kernels/attention.py", "gpu/paged.py"}),
        (
            "cutlass.multistage_int8",
            {"gpu/cutlass/call.hpp", "gpu/cutlass/hopper.cu.j2"},
        ),
        ("cublaslt.matmul", {"gpu/cublaslt/cublaslt.cpp", "gpu/cublaslt/cublaslt.h"}),
    ],
)
def test_imports_includes_and_declared_files_are_followed(id: str, files: set[str]) -> None:
    assert files <= relative(pool.kernels()[id])


@pytest.mark.parametrize("kernel", DISTINCT, ids=lambda kernel: kernel.id)
def test_what_is_imported_is_followed_or_known_to_compute_nothing(kernel: Kernel) -> None:
    """A new module at the top of dks.dispatch that kernels use must be followed, or be added here with a reason."""
    found = files_of(kernel)
    for name, path in found.items():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("dks."):
                assert not (isinstance(node, ast.Import) and "dks" in {a.name.split(".")[0] for a in node.names})
                continue
            for alias in node.names:
                assert (
                    {node.module, f"{node.module}.{alias.name}"} & found.keys()
                    or (node.module or "").removeprefix("dks.dispatch.") in DECLARING
                    or (node.module == "dks.dispatch" and alias.name in DECLARING)
                ), f"{name}: {alias.name} of {node.module}"


def test_each_file_beside_a_kernel_is_in_a_digest() -> None:
    read = set[str]().union(*map(relative, KERNELS))
    there = {path.relative_to(HERE).as_posix() for path in HERE.glob("ops/*/*.py")}
    there |= {path.relative_to(HERE).as_posix() for path in HERE.glob("tiles/*.[hj]*")}
    there |= {path.relative_to(HERE).as_posix() for path in HERE.glob("gpu/kernels/[a-z]*.py")}
    left = {name for name in there - read if Path(name).name not in ("__init__.py", "serve.py", "traced.py")}
    in_models = {"ops/attention/models.py", "ops/linear/layers.py", "ops/linear/others.py", "ops/linear/pair.py"}
    assert left == in_models, "these serve modules of a model, and choose who is called"


def small(kernel: Kernel) -> Iterator[Problem]:
    operator, size = pool.operator(kernel.op), 64 if kernel.op == "linear" else 16
    for dtype in kernel.precision:
        for values in ({}, {"epilogue": "gelu"}, {"residual": "yes"}):
            traits = {name: allowed[0] for name, allowed in operator.traits.items()} | {"dtype": dtype}
            traits |= {name: value for name, value in values.items() if value in operator.traits.get(name, ())}
            yield Problem.of(kernel.op, traits, dict.fromkeys(operator.dims, size), max(16, DTYPES[dtype].itemsize))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.id)
def test_what_runs_of_ours_when_a_kernel_is_made_and_called_is_in_its_digest(kernel: Kernel) -> None:
    """Python says which of our files it executes; the digest's own way of finding them plays no part."""
    ran: set[str] = set()

    def profile(frame: object, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)  # type: ignore[attr-defined]
        if event == "call" and path.is_relative_to(HERE):
            ran.add(path.relative_to(HERE).as_posix())

    compiled = kernel.unit or kernel.programs or kernel.configuration or kernel.search
    for problem in small(kernel):
        inputs = None
        if not compiled and not kernel.unavailable() and not kernel.objection(problem) and kernel.runs_on("cpu"):
            inputs = pool.operator(kernel.op).make_inputs(problem, torch.Generator().manual_seed(0), "normal")
        sys.setprofile(profile)
        try:
            if not kernel.objection(problem) and not kernel.suits(problem, kernel.params[0]):
                for made in filter(None, (kernel.unit, kernel.programs, kernel.configuration)):
                    made(problem, kernel.params[0])
            with suppress(RuntimeError):  # a library of this machine may refuse
                if inputs is not None:
                    kernel.bind(problem, kernel.params[0], *inputs.static)(*inputs.dynamic)
        finally:
            sys.setprofile(None)
    assert ran
    assert {name for name in ran if Path(name).stem not in DECLARING} <= relative(kernel)


def test_a_kernel_names_the_sources_of_what_it_compiles() -> None:
    for kernel in KERNELS:
        for problem in small(kernel):
            if kernel.objection(problem) or kernel.suits(problem, kernel.params[0]):
                continue
            if kernel.unit is not None:
                made = kernel.unit(problem, kernel.params[0])
                assert made.header == kernel.header
                names = unit.source_of(made.header).split("\0")[::2]
                assert {f"tiles/{name}" for name in names} <= relative(kernel)
            for each in kernel.programs(problem, kernel.params[0]) if kernel.programs else ():
                names = program.source_of(each.source).split("\0")[::2]
                assert each.source in kernel.sources
                assert {f"gpu/kernels/{name}" for name in names} <= relative(kernel)


def test_a_digest_is_the_same_whatever_is_loaded() -> None:
    """Another process, which has the pool and nothing else, in another order."""
    code = (
        "from dks.dispatch.sources import source_digest\n"
        "from dks.dispatch import pool\n"
        "print(*(source_digest(pool.kernels()[id]) for id in reversed(pool.kernels())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [source_digest(pool.kernels()[id]) for id in reversed(pool.kernels())]


@pytest.mark.parametrize("package", ["", "ours"])
def test_a_kernel_of_ones_own_rests_on_what_it_imports(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / package
    folder.mkdir(exist_ok=True)
    base, dot = (f"{package}.", ".") if package else ("", "")
    if package:
        (folder / "__init__.py").write_text("")
    (folder / "mine_help.py").write_text("import json\nfrom dks.dispatch.ops.linear.epilogue import finish\n")
    (folder / "mine.py").write_text(
        "from dks.dispatch import pool\nimport dataclasses\n"
        + (f"from {dot} import mine_help\n" if package else "import mine_help\n")
        + "def bind(*_): ...\n"
        "KERNELS = [dataclasses.replace(pool.kernels()['torch.addmm'], id='mine.linear', bind=bind)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__(f"{base}mine", fromlist=["KERNELS"])
    kernel = module.KERNELS[0]
    assert {f"{base}mine", f"{base}mine_help", "dks.dispatch.ops.linear.epilogue"} <= files_of(kernel).keys()
    assert not {"dataclasses", "json"} & files_of(kernel).keys()
    before = source_digest(kernel)
    (folder / "mine_help.py").write_text("import json\n")
    assert source_digest(kernel) != before
    for name in (f"{base}mine", f"{base}mine_help", package):
        sys.modules.pop(name, None)
