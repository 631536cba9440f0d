"""The launcher against a driver that launches nothing: what would reach a GPU, and what never does."""

from __future__ import annotations

import ctypes
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dks.dispatch.compiler import find_compiler
from dks.dispatch.gpu import embed, launch
from dks.dispatch.gpu.launch import ContextLost, LaunchFailed, Library, Plan, Step
from dks.dispatch.gpu.program import Argument, Program
from dks.dispatch.kernel import Declined
from tests.gpu.conftest import FAKE, Fake, Open, compile_with, embedded
from tests.gpu.cubins import made

HERE = Path(__file__).parent
STRICT = ("-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror", "-pthread")
SANITIZERS = {
    "none": ("-O2", "-DDKS_COUNT_ALLOCATIONS"),
    "address": ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g1", "-fsanitize=thread"),
}
X, Y, M, N, STRIDE, SCALE = 0x7F0000001000, 0x7F0000002010, 130, 96, 64, 0.5
GOOD = {"x": X, "y": Y, "m": M, "n": N, "stride": STRIDE, "scale": SCALE}


def bits(value: float) -> int:
    found: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return found


def run(plan: Plan, device: int = 0, stream: int = 0, **changes: float) -> None:
    values = GOOD | changes
    plan(*(values[name] for name in plan.names), device=device, stream=stream)


def test_a_launch_has_its_grid_its_arguments_and_its_stream(opened: Open, fake: Fake) -> None:
    library = opened()
    assert not library.lack
    plan = Plan(library, [Step(library.add(made()))])
    assert plan.names == ("x", "y", "m", "n", "stride", "scale")
    run(plan, stream=0x5EED0)
    ((name, numbers),) = fake.calls("launch")
    assert name == "f__ppiilfpp"
    assert numbers[:9] == [3 * 3, 3, 1, 128, 1, 1, 1024, 0x5EED0, fake.primary(0)]
    assert numbers[9:] == [X, Y, M, N, STRIDE, bits(SCALE), 0, 0]
    assert not fake.calls("attribute"), "48 KiB and less need no asking"
    run(plan, m=0)  # no rows: nothing to do, and no grid of that size
    assert len(fake.calls("launch")) == 1 and len(fake.calls("load")) == 1


def test_modules_load_once_with_capture_relaxed(opened: Open, fake: Fake) -> None:
    library = opened()
    cubin = made(shared=100_000)
    plan = Plan(library, [Step(library.add(cubin))])
    plan.load()
    assert not fake.calls("launch")
    for _ in range(3):
        run(plan)
    ((_, (context, image, mode)),) = fake.calls("load")
    assert context == fake.primary(0) and mode == 2
    assert ctypes.string_at(image, len(cubin.elf)) == cubin.elf
    assert fake.calls("attribute") == [("f__ppiilfpp", [8, 100_000])] and len(fake.calls("funcload")) == 1
    assert [numbers[6] for _, numbers in fake.calls("launch")] == [100_000] * 3


def test_resident_grids_are_cut_to_the_multiprocessors(opened: Open, fake: Fake) -> None:
    library = opened(multiprocessors=78)
    kernel = library.add(made(resident=2, grid=((("m", 16), ("n", 16)), (), (("", 5),))))
    plan = Plan(library, [Step(kernel)])
    run(plan, m=16 * 100, n=16 * 100)
    run(plan, m=16 * 10, n=16 * 10)
    run(plan, m=2**31 - 1, n=2**31 - 16)  # more blocks than a grid has, but never launched as so many
    assert [numbers[:3] for _, numbers in fake.calls("launch")] == [[156, 1, 5], [100, 1, 5], [156, 1, 5]]


def test_the_grid_may_name_what_is_no_argument(opened: Open, fake: Fake) -> None:
    library = opened()
    plan = Plan(library, [Step(library.add(made(grid=((("m", 64),), (("batch", 1),), ()))), {"batch": "b"})])
    assert plan.names == (*GOOD, "b")
    run(plan, b=7)
    ((_, numbers),) = fake.calls("launch")
    assert numbers[:3] == [3, 7, 1] and len(numbers) == 9 + 8


