"""``make bench-gpu-views``: every input 1, 2, 4 and 8 bytes past an aligned address, against torch on the same.

A tensor begins at a multiple of its element's size, and torch refuses any other view: what is left of the four is
measured, and the rows say which. An answer other than torch's leaves a case without a ratio, with the reason.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
import torch.nn.functional as F

from bench.gpu import MODES, OURS, Bench, Case, Gpu, each, normal, placed
from bench.gpu_peers import default_of, gathered
from bench.gpu_run import package, row, run
from bench.report import Row
from dks.dispatch.problem import Problem

PACKAGE = "gpu_smoke"
OFFSETS = (1, 2, 4, 8)
DTYPE = torch.bfloat16
TORCH = "torch on the same views"

Function = Callable[..., object]


def rows(bench: Bench) -> Iterator[Row]:
    """A row an operator and mode, and the worst of all."""
    cells = bench.measure(list(cases(bench.gpu, package(PACKAGE))))
    left = [offset for offset in OFFSETS if offset % DTYPE.itemsize]
    note = f"offsets {', '.join(map(str, left))}: no {DTYPE} tensor can begin there"
    for mode in MODES:
        of = [cell for cell in cells if cell.mode == mode]
        for op in dict.fromkeys(cell.name.partition(" ")[0] for cell in of):
            mine = [cell for cell in of if cell.name.startswith(f"{op} ")]
            yield row(
                f"views-{op.replace('_', '-')}-{mode}", f"{op}, misaligned, {mode}", TORCH, mine, 1.0, note=note
            )
        if of:
            yield row(f"views-worst-{mode}", f"all, misaligned, {mode}", TORCH, of, 1.0, "worst", note)


def cases(gpu: Gpu, served: ModuleType) -> Iterator[Case]:
    """Each input of each operator alone, and all together, at each offset that a tensor can begin at."""
    for op, (shapes, framework, own) in operators(served).items():
        sets = [(i,) for i in range(len(shapes))] + ([tuple(range(len(shapes)))] if len(shapes) > 1 else [])
        for which, offset in itertools.product(sets, OFFSETS):
            if offset % DTYPE.itemsize:
                continue
            name = f"{op} {'+'.join(map(str, which))} at byte {offset}"
            makers = {TORCH: each(_called(framework)), OURS: each(_called(own))}
            yield Case(name, _drawn(gpu, shapes, which, offset), makers)


def operators(served: ModuleType) -> dict[str, tuple[tuple[tuple[int, ...], ...], Function, Function]]:
    """By operator: shapes of its inputs, as in configs/gpu-smoke.yaml, torch's function, the package's."""
    heads = ((2, 128, 4, 64), (2, 128, 2, 64), (2, 128, 2, 64))
    pages = ((4, 8, 128), (64, 16, 2, 128), (64, 16, 2, 128))

    def attend(function: Function) -> Function:
        return lambda *qkv: function(*(t.transpose(1, 2) for t in qkv), is_causal=True, enable_gqa=True)

    def paged(function: Function) -> Function:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> object:
            table = torch.arange(64, dtype=torch.int32, device=q.device).view(4, 16)
            return function(q, k, v, table, torch.full((4,), 256, dtype=torch.int32, device=q.device), None)

        return call

    def losses(function: Function) -> Function:
        return lambda x: function(x, torch.arange(len(x), device=x.device), reduction="none")

    def turned(function: Function) -> Function:
        return lambda q, *more: function(q, *more, torch.arange(len(q), dtype=torch.int32, device=q.device))

    traits, dims = {"dtype": "bfloat16", "cache": "same"}, {"tokens": 64, "h": 8, "hkv": 2, "d": 128}
    rotary = default_of(Problem.of("rotary", traits, dims))
    return {
        "linear": (((128, 256), (512, 256), (512,)), F.linear, served.linear),
        "linear_ragged": (((128, 250), (510, 250)), F.linear, served.linear),
        "rms_norm": (
            ((64, 1024), (1024,)),
            lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6),
            lambda x, weight: served.rms_norm(x, weight.shape, weight, 1e-6),
        ),
        "softmax": (((64, 1000),), lambda x: torch.softmax(x, -1), lambda x: served.softmax(x, -1)),
        "silu_and_mul": (
            ((64, 1024),),
            lambda x: F.silu(x[..., :512]) * x[..., 512:],
            served.silu_and_mul,
        ),
        "cross_entropy": (((64, 1000),), losses(F.cross_entropy), losses(served.cross_entropy)),
        "rotary": (((64, 8, 128), (64, 2, 128), (64, 64), (64, 64)), turned(rotary), turned(served.rotary)),
        "paged_attention": (pages, paged(gathered(256)), paged(served.paged_attention)),
        "attention": (heads, attend(F.scaled_dot_product_attention), attend(served.attention)),
    }


def _drawn(
    gpu: Gpu, shapes: tuple[tuple[int, ...], ...], which: tuple[int, ...], offset: int
) -> Callable[[int], tuple[torch.Tensor, ...]]:
    def draw(copy: int) -> tuple[torch.Tensor, ...]:
        plain = [normal(shape, DTYPE, gpu.torch, len(shapes) * copy + i) for i, shape in enumerate(shapes)]
        return tuple(placed(t, offset if i in which else 0) for i, t in enumerate(plain))

    return draw


def _called(function: Function) -> Callable[..., Callable[[], object]]:
    def make(*inputs: torch.Tensor) -> Callable[[], object]:
        return lambda: function(*inputs)

    return make


if __name__ == "__main__":
    sys.exit(run("views", __doc__, rows, [PACKAGE]))
