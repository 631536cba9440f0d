"""``make bench-gpu-gemm``: 200 bf16 products, cold, against torch.matmul and the best of cuBLASLt's algorithms."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import torch

from bench.gpu import EAGER, GRAPH, MODES, OURS, Bench, Case, Gpu, each
from bench.gpu_peers import best_of_cublaslt, products, served_linear
from bench.gpu_run import package, row, run
from bench.gpu_shapes import shapes
from bench.report import Row

PACKAGE = "h200_gemm"
TORCH, LT = "torch.matmul", "cuBLASLt, best of 32"
SMALL = 1e9  # flop


def rows(bench: Bench) -> Iterator[Row]:
    """The rows of the table. cuBLASLt is judged by the device's time: it is called through ctypes here."""
    served = package(PACKAGE)
    cells = bench.measure([case(bench.gpu, served, *shape) for shape in shapes()])
    words = "bf16 GEMM, 200 shapes of 64 to 16384, cold"
    for mode in MODES:
        of = [cell for cell in cells if cell.mode == mode]
        if of:
            yield row(f"gemm-torch-{mode}", f"{words}, {mode}", TORCH, of, 1.10)
            yield row(f"gemm-torch-worst-{mode}", f"{words}, {mode}, the worst", TORCH, of, 0.98, "worst")
    of = [cell for cell in cells if cell.mode == GRAPH]
    small = [cell for cell in of if cell.figures["flop"] < SMALL]
    if small:
        yield row("gemm-cublaslt-graph", f"{words}, graph", LT, of, 1.03)
        yield row("gemm-cublaslt-small-graph", f"{words}, graph, below 1e9 flop", LT, small, 1.10)
        yield row("gemm-cublaslt-worst-graph", f"{words}, graph, the worst", LT, of, 0.98, "worst")


def case(gpu: Gpu, served: ModuleType, m: int, n: int, k: int) -> Case:
    """x (m, k) @ weight (n, k)^T."""
    makers = {
        TORCH: each(lambda x, w: lambda: torch.matmul(x, w.T)),
        OURS: served_linear(served),
        LT: best_of_cublaslt(gpu),
    }
    return Case(
        f"m={m} n={n} k={k}",
        products(gpu, m, n, k),
        makers,
        figures={"flop": 2.0 * m * n * k},
        modes=(GRAPH, EAGER),
    )


if __name__ == "__main__":
    sys.exit(run("gemm", __doc__, rows, [PACKAGE]))