def test_the_grid_is_the_programs(opened: Open, fake: Fake) -> None:
    """Computed twice, in Python and C++: held equal on random grids."""
    library, rng = opened(multiprocessors=60), random.Random(4)
    numbers = (Argument("a", "i32"), Argument("b", "i64"), Argument("c", "i32"))
    for i in range(60):
        names = ("a", "b", "c", "d", "")
        axes = [
            tuple((rng.choice(names), rng.choice((1, 3, 16, 100))) for _ in range(rng.randint(0, 3))) for _ in "xyz"
        ]
        grid: Any = tuple(axes)
        resident = rng.choice((0, 0, 1, 4))
        program = Program(f"p{i}", "", "", numbers, (), 1, 4, 1, grid, resident)
        plan = Plan(
            library, [Step(library.add(made(f"p{i}", arguments=numbers, grid=grid, resident=resident, align=1)))]
        )
        values = {name: rng.choice((1, 2, 15, 16, 17, 33)) for name in "abcd"}
        x, y, z = program.blocks(values, 60)
        before = len(fake.calls("launch"))
        if max(y, z) > 65535:
            with pytest.raises(Declined, match="grid"):
                plan(*(values[name] for name in plan.names))
            continue
        plan(*(values[name] for name in plan.names))
        (_, found), *_ = fake.calls("launch")[before:]
        assert tuple(found[:3]) == (x, y, z), (grid, resident, values)


@pytest.mark.parametrize(
    "changes",
    [{"x": X + 8}, {"x": X + 2}, {"y": Y + 1}, {"n": 100}, {"n": 97}, {"stride": 60}, {"stride": -4}],
)
def test_what_is_less_aligned_is_never_launched(opened: Open, fake: Fake, changes: dict[str, int]) -> None:
    library = opened()
    plan = Plan(library, [Step(library.add(made()))])
    with pytest.raises(Declined, match="not aligned as the program needs"):
        run(plan, **changes)
    assert not fake.calls("launch") and not fake.calls("load")


@pytest.mark.parametrize(
    "changes", [{"m": 2**31}, {"m": -1}, {"n": -(2**31) - 8}, {"m": 2**31 - 1, "n": 2**31 - 8}]
)
def test_values_outside_their_range_are_refused(opened: Open, fake: Fake, changes: dict[str, int]) -> None:
    library = opened()
    plan = Plan(library, [Step(library.add(made()))])
    with pytest.raises(Declined, match="outside the range"):
        run(plan, **changes)
    tall = Plan(library, [Step(library.add(made("tall", grid=((), (("m", 1),), ()))))])
    run(tall, m=65535)
    with pytest.raises(Declined, match="makes a grid that no device has"):
        run(tall, m=65536)
    assert len(fake.calls("launch")) == 1


PARTS = (Argument("x", "*bf16", 1), Argument("parts", "*fp32", 1), Argument("k", "i32"), Argument("splits", "i32"))
SUM = (Argument("parts", "*fp32", 1), Argument("out", "*bf16", 1), Argument("n", "i64"), Argument("splits", "i32"))


