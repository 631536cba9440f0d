"""CUTLASS kernels before a GPU is there: descriptions, rendering, compiling within memory, one of each kind built.

The compiled ones take minutes and gigabytes: DKS_SOAK=1.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from dks.dispatch import room
from dks.dispatch.compiler import find_compiler
from dks.dispatch.gpu.cutlass import build, configuration, library
from dks.dispatch.gpu.cutlass.configuration import SIZES, Configuration, configurations
from dks.dispatch.gpu.cutlass.library import Call, Linear
from dks.dispatch.kernel import relative_error
from dks.dispatch.problem import alignment
from dks.dispatch.tiles.library import Missing
from tests.gpu.linears import ROWS, case

Structure = TypeVar("Structure", Linear, Call)

GOLDEN = Path(__file__).parent.parent / "golden"
soak = pytest.mark.skipif(os.environ.get("DKS_SOAK") != "1", reason="compiles for minutes: make soak runs it")

MULTISTAGE = Configuration(80, "multistage", "bfloat16", (128, 128, 32), (2, 2, 1), 4)
COOPERATIVE = Configuration(90, "cooperative", "bfloat16", (128, 256, 64), cluster=(2, 1, 1))
RENDERED = {
    "multistage_bfloat16_relu": dataclasses.replace(MULTISTAGE, epilogue="relu", align=8),
    "multistage_stream_k_float16_add": dataclasses.replace(
        MULTISTAGE, schedule="multistage_stream_k", dtype="float16", epilogue="add"
    ),
    "multistage_int8_none": Configuration(80, "multistage", "int8", (128, 128, 64), (2, 2, 1), 5, align=4),
    "cooperative_bfloat16_add": dataclasses.replace(COOPERATIVE, epilogue="add"),
    "cooperative_fast_float8_gelu": Configuration(
        90, "cooperative_fast", "float8_e4m3fn", (128, 128, 128), epilogue="gelu"
    ),
    "pingpong_bfloat16_silu_align8": Configuration(
        90, "pingpong", "bfloat16", (64, 128, 64), align=8, epilogue="silu"
    ),
}


@pytest.mark.parametrize("name", RENDERED)
def test_rendered_code_is_as_accepted(name: str) -> None:
    """To accept a change: DKS_ACCEPT=1 pytest tests/gpu/test_cutlass.py, and read the diff."""
    assert RENDERED[name].objection() is None
    text = build.source(RENDERED[name])
    path = GOLDEN / f"cutlass_{name}.cu.expected"
    if os.environ.get("DKS_ACCEPT") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path} differs; DKS_ACCEPT=1 accepts the new text"


def test_the_sweep_is_possible_and_each_kernel_has_its_own_name() -> None:
    for arch in (80, 90):
        found = list(configurations(arch, epilogues=tuple(configuration.ACTIVATIONS)))
        assert {each.objection() for each in found} == {None}
        assert len({each.symbol for each in found}) == len({each.digest() for each in found}) == len(found)
        assert {each.dtype for each in found} == {
            dtype for dtype in SIZES if arch == 90 or dtype != "float8_e4m3fn"
        }
    assert {each.align for each in configurations(80, ("bfloat16",))} == {16, 8, 4, 2}
    assert {each.align for each in configurations(90, ("bfloat16",)) if not each.multistage} == {16, 8}
    for each in configurations(90, epilogues=("none", "silu")):
        build.source(each)  # StrictUndefined: nothing is left out


def test_the_sweep_starts_from_what_cutlass_would_build() -> None:
    """Ours are two-stage tiles, for the 2 bytes that cp.async can't copy, and the smallest on sm_90."""
    from dks.dispatch.gpu.cutlass import upstream

    for arch, dtype in ((80, "bfloat16"), (80, "int8"), (90, "float16"), (90, "float8_e4m3fn")):
        described = {_shape(each) for each in upstream.described(arch, dtype)}
        ours = {_shape(each): each for each in configurations(arch, (dtype,))}
        own = [each for shape, each in ours.items() if shape not in described]
        assert {each.stages == 2 or (not each.multistage and each.tile[:2] == (64, 64)) for each in own} <= {True}
        assert len(own) < len(ours)


