"""Who takes part on a GPU: what a package serves, and peers that are no kernels of the pool."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from statistics import median
from types import ModuleType
from typing import Any

import torch

from bench.cells import Call
from bench.gpu import Copies, Gpu, Maker, each, normal
from dks.dispatch import pool
from dks.dispatch.gpu.cublaslt import build
from dks.dispatch.gpu.cublaslt.library import MOST, Library, Matmul, Refused
from dks.dispatch.gpu.cublaslt.library import Call as Addresses
from dks.dispatch.kernel import Inputs
from dks.dispatch.ops.paged_attention.gather import attend
from dks.dispatch.problem import Problem

Draw = Callable[[int], tuple[torch.Tensor, ...]]
TRIES = 5
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def products(gpu: Gpu, m: int, n: int, k: int) -> Draw:
    """Number of a copy -> x (m, k) and weight (n, k), in bfloat16."""

    def draw(copy: int) -> tuple[torch.Tensor, ...]:
        return tuple(
            normal(shape, torch.bfloat16, gpu.torch, 2 * copy + i) for i, shape in enumerate(((m, k), (n, k)))
        )

    return draw


def served_linear(served: ModuleType) -> Maker:
    """A layer that a package prepared, for each copy of x and weight."""

    def make(x: torch.Tensor, weight: torch.Tensor) -> Call:
        layer = served.prepare_linear(weight)
        return lambda: layer(x)

    return each(make)


@lru_cache
def cublaslt() -> Library:
    """cuBLASLt on the current device. Raises Refused where it is not there."""
    binary, why = build.cached()
    if binary is None:
        raise Refused(why)
    return Library(binary)


def best_of_cublaslt(gpu: Gpu, library: Callable[[], Library] = cublaslt) -> Maker:
    """x (m, k) @ weight (n, k)^T by the fastest of the algorithms that cuBLASLt's heuristic names.

    They are timed on the device alone, five calls each after one that is not counted; the output is allocated once.
    """

    def make(copies: Copies) -> list[Call]:
        (x, weight), lt = copies[0], library()
        (m, k), n = x.shape, weight.shape[0]
        matmul = Matmul(m, n, k, DTYPES[x.dtype])
        space = torch.empty(matmul.workspace, dtype=torch.uint8, device=x.device)
        y = torch.empty((m, n), dtype=x.dtype, device=x.device)

        def calls(algorithm: Any) -> list[Call]:
            run = lt.bind(matmul, algorithm)
            return [_launch(gpu, run, x, w, y, space) for x, w in copies]

        times = {}
        for algorithm in lt.search(matmul, MOST):
            try:
                made = calls(algorithm)
                samples = [gpu.device(made[i % len(made)]) for i in range(TRIES + 1)]
            except Refused:
                continue
            times[algorithm] = median(samples[1:])
        if not times:
            raise Refused("none of its algorithms runs")
        return calls(min(times, key=lambda algorithm: times[algorithm]))

    return make


def _launch(
    gpu: Gpu,
    run: Callable[[Addresses], None],
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    space: torch.Tensor,
) -> Call:
    def call() -> torch.Tensor:
        addresses = Addresses(x=x.data_ptr(), weight=w.data_ptr(), y=y.data_ptr(), stream=gpu.stream())
        addresses.workspace, addresses.workspace_bytes = space.data_ptr(), space.nbytes
        run(addresses)
        return y

    return call


def compiled(function: Callable[..., Any]) -> Maker:
    """``torch.compile`` of a function of one copy's inputs, for their very shapes, with all it may search."""

    def make(copies: Copies) -> list[Call]:
        torch._dynamo.reset()  # else the shapes of the cases before count against its limit
        run = torch.compile(function, dynamic=False, fullgraph=True, mode="max-autotune-no-cudagraphs")
        run(*copies[0])
        return [lambda copy=copy: run(*copy) for copy in copies]  # type: ignore[misc]

    return make


def gathered(kv: int) -> Callable[..., torch.Tensor]:
    """The framework's own way with pages: a function of paged_attention's arguments, told that all sequences have
    ``kv`` keys, as who writes it for them knows. Without that it would mask keys, which no peer here has to."""

    return partial(attend, bounds=(kv, kv))


def default_of(problem: Problem) -> Callable[..., object]:
    """The pool's default kernel of an operator without constant arguments."""
    kernel = pool.kernels()[pool.operator(problem.op).default]
    return kernel.bind(problem, kernel.candidates()[0].params)


def flashinfer_decode(inputs: Inputs) -> Call:
    """FlashInfer's paged decode on paged_attention's arguments, planned once as a server does for a step.

    Raises:
        ImportError: it is not installed.
    """
    flashinfer = importlib.import_module("flashinfer")
    q, k_cache, v_cache, block_table, lengths, scale = inputs.dynamic
    (_, h, d), (_, page, hkv, _) = q.shape, k_cache.shape
    pages = (lengths.int() + page - 1) // page
    ends = torch.zeros(len(pages) + 1, dtype=torch.int32, device=q.device)
    ends[1:] = pages.cumsum(0)
    indices = torch.cat([row[:count] for row, count in zip(block_table.int(), pages.tolist(), strict=True)])
    last = (lengths.int() - 1) % page + 1
    space = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=h // hkv >= 4)
    wrapper.plan(ends, indices, last, h, hkv, d, page, sm_scale=scale, q_data_type=q.dtype, kv_data_type=q.dtype)
    return lambda: wrapper.run(q, (k_cache, v_cache))