def test_kernels_of_one_call_share_a_workspace(opened: Open, fake: Fake) -> None:
    library = opened()
    one = library.add(made("part", arguments=PARTS, grid=((("k", 64),), (("splits", 1),), ())))
    two = library.add(made("sum", arguments=SUM, grid=((("n", 256),), (), ())))
    workspace, four = {"parts": "workspace"}, {"splits": 4}
    plan = Plan(library, [Step(one, workspace | four), Step(two, workspace | four)])
    assert plan.names == ("x", "workspace", "k", "out", "n")
    plan(X, 0x1000, 640, Y, 2**33, stream=3)
    assert [(name, numbers[:3], numbers[7], numbers[9:]) for name, numbers in fake.calls("launch")] == [
        ("part__ppiipp", [10, 4, 1], 3, [X, 0x1000, 640, 4, 0, 0]),
        ("sum__pplipp", [2**25, 1, 1], 3, [0x1000, Y, 2**33, 4, 0, 0]),
    ]
    with pytest.raises(Declined, match="not aligned"):  # of the second one, before the first
        plan(X, 0x1000, 640, Y + 2, 2**33)
    assert len(fake.calls("launch")) == 2
    with pytest.raises(ValueError, match="found 4 values, expected 5: x, workspace, k, out, n"):
        plan(X, 0x1000, 640, Y)
    with pytest.raises(ValueError, match="has no part"):
        Plan(library, [Step(one, {"part": 1})])
    with pytest.raises(ValueError, match="a float for one"):
        Plan(library, [Step(library.add(made())), Step(one, {"k": "scale"})])
    with pytest.raises(ValueError, match="expected a whole number"):
        plan(X, 0x1000, 640.0, Y, 2**33)


def test_scratch_memory_is_asked_for_and_checked(opened: Open, fake: Fake) -> None:
    library = opened()
    plan = Plan(library, [Step(library.add(made(scratch=384, scratch_align=128)))])
    values = tuple(GOOD.values())
    assert plan.scratch_bytes(*values) == 27 * 384
    plan(*values, scratch=(0x2000, 27 * 384))
    ((_, numbers),) = fake.calls("launch")
    assert numbers[-2:] == [0x2000, 0]
    for scratch in ((0, 0), (0x2000, 27 * 384 - 1), (0x2040, 27 * 384), (0, 27 * 384)):
        with pytest.raises(Declined, match="scratch"):
            plan(*values, scratch=scratch)
    assert len(fake.calls("launch")) == 1
    assert Plan(library, [Step(library.add(made()))]).scratch_bytes(*values) == 0


def test_a_missing_driver_is_said(launcher_bytes: bytes, tmp_path: Path) -> None:
    library = Library.from_bytes(launcher_bytes, str(tmp_path / "libcuda.so.1"))
    assert library.lack.startswith("no NVIDIA driver: ") and "libcuda.so.1" in library.lack
    plan = Plan(library, [Step(library.add(made()))])
    for call in (lambda: run(plan), library.device, plan.load):
        with pytest.raises(Declined, match="no NVIDIA driver"):
            call()
    with pytest.raises(Declined, match="no NVIDIA driver"):
        plan.scratch_bytes(*GOOD.values())


def test_an_old_driver_is_said(launcher_bytes: bytes, tmp_path: Path) -> None:
    (tmp_path / "old.c").write_text("int cuInit(unsigned flags) { return (int)flags; }\n")
    compile_with(tmp_path, "-x", "c", "-shared", "-fPIC", "old.c", "-o", "libcuda.so.1")
    lack = Library.from_bytes(launcher_bytes, str(tmp_path / "libcuda.so.1")).lack
    assert lack.startswith("the NVIDIA driver is too old: it has no cu")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"init": 100}, "no NVIDIA device: found 0"),
        ({"devices": 0}, "no NVIDIA device: found 0"),
        ({"init": 34}, "no NVIDIA device: the driver is a stub to link with"),
        ({"init": 803}, "the driver answered 803 CUDA_ERROR_OF_A_KIND: of a kind"),
    ],
)
def test_a_driver_without_a_device_is_said(opened: Open, settings: dict[str, int], said: str) -> None:
    library = opened(**settings)
    assert library.lack == said
    with pytest.raises(Declined):
        run(Plan(library, [Step(library.add(made()))]))


def test_the_first_driver_that_opens_stays(opened: Open, fake: Fake) -> None:
    library = opened(init=100)
    fake.set(init=0)
    why = ctypes.create_string_buffer(100)
    assert library.functions.dks_gpu_open(fake.path.encode(), why, len(why)) == 0 and why.value == b""
    assert library.functions.dks_gpu_open(b"/nowhere", None, 0) == 0
    assert library.device().multiprocessors == 132


