"""cuBLASLt behind its C interface, against a library that writes down what it is told."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dks.dispatch.compiler import find_compiler
from dks.dispatch.gpu.cublaslt import build
from dks.dispatch.gpu.cublaslt.library import (
    EPILOGUES,
    Algorithm,
    Call,
    Found,
    Library,
    Matmul,
    Problem,
    Refused,
)
from dks.dispatch.kernel import relative_error
from tests.gpu.linears import ROWS, case

FAKE = Path(__file__).parent / "fake_cublaslt.c"

# 24 rows of 512 to 1024 channels. cuBLASLt is told of columns: y^T = weight x^T.
PLAIN = Matmul(24, 1024, 512, "bfloat16")
PLAIN_LAYOUTS = """\
A: type 14, 512 x 1024, leading 512
B: type 14, 512 x 24, leading 512
C: type 14, 1024 x 24, leading 1024
D: type 14, 1024 x 24, leading 1024
"""
CALL = Call(x=0x1000, weight=0x2000, y=0x3000, workspace=0x10000, workspace_bytes=4096, stream=0x77)


class Fake:
    """The fake library, as a test speaks to it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.c = ctypes.CDLL(self.path)
        self.c.fake_log.restype = ctypes.c_char_p

    def log(self) -> str:
        text = self.c.fake_log().decode()
        self.c.fake_reset()
        return text

    def fail(self, function: str, status: int) -> None:
        self.c.fake_fail(function.encode(), status)


