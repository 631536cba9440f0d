"""Factory of torch's dynamic int8 linears: one kernel an engine, in the files beside this one.

Activations are quantised inside, one scale for the whole tensor: ``by_rows`` makes it one a row. Weights have one
scale a channel.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dks.dispatch import forks
from dks.dispatch.kernel import DTYPES, Kernel, Run
from dks.dispatch.ops.linear.epilogue import fused_in_place
from dks.dispatch.ops.linear.quantize import activation_levels, by_rows, hush, per_channel_int8
from dks.dispatch.problem import Precision, Problem


class _Engine:
    """torch's engine, a setting of the whole process, is chosen while a thread packs: the result remembers it."""

    def __init__(self) -> None:
        self._usual: str | None = None  # to go back to, while another one is chosen
        self._lock = threading.Lock()
        forks.enroll(self)

    @contextmanager
    def chosen(self, engine: str) -> Iterator[None]:
        with self._lock:
            self._usual = torch.backends.quantized.engine
            try:
                torch.backends.quantized.engine = engine
                yield
            finally:
                self._back()

    def _back(self) -> None:
        if self._usual is not None:
            torch.backends.quantized.engine, self._usual = self._usual, None

    def after_fork(self) -> None:
        """See ``forks``."""
        self._lock = threading.Lock()
        self._back()


_ENGINE = _Engine()


def dynamic_int8(engine: str) -> Kernel:
    """The kernel ``quantized.dynamic_<engine>``."""

    def bind(
        problem: Problem,
        _params: tuple[tuple[str, int], ...],
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> Run:
        """weight (n, k), bias (n,) or None -> run(x (..., k)[, residual (..., n)]) -> (..., n), of x's dtype."""
        quantized, scale = per_channel_int8(weight)
        n, k = quantized.shape
        zero = torch.zeros(n, dtype=torch.long, device="cpu")
        hush()
        as_quantized = torch._make_per_channel_quantized_tensor(quantized, scale.double(), zero, 0)
        with _ENGINE.chosen(engine):
            packed = torch.ops.quantized.linear_prepack(as_quantized, None)
        linear = torch.ops.quantized.linear_dynamic.default
        reduce_range = activation_levels() < 255

        def product(rows: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = linear(rows, packed, reduce_range)
            return y

        run = by_rows(product, bias, DTYPES[problem.trait("dtype")], n, k)
        return fused_in_place(run, problem.trait("epilogue"))

    def unavailable() -> str | None:
        engines = torch.backends.quantized.supported_engines
        return None if engine in engines else f"this torch has the engines {', '.join(engines)}"

    return Kernel(
        id=f"quantized.dynamic_{engine}",
        op="linear",
        precision={"float32": Precision.INT8, "bfloat16": Precision.INT8},
        bind=bind,
        form=f"int8 weight packed by {engine}, a scale a channel",
        form_bytes=lambda p: p.dim("n") * (p.dim("k") + 8),
        unavailable=unavailable,
        rank=6,
    )