def _shape(it: Configuration) -> tuple[object, ...]:
    return it.multistage, it.tile, it.warps, it.stages, it.cluster


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"arch": 70}, "sm_70: expected one of sm_80"),
        ({"schedule": "serial"}, "not all of them are known"),
        ({"dtype": "float8_e4m3fn"}, "fp8 is multiplied on sm_90"),
        ({"align": 1}, "bfloat16 aligned to 1 bytes: expected 16, 8, 4 or 2"),
        ({"dtype": "int8", "align": 2}, "int8 aligned to 2 bytes: expected 16, 8 or 4"),
        ({"align": 2}, "4 stages aligned to 2 bytes: expected 2 with 2 bytes"),
        ({"stages": 2}, "2 stages aligned to 16 bytes"),
        ({"warps": (3, 2, 1)}, "warps 3x2x1 do not divide the tile 128x128x32"),
        ({"warps": (16, 2, 1)}, "a warp's 8x64x32: expected multiples of 16x8x16"),
        ({"stages": 11}, "needs 180224 bytes of shared memory, sm_80 gives 166912"),
    ],
)
def test_what_a_multistage_kernel_cannot_be(change: dict[str, object], why: str) -> None:
    assert MULTISTAGE.objection() is None
    assert why in str(dataclasses.replace(MULTISTAGE, **change).objection())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"arch": 80}, "on sm_90"),
        ({"dtype": "int8"}, "is for bfloat16, float16 and fp8"),
        ({"schedule": "pingpong_fast"}, "pingpong_fast is for fp8"),
        ({"align": 4}, "aligned to 4 bytes: expected 16, or 8"),
        ({"align": 8}, "clusters and stream-K go with 16-byte alignment"),
        ({"tile": (64, 256, 64)}, "tile 64x256x64: cooperative takes multiples of 128x8x64"),
        ({"tile": (256, 256, 128)}, "needs 262144 bytes of shared memory, sm_90 gives 232448"),
    ],
)
def test_what_a_hopper_kernel_cannot_be(change: dict[str, object], why: str) -> None:
    assert COOPERATIVE.objection() is None
    assert why in str(dataclasses.replace(COOPERATIVE, **change).objection())  # type: ignore[arg-type]


def test_a_digest_changes_with_all_that_decides_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {
        "arch": 90,
        "schedule": "multistage_stream_k",
        "dtype": "float16",
        "tile": (128, 128, 64),
        "warps": (4, 2, 1),
        "stages": 3,
        "cluster": (2, 1, 1),
        "align": 8,
        "epilogue": "relu",
    }
    assert set(changed) == set(Configuration.__slots__)
    digests = {dataclasses.replace(MULTISTAGE, **{name: value}).digest() for name, value in changed.items()}
    digests.add(MULTISTAGE.digest())
    assert len(digests) == 1 + len(changed)
    for name in ("multistage.cu.j2", "abi.h", "call.hpp", "functions.j2"):
        (tmp_path / name).write_text((configuration.HERE / name).read_text())
    monkeypatch.setattr(configuration, "HERE", tmp_path)
    configuration._sources.cache_clear()
    assert MULTISTAGE.digest() in digests
    (tmp_path / "call.hpp").write_text("")
    configuration._sources.cache_clear()
    assert MULTISTAGE.digest() not in digests
    configuration._sources.cache_clear()


NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "nvcc: release 13.0"; exit 0; fi
echo "start $*" >> {log}
for last in "$@"; do :; done
sleep 0.05
if grep -q "_relu(" kernel.cu; then echo "kernel.cu(7): error: no such thing"; echo "end" >> {log}; exit 2; fi
echo made > "$last"
echo "end" >> {log}
"""


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes down how it is called; the log's path."""
    log = tmp_path / "log"
    program = tmp_path / "cuda" / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text(NVCC.format(log=log))
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("DKS_CACHE", str(tmp_path / "cache"))
    return log


def test_compiling_is_done_once_and_failures_are_kept(nvcc: Path) -> None:
    failing = dataclasses.replace(MULTISTAGE, epilogue="relu")
    with pytest.raises(Missing, match="is not in"):
        build.locate(MULTISTAGE)
    said = build.build([MULTISTAGE, failing, MULTISTAGE, COOPERATIVE])
    assert list(said) == [failing.symbol]
    assert "does not compile" in said[failing.symbol] and "error: no such thing" in said[failing.symbol]
    with pytest.raises(Missing, match="no such thing"):
        build.locate(failing)
    assert build.locate(MULTISTAGE).name.startswith(MULTISTAGE.symbol)
    starts = [line for line in nvcc.read_text().splitlines() if line.startswith("start")]
    assert len(starts) == 5, "two to compile and link each, one that fails"
    assert sum("arch=compute_80,code=sm_80 " in line for line in starts) == 2
    assert sum("arch=compute_90a,code=sm_90a " in line for line in starts) == 1
    assert build.build([MULTISTAGE, COOPERATIVE]) == {}
    assert len(nvcc.read_text().splitlines()) == 10


