"""``make bench-gpu-launch``: everybody launches the same kernel with the same 19 arguments; on the fake driver."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import gpu_launch
from bench.gpu_launch import NUMBERS, SHAPE, TENSORS, bare, numbers_of, plan_call, program_of
from dks.dispatch.gpu.launch import Library
from tests.gpu.conftest import Fake, Open, compile_with
from tests.gpu.cubins import elf

HOST = SimpleNamespace(stream=lambda: 0x5EED0)
FUNCTION = f"nineteen__{'p' * 5}{'i' * 14}pp"


def compiled() -> Any:
    """As Triton hands a compiled kernel out."""
    said = SimpleNamespace(name=FUNCTION, num_warps=4, shared=0, target=SimpleNamespace(arch=90))
    code = elf(FUNCTION, [8] * 5 + [4] * 14 + [8, 8])
    return SimpleNamespace(metadata=said, asm={"cubin": code}, function=0xF00)


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    return [torch.ones(SHAPE) for _ in TENSORS]


def test_the_kernel_has_19_arguments_and_so_many_are_told(tensors: list[torch.Tensor]) -> None:
    source = Path(gpu_launch.__file__).with_name("gpu_nineteen.py").read_text()
    names = source.partition("def nineteen(")[2].partition(", BLOCK")[0].replace("\n", " ")
    assert tuple(name.strip() for name in names.split(",")) == (*TENSORS, *NUMBERS)
    assert len(TENSORS) + len(NUMBERS) == 19 and len(numbers_of(tensors)) == 14
    cubin, program = program_of(compiled())
    assert cubin.inputs() == (*TENSORS, *NUMBERS) and cubin.program == program.digest()
    assert 1 not in numbers_of(tensors), "Triton makes a constant of a 1, and the argument vanishes"


def test_ours_launches_it(
    opened: Open, fake: Fake, tensors: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    library: Library = opened()
    monkeypatch.setattr(gpu_launch, "Library", lambda _: library)
    plan_call(program_of(compiled())[0], tensors, HOST)()  # type: ignore[arg-type]
    ((name, numbers),) = fake.calls("launch")
    assert name == FUNCTION and numbers[:3] == [1, 1, 1] and numbers[3] == 128 and numbers[7] == 0x5EED0
    assert numbers[9:] == [*(t.data_ptr() for t in tensors), *numbers_of(tensors), 0, 0]


def test_ours_launches_it_from_tensors_alone(
    opened: Open, fake: Fake, tensors: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    library: Library = opened()
    monkeypatch.setattr(gpu_launch, "Library", lambda _: library)
    monkeypatch.setattr(
        gpu_launch.loaded, "_locate", gpu_launch.loaded._locate
    )  # which a benchmark's process keeps
    gpu_launch.ours(program_of(compiled()), tensors)()
    ((_, numbers),) = fake.calls("launch")
    assert numbers[9:] == [*(t.data_ptr() for t in tensors), *numbers_of(tensors), 0, 0]


DRIVER = """
static long long seen[64];
static int launches;
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
  seen[0] = (long long)f, seen[1] = gx * gy * gz, seen[2] = bx * by * bz, seen[3] = (long long)stream;
  for (int i = 0; i < 5; ++i) seen[4 + i] = *(long long*)arguments[i];
  for (int i = 5; i < 19; ++i) seen[4 + i] = *(int*)arguments[i];
  return ++launches == 5 ? 719 : 0;
}
long long seen_at(int i) { return i < 0 ? launches : seen[i]; }
"""


def test_the_least_that_a_launch_can_cost(tmp_path: Path, tensors: list[torch.Tensor]) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    compile_with(tmp_path, "-x", "c", "-O1", "-fPIC", "-shared", tmp_path / "driver.c", "-o", "libdriver.so")
    path = str(tmp_path / "libdriver.so")
    seen = gpu_launch.ctypes.CDLL(path).seen_at
    seen.restype = gpu_launch.ctypes.c_longlong
    launch = bare(compiled(), tensors, HOST, path)  # type: ignore[arg-type]
    assert launch(4) >= 0 and seen(-1) == 4
    assert [seen(i) for i in range(4)] == [0xF00, 1, 128, 0x5EED0]
    assert [seen(4 + i) for i in range(19)] == [*(t.data_ptr() for t in tensors), *numbers_of(tensors)]
    with pytest.raises(RuntimeError, match="cuLaunchKernel refused with 719"):
        launch(1)