@pytest.fixture(scope="module")
def binary() -> Path:
    path, why = build.cached()
    assert path is not None, why
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    compiler, why = find_compiler()
    assert not why
    path = tmp_path_factory.mktemp("fake") / "libcublasLt.so.13"
    flags = ["-x", "c", "-std=c11", "-pedantic", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
    command = [*compiler, *flags, "-shared", "-fPIC", "-iquote", str(build.HERE), str(FAKE), "-o", str(path)]
    subprocess.run(command, check=True)
    return Fake(path)


@pytest.fixture
def fake(made: Fake) -> Fake:
    made.log()
    return made


@pytest.fixture
def lt(binary: Path, fake: Fake) -> Iterator[Library]:
    opened = Library(binary, fake.path)
    yield opened
    opened.close()


def test_structures_are_as_in_c(fake: Fake) -> None:
    sizes = (ctypes.c_size_t * 3).in_dll(fake.c, "fake_sizes")
    assert list(sizes) == [ctypes.sizeof(each) for each in (Problem, Found, Call)]


def test_a_missing_library_is_a_reason(binary: Path) -> None:
    with pytest.raises(Refused, match=r"no cuBLASLt: /nowhere/libcublasLt.so: cannot open"):
        Library(binary, "/nowhere/libcublasLt.so")
    with pytest.raises(Refused, match="libcublasLt has no function cublasLtCreate"):
        Library(binary, str(binary))


def test_a_machine_without_a_device_is_a_reason(binary: Path, fake: Fake) -> None:
    fake.fail("cublasLtCreate", 1)
    with pytest.raises(Refused, match=r"cublasLtCreate: an unknown status \(1\)"):
        Library(binary, fake.path)


def test_a_search_says_layouts_epilogue_and_alignments(lt: Library, fake: Fake) -> None:
    assert lt.version == 130100
    found = lt.search(dataclasses.replace(PLAIN, align=(16, 8, 4, 2, 256), workspace=1 << 20))
    assert fake.log() == (
        f"heuristic 0x1234 most 32\ncompute 68 scale 0\nset 3 = 1\nset 7 = 1\n{PLAIN_LAYOUTS}"
        "workspace 1048576, alignments A 8 B 16 C 2 D 2\n"
    )
    # The third has no success, the fourth is the first again, the fifth takes more than the workspace.
    assert [(each.data[:8], each.workspace, each.waves) for each in found] == [
        (b"G" + bytes(7), 71 * 1024, 0.5),
        (b"B" + bytes(7), 66 * 1024, 1.5),
    ]


@pytest.mark.parametrize(
    ("matmul", "said"),
    [
        (dataclasses.replace(PLAIN, bias=True, align=(16, 16, 16, 16, 2)), "set 7 = 4\nset 8 = 2\nset 26 = 14\n"),
        (dataclasses.replace(PLAIN, epilogue="relu"), "set 7 = 2\n"),
        (dataclasses.replace(PLAIN, epilogue="relu", bias=True), "set 7 = 6\nset 8 = 16\nset 26 = 14\n"),
        (dataclasses.replace(PLAIN, epilogue="gelu_tanh"), "set 7 = 32\n"),
        (dataclasses.replace(PLAIN, epilogue="gelu_tanh", bias=True), "set 7 = 36\nset 8 = 16\nset 26 = 14\n"),
        (dataclasses.replace(PLAIN, epilogue="add"), "set 7 = 1\n"),
    ],
)
def test_epilogues(lt: Library, fake: Fake, matmul: Matmul, said: str) -> None:
    lt.search(matmul, 1)
    assert fake.log().startswith(f"heuristic 0x1234 most 1\ncompute 68 scale 0\nset 3 = 1\n{said}{PLAIN_LAYOUTS}")


def test_rows_lie_as_far_apart_as_said(lt: Library, fake: Fake) -> None:
    lt.search(
        dataclasses.replace(PLAIN, epilogue="add", ldx=520, ldw=528, ldr=1040, ldy=1032, align=(16, 8, 4, 2, 2))
    )
    log = fake.log()
    assert "A: type 14, 512 x 1024, leading 528\nB: type 14, 512 x 24, leading 520\n" in log
    assert "C: type 14, 1024 x 24, leading 1040\nD: type 14, 1024 x 24, leading 1032\n" in log
    assert "alignments A 8 B 16 C 4 D 2" in log


def test_fp8_has_scales_and_a_wider_output(lt: Library, fake: Fake) -> None:
    lt.search(Matmul(24, 1024, 512, "float8_e4m3fn", bias=True, scales=True, fast=True), 1)
    log = fake.log()
    assert (
        "compute 68 scale 0\nset 3 = 1\nset 7 = 4\nset 8 = 16\nset 17 = 16\nset 18 = 16\nset 25 = 1\nset 26 = 14\n"
        in log
    )
    assert [line[:10] for line in log.splitlines() if line[1:2] == ":"] == [
        *("A: type 28", "B: type 28", "C: type 14", "D: type 14")
    ]


def test_int8_is_summed_in_int32(lt: Library, fake: Fake) -> None:
    matmul = Matmul(24, 1024, 512, "int8")
    algorithm = lt.search(matmul)[0]
    assert "compute 72 scale 10\n" in fake.log()
    lt.bind(matmul, algorithm)(CALL)
    assert "alpha 1 beta 0\n" in fake.log()


def test_a_run_passes_the_bytes_of_the_algorithm(lt: Library, fake: Fake) -> None:
    algorithm = Algorithm(bytes(range(1, 65)), lt.version)
    run = lt.bind(PLAIN, algorithm)
    first, last = (int.from_bytes(algorithm.data[at : at + 8], "little", signed=True) for at in (0, 56))
    assert fake.log() == (
        f"check 0x1234\ncompute 68 scale 0\nset 3 = 1\nset 7 = 1\n{PLAIN_LAYOUTS}algorithm {first} ... {last}\n"
    )
    run(CALL)
    assert fake.log() == (
        f"matmul 0x1234\ncompute 68 scale 0\nset 3 = 1\nset 7 = 1\n{PLAIN_LAYOUTS}"
        "alpha 1 beta 0\nA 0x2000 B 0x1000 C 0x3000 D 0x3000\n"
        f"algorithm {first} ... {last}\nworkspace 0x10000 4096 stream 0x77\n"
    )


def test_a_run_adds_its_residual_and_reads_its_own_bias(lt: Library, fake: Fake) -> None:
    matmul = dataclasses.replace(PLAIN, epilogue="add", bias=True)
    run = lt.bind(matmul, lt.search(matmul)[0])
    fake.log()
    run(Call(x=0x1000, weight=0x2000, y=0x3000, residual=0x4000, bias=0x5000))
    log = fake.log()
    assert "set 7 = 4\nset 8 = 20480\n" in log
    assert "alpha 1 beta 1\nA 0x2000 B 0x1000 C 0x4000 D 0x3000\n" in log


def test_scales_come_with_a_call(lt: Library, fake: Fake) -> None:
    matmul = Matmul(24, 1024, 512, "float8_e4m3fn", scales=True)
    run = lt.bind(matmul, lt.search(matmul)[0])
    fake.log()
    run(Call(x=0x1000, weight=0x2000, y=0x3000, x_scale=0x100, weight_scale=0x200))
    assert "set 17 = 512\nset 18 = 256\n" in fake.log()


@pytest.mark.parametrize("name", ["x", "weight", "y", "bias", "residual"])
@pytest.mark.parametrize("address", [0, 0x1008])
def test_an_address_that_is_not_as_said_launches_nothing(lt: Library, fake: Fake, name: str, address: int) -> None:
    matmul = dataclasses.replace(PLAIN, epilogue="add", bias=True)
    run = lt.bind(matmul, lt.search(matmul)[0])
    call = Call(x=0x1000, weight=0x2000, y=0x3000, residual=0x4000, bias=0x5000)
    run(call)
    fake.log()
    setattr(call, name, address)
    with pytest.raises(Refused, match=f"^{name}: null, or not as aligned"):
        run(call)
    assert fake.log() == ""


def test_an_algorithm_is_checked_before_it_runs(lt: Library, fake: Fake) -> None:
    with pytest.raises(Refused, match=r"cublasLtMatmulAlgoCheck: CUBLAS_STATUS_NOT_SUPPORTED \(15\)"):
        lt.bind(PLAIN, Algorithm((666).to_bytes(64, "little"), lt.version))
    with pytest.raises(Refused, match="needs 4096 bytes, the problem gives 64"):
        lt.bind(dataclasses.replace(PLAIN, workspace=64), Algorithm(bytes(64), lt.version))
    fake.log()
    with pytest.raises(Refused, match="algorithm of cuBLASLt 120400: found version 130100"):
        lt.bind(PLAIN, Algorithm(bytes(64), 120400))
    assert fake.log() == ""


@pytest.mark.parametrize(
    "function",
    ["cublasLtMatmulDescInit", "cublasLtMatmulDescSetAttribute", "cublasLtMatrixLayoutInit", "cublasLtMatmul"],
)
def test_what_cublaslt_refuses_is_said(lt: Library, fake: Fake, function: str) -> None:
    run = lt.bind(PLAIN, Algorithm(bytes(64), lt.version))
    fake.fail(function, 15)
    with pytest.raises(Refused, match=rf"^{function}: CUBLAS_STATUS_NOT_SUPPORTED \(15\)$"):
        run(CALL)


def test_a_search_without_a_result_is_said(lt: Library, fake: Fake) -> None:
    fake.fail("cublasLtMatmulAlgoGetHeuristic", 15)
    with pytest.raises(Refused, match="cublasLtMatmulAlgoGetHeuristic: CUBLAS_STATUS_NOT_SUPPORTED"):
        lt.search(PLAIN)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"epilogue": "silu"}, "fuses none, relu, gelu_tanh, add, not silu"),
        ({"epilogue": "gelu"}, "not gelu"),
        ({"dtype": "float64"}, "not float64"),
        ({"dtype": "float32"}, "type: expected bfloat16"),
        ({"dtype": "int8", "bias": True}, "int8: expected no bias"),
        ({"scales": True}, "expected fp8"),
        ({"m": 0}, "expected at least 1"),
        ({"ldx": 500}, "no less than a row"),
        ({"align": (16, 16, 16, 12, 16)}, "powers of two"),
        ({"align": (16, 0, 16, 16, 16)}, "powers of two"),
    ],
)
def test_what_cannot_be_asked(lt: Library, fake: Fake, change: dict[str, object], why: str) -> None:
    with pytest.raises(Refused, match=why):
        lt.search(dataclasses.replace(PLAIN, **change))  # type: ignore[arg-type]
    assert fake.log() == ""