def test_compilers_share_the_memory_there_is(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = [dataclasses.replace(MULTISTAGE, epilogue=each) for each in ("none", "gelu", "silu")]
    monkeypatch.setattr(room, "cpus", lambda: 8)
    monkeypatch.setattr(room, "memory", lambda: MULTISTAGE.memory)
    told: list[tuple[int, int]] = []
    assert build.build(several, lambda *each: told.append(each)) == {}
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert [line[:3] for line in nvcc.read_text().splitlines()] == ["sta", "end"] * 6, "one after the other"
    monkeypatch.setattr(room, "memory", lambda: 10**9)
    said = build.build([COOPERATIVE])
    assert said == {COOPERATIVE.symbol: f"{COOPERATIVE.symbol}: needs 4.0 GB of memory, 1.0 GB may be used"}


def test_another_compiler_makes_another_file(nvcc: Path, tmp_path: Path) -> None:
    build.build([MULTISTAGE])
    assert build.is_built(MULTISTAGE)
    program = tmp_path / "cuda" / "bin" / "nvcc"
    program.write_text(program.read_text().replace("13.0", "13.1"))
    build._version.cache_clear()
    assert not build.is_built(MULTISTAGE)


def test_what_is_impossible_is_not_compiled(nvcc: Path) -> None:
    said = build.build([dataclasses.replace(MULTISTAGE, stages=11)])
    assert "bytes of shared memory" in next(iter(said.values()))
    assert not nvcc.exists()


def test_linking_several_into_one(nvcc: Path, tmp_path: Path) -> None:
    build.link([MULTISTAGE, COOPERATIVE], tmp_path / "all.so")
    last = nvcc.read_text().splitlines()[-2]
    assert last.endswith("-o all.so") and MULTISTAGE.symbol in last and COOPERATIVE.symbol in last
    with pytest.raises(Missing, match="no such thing"):
        build.link([dataclasses.replace(MULTISTAGE, epilogue="relu")], tmp_path / "none.so")


def test_a_machine_without_nvcc_or_cutlass_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.build([MULTISTAGE]) == {
        MULTISTAGE.symbol: f"no nvcc: $CUDA_HOME is '{tmp_path}', and has no bin/nvcc"
    }
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.unavailable() == "no nvcc: found none in $PATH"
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert build.find_cutlass() == (None, "no CUTLASS: install nvidia-cutlass (pip install 'dks[gpu]')")


def test_a_library_of_another_version_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="cannot open shared object"):
        library.load(tmp_path / "none.so", MULTISTAGE)
    compiler, _ = find_compiler()
    (tmp_path / "a.c").write_text(f'const char {MULTISTAGE.symbol}_source[] = "0123456789abcdef";\n')
    subprocess.run([*compiler, "-x", "c", "-shared", "-fPIC", "a.c", "-o", "a.so"], cwd=tmp_path, check=True)
    with pytest.raises(Missing, match="another version"):
        library.load(tmp_path / "a.so", MULTISTAGE)
    with pytest.raises(Missing, match="undefined symbol"):
        library.load(tmp_path / "a.so", COOPERATIVE)


def test_every_status_has_words() -> None:
    text = (configuration.HERE / "abi.h").read_text()
    for status in (1, 2, 3, 4, 5):
        assert f"= {status}," in text
        assert library.why(status) == library.REASONS[status]
    assert library.why(0) == ""
    assert library.why(1001) == "CUDA error 1"
    assert library.why(1035).startswith("no NVIDIA driver")


COMPILED = (
    *RENDERED.values(),
    Configuration(80, "multistage", "bfloat16", (64, 64, 32), (2, 2, 1), 2, align=2),
    Configuration(90, "cooperative_stream_k", "bfloat16", (128, 128, 64)),
    Configuration(90, "cooperative", "float16", (128, 128, 64), align=8, epilogue="add"),
)


@pytest.fixture(scope="module")
def failed() -> dict[str, str]:
    """Why kernels did not compile, by symbol."""
    return build.build(COMPILED)


