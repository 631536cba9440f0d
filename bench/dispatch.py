"""``make bench-dispatch``: what choosing and calling cost, beside what one would do instead.

Blocks are interleaved: in each, everything that is compared runs once, in an order drawn anew, so that a neighbour
on the machine disturbs all alike. A time is the median over blocks, a ratio that of one pair a block.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table as Shown

from bench import swaps
from bench.report import Row, environment_lines, write_result
from dks.codegen.cpp import render_header
from dks.dispatch import native, pool
from dks.dispatch.compiler import find_compiler
from dks.dispatch.generation import Generation
from dks.dispatch.intervals import paired_ratio
from dks.dispatch.kernel import Kernel
from dks.dispatch.native import build as native_build
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import Group, Rule, Table
from dks.dispatch.tiles import build, library
from dks.dispatch.watch import Watch

BLOCKS, BLOCK_S = 60, 2e-3
HERE = Path(__file__).parent
HEADERS = HERE.parent / "dispatch" / "cpp"
EDGES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
SIZES = ((1, 64, 64), (8, 256, 256), (1, 1024, 1024), (32, 384, 384), (64, 768, 768), (128, 1024, 1024))
TILE = "tile.f32_avx512/mr4-nv4-kc0-pack0-pf8-t1-r0"

Call = Callable[[], object]


def table(candidate: str, n: int, k: int) -> Table:
    """A table of fifteen bins and three alignment classes that sends every linear of (n, k) to one candidate."""
    cells = (0,) * len(EDGES)
    groups = [
        Group(
            "linear", form, (("bias", bias), ("dtype", "float32"), ("epilogue", "none")), (("n", n), ("k", k)),
            (EDGES,), {64: cells, 16: cells, 4: cells},
        )
        for form in ("prepared", "direct")
        for bias in ("yes", "no")
    ]  # fmt: skip
    return Table((Rule(candidate, 4),), tuple(groups))


def measure(calls: Mapping[str, Call]) -> dict[str, list[float]]:
    """Nanoseconds a call, by name, one number a block."""
    repeats = {}
    for name, call in calls.items():
        start = time.perf_counter_ns()
        for _ in range(100):
            call()
        repeats[name] = max(1, int(BLOCK_S * 1e9 / max(1, (time.perf_counter_ns() - start) / 100)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(BLOCKS):
        random.shuffle(order)
        for name in order:
            call, count = calls[name], repeats[name]
            start = time.perf_counter_ns()
            for _ in range(count):
                call()
            found[name].append((time.perf_counter_ns() - start) / count)
    return found


def rows(kind: str, workload: str, ours: str, times: Mapping[str, list[float]], target: float | None) -> list[Row]:
    """One row a peer; every row carries both medians."""
    mine = statistics.median(times[ours])
    return [
        Row(
            f"{kind}: {peer}", workload, peer, paired_ratio(samples, times[ours]), target,
            {"ours_ns": round(mine, 1), "peer_ns": round(statistics.median(samples), 1)},
        )
        for peer, samples in times.items()
        if peer != ours
    ]  # fmt: skip


def choosing() -> list[Row]:
    """From two tensors to a rule."""
    x, weight = torch.randn(17, 384), torch.randn(384, 384)
    runtime = Runtime("bench", Generation(table("torch.addmm", 384, 384)))
    server = runtime.server("linear")
    server.call(x, weight)  # the first call makes what the later ones ask
    fast = runtime.generation.fast["linear"]
    plan = runtime.generation.plan(*server.question("direct", weight, None, "none"))
    known = {(x.shape, x.stride(), x.dtype, x.device, weight.shape, weight.stride()): 0}

    def python() -> int:
        assert x.is_contiguous() and weight.is_contiguous() and plan.find is not None
        n, k = weight.shape
        bits = (n | k) * x.element_size() | x.data_ptr() | weight.data_ptr() | 64
        return plan.find(bits & -bits, x.numel() // k)

    calls: dict[str, Call] = {
        "compiled": lambda: fast.choose(x, weight, None),
        "the same in Python": python,
        "a dict keyed on tensor attributes": lambda: known[
            x.shape, x.stride(), x.dtype, x.device, weight.shape, weight.stride()
        ],
        "a torch.ops call": lambda: torch.ops.aten.alias.default(x),
        "(an empty call)": lambda: None,
    }
    if lookup := triton_lookup():
        calls["triton.autotune's lookup"] = lambda: lookup(x, weight, x, 17, 384, 384)
    return rows("choose", "linear, x (17, 384), weight (384, 384), to a rule", "compiled", measure(calls), None)


def triton_lookup() -> Callable[..., object] | None:
    """``triton.autotune`` up to the choice of a configuration it knows: what it would launch does nothing."""
    try:
        import triton
    except ImportError:
        return None

    def linear(x, weight, y, m, n, k, BLOCK):  # type: ignore[no-untyped-def]
        pass

    configs = [triton.Config({"BLOCK": block}) for block in (64, 128)]
    tuned = triton.autotune(configs, key=["m", "n", "k"])(triton.jit(linear))
    tuned._bench = lambda *_, **__: [1.0]
    tuned.fn = SimpleNamespace(run=lambda *_, **__: None)
    run: Callable[..., object] = tuned.run
    return run


def calling(candidate: str, kind: str, target: float | None) -> list[Row]:
    """A whole call of a prepared layer against F.linear."""
    found = []
    for m, n, k in SIZES:
        x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
        layer = Runtime("bench", Generation(table(candidate, n, k))).server("linear").prepare(weight, bias)
        calls: dict[str, Call] = {
            "prepare_linear(...)(x)": lambda layer=layer, x=x: layer(x),  # type: ignore[misc]
            "F.linear(x, weight, bias)": lambda x=x, w=weight, b=bias: F.linear(x, w, b),  # type: ignore[misc]
        }
        times = measure(calls)
        kernel_us = statistics.median(times["F.linear(x, weight, bias)"]) / 1e3
        wanted = target if kernel_us >= 10 else None
        found += rows(f"{kind} m={m} n={n} k={k}", f"linear, {kernel_us:.1f} us", next(iter(calls)), times, wanted)
    return found


def looking() -> list[Row]:
    """A prepared layer whose calls look at a part of its weight, against one whose calls do not."""
    found = []
    for m, n, k in SIZES:
        x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
        server = Runtime("bench", Generation(table("torch.addmm", n, k))).server("linear")
        looks = server.prepare(weight, bias)
        with mock.patch.object(Watch, "cover", lambda _: None):
            trusts = server.prepare(weight, bias)
        ours, peer = f"looks at all of it in {looks.scrub_calls} calls", "looks at no byte"
        times = measure({ours: lambda f=looks, x=x: f(x), peer: lambda f=trusts, x=x: f(x)})  # type: ignore[misc]
        call_us = statistics.median(times[peer]) / 1e3
        found += rows(f"the weight, m={m} n={n} k={k}", f"linear, {call_us:.1f} us", ours, times, None)
    return found


def in_cpp() -> list[Row]:
    """The header form, by bench/dispatch.cpp: nanoseconds, no ratio."""
    command, why = find_compiler()
    if why:
        print(f"the C++ form is not measured: {why}")
        return []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for header in ("lookup.hpp", "serving.hpp"):
            shutil.copy(HEADERS / header, folder)
        text = render_header("bench", table("torch.addmm", 384, 384), (HEADERS / "lookup.hpp").read_text())
        (folder / "table.hpp").write_text(text)
        program = folder / "dispatch"
        flags = ["-std=c++17", "-O2", "-pthread", "-iquote", name]
        subprocess.run([*command, *flags, HERE / "dispatch.cpp", "-o", program], check=True)
        output = subprocess.run([str(program), "linear"], check=True, capture_output=True, text=True).stdout
    found: dict[str, dict[str, Any]] = {}
    for line in map(json.loads, output.splitlines()):
        found.setdefault(f"{line['call']}, {line['shapes']} shapes", line)
    return [
        Row(f"C++: {name}", "linear, one dim, in C++", "-", None, None, {"ours_ns": line["ns"]})
        for name, line in found.items()
    ]


def main() -> None:
    """Measure, print and write runs/dispatch/result.json."""
    torch.set_num_threads(1)
    fast, why = native_build.cached()
    if fast is None or (why := native.install(fast)):
        raise SystemExit(f"there is no compiled fast path here: {why}")
    library.look_in(build.locate)
    with torch.inference_mode():
        measured = [*choosing(), *calling("torch.linear", "same kernel", 0.98), *looking()]
        if _has(TILE):
            measured += calling(TILE, "generated kernel", None)
    measured += in_cpp()
    measured += swaps.rows()
    shown = Shown(title="dispatch: medians of interleaved blocks, one thread")
    for column in ("what", "ours ns", "peer ns", "peer / ours [95 %]", "target"):
        shown.add_column(column, justify="left" if column == "what" else "right")
    for row in measured:
        shown.add_row(
            row.id, str(row.extra["ours_ns"]), str(row.extra.get("peer_ns", "")), str(row.ratio or ""),
            "" if row.target is None else str(row.target),
        )  # fmt: skip
    for line in environment_lines():
        print(line)
    Console(width=120).print(shown)
    print(f"written to {write_result('dispatch', measured)}")


def _has(candidate: str) -> bool:
    """Compile a generated kernel; whether this machine runs it."""
    chosen = Candidate.parse(candidate)
    kernel: Kernel = pool.kernels()[chosen.kernel]
    if kernel.unit is None or kernel.unavailable():
        return False
    traits = {"dtype": "float32", "bias": "yes", "epilogue": "none"}
    problem = Problem.of("linear", traits, {"m": 1, "n": 64, "k": 64})
    return not build.build([kernel.unit(problem, chosen.params)])


if __name__ == "__main__":
    main()
