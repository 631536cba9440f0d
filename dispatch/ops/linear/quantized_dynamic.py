"""Factory of torch's dynamic int8 linears: one kernel an engine, in the files beside this one.

Activations are quantised inside, one scale for the whole tensor: ``by_rows`` makes it one a row. Weights have one
scale a channel.
"""

from __future__ import annotations

import threading

import torch

from dks.dispatch.kernel import DTYPES, Kernel, Run
from dks.dispatch.ops.linear.epilogue import fused_in_place
from dks.dispatch.ops.linear.quantize import activation_levels, by_rows, hush, per_channel_int8
from dks.dispatch.problem import Precision, Problem

# The engine is chosen by a process-wide setting, and only while packing: the packed weight remembers it.
_ENGINE = threading.Lock()


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
        with _ENGINE:
            previous = torch.backends.quantized.engine
            torch.backends.quantized.engine = engine
            try:
                packed = torch.ops.quantized.linear_prepack(as_quantized, None)
            finally:
                torch.backends.quantized.engine = previous
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
