"""CUTLASS kernels of the pool: bound, called, compiled for a sweep and shipped; a library stands for them."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dks.codegen import package
from dks.codegen.kernels import chosen_configurations, describe, ship_configurations
from dks.codegen.lut import Lut
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch import loader, native, pool
from dks.dispatch.environment import Environment
from dks.dispatch.errors import BadInput
from dks.dispatch.gpu import call, measuring
from dks.dispatch.gpu import library as programs
from dks.dispatch.gpu.cutlass import build, configuration, library
from dks.dispatch.gpu.cutlass.configuration import Configuration
from dks.dispatch.gpu.launch import ContextLost, LaunchFailed, Misaligned, Plan, Step
from dks.dispatch.gpu.library import Steps
from dks.dispatch.kernel import Declined, Kernel, relative_error
from dks.dispatch.manifest import CUTLASS, MANIFEST, intact
from dks.dispatch.native import build as native_build
from dks.dispatch.ops.linear.cutlass_linear import KERNELS
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.tiles.library import Missing
from dks.profiler import compiling
from dks.profiler.check import Checker
from tests.codegen.rows import ENVIRONMENT, row
from tests.gpu.conftest import Fake, Open, compile_with
from tests.gpu.cubins import made
from tests.gpu.interpreting import Plan as Interpreted

FAKE = Path(__file__).parent / "fake_cutlass.c"
FORMS = [pytest.param(True, id="compiled"), pytest.param(False, id="python")]
soak = pytest.mark.skipif(os.environ.get("DKS_SOAK") != "1", reason="compiles for minutes: make soak runs it")
SIZES = {"m": 6, "n": 48, "k": 32}


class Told(ctypes.Structure):
    """What the stand-in was told, ``struct told`` of ``fake_cutlass.c``, and what it is to answer."""

    _fields_ = (
        ("linear", library.Linear),
        ("call", library.Call),
        *((name, ctypes.c_int64) for name in ("asked", "runs", "status", "room")),
    )


def problem(epilogue: str = "none", bias: str = "yes", align: int = 16, **sizes: int) -> Problem:
    return Problem.of(
        "linear", {"dtype": "bfloat16", "bias": bias, "epilogue": epilogue}, {**SIZES, **sizes}, align
    )


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(native, "module", None)


Stand = Callable[[Configuration], Told]


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    """stand(configuration): from now on the stand-in is that kernel, compiled for sm_90; what it will be told."""

    def make(it: Configuration) -> Told:
        path = tmp_path / f"{it.symbol}.so"
        options = (f"-DSYMBOL={it.symbol}", f'-DDIGEST="{it.digest()}"', f"-DALIGN={it.align}")
        more = (f"-DIN={configuration.SIZES[it.dtype]}", f"-DADDS={int(it.epilogue == 'add')}")
        compile_with(
            tmp_path,
            "-x",
            "c",
            "-O1",
            "-fPIC",
            "-shared",
            *options,
            *more,
            "-I",
            configuration.HERE,
            FAKE,
            "-o",
            path,
        )
        monkeypatch.setattr(library, "_locate", lambda asked: library.load(path, asked.on(90)))
        return Told.in_dll(ctypes.CDLL(str(path)), f"{it.symbol}_told")

    return make


def bound(kernel: Kernel, of: Problem, stand: Stand) -> tuple[Any, Told, Any]:
    """The first of its candidates on the stand-in, what that is told, and the inputs."""
    assert kernel.objection(of) is None and kernel.configuration is not None
    told = stand(kernel.configuration(of, kernel.params[0]).on(90))
    inputs = pool.operator("linear").make_inputs(of, torch.Generator().manual_seed(3), "normal")
    return kernel.bind(of, kernel.params[0], *inputs.static), told, inputs


@pytest.mark.parametrize("compiled", FORMS, indirect=True)
@pytest.mark.parametrize(
    ("id", "epilogue", "bias", "align"),
    [
        ("cutlass.multistage", "none", "yes", 16),
        ("cutlass.cooperative_stream_k", "add", "no", 16),
        ("cutlass.pingpong_align8", "add", "yes", 8),
        ("cutlass.multistage_align2", "none", "no", 2),
    ],
)
def test_a_kernel_is_told_what_the_call_is(
    id: str, epilogue: str, bias: str, align: int, stand: Stand, compiled: None
) -> None:
    sizes = {16: {}, 8: {"k": 36, "n": 44}, 2: {"k": 33, "n": 47}}[align]
    of = problem(epilogue, bias, align, **sizes)
    run, told, inputs = bound(pool.kernels()[id], of, stand)
    told.room = 1000
    n, k = of.dim("n"), of.dim("k")
    given = tuple(t.view(2, 3, -1) for t in inputs.dynamic)
    y = run(*given)
    expected = pool.operator("linear").reference(of, inputs).view(2, 3, n)
    assert y.dtype is torch.bfloat16 and relative_error(y, expected) < 1e-2
    weight, bias_tensor = inputs.static
    linear, c = told.linear, told.call
    assert (linear.weight, linear.bias) == (weight.data_ptr(), None if bias == "no" else bias_tensor.data_ptr())
    assert (linear.n, linear.k, linear.ldw, linear.multiprocessors) == (n, k, k, 1)
    assert (c.x, c.y, c.rows) == (given[0].data_ptr(), y.data_ptr(), 6)
    assert (c.residual, c.ldr) == ((given[1].data_ptr(), n) if epilogue == "add" else (None, 0))
    assert (c.ldx, c.ldy, c.x_scale, c.stream, c.device) == (k, n, None, None, 0)
    assert c.workspace_bytes == 1000 and c.workspace % 16 == 0 and told.asked == told.runs == 1


@pytest.mark.parametrize("compiled", FORMS, indirect=True)
def test_what_is_misaligned_is_refused_or_taken_by_another(stand: Stand, compiled: None) -> None:
    of, kernel = problem(), pool.kernels()["cutlass.multistage"]
    run, told, inputs = bound(kernel, of, stand)
    odd = torch.zeros(6 * 32 + 1, dtype=torch.bfloat16)[1:].view(6, 32)
    with pytest.raises(Misaligned, match="is not divisible by what the kernel needs"):
        run(odd)
    with pytest.raises(Declined):
        run(odd.float())
    assert told.runs == 0
    assert kernel.configuration is not None
    values = (call.given(0), 0, 0, call.buffer(0), call.rows(0), 32, 0, 48)
    weight, bias = inputs.static
    constant = library.Linear(weight.data_ptr(), bias.data_ptr(), None, 48, 32, 32, 1)
    function = library.find(kernel.configuration(of, kernel.params[0])).function(constant, values, None)
    recipe = call.Recipe(("bfloat16",), (), (call.Buffer(last=48),), function=function)
    less = pool.kernels()["cutlass.multistage_align2"]
    assert less.configuration is not None
    other = stand(less.configuration(of, less.params[0]).on(90))
    second = library.find(less.configuration(of, less.params[0])).function(constant, values, None)
    both = call.bound(recipe, dataclasses.replace(recipe, function=second), device="cpu")
    assert both(odd).shape == (6, 48) and (told.runs, other.runs) == (0, 1)
    both(inputs.dynamic[0])
    assert (told.runs, other.runs) == (1, 1)


@pytest.mark.parametrize("compiled", FORMS, indirect=True)
@pytest.mark.parametrize(
    ("status", "raised", "words"),
    [
        (2, Declined, "CUTLASS refuses it"),
        (3, Declined, "the workspace is too small"),
        (5, LaunchFailed, "could not launch"),
        (1001, LaunchFailed, "CUDA error 1"),
        (1035, Declined, "no NVIDIA driver that could run it"),
        (1100, Declined, "no device"),
        (1700, ContextLost, "every later CUDA call of this process fails too"),
    ],
)
def test_a_status_raises_what_it_means(
    status: int, raised: type[Exception], words: str, stand: Stand, compiled: None
) -> None:
    run, told, inputs = bound(pool.kernels()["cutlass.multistage"], problem(), stand)
    told.status = status
    with pytest.raises(raised, match=words) as caught:
        run(*inputs.dynamic)
    assert type(caught.value) is raised


def test_a_quantised_one_comes_after_the_program_that_quantises(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "_locate", Interpreted)
    kernel, of = pool.kernels()["cutlass.multistage_int8"], problem("add")
    run, told, inputs = bound(kernel, of, stand)
    expected = pool.operator("linear").reference(of, inputs)
    assert relative_error(run(*inputs.dynamic), expected) < kernel.precision["bfloat16"].limit
    assert told.call.x_scale % 16 == 0 and told.linear.weight_scale % 16 == 0
    assert kernel.supports(problem(k=40)) == "k=40 is not divisible by 16, and each element is a byte"


@pytest.mark.parametrize("compiled", FORMS, indirect=True)
def test_nothing_is_launched_before_the_kernel_agrees(
    stand: Stand, compiled: None, opened: Open, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = opened()

    def locate(steps: Steps) -> Plan:
        cubins = [
            made(each.symbol, arguments=each.arguments, align=each.align, grid=each.grid) for each, _ in steps
        ]
        return Plan(launcher, [Step(launcher.add(c), b) for c, (_, b) in zip(cubins, steps, strict=True)])

    monkeypatch.setattr(programs, "_locate", locate)
    run, told, inputs = bound(pool.kernels()["cutlass.multistage_int8"], problem(), stand)
    odd = torch.zeros(6 * 32 + 1, dtype=torch.bfloat16)[1:].view(6, 32)
    run(*inputs.dynamic)
    ((name, numbers),) = fake.calls("launch")
    assert "quantize" in name and numbers[9] == inputs.dynamic[0].data_ptr()
    assert numbers[10] == told.call.x and numbers[11] == told.call.x_scale and told.runs == 1
    told.room = -3
    with pytest.raises(Declined, match="the workspace is too small"):
        run(*inputs.dynamic)
    told.room = 0
    with pytest.raises(Misaligned):
        run(odd)
    assert len(fake.calls("launch")) == 1 and told.runs == 1


def test_the_pool_has_every_configuration_of_the_default_sweep() -> None:
    """Each once, from its parameters again; int8 in the alignment class that its activations are made in."""
    found: dict[str, list[Configuration]] = {}
    for kernel in KERNELS:
        for params in kernel.params:
            assert kernel.configuration is not None
            it = kernel.configuration(problem(), params)
            assert it.align == kernel.align and it.objection() is None
            found.setdefault(it.dtype, []).append(it.on(90))
    assert set(found) == {"bfloat16", "float8_e4m3fn", "int8"}
    for dtype, ours in found.items():
        wanted = {
            it.symbol for it in configuration.configurations(90, (dtype,)) if dtype != "int8" or it.align == 16
        }
        assert {each.symbol for each in ours} == wanted and len(ours) == len(wanted)


def test_a_gpu_of_another_architecture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper, everywhere = pool.kernels()["cutlass.pingpong"], pool.kernels()["cutlass.multistage"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert "compute capability 9.0 alone, this one has 8.0" in (hopper.unavailable() or "")
    assert everywhere.unavailable() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert hopper.unavailable() is None
    assert not any(each.runs_on("cpu") for each in KERNELS)


NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "nvcc: release 13.0"; exit 0; fi
for last in "$@"; do :; done
case " $* " in
*" -c "*)
  line=$(grep "_source\\[\\] = " kernel.cu)
  name=${{line#const char }}; name=${{name%%_source*}}
  digest=${{line#*\\"}}; digest=${{digest%%\\"*}}
  set -- -DSYMBOL=$name -DDIGEST="\\"$digest\\"" -DALIGN=16 -DIN=2 -DADDS=0
  exec cc -x c -O1 -fPIC -c "$@" -I "{abi}" "{fake}" -o "$last" ;;
*) for each in "$@"; do case $each in *.o) objects="$objects $each" ;; esac; done
  exec cc -shared $objects -o "$last" ;;
esac
"""


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that makes the stand-in of whatever it is given, and nothing cached."""
    if shutil.which("cc") is None:
        pytest.skip("no cc")
    program = tmp_path / "cuda" / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text(NVCC.format(abi=configuration.HERE, fake=FAKE))
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("DKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native_build, "cached", lambda: (None, ""))
    for name in ("compile_into", "compile_library"):
        monkeypatch.setattr(package, name, lambda *_: "not in this test")
    return program


def gpu(isa: str) -> Environment:
    return dataclasses.replace(ENVIRONMENT, device="cuda", isa=isa)


def asked(*ids: str) -> list[tuple[Problem, Candidate]]:
    """Two candidates of each kernel."""
    return [(problem(m=300, n=512), each) for id in ids for each in pool.kernels()[id].candidates()[:2]]


def test_a_sweep_compiles_what_its_gpu_runs_and_says_so(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "capability", lambda _: 80)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    said: list[str] = []
    compiling.compile_for(asked("cutlass.multistage", "cutlass.pingpong"), said.append, gpu("sm_80"))
    assert any("compiling 2 CUTLASS kernels for sm_80, a minute each (0 are there)" in line for line in said)
    assert said[-1] == "2 of 2 compiled"
    said.clear()
    compiling.compile_for(asked("cutlass.multistage"), said.append, gpu("sm_80"))
    assert not said, "they are there"
    monkeypatch.setattr(library, "_locate", measuring.locate_cutlass(80))
    ((of, candidate), *_) = asked("cutlass.multistage")
    made = pool.kernels()[candidate.kernel].configuration
    assert made is not None and library.find(made(of, candidate.params)).symbol.startswith("dks_cutlass_80_")
    assert library.lack(made(problem("silu"), candidate.params)) is not None


def test_a_machine_without_nvcc_says_so_once_and_it_is_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_build, "cached", lambda: (None, ""))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("DKS_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    compiling.compile_for(asked("cutlass.multistage"), said.append, gpu("sm_90"))
    assert [line for line in said if "CUTLASS" in line] == [
        f"no CUTLASS kernel is compiled: no nvcc: $CUDA_HOME is '{tmp_path}', and has no bin/nvcc"
    ]
    monkeypatch.setattr(library, "_locate", measuring.locate_cutlass(90))
    ((of, candidate), *_) = asked("cutlass.multistage")
    verdict = Checker(0).check(of, candidate)
    assert verdict.status == "not_compiled" and "is not in" in verdict.reason


def made_lut(*ids: str) -> tuple[Lut, list[Any]]:
    """A table of an H200's measurements where the first candidate of each kernel wins something."""
    there = dataclasses.replace(ENVIRONMENT, device="cuda", arch="NVIDIA H200 132", isa="sm_90", threads="none")
    text, rows = json.dumps(there.to_dict(), sort_keys=True), []
    for m, id in zip((1, 64, 4096), ids, strict=False):
        of = problem(m=m)
        rows.append(row("torch.linear", 100, of, environment=text))
        rows.append(row(pool.kernels()[id].candidates()[0].id, 50, of, environment=text))
    return select(rows, Policy(max_error=1e-2)), rows


