"""``make bench-gpu-launch``: host time from Python to enqueue, a kernel of 19 arguments, by launcher.

The same compiled kernel is launched by all: ``triton.jit`` compiles it, and its code is given to the others. Ours
reads the 14 sizes and strides from the five tensors, checks their alignment and launches; Triton's is given them.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.cells import Call
from bench.gpu import OURS, Bench, Gpu, NotHere
from bench.gpu_run import run
from bench.report import Row
from dks.dispatch import native
from dks.dispatch.compiler import find_compiler
from dks.dispatch.gpu import call as recipe
from dks.dispatch.gpu import embed
from dks.dispatch.gpu import library as loaded
from dks.dispatch.gpu.cubin import Cubin
from dks.dispatch.gpu.launch import Library, Plan, Step
from dks.dispatch.gpu.program import Argument, Program
from dks.dispatch.intervals import paired_ratio
from dks.dispatch.native import build as native_build

HERE = Path(__file__).parent
BLOCKS, CALLS = 60, 200  # a block's calls fit in the driver's queue, so that none waits for the device
JIT, AUTOTUNE, BARE = "triton.jit", "triton.autotune", "bare cuLaunchKernel"
TENSORS = ("x", "weight", "bias", "residual", "y")
NUMBERS = ("x0", "x1", "x_s", "w0", "w1", "w_s", "b0", "b1", "b_s", "r0", "r1", "r_s", "y0", "y_s")
SHAPE, BLOCK = (48, 96), 32
ALLOWED_NS = 500.0


def rows(bench: Bench) -> Iterator[Row]:
    """The rows of the table."""
    calls, lost = launchers(bench.gpu)
    bench.notes += lost
    yield from judged(interleaved(bench.gpu, calls))


def judged(ns: Mapping[str, Sequence[float]]) -> Iterator[Row]:
    """Rows from nanoseconds a launch, a number a block, by launcher."""
    words = "from Python to enqueue, 19 arguments"
    for name, ours in ns.items():
        if not name.startswith(OURS):
            continue
        for peer, target in ((JIT, 4.0), (AUTOTUNE, 6.0)):
            if peer in ns:
                yield _row(f"launch-{name}-{peer}", words, peer, ns[peer], ours, target)
        if BARE in ns:
            allowed = [each + ALLOWED_NS for each in ns[BARE]]
            yield _row(f"launch-{name}-bare", words, f"{BARE} + {ALLOWED_NS / 1e3} us", allowed, ours, 1.0)


def _row(id: str, words: str, peer: str, theirs: Sequence[float], ours: Sequence[float], target: float) -> Row:
    figures = {"ours_us": median(ours) / 1e3, "peer_us": median(theirs) / 1e3, "note": ""}
    return Row(id, words, peer, paired_ratio(theirs, ours), target, figures)


Launcher = Callable[[int], float]
"""Launches so many times; nanoseconds of one."""


def interleaved(gpu: Gpu, launchers: Mapping[str, Launcher], blocks: int = BLOCKS) -> dict[str, list[float]]:
    """Blocks of calls, each launcher once a round in random order, from an idle device."""
    order, found = list(launchers), {name: list[float]() for name in launchers}
    rng = random.Random(1)
    for turn in range(blocks + 2):
        rng.shuffle(order)
        for name in order:
            gpu.wait()
            ns = launchers[name](CALLS)
            if turn >= 2:
                found[name].append(ns)
    gpu.wait()
    return found


def looped(call: Call) -> Launcher:
    """A launcher from a Python call."""

    def launch(count: int) -> float:
        before = time.perf_counter_ns()
        for _ in range(count):
            call()
        return (time.perf_counter_ns() - before) / count

    return launch


def launchers(gpu: Gpu) -> tuple[dict[str, Launcher], list[str]]:
    """Everybody who can launch here, and why others can't. Raises NotHere without Triton."""
    try:
        import triton

        from bench import gpu_nineteen
    except ImportError as error:
        raise NotHere(f"needs Triton: {error}") from None
    tensors = [torch.ones(SHAPE, device=gpu.torch) for _ in TENSORS]
    numbers = numbers_of(tensors)
    nineteen: Any = gpu_nineteen.nineteen
    kernel = nineteen[(1,)](*tensors, *numbers, BLOCK=BLOCK)
    configs = [triton.Config({"BLOCK": BLOCK}, num_warps=warps) for warps in (4, 8)]
    tuned: Any = triton.autotune(configs, key=["x0", "x1", "w0"])(nineteen)
    tuned[(1,)](*tensors, *numbers)
    found = {
        JIT: looped(lambda: nineteen[(1,)](*tensors, *numbers, BLOCK=BLOCK)),
        AUTOTUNE: looped(lambda: tuned[(1,)](*tensors, *numbers)),
    }
    others: dict[str, Callable[[], Launcher]] = {
        OURS: lambda: looped(ours(program_of(kernel), tensors)),
        f"{OURS}, ctypes": lambda: looped(plan_call(program_of(kernel)[0], tensors, gpu)),
        BARE: lambda: bare(kernel, tensors, gpu),
    }
    lost = []
    for name, make in others.items():
        try:
            found[name] = make()
        except Exception as error:
            lost.append(f"{name}: {type(error).__name__}: {error}")
    return found, lost


