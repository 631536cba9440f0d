"""A driver library that launches nothing, compiled once; and what a test does with a copy of it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from dks.dispatch.compiler import find_compiler
from dks.dispatch.gpu import embed
from dks.dispatch.gpu.cubin import Cubin
from dks.dispatch.gpu.launch import Library
from tests.gpu.cubins import LETTERS

FAKE = Path(__file__).parent / "fake_cuda.c"


class _Call(ctypes.Structure):
    _fields_ = (
        ("what", ctypes.c_char * 12),
        ("name", ctypes.c_char * 100),
        ("count", ctypes.c_int32),
        ("numbers", ctypes.c_int64 * 64),
    )


class Fake:
    """The fake driver of one test: settings by name, and what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)
        self.library.fake_call.restype = ctypes.POINTER(_Call)
        self.library.fake_primary.restype = ctypes.c_void_p

    def set(self, **settings: int) -> None:
        for name, value in settings.items():
            ctypes.c_int.in_dll(self.library, f"fake_{name}").value = value

    def knows(self, cubins: Iterable[Cubin]) -> None:
        """Record the parameters of these programs too, whose functions' names don't say what they are."""
        for each in cubins:
            letters = "".join("p" if a.type.startswith("*") else LETTERS[a.type] for a in each.arguments)
            self.library.fake_signature(each.function.encode(), letters.encode() + b"pp")

    def calls(self, what: str) -> list[tuple[str, list[int]]]:
        """Name and numbers of each call of a kind, in order."""
        found = (self.library.fake_call(i).contents for i in range(self.library.fake_calls()))
        return [
            (each.name.decode(), list(each.numbers[: each.count])) for each in found if each.what.decode() == what
        ]

    def primary(self, device: int) -> int:
        """The address of a device's primary context."""
        return int(self.library.fake_primary(device))

    def push(self, context: int) -> None:
        assert self.library.cuCtxPushCurrent_v2(ctypes.c_void_p(context)) == 0

    def pop(self) -> int | None:
        found = ctypes.c_void_p()
        assert self.library.cuCtxPopCurrent_v2(ctypes.byref(found)) == 0
        return found.value


def compile_with(folder: Path, *arguments: str | Path) -> None:
    """Run the machine's compiler; skips where there is none."""
    compiler, lack = find_compiler()
    if lack:
        pytest.skip(lack)
    done = subprocess.run([*compiler, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    compile_with(
        folder, "-x", "c", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", FAKE, "-o", "libcuda.so.1"
    )
    return folder / "libcuda.so.1"


@pytest.fixture
def fake(fake_library: Path, tmp_path: Path) -> Fake:
    """A copy, since the system loads a path once."""
    return Fake(Path(shutil.copy(fake_library, tmp_path / "libcuda.so.1")))


@pytest.fixture(scope="session")
def launcher_bytes() -> bytes:
    _, lack = find_compiler()
    if lack:
        pytest.skip(lack)
    return embed.launcher().read_bytes()


Open = Callable[..., Library]


@pytest.fixture
def opened(launcher_bytes: bytes, fake: Fake) -> Open:
    """opened(driver=path of another one) -> a launcher of its own, that has opened the fake driver."""

    def make(driver: str | None = None, **settings: int) -> Library:
        fake.set(**settings)
        return Library.from_bytes(launcher_bytes, driver or fake.path)

    return make


def embedded(cubins: list[Cubin], folder: Path, driver: str) -> tuple[Library, bytes]:
    """A library of these programs, and its bytes."""
    embed.build(cubins, folder / "_gpu.so")
    data = (folder / "_gpu.so").read_bytes()
    return Library.from_bytes(data, driver), data