def test_an_algorithm_is_named_by_its_bytes_and_version() -> None:
    one = Algorithm(bytes(64), 130100, workspace=1)
    assert one.id == dataclasses.replace(one, workspace=2).id == "e03d3c14ec2409ce"
    assert len({one.id, dataclasses.replace(one, version=130200).id, Algorithm(b"\1" * 64, 130100).id}) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("align", [16, 2])
def test_every_algorithm_computes_linear(binary: Path, dtype: str, epilogue: str, align: int) -> None:
    real = Library(binary)  # torch has loaded it
    for rows in ROWS:
        made = case(dtype, epilogue, rows, align, "cuda")
        (n, k), workspace = made.weight.shape, torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
        matmul = Matmul(rows, n, k, dtype, epilogue, bias=True, align=(align,) * 5)
        found = real.search(matmul)
        assert found and [each.id for each in found] == [each.id for each in real.search(matmul)]
        for algorithm in found:
            made.y.fill_(float("nan"))
            call = Call(
                *(None if t is None else t.data_ptr() for t in (made.x, made.weight, made.bias, made.residual))
            )
            call.y, call.workspace, call.workspace_bytes = made.y.data_ptr(), workspace.data_ptr(), 32 << 20
            call.stream = torch.cuda.current_stream().cuda_stream
            real.bind(matmul, algorithm)(call)
            torch.cuda.synchronize()
            assert relative_error(made.y, made.expected) < 1e-2, algorithm.id


def test_most_is_bounded(lt: Library) -> None:
    with pytest.raises(Refused, match="most: expected 1 to 256, found 257"):
        lt.search(PLAIN, 257)
