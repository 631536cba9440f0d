"""Factory of torch's dynamic int8 linears: one kernel an engine, in the files beside this one.

Activations are quantised inside, one scale for the whole tensor; weights have one scale a channel.
"""

from __future__ import annotations

import warnings

import torch

from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.ops.linear.epilogue import fused_in_place
from dks.dispatch.ops.linear.quantize import per_channel_int8
from dks.dispatch.problem import Precision, Problem


def dynamic_int8(engine: str) -> Kernel:
    """The kernel ``quantized.dynamic_<engine>``."""

    def bind(
        problem: Problem,
        params: tuple[tuple[str, int], ...],
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> Run:
        """weight (n, k), bias (n,) or None -> run(x (..., k)) -> (..., n), of x's dtype."""
        quantized, scale = per_channel_int8(weight)
        zero = torch.zeros(quantized.shape[0], dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch announces that quantized tensors will go
            as_quantized = torch._make_per_channel_quantized_tensor(quantized, scale.double(), zero, 0)
        # The engine is chosen by a process-wide setting, and only while packing: the packed weight
        # remembers it.
        previous = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            packed = torch.ops.quantized.linear_prepack(as_quantized, None if bias is None else bias.float())
        finally:
            torch.backends.quantized.engine = previous
        linear = torch.ops.quantized.linear_dynamic.default
        # Without VNNI the 16-bit sums of pairs can saturate; one bit less of activation keeps them apart.
        reduce_range = engine != "onednn" and not torch.cpu._is_vnni_supported()
        if problem.trait("dtype") == "float32":
            run: Run = lambda x: linear(x, packed, reduce_range)  # noqa: E731
        else:
            run = lambda x: linear(x.float(), packed, reduce_range).bfloat16()  # noqa: E731
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
