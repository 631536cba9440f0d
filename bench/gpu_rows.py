"""``make bench-gpu-rows``: rms_norm, softmax and cross-entropy against eager, torch.compile and a plain copy.

The copy moves as many bytes as the operator must move at least, half of them read and half written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType

import torch
import torch.nn.functional as F

from bench.cells import Call
from bench.gpu import MODES, OURS, Bench, Case, Gpu, Maker, each, normal
from bench.gpu_peers import compiled
from bench.gpu_run import package, row, run
from bench.report import Row

PACKAGE = "h200_rows"
EAGER, COMPILE, COPY = "eager torch", "torch.compile max-autotune", "a copy of as many bytes"
FUSED = "F.rms_norm"
TARGETS = {"rms_norm": 5.3, "softmax": 2.8, "cross_entropy": 2.2}
ROWS = 4096
HIDDEN, VOCABULARY = (2048, 4096, 8192, 16384), (32000, 128256)
EPS = 1e-6


def rows(bench: Bench) -> Iterator[Row]:
    """The rows of the table; those of an operator that the package has not are left out, and said."""
    served = package(PACKAGE)
    cells = bench.measure(list(cases(bench.gpu, served)))
    for op, target in TARGETS.items():
        if not hasattr(served, op):
            bench.notes.append(f"{op}: {PACKAGE} has no such operator")
        for mode in MODES:
            of = [cell for cell in cells if cell.mode == mode and cell.name.startswith(f"{op} ")]
            if not of:
                continue
            for id, peer, wanted in (("eager", EAGER, target), ("compile", COMPILE, 1.05), ("copy", COPY, 0.9)):
                words = f"{op} of {ROWS} rows, bf16, {mode}"
                yield row(f"{op.replace('_', '-')}-{id}-{mode}", words, peer, of, wanted)
            if op == "rms_norm":
                plain = [cell for cell in of if not cell.name.endswith("residual")]
                yield row(f"rms-norm-fused-{mode}", f"rms_norm without residual, bf16, {mode}", FUSED, plain, None)


def cases(gpu: Gpu, served: ModuleType) -> Iterator[Case]:
    """Every operator that the package has, at each width."""
    for n in HIDDEN:
        x, weight = (ROWS, n), (n,)
        plain = _case(gpu, f"rms_norm n={n}", (x, weight), 2 * ROWS * n, eager_rms_norm, prepared_rms_norm(served))
        fused = each(lambda x, weight: lambda: F.rms_norm(x, weight.shape, weight, EPS))
        yield replace(plain, makers={**plain.makers, FUSED: fused})
        added = (x, x, weight)
        yield _case(gpu, f"rms_norm n={n} residual", added, 4 * ROWS * n, eager_add_norm, prepared_add_norm(served))
    for n in (*HIDDEN, *VOCABULARY):
        own = each(lambda x: lambda: served.softmax(x, -1))
        yield _case(gpu, f"softmax n={n}", ((ROWS, n),), 2 * ROWS * n, lambda x: torch.softmax(x, -1), own)
    if hasattr(served, "cross_entropy"):
        for n in VOCABULARY:
            yield cross_entropy(gpu, served, n)


def eager_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As model code writes it, step by step in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def eager_add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of the sum, the sum)."""
    total = x + residual
    return eager_rms_norm(total, weight), total


def prepared_rms_norm(served: ModuleType) -> Maker:
    """A layer for each copy of x and weight."""

    def make(x: torch.Tensor, weight: torch.Tensor) -> Call:
        layer = served.prepare_rms_norm(weight, EPS)
        return lambda: layer(x)

    return each(make)


def prepared_add_norm(served: ModuleType) -> Maker:
    """The same with a residual."""

    def make(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Call:
        layer = served.prepare_rms_norm(weight, EPS)
        return lambda: layer(x, residual)

    return each(make)


def cross_entropy(gpu: Gpu, served: ModuleType, n: int) -> Case:
    """Losses of each row; it reads the logits and writes next to nothing."""

    def draw(copy: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator(device=gpu.torch).manual_seed(copy)
        targets = torch.randint(n, (ROWS,), generator=generator, device=gpu.torch)
        return normal((ROWS, n), torch.bfloat16, gpu.torch, copy), targets

    def framework(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets, reduction="none")

    own = each(lambda logits, targets: lambda: served.cross_entropy(logits, targets))
    return Case(f"cross_entropy n={n}", draw, _makers(framework, own, ROWS * n), figures={"bytes": 2.0 * ROWS * n})


def _case(
    gpu: Gpu,
    name: str,
    shapes: tuple[tuple[int, ...], ...],
    moved: int,
    framework: Callable[..., object],
    own: Maker,
) -> Case:
    """``moved``: elements of two bytes that are read and written at least."""

    def draw(copy: int) -> tuple[torch.Tensor, ...]:
        return tuple(
            normal(shape, torch.bfloat16, gpu.torch, len(shapes) * copy + i) for i, shape in enumerate(shapes)
        )

    return Case(name, draw, _makers(framework, own, moved), figures={"bytes": 2.0 * moved})


def _makers(framework: Callable[..., object], own: Maker, moved: int) -> Mapping[str, Maker]:
    def eager(*inputs: torch.Tensor) -> Call:
        return lambda: framework(*inputs)

    return {EAGER: each(eager), OURS: own, COMPILE: compiled(framework), COPY: _copy(moved // 2)}


def _copy(elements: int) -> Maker:
    """A copy of so many elements of two bytes. What it returns is no answer to anything, and not compared."""

    def make(first: torch.Tensor, *_: torch.Tensor) -> Call:
        source = torch.empty(elements, dtype=torch.bfloat16, device=first.device)
        target = torch.empty_like(source)

        def call() -> None:
            target.copy_(source)

        return call

    return each(make)


if __name__ == "__main__":
    sys.exit(run("rows", __doc__, rows, [PACKAGE]))
