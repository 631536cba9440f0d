"""Packages of a GPU's table: the chosen programs alone, launched from the package's own library."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dks.codegen.kernels import chosen_programs
from dks.codegen.lut import Lut
from dks.codegen.package import Built, build
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch import pool
from dks.dispatch.environment import Environment
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement
from dks.dispatch.gpu import compile as compiling
from dks.dispatch.gpu import library
from dks.dispatch.gpu.cutlass import library as cutlass
from dks.dispatch.gpu.launch import Library, Misaligned
from dks.dispatch.loader import load
from dks.dispatch.manifest import GPU, MANIFEST
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.strict import needs
from dks.dispatch.tiles import library as tiles
from tests.codegen.rows import row
from tests.dispatch import pretended
from tests.gpu.conftest import Fake

HOPPER = Environment(
    "cuda", "NVIDIA H200 132 SMs", "sm_90", "580.1", "2.11.0+cu130", "cuda-13.0+cudnn-91002", "none", "none", ""
)
TRAITS = {"dtype": "bfloat16", "bias": "no", "epilogue": "none"}
N, K = 64, 1024
WHOLE = "group8-split1-resident0-streamk0-tma0-flat0"
FEW, MANY = "triton.gemv/rows1-bn4-bk512-w2-s1-split4", f"triton.matmul/bm64-bn64-bk64-w4-s5-{WHOLE}"
LOSER = f"triton.matmul/bm16-bn32-bk256-w4-s4-{WHOLE}"


def problem(m: int) -> Problem:
    return Problem.of("linear", TRAITS, {"m": m, "n": N, "k": K}, 64)


def rows(environment: Environment = HOPPER) -> list[Measurement]:
    """Few rows go to the one, many to the other, and the third wins nothing."""
    found = []
    for m, winner in ((1, FEW), (64, MANY)):
        found.append(row("torch.linear", 100, problem(m), error=1e-3))
        for candidate in (FEW, MANY, LOSER):
            us = 50 if candidate == winner else 200
            found.append(row(candidate, us, problem(m), error=1e-3, precision="bf16"))
    text = json.dumps(environment.to_dict(), sort_keys=True)
    return [dataclasses.replace(each, environment=text) for each in found]


def lut(environment: Environment = HOPPER) -> Lut:
    return select(rows(environment), Policy(max_error=1e-2))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(lut(), rows(), tmp_path_factory.mktemp("out"), "gpu_table")


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(library, "_shipped", {})
    yield


def test_the_chosen_programs_are_shipped_and_their_size_is_said(built: Built) -> None:
    assert [each.candidate for each in lut().rules] and {each.candidate for each in lut().rules} >= {FEW, MANY}
    symbols = {program.symbol for program in chosen_programs(lut())}
    assert len(symbols) == 3, "the split product is two programs"
    shipped = Library.from_bytes((built.folder / GPU).read_bytes())
    assert {symbol for symbol, _ in shipped.embedded()} == symbols
    assert {arch for _, arch in shipped.embedded()} == {90}
    assert built.kernels.startswith(f"3 Triton programs in {GPU}: ") and built.kernels.endswith("KiB")
    assert GPU in json.loads((built.folder / MANIFEST).read_text())["files"]


def test_a_kernel_is_launched_from_its_packages_library(built: Built, fake: Fake) -> None:
    data = (built.folder / GPU).read_bytes()
    library._shipped["one"] = Library.from_bytes(data, fake.path)
    fake.knows(compiling.load(program, 90) for program in chosen_programs(lut()))
    weight = torch.zeros(N, K, dtype=torch.bfloat16)
    kernel = pool.kernels()["triton.matmul"]
    run = kernel.bind(problem(64), Candidate.parse(MANY).params, weight, None)
    x = torch.zeros(5, 30, K, dtype=torch.bfloat16)
    y = run(x)
    assert y.shape == (5, 30, N) and y.dtype is torch.bfloat16
    ((_, numbers),) = fake.calls("launch")
    assert numbers[:6] == [3 * 1, 1, 1, 4 * 32, 1, 1]
    assert kernel.programs is not None
    (program,) = kernel.programs(problem(64), Candidate.parse(MANY).params)
    found = dict(zip([each.name for each in program.arguments], numbers[9:], strict=False))
    assert (found["x"], found["weight"], found["y"]) == (x.data_ptr(), weight.data_ptr(), y.data_ptr())
    assert (found["bias"], found["residual"]) == (0, 0)
    assert [found[name] for name in ("m", "n", "k", "x_stride", "weight_stride", "y_stride")] == [
        150,
        N,
        K,
        K,
        K,
        N,
    ]
    few = pool.kernels()["triton.gemv"].bind(problem(1), Candidate.parse(FEW).params, weight, None)
    few(x[0, :1])
    _, (_, parts), (_, sums) = fake.calls("launch")
    assert parts[:3] == [N // 4, 4, 1] and sums[9] == parts[9 + 2] != 0, "pieces of k in one workspace"
    with pytest.raises(Misaligned):
        run(torch.zeros(K + 1, dtype=torch.bfloat16)[1:].view(1, K))
    assert len(fake.calls("launch")) == 3


def test_from_import_to_launch_on_tensors_of_a_gpu(
    built: Built, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strict mode, the loader, prepared and functional calls by the compiled fast path, a misaligned view."""
    real = Library.from_bytes
    monkeypatch.setattr(Library, "from_bytes", lambda data: real(data, fake.path))
    monkeypatch.setattr(Environment, "current", lambda _device: HOPPER)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setenv("DKS_STRICT", "1")
    for each in (library, tiles, cutlass):  # a test before this one may have compiled on demand
        monkeypatch.setattr(each, "_locate", each._nowhere)
    fake.knows(compiling.load(program, 90) for program in chosen_programs(lut()))
    with pretended.gpus(), torch.no_grad():
        runtime = load("gpu_table", str(built.folder))
        server = runtime.server("linear")
        weight = torch.zeros(N, K, dtype=torch.bfloat16)
        layer = server.prepare(weight)
        assert len(fake.calls("load")) == 3, "code is loaded before the first request"
        room = torch.zeros(64 * K + 1, dtype=torch.bfloat16)
        # Calls without preparation are the framework's: no sweep measured such a form of these kernels.
        for call, launches in ((layer, 3), (layer, 3), (lambda x: server.call(x, weight), 0)):
            before = len(fake.calls("launch"))
            assert call(room[:-1].view(64, K)).shape == (64, N) and call(room[:K].view(1, K)).shape == (1, N)
            launched = fake.calls("launch")[before:]
            assert len(launched) == launches
            assert sum(weight.data_ptr() in numbers for _, numbers in launched) == (2 if launches else 0)
        assert call(room[1:].view(64, K)).shape == (64, N), "by the framework"
        assert layer(room[1:].view(64, K)).shape == (64, N)
    found = runtime.stats()
    assert found["table"] == "serving" and set(found["lookup"].values()) == {"compiled"} and not found["failed"]
    assert found["ops"]["linear"] == {"hits": {"exact": 6, "nearest": 1}, "fallbacks": {"misaligned": 1}}