@soak
@pytest.mark.parametrize("it", COMPILED, ids=lambda it: it.symbol)
def test_a_kernel_compiles_loads_and_refuses_what_it_would_get_wrong(
    it: Configuration, failed: dict[str, str]
) -> None:
    """Addresses are invented: nothing is ever launched."""
    assert it.symbol not in failed, failed[it.symbol]
    kernel, adds = library.load(build.locate(it), it), it.epilogue == "add"
    linear = Linear(weight=0x1000, bias=0x2000, n=256, k=512, ldw=512, multiprocessors=132)
    call = Call(x=0x3000, y=0x4000, residual=0x5000 if adds else None, rows=64, ldx=512, ldy=256, ldr=256)
    assert kernel.workspace(linear, call) >= 0
    odd_sizes = [{"k": 511}, {"ldw": 513}, {"n": 255}] if it.align > 2 else []
    for change in ({"weight": 0x1001}, {"bias": 0x2001}, *odd_sizes):
        assert kernel.run(_but(linear, change), call) == 1, change
    odd_rows = [{"ldx": 513}, {"ldy": 257}] if it.align > 2 else []
    for change in ({"x": 0x3001}, {"y": 0x4001}, *odd_rows):
        assert kernel.run(linear, _but(call, change)) == 1, change
    for change in ({"k": 0}, {"multiprocessors": 0}):
        assert kernel.run(_but(linear, change), call) == 2, change
        with pytest.raises(ValueError, match="out of range"):
            kernel.workspace(_but(linear, change), call)
    for change, status in (
        ({"rows": -1}, 2),
        ({"ldx": 256}, 2),
        ({"ldx": 1 << 32}, 2),
        ({"ldy": 128}, 2),
        ({"y": None}, 4),
        ({"residual": None if adds else 0x5000}, 4),
        ({"rows": 0}, 0),
    ):
        assert kernel.run(linear, _but(call, change)) == status, change
    scaled = kernel.run(linear, _but(call, {"x_scale": 0x6004}))
    assert scaled == (1 if it.scales else 4)


@pytest.mark.parametrize("dtype", SIZES)
def test_cases_are_as_aligned_as_they_say(dtype: str) -> None:
    """And their answers are those of the framework, in lower precision."""
    for align in (16, 8, 4):
        made = case(dtype, "add", 5, align, "cpu")
        tensors = (made.x, made.weight, made.bias, made.residual, made.y)
        assert {alignment(t.data_ptr()) for t in tensors if t is not None} == {align}
        assert {alignment(t.shape[1] * t.element_size()) for t in (made.x, made.weight, made.y)} == {align}
        x, weight = made.x.float(), made.weight.float()
        if made.x_scale is not None and made.weight_scale is not None:
            x, weight = x * made.x_scale[:, None], weight * made.weight_scale[:, None]
        assert made.residual is not None
        y = torch.nn.functional.linear(x, weight, made.bias.float()) + made.residual.float()
        assert relative_error(y, made.expected) < 1e-5
        assert made.y.isnan().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("it", COMPILED, ids=lambda it: it.symbol)
def test_a_kernel_computes_linear(it: Configuration) -> None:
    major, minor = torch.cuda.get_device_capability()
    if it.multistage:
        it = dataclasses.replace(it, arch=10 * major + minor)
    if it.objection() is not None or (major, minor) != (it.arch // 10, it.arch % 10):
        pytest.skip(f"not for sm_{major}{minor}")
    assert build.build([it]) == {}
    kernel = library.load(build.locate(it), it)
    for rows in ROWS:
        made = case(it.dtype, it.epilogue, rows, it.align, "cuda")
        (n, k), at = made.weight.shape, _address
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        linear = Linear(at(made.weight), at(made.bias), at(made.weight_scale), n, k, k, processors)
        call = Call(at(made.x), at(made.x_scale), at(made.residual), at(made.y), rows, k, n, n)
        workspace = torch.empty(kernel.workspace(linear, call), dtype=torch.uint8, device="cuda")
        call.workspace, call.workspace_bytes = at(workspace), workspace.numel()
        call.stream = torch.cuda.current_stream().cuda_stream
        assert library.why(kernel.run(linear, call)) == ""
        torch.cuda.synchronize()
        assert relative_error(made.y, made.expected) < 1e-2


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _but(structure: Structure, change: dict[str, object]) -> Structure:
    copy = type(structure).from_buffer_copy(structure)
    for name, value in change.items():
        setattr(copy, name, value)
    return copy