def test_failing_launches_say_whether_the_process_can_go_on(opened: Open, fake: Fake) -> None:
    library = opened()
    plan = Plan(library, [Step(library.add(made()))])
    fake.set(launch=701)
    with pytest.raises(LaunchFailed, match=r"the driver answered 701 CUDA_ERROR_OF_A_KIND: of a kind$") as failed:
        run(plan)
    assert not isinstance(failed.value, ContextLost)
    fake.set(launch=700)
    with pytest.raises(
        ContextLost, match=r"an illegal memory access was encountered; every later CUDA call of this"
    ):
        run(plan)
    fake.set(launch=0)
    run(plan)


def test_loading_that_fails_is_tried_again_where_that_may_help(opened: Open, fake: Fake) -> None:
    library = opened(load=2)
    plan = Plan(library, [Step(library.add(made()))])
    for code, tries in ((2, 1), (2, 2), (200, 3), (200, 3)):
        fake.set(load=code)
        with pytest.raises(LaunchFailed, match=f"answered {code} "):
            run(plan)
        assert len(fake.calls("load")) == tries
    fake.set(load=0)
    with pytest.raises(LaunchFailed, match="answered 200 "):  # an image stays as it is
        run(plan)
    fake.set(function=500)
    other = Plan(library, [Step(library.add(made("other")))])
    with pytest.raises(LaunchFailed, match="answered 500 "):
        run(other)
    assert len(fake.calls("unload")) == 1 and not fake.calls("launch")


@pytest.mark.parametrize(
    ("arch", "major", "minor", "runs"),
    [
        (80, 8, 0, True),
        (80, 8, 9, True),
        (80, 9, 0, False),
        (90, 9, 0, True),
        (90, 10, 0, False),
        (100, 10, 3, False),
    ],
)
def test_code_runs_on_its_own_architecture(
    opened: Open, fake: Fake, arch: int, major: int, minor: int, runs: bool
) -> None:
    library = opened(major=major, minor=minor)
    assert library.device().capability == major * 10 + minor
    plan = Plan(library, [Step(library.add(made(arch=arch)))])
    if runs:
        run(plan)
    else:
        with pytest.raises(Declined, match="another architecture"):
            run(plan)
    assert len(fake.calls("load")) == runs


def test_shared_memory_is_the_devices_own(opened: Open, fake: Fake) -> None:
    library = opened(shared=101_376)
    with pytest.raises(Declined, match="more shared memory"):
        run(Plan(library, [Step(library.add(made(shared=101_377)))]))
    run(Plan(library, [Step(library.add(made(shared=101_376)))]))
    assert len(fake.calls("load")) == 1


def test_the_context_is_the_devices(opened: Open, fake: Fake) -> None:
    """The current one if it is of the device, else the primary one for as long as the call lasts."""
    library = opened()
    plan = Plan(library, [Step(library.add(made()))])
    own = 0x7700  # of device 0, and not its primary one
    run(plan)
    fake.push(own)
    run(plan)
    run(plan, device=1)
    assert fake.pop() == own
    fake.push(fake.primary(1))
    run(plan, device=1)
    run(plan)
    assert fake.pop() == fake.primary(1)
    run(plan, device=1)
    used = [numbers[8] for _, numbers in fake.calls("launch")]
    first, second = fake.primary(0), fake.primary(1)
    assert used == [first, own, second, second, first, second]
    assert [numbers for _, numbers in fake.calls("retain")] == [[0], [1]]
    assert [numbers[0] for _, numbers in fake.calls("load")] == [first, own, second]
    assert fake.library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())) == 201, "nothing is left current"
    with pytest.raises(Declined, match="no such NVIDIA device"):
        run(plan, device=2)


def test_a_primary_context_that_was_current_first_is_no_other(opened: Open, fake: Fake) -> None:
    library = opened()
    plan = Plan(library, [Step(library.add(made()))])
    fake.push(fake.primary(0))
    run(plan)
    fake.pop()
    run(plan)
    assert len(fake.calls("load")) == 1 and len(fake.calls("launch")) == 2