def test_without_a_driver_a_launch_says_so_and_the_framework_can_serve(built: Built) -> None:
    library.add((built.folder / GPU).read_bytes(), "one")
    kernel = pool.kernels()["triton.matmul"]
    run = kernel.bind(problem(64), Candidate.parse(MANY).params, torch.zeros(N, K, dtype=torch.bfloat16), None)
    with pytest.raises(Exception, match=r"driver|device"):
        run(torch.zeros(2, K, dtype=torch.bfloat16))


def test_calls_without_preparation_take_what_was_measured_without_it() -> None:
    chosen = {
        form: {rule.candidate for rule in lut().rules if rule.form == form} for form in ("prepared", "direct")
    }
    assert chosen == {"prepared": {FEW, MANY}, "direct": {"torch.linear"}}


def test_strict_mode_asks_for_the_programs_of_each_entry(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (library, tiles, cutlass):  # a test before this one may have compiled on demand
        monkeypatch.setattr(each, "_locate", each._nowhere)
    table = lut().table()
    lines = needs(table, {})
    assert lines and all("no loaded library has its Triton programs" in line for line in lines)
    assert {line.partition(" ")[0] for line in lines} == {FEW, MANY}
    library.add((built.folder / GPU).read_bytes(), "one")
    assert needs(table, {}) == []
    monkeypatch.setattr(library, "_locate", lambda steps: None)
    assert needs(table, {}) == ["this process compiles kernels when they are asked for, as profiling does"]


def test_importing_it_needs_no_triton_and_elsewhere_it_is_refused_by_name(built: Built) -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); import torch, gpu_table as t; x = torch.ones(2, 3);"
        "print(t.linear(x, torch.ones(4, 3)).shape, t.stats()['table'], 'triton' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=built.folder.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("torch.Size([2, 4])") and done.stdout.strip().endswith("False")
    assert "no NVIDIA GPU" in done.stdout or torch.cuda.is_available()


def test_an_architecture_that_nothing_is_compiled_for_is_a_clear_error(tmp_path: Path) -> None:
    other = dataclasses.replace(HOPPER, isa="sm_75")
    with pytest.raises(BadInput, match=r"3 Triton programs .*found sm_75, expected one that runs code for sm_80"):
        build(lut(other), rows(other), tmp_path, "old_table")
    assert not list(tmp_path.iterdir())


def test_the_same_table_is_built_to_the_same_bytes(built: Built, tmp_path: Path) -> None:
    again = build(lut(), rows(), tmp_path, "gpu_table")
    assert (again.folder / GPU).read_bytes() == (built.folder / GPU).read_bytes()


def test_serving_can_not_compile(built: Built) -> None:
    importlib.import_module("dks.dispatch.loader")
    code = "import sys, dks.dispatch.loader; print('dks.dispatch.gpu.compile' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False" and compiling.version()
