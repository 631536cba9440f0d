"""Compiling ahead of time, on a machine without a GPU: what the code is, what is kept of it, and what fails."""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import hashlib
import json
import os
import random
import re
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dks.dispatch.errors import BadInput
from dks.dispatch.gpu import compile as compiling
from dks.dispatch.gpu import cubin as cubins
from dks.dispatch.gpu import measuring
from dks.dispatch.gpu import program as programs
from dks.dispatch.gpu.cubin import Cubin
from dks.dispatch.gpu.launch import Plan, Step
from dks.dispatch.gpu.library import Unsuited
from dks.dispatch.gpu.limits import ARCHS, fits, lacks, runs_on, spilled
from dks.dispatch.gpu.program import Argument, Program
from dks.dispatch.gpu.workplace import clear, work_folder
from dks.dispatch.kernel import Declined
from dks.dispatch.tiles import build as tiles
from dks.dispatch.tiles.library import Missing
from tests.gpu.conftest import Fake, Open
from tests.gpu.cubins import elf, made
from tests.gpu.ptx import moves_16_bytes, moves_elements
from tests.mutations import nothing_runs

pytest.importorskip("triton")
SOURCES = Path(__file__).parent / "sources"


def multiply(align: int, **changes: Any) -> Program:
    fields: dict[str, Any] = {
        "symbol": f"small_multiply_a{align}",
        "source": "small.py",
        "function": "multiply",
        "arguments": (
            *(Argument(name, "*bf16", 1) for name in "abc"),
            Argument("m", "i32"),
            *(Argument(name, "i32", 2) for name in ("n", "k", "lda", "ldb", "ldc")),
            Argument("scale", "fp32"),
        ),
        "constants": (("BM", 64), ("BN", 64), ("BK", 32), ("ACC", "fp32")),
        "align": align,
        "warps": 4,
        "stages": 3,
        "grid": ((("m", 64),), (("n", 64),), ()),
    }
    return Program(**(fields | changes))


def copy(align: int) -> Program:
    arguments = (Argument("x", "*bf16", 1), Argument("y", "*bf16", 1), Argument("n", "i32", 2))
    grid: Any = ((("rows", 1),), (), ())
    return Program(f"small_copy_a{align}", "small.py", "copy", arguments, (("WIDTH", 1024),), align, 4, 1, grid)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this file's tests, and its kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "SOURCES", SOURCES)
        patch.setenv(tiles.CACHE, str(tmp_path_factory.mktemp("cache")))
        yield tiles.cache()


@pytest.fixture(scope="module")
def compiled(folder: Path) -> dict[tuple[str, int], str]:
    """Everything that these tests look at, compiled once."""
    wanted = [multiply(16), multiply(2), copy(16), copy(2)]
    failed = compiling.build(wanted, ARCHS, workers=2)
    assert failed == {}
    return {(each.symbol, arch): compiling.ptx(each, arch) for each in wanted for arch in ARCHS}


@pytest.mark.parametrize("arch", ARCHS)
def test_programs_compile_to_what_can_be_launched(compiled: dict[tuple[str, int], str], arch: int) -> None:
    found = compiling.load(multiply(16), arch)
    assert (found.function, found.arch, found.triton, found.warps) == ("multiply", arch, compiling.version(), 4)
    assert cubins.parameters(found.elf, "multiply") == [8] * 3 + [4] * 7 + [8, 8]
    assert cubins.arch_of(found.elf) == arch
    assert found.divisors() == [16, 16, 16, 1, 8, 8, 8, 8, 8, 1] and found.inputs()[-1] == "scale"
    assert found.shared > 0 and found.scratch == 0 and len(found.elf) < 64 * 1024
    assert fits(found, arch) is None
    tool = Path(str(find_spec("triton").origin)).parent / "backends/nvidia/bin/cuobjdump"  # type: ignore[union-attr]
    assert (found.registers is not None and found.registers >= 32) if tool.is_file() else found.registers is None
    assert compiling.load(copy(16), arch).inputs() == ("x", "y", "n", "rows")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", ["small_multiply", "small_copy"])