def test_more_contexts_than_there_is_room_for(opened: Open, fake: Fake) -> None:
    library = opened()
    plan = Plan(library, [Step(library.add(made()))])
    for i in range(33):
        fake.push(0x10000 * (i + 1))
        if i < 32:
            run(plan)
        else:
            with pytest.raises(Declined, match="too many CUDA contexts"):
                run(plan)
        fake.pop()


@pytest.mark.parametrize("change", ["slot_count", "slots", "steps", "kernel", "sources"])
def test_calls_that_contradict_themselves_are_refused(opened: Open, fake: Fake, change: str) -> None:
    library = opened()
    plan = Plan(library, [Step(library.add(made()))])
    call = plan._call(tuple(GOOD.values()), 0, 0, (0, 0))
    if change == "slot_count":
        call.slot_count = 3
    elif change == "slots":
        call.slots = None
    elif change == "sources":
        call.steps[0].sources = None
    elif change == "steps":
        call.step_count = 9
    else:
        call.steps[0].kernel = None
    assert library.functions.dks_gpu_launch(ctypes.byref(call)) == 10
    assert not fake.calls("launch")


def test_descriptions_that_contradict_themselves_are_refused(opened: Open) -> None:
    library = opened()
    for changes in ({"warps": 0}, {"elf": b"no code"}, {"scratch_align": 3}, {"grid": ((("x", 4),), (), ())}):
        with pytest.raises(ValueError, match="refuses its description"):
            library.add(made(**changes))


def test_embedded_programs_are_found_and_launched(fake: Fake, tmp_path: Path) -> None:
    cubins = [made("one"), made("two", shared=60_000, align=2, grid=((), (("m", 8),), (("", 2), ("n", 32))))]
    cubins.append(made("one", arch=80, arguments=(Argument("m", "i32"),), grid=((("m", 1),), (), ())))
    library, data = embedded(cubins, tmp_path, fake.path)
    (tmp_path / "again").mkdir()
    assert embedded(cubins[::-1], tmp_path / "again", fake.path)[1] == data
    found = library.embedded()
    assert set(found) == {("one", 80), ("one", 90), ("two", 90)}
    run(Plan(library, [Step(found["two", 90])]))
    run(Plan(library, [Step(found["one", 90])]))
    two, one = fake.calls("launch")
    assert two[1][:9] == [1, 17, 6, 128, 1, 1, 60_000, 0, fake.primary(0)]
    assert one[1][:3] == [9, 3, 1] and one[1][9:] == two[1][9:] == [X, Y, M, N, STRIDE, bits(SCALE), 0, 0]
    images = [numbers[1] for _, numbers in fake.calls("load")]
    assert all(image % 64 == 0 for image in images)
    assert [
        ctypes.string_at(image, len(each.elf)) for image, each in zip(images, (cubins[1], cubins[0]), strict=True)
    ] == [
        cubins[1].elf,
        cubins[0].elf,
    ]
    described = [launch.described(each) for each in cubins]
    assert described[0][3] == ("n", 1, 8) and described[1][3] == ("n", 1, 1)
    assert [each[2] for each in described[1]] == [2, 4, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="one symbol"):
        embed.build([cubins[0], cubins[0]], tmp_path / "twice.so")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_gpu.so", "again", "libcuda.so.1"]


def test_serving_imports_no_compiler() -> None:
    heavy = ("triton", "jinja2", "numpy", "dks.dispatch.gpu.compile", "dks.dispatch.gpu.embed")
    code = "import torch, sys; before = set(sys.modules); import dks.dispatch.gpu.launch\n"
    code += f"print([name for name in set(sys.modules) - before if name in {heavy!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


C = """
#include "gpu.h"
#include <stdio.h>
#define SAY(s, f) printf("%s.%s %zu\\n", #s, #f, offsetof(struct dks_gpu_##s, f));
int main(void) {
SIZES
  return 0;
}
"""