def numbers_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Two sizes and a stride of each tensor; of y a size and a stride."""
    found = [number for t in tensors[:-1] for number in (*t.shape, t.stride(0))]
    return [*found, tensors[-1].shape[0], tensors[-1].stride(0)]


def program_of(kernel: Any) -> tuple[Cubin, Program]:
    """What Triton compiled, as ours."""
    said = kernel.metadata
    arguments = (*(Argument(name, "*fp32", 1) for name in TENSORS), *(Argument(name, "i32") for name in NUMBERS))
    program = Program(
        symbol="dks_nineteen",
        source=str(HERE / "gpu_nineteen.py"),
        function="nineteen",
        arguments=arguments,
        constants=(("BLOCK", BLOCK),),
        align=16,
        warps=said.num_warps,
        stages=1,
        grid=((), (), ()),
    )
    cubin = Cubin(
        symbol=program.symbol,
        arguments=arguments,
        align=program.align,
        grid=program.grid,
        resident=0,
        warps=program.warps,
        program=program.digest(),
        arch=said.target.arch,
        triton=metadata.version("triton"),
        function=said.name,
        shared=said.shared,
        tensor_memory=0,
        scratch=0,
        scratch_align=1,
        registers=None,
        stack=None,
        local=None,
        elf=kernel.asm["cubin"],
    )
    return cubin, program


def ours(compiled: tuple[Cubin, Program], tensors: Sequence[torch.Tensor]) -> Call:
    """As packages launch: one compiled function of the tensors. Raises where there is no compiled fast path."""
    cubin, program = compiled
    path, why = native_build.cached()
    if path is None or (why := native.install(path)):
        raise RuntimeError(f"no compiled fast path: {why}")
    library = Library(embed.launcher())
    kernel = library.add(cubin)
    loaded.look_in(lambda steps: Plan(library, [Step(kernel, bound) for _, bound in steps]))
    sources: dict[str, recipe.Value] = {name: recipe.given(i) for i, name in enumerate(TENSORS)}
    of = (part for i in range(4) for part in (recipe.size(i, 0), recipe.size(i, 1), recipe.stride(i, 0)))
    sources |= zip(NUMBERS, (*of, recipe.size(4, 0), recipe.stride(4, 0)), strict=True)
    made = recipe.Recipe(("float32",) * len(tensors), ((program, sources),), ())
    call = recipe.bound(made, device=tensors[0].device.type)
    return lambda: call(*tensors)


def plan_call(cubin: Cubin, tensors: Sequence[torch.Tensor], gpu: Gpu) -> Call:
    """Through ctypes, where no fast path is loaded."""
    library = Library(embed.launcher())
    plan = Plan(library, [Step(library.add(cubin))])
    values: list[Any] = [*tensors, *numbers_of(tensors)]
    return lambda: plan(*values, stream=gpu.stream())


def bare(kernel: Any, tensors: Sequence[torch.Tensor], gpu: Gpu, driver: str = "libcuda.so.1") -> Launcher:
    """cuLaunchKernel alone, by bench/gpu_launch.c. Raises RuntimeError where it can't be compiled."""
    library = _compiled()
    launch = ctypes.cast(ctypes.CDLL(driver).cuLaunchKernel, ctypes.c_void_p)
    # A slot of 8 bytes each, with zeros for Triton's two scratch memories behind them.
    values = [*(t.data_ptr() for t in tensors), *numbers_of(tensors), 0, 0]
    slots = (ctypes.c_uint64 * len(values))(*values)
    said = kernel.metadata

    def run(count: int) -> float:
        stream = ctypes.c_void_p(gpu.stream())
        function, threads = ctypes.c_void_p(kernel.function), 32 * said.num_warps
        begin = ctypes.addressof(slots)
        arguments = (ctypes.c_void_p * len(slots))(*range(begin, begin + ctypes.sizeof(slots), 8))
        ns = float(library.dks_bare(launch, function, threads, said.shared, stream, arguments, count))
        if ns < 0:
            raise RuntimeError(f"cuLaunchKernel refused with {-ns:.0f}")
        return ns

    return run


def _compiled() -> ctypes.CDLL:
    compiler, why = find_compiler()
    if why:
        raise RuntimeError(why)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "gpu_launch.so"
        source = str(HERE / "gpu_launch.c")
        command = [*compiler, "-x", "c", "-O2", "-fPIC", "-shared", source, "-o", str(path)]
        subprocess.run(command, check=True, capture_output=True)
        library = ctypes.CDLL(str(path))
    library.dks_bare.restype = ctypes.c_double
    return library


if __name__ == "__main__":
    sys.exit(run("launch", __doc__, rows))