def test_only_the_aligned_form_moves_16_bytes_at_once(
    compiled: dict[tuple[str, int], str], arch: int, kernel: str
) -> None:
    aligned, loose = compiled[f"{kernel}_a16", arch], compiled[f"{kernel}_a2", arch]
    assert moves_16_bytes(aligned) and not moves_elements(aligned, 2)
    assert moves_elements(loose, 2) and not moves_16_bytes(loose)
    assert ("cp.async.cg.shared.global" in aligned) == (kernel == "small_multiply")


def test_what_was_compiled_is_what_is_launched(compiled: Any, opened: Open, fake: Fake) -> None:
    library = opened()
    program, found = multiply(16), compiling.load(multiply(16), 90)
    plan = Plan(library, [Step(library.add(found))])
    assert plan.names == tuple(each.name for each in program.arguments)
    plan(0x1000, 0x2000, 0x3000, 130, 200, 64, 64, 200, 200, 0.5, stream=9)
    ((_, (_, image, _)),) = fake.calls("load")
    assert ctypes.string_at(image, len(found.elf)) == found.elf
    ((name, numbers),) = fake.calls("launch")
    assert (name, numbers[:3]) == ("multiply", list(program.blocks({"m": 130, "n": 200}, 132)))
    assert numbers[3:8] == [128, 1, 1, found.shared, 9]
    with pytest.raises(Declined, match="not aligned"):
        plan(0x1000, 0x2000, 0x3000, 130, 200, 64, 64, 201, 200, 0.5)
    loose = Plan(library, [Step(library.add(compiling.load(multiply(2), 90)))])
    loose(0x1002, 0x2002, 0x3002, 130, 201, 63, 63, 201, 201, 0.5)
    assert len(fake.calls("launch")) == 2


def test_a_program_that_spills_is_compiled_and_not_worth_measuring(compiled: Any) -> None:
    spills = dataclasses.replace(copy(16), symbol="small_spills", constants=(("WIDTH", 32768),), warps=1)
    assert compiling.build([spills], [80]) == {}
    stack = compiling.load(spills, 80).stack
    if stack is None:
        pytest.skip("this Triton brings no cuobjdump")
    assert stack > 1020
    locate = measuring.locate(86)
    locate([(copy(16), {})])
    with pytest.raises(Unsuited, match=f"small_spills: spills {stack} bytes a thread, more than its 1020 bytes"):
        locate([(spills, {})])
    with pytest.raises(Missing, match=r"found sm_75, expected one that runs code for sm_80, sm_90, sm_100"):
        measuring.locate(75)([(copy(16), {})])