def test_a_package_ships_the_winners_and_loads_them_from_memory(
    nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lut, rows = made_lut("cutlass.multistage", "cutlass.pingpong", "cutlass.multistage")
    chosen = chosen_configurations(lut)
    assert [each.arch for each in chosen] == [90, 90], "each once, for the GPU that it was measured on"
    built = package.build(lut, rows, tmp_path, "shipped")
    size = (built.folder / CUTLASS).stat().st_size / 1024
    assert built.kernels == f"2 CUTLASS kernels in {CUTLASS}: {size:.0f} KiB"
    assert {CUTLASS, "cutlass_license.txt"} <= set(json.loads((built.folder / MANIFEST).read_text())["files"])
    assert "BSD-3-Clause" in (built.folder / "cutlass_license.txt").read_text()

    monkeypatch.setattr(library, "_shipped", {})
    monkeypatch.setattr(loader, "examine", intact)  # it belongs to another machine
    loader.open_generation(built.folder)
    kernel = pool.kernels()["cutlass.multistage"]
    inputs = pool.operator("linear").make_inputs(problem(), torch.Generator().manual_seed(3), "normal")
    run = kernel.bind(problem(), kernel.params[0], *inputs.static)
    assert relative_error(run(*inputs.dynamic), pool.operator("linear").reference(problem(), inputs)) < 1e-2
    with pytest.raises(Missing, match="no loaded package ships it"):
        kernel.bind(problem(), kernel.params[1], *inputs.static)


def test_a_table_that_cannot_be_compiled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("DKS_CACHE", str(tmp_path / "cache"))
    chosen = chosen_configurations(made_lut("cutlass.multistage")[0])
    with pytest.raises(BadInput, match=r"chose 1 CUTLASS kernels that can't be compiled here \(no nvcc"):
        ship_configurations(chosen, tmp_path)
    ship_configurations([], tmp_path)
    assert describe(tmp_path, 0, 0, 0).startswith("no generated kernels were chosen")


def test_what_is_no_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_shipped", {})
    with pytest.raises(Missing):
        library.add(b"no library", "0")
    assert not library._shipped


@soak
def test_kernels_compiled_by_nvcc_ship_load_and_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One as on sm_80 and one of sm_90, in a package; nothing of them is ever launched without a GPU."""
    if why := build.unavailable():
        pytest.skip(why)
    monkeypatch.setattr(library, "_shipped", {})
    lut, rows = made_lut("cutlass.multistage_align4", "cutlass.pingpong")
    built = package.build(lut, rows, tmp_path, "shipped")
    print(built.kernels)
    library.add((built.folder / CUTLASS).read_bytes(), "shipped")
    for id, odd in (("cutlass.multistage_align4", 33), ("cutlass.pingpong", 36)):
        kernel = pool.kernels()[id]
        for of, raised in ((problem(k=odd), Misaligned), (problem(), (Declined, LaunchFailed))):
            inputs = pool.operator("linear").make_inputs(of, torch.Generator().manual_seed(3), "normal")
            run = kernel.bind(of, kernel.params[0], *inputs.static)
            with pytest.raises(raised) as caught:  # there is no driver here, or these are no addresses of a GPU
                run(*inputs.dynamic)
            if raised is Misaligned:
                assert caught.type is Misaligned
            elif not torch.cuda.is_available():
                assert "no NVIDIA driver" in str(caught.value)