def test_the_interface_is_plain_c_and_python_has_the_same_structures(tmp_path: Path) -> None:
    structures = {
        "input": launch.CInput,
        "factor": launch.CFactor,
        "cubin": launch.CCubin,
        "source": launch.CSource,
        "step": launch.CStep,
        "call": launch.CCall,
        "device": launch.CDevice,
    }
    lines, expected = [], []
    for name, structure in structures.items():
        lines.append(f'  printf("{name} %zu\\n", sizeof(struct dks_gpu_{name}));')
        expected.append(f"{name} {ctypes.sizeof(structure)}")
        for field in structure._fields_:
            lines.append(f"  SAY({name}, {field[0]})")
            expected.append(f"{name}.{field[0]} {getattr(structure, field[0]).offset}")
    (tmp_path / "sizes.c").write_text(C.replace("SIZES", "\n".join(lines)))
    flags = ("-x", "c", "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
    compile_with(tmp_path, *flags, "-I", embed.HERE, "sizes.c", "-o", "sizes")
    told = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == expected


def test_numbers_are_those_of_cuda_h(tmp_path: Path) -> None:
    headers = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if not (headers / "cuda.h").is_file():
        pytest.skip("no cuda.h here")
    same = {
        "multiprocessor_count": "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT",
        "capability_major": "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR",
        "capability_minor": "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR",
        "shared_memory_optin": "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
        "max_dynamic_shared_size": "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES",
        "capture_relaxed": "CU_STREAM_CAPTURE_MODE_RELAXED",
        "no_device": "CUDA_ERROR_NO_DEVICE",
        "stub_library": "CUDA_ERROR_STUB_LIBRARY",
        "invalid_image": "CUDA_ERROR_INVALID_IMAGE",
        "no_binary_for_gpu": "CUDA_ERROR_NO_BINARY_FOR_GPU",
        "not_found": "CUDA_ERROR_NOT_FOUND",
        "failed(700)": "CUDA_ERROR_ILLEGAL_ADDRESS + DKS_GPU_STICKY",
        "failed(701)": "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES + DKS_GPU_FAILED",
        "failed(719)": "CUDA_ERROR_LAUNCH_FAILED + DKS_GPU_STICKY",
    }
    checks = "".join(
        f"if (dks::gpu::{ours} != static_cast<int>({theirs})) return 1;\n" for ours, theirs in same.items()
    )
    text = f'#include "driver.hpp"\n#include <cuda.h>\nint main() {{\n{checks}return 0;\n}}\n'
    (tmp_path / "numbers.cpp").write_text(text)
    compile_with(
        tmp_path, "-std=c++17", "-iquote", embed.HERE, "-isystem", headers, "numbers.cpp", "-o", "numbers", "-ldl"
    )
    assert subprocess.run([tmp_path / "numbers"], check=False).returncode == 0


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_64_threads_launch_at_once(sanitizer: str, tmp_path: Path) -> None:
    flags = SANITIZERS[sanitizer]
    compiler, lack = find_compiler()
    if lack:
        pytest.skip(lack)
    (tmp_path / "probe.cpp").write_text("int main() { return 0; }\n")
    empty = subprocess.run(
        [*compiler, *flags, "probe.cpp", "-o", "probe"], cwd=tmp_path, capture_output=True, check=False
    )
    if empty.returncode or subprocess.run([tmp_path / "probe"], capture_output=True, check=False).returncode:
        pytest.skip(f"no {' '.join(flags)} here")
    fake = [flag for flag in flags if not flag.startswith("-D")]
    compile_with(tmp_path, "-x", "c", *fake, "-fPIC", "-shared", FAKE, "-o", "libcuda.so.1")
    compile_with(tmp_path, *STRICT, *flags, "-iquote", embed.HERE, HERE / "stress.cpp", "-o", "stress", "-ldl")
    done = subprocess.run(
        [tmp_path / "stress", tmp_path / "libcuda.so.1", "64", "100"],
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    told = json.loads(done.stdout)
    assert told["launches"] == 12800
    if sanitizer == "none":
        assert told["allocations"] == 0