def test_the_same_bytes_anywhere(
    compiled: dict[tuple[str, int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiling.load(multiply(16), 90)
    before = next(tiles.cache().glob("small_multiply_a16-sm90-*.json")).read_bytes()
    monkeypatch.setenv(tiles.CACHE, str(tmp_path))
    assert compiling.build([multiply(16)], [90]) == {}
    assert compiling.load(multiply(16), 90) == first
    assert next(tmp_path.glob("*.json")).read_bytes() == before
    kinds = sorted(path.suffix for path in tmp_path.iterdir())
    assert kinds == [".cubin", ".json", ".ptx"], "nothing else is left"
    assert os.fsencode(tmp_path) not in first.elf and os.fsencode(SOURCES) not in first.elf


def test_what_is_in_the_cache_is_not_compiled_again(
    compiled: dict[tuple[str, int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "WORKER", Path("/nowhere"))
    assert compiling.build([multiply(16), copy(2)], ARCHS) == {}
    assert compiling.is_built(multiply(16), 90) and not compiling.is_built(multiply(16, stages=4), 90)
    with pytest.raises(Missing, match="is not compiled for sm_90 in"):
        compiling.load(multiply(16, stages=4), 90)
    monkeypatch.setattr(compiling, "version", lambda: "0.0")
    assert not compiling.is_built(multiply(16), 90)
    monkeypatch.setattr(compiling, "version", lambda: "")
    why = "no Triton here: install dks[gpu], or triton>=3.6"
    assert compiling.build([multiply(16)], [90]) == {("small_multiply_a16", 90): why}


def test_what_is_damaged_is_compiled_again(folder: Path) -> None:
    program = dataclasses.replace(copy(2), symbol="small_damaged")
    assert compiling.build([program], [90]) == {}
    whole = compiling.load(program, 90)
    (code,) = tiles.cache().glob("small_damaged-*.cubin")
    code.write_bytes(whole.elf[:-1])
    assert not compiling.is_built(program, 90)
    with pytest.raises(Missing, match="the code differs from its digest"):
        compiling.load(program, 90)
    assert compiling.build([program], [90]) == {} and compiling.load(program, 90) == whole
    code.unlink()
    assert not compiling.is_built(program, 90)


def test_what_a_killed_build_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    left, file = tmp_path / ".triton-left", tmp_path / ".triton-file"
    (left / "triton-0").mkdir(parents=True)
    file.write_text("")
    (tmp_path / ".triton-link").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    with work_folder(tmp_path) as (first, _):
        assert not left.exists() and file.is_file() and (tmp_path / "kept").is_dir()
        with work_folder(tmp_path) as (second, _):
            assert first.is_dir() and second.is_dir() and first != second
        assert not second.exists()
    assert not first.exists()


def test_a_compiler_that_outlives_its_build_keeps_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / ".triton-orphan"
    folder.mkdir()
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    with subprocess.Popen(["sleep", "60"], pass_fds=(held,)) as compiler:
        os.close(held)  # as the death of the build does
        clear(tmp_path)
        assert folder.is_dir()
        compiler.kill()
    clear(tmp_path)
    assert not folder.exists()


def test_failures_are_reasons(folder: Path) -> None:
    """Each of its own program; the others compile, and so does one in the place of a compiler that died."""
    x, n = Argument("x", "*i32", 1), Argument("n", "i32")
    grid: Any = ((), (), ())
    broken = Program("small_broken", "small.py", "broken", (x, n), (("WIDTH", 16),), 4, 4, 1, grid)
    other = Program("small_other", "small.py", "copy", (n, x), (("WIDTH", 16),), 4, 4, 1, grid)
    turned = Program(
        "small_turned", "small.py", "copy", (x, n, Argument("y", "*i32", 1)), (("WIDTH", 16),), 4, 4, 1, grid
    )
    absent = Program("small_absent", "small.py", "nothing", (x,), (), 4, 4, 1, grid)
    deadly = Program("small_deadly", "deadly.py", "never", (x,), (), 4, 4, 1, grid)
    good = dataclasses.replace(copy(4), symbol="small_good")
    seen = []
    failed = compiling.build(
        [deadly, broken, other, turned, absent, good],
        [90],
        workers=1,
        progress=lambda done, total, program, arch, why: seen.append(
            (done, total, program.symbol, arch, bool(why))
        ),
    )
    assert set(failed) == {(each.symbol, 90) for each in (broken, other, turned, absent, deadly)}
    for program, said in (
        (broken, "must be|incompatible|Cannot make_shape_compatible|shape"),
        (other, "takes x, y, n, WIDTH; the program has arguments n, x and constants WIDTH"),
        (turned, "takes x, y, n in this order, found x, n, y"),
        (absent, "has no attribute 'nothing'"),
        (deadly, "the compiler's process ended with -9"),
    ):
        why = failed[program.symbol, 90]
        assert why.startswith(f"{program.symbol} does not compile for sm_90: ") and re.search(said, why), why
        assert str(folder) not in why and len(why) < 4000
        with pytest.raises(Missing, match=re.escape(why)):
            compiling.load(program, 90)
    assert [done for done, *_ in seen] == [1, 2, 3, 4, 5, 6] and all(total == 6 for _, total, *_ in seen)
    assert compiling.load(good, 90).symbol == "small_good"


def test_what_an_architecture_has_not_is_not_compiled_for_it(folder: Path) -> None:
    of_bytes = multiply(16, symbol="small_fp8", arguments=(Argument("x", "*fp8e4nv", 1),))
    assert compiling.build([of_bytes], [80]) == {("small_fp8", 80): "sm_80 has no float8_e4m3"}
    assert lacks(of_bytes, 89) is None and lacks(multiply(16), 80) is None


def test_a_compiler_that_takes_too_long_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "TIMEOUT", 0.05)
    slow = dataclasses.replace(copy(8), symbol="small_slow")
    ((_, why),) = compiling.build([slow], [80]).items()
    assert "took more than 0 s" in why


def test_nothing_is_taken_from_a_folder_of_others(
    folder: Path, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.chmod(0o777)
    try:
        with pytest.raises(Missing, match="others may write there"):
            compiling.load(multiply(16), 90)
        assert "others may write there" in compiling.build([multiply(16)], [90])["small_multiply_a16", 90]
    finally:
        folder.chmod(0o700)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    given = made(grid=((("m", 64), ("batch", 1)), (), (("", 3),)), registers=None, scratch=128, scratch_align=64)
    cubins.write(given, tmp_path / "a.json")
    assert cubins.read(tmp_path / "a.json") == given
    assert given.inputs() == ("x", "y", "m", "n", "stride", "scale", "batch")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"symbol": "a b"}, "symbol is 'a b'"),
        ({"function": "f\n"}, "function is"),
        ({"program": "0"}, "program is"),
        ({"arch": 70}, "arch is 70"),
        ({"arch": 90.0}, "arch is 90.0"),
        ({"warps": 0}, "warps is 0"),
        ({"warps": True}, "warps is True"),
        ({"shared": -1}, "shared is -1"),
        ({"align": 12}, "align is 12, expected a power of two"),
        ({"scratch_align": 3}, "scratch_align is 3"),
        ({"registers": "64"}, "registers is '64'"),
        ({"grid": ((("m", 0),), (), ())}, "divides by 0"),
        ({"grid": ((("m;", 1),), (), ())}, "the grid names"),
        ({"grid": ((), ())}, "three axes"),
        ({"grid": ((("m", 1),) * 9, (), ())}, "more than 8 factors"),
        ({"arguments": (Argument("x", "*bf16", 3),)}, "unit 3"),
        ({"arguments": (Argument("x", "*bf16", 1),) * 2}, "two arguments of one name"),
        ({"arguments": (Argument("s", "fp32", 4),)}, "fp32 and has unit"),
        ({"arguments": tuple(Argument(f"a{i}", "i32") for i in range(49))}, "expected at most 48"),
        ({"elf": b""}, "no ELF file"),
        ({"elf": elf("f__ppiilfpp", [8, 8, 4, 4, 8, 4, 8])}, r"has parameters of \[8, 8, 4, 4, 8, 4, 8\] bytes"),
        ({"elf": elf("g", [8])}, "no code of f__ppiilfpp"),
        ({"elf": elf("f__ppiilfpp", [8, 8, 4, 4, 8, 4, 8, 8], 80)}, "the code is for sm_80, expected sm_90"),
        ({"elf": elf("f__ppiilfpp", [8])[:-1]}, "no table of sections"),
        ({"elf": elf("f__ppiilfpp", [8]).replace(b"\xbe\0", b"\x3e\0", 1)}, "machine 62"),
    ],
)
def test_what_can_not_be_launched_is_not_read(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    bad = dataclasses.replace(made(), **changes) if "arguments" not in changes else made(**changes)
    with pytest.raises(ValueError, match=said):
        cubins.check(bad)
    cubins.write(bad, tmp_path / "a.json")
    with pytest.raises(BadInput, match="found no compiled program"):
        cubins.read(tmp_path / "a.json")


def test_arguments_of_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="argument x is 'fp16', expected an address, i32, i64, fp32"):
        cubins.check(dataclasses.replace(made(), arguments=(Argument("x", "fp16"),)))


def test_files_that_were_changed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"

    def refused(said: str) -> None:
        with pytest.raises(BadInput, match=said):
            cubins.read(path)
        cubins.write(made(), path)

    refused("no readable compiled program")
    path.with_suffix(".cubin").unlink()
    refused("no readable compiled program")
    path.with_suffix(".cubin").write_bytes(made().elf + b"\0")
    refused("the code differs from its digest")
    path.write_bytes(path.read_bytes().replace(b'"warps": 4', b'"warps": 8'))
    refused("the text differs from its digest")
    path.write_bytes(b" " * (cubins.MAX_SIDE + 1))
    refused("expected less")
    path.with_suffix(".cubin").write_bytes(bytes(cubins.MAX_ELF + 1))
    refused("expected less")
    data = json.loads(path.read_text())
    path.write_text(cubins.seal(data | {"more": 1}))
    refused("other fields")
    path.write_text(cubins.seal(data | {"version": 2}))
    refused("version 2, expected 1")
    assert cubins.read(path) == made()


def test_mutated_files_are_refused_or_what_they_were(tmp_path: Path) -> None:
    """Resealed, so that the digests hold and every other check must."""
    generator = random.Random(6)
    given = made()
    text = cubins.describe(given).encode()
    for _ in range(300):
        data = bytearray(given.elf)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        side = json.loads(text) | {"elf": hashlib.sha256(data).hexdigest()}
        if generator.random() < 0.5:
            name = generator.choice(sorted(side))
            side[name] = generator.choice(
                [None, -1, [], [[]], {}, "x", 2**40, 1.5, True, [["x", "*bf16", 1]], "\u00e9"]
            )
        with nothing_runs():
            try:
                found = cubins.parse(cubins.seal(side).encode(), bytes(data), "mutated")
            except BadInput as error:
                assert str(error).isprintable()
            else:
                cubins.check(found)


def at(**changes: Any) -> Cubin:
    return made(shared=0, registers=32, **changes) if "registers" not in changes else made(shared=0, **changes)


def test_limits() -> None:
    assert fits(made(arch=80, shared=163 * 1024), 80) is None
    assert fits(made(arch=80, shared=163 * 1024 + 1), 80) == "needs 166913 bytes of shared memory, sm_80 has 166912"
    assert fits(made(arch=80, shared=163 * 1024), 89) == "needs 166912 bytes of shared memory, sm_89 has 101376"
    assert fits(made(shared=232448), 90) is None and fits(made(shared=232449), 90) is not None
    assert fits(at(warps=32, registers=64), 90) is None
    assert fits(at(warps=32, registers=65), 90) == "needs 73728 registers a block, sm_90 has 65536"
    assert fits(at(registers=256), 90) == "needs 256 registers a thread, sm_90 has 255"
    assert fits(at(registers=None, warps=32), 90) is None
    assert fits(at(arch=100, tensor_memory=512), 100) is None
    assert fits(at(arch=100, tensor_memory=1024), 100) == "needs 1024 columns of tensor memory, sm_100 has 512"
    assert fits(at(), 100) == "compiled for sm_90, which sm_100 doesn't run"
    assert fits(at(arch=80), 90) is not None and fits(at(), 75) is not None
    assert spilled(at(stack=1020)) is None and spilled(at(stack=None)) is None
    assert spilled(at(stack=1024)) == "spills 1024 bytes a thread, more than its 1020 bytes of registers"
    assert runs_on(80, 89) and not runs_on(80, 75) and not runs_on(90, 100)
