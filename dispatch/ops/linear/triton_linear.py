"""Triton kernels of linear on a GPU: tiles of the tensor cores, and a few rows that read the weight once.

Each has a form for 16-byte alignment and one, ``_scalar``, for what has none. Weights are read where the caller has
them; those of one byte are quantised in ``bind``, and x in a launch before the product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dks.dispatch.gpu import gemv, matmul, quantize
from dks.dispatch.gpu.call import Buffer, Recipe, Steps, Value, bound, buffer, given, rows, steps
from dks.dispatch.gpu.program import Program
from dks.dispatch.kernel import Kernel, Params, Run
from dks.dispatch.problem import Precision, Problem

_EXACTNESS = {"bfloat16": Precision.BF16, "float16": Precision.BF16}
_QUANTISED = {"bfloat16": Precision.INT8, "float16": Precision.INT8}
_FAMILIES = {"matmul": matmul, "gemv": gemv}

Make = Callable[..., tuple[Program, ...]]


def linear(family: str, align: int, form: str = "", rank: int = 20) -> Kernel:
    """The kernel ``triton.<family>``, of one alignment class.

    Args:
        family: ``matmul`` or ``gemv``.
        align: 16, or 0 for the element's size.
        form: what x and weight are quantised to; empty where they stay as they are.
    """
    module = _FAMILIES[family]
    make: Make = getattr(module, family)

    def product(problem: Problem, params: Params) -> tuple[Program, ...]:
        dtype = problem.trait("dtype")
        bias, epilogue = problem.trait("bias") == "yes", problem.trait("epilogue")
        return make(form or dtype, params, _class(dtype), bias=bias, epilogue=epilogue, out=dtype)

    def _class(dtype: str) -> int:
        return align or matmul.DTYPES[form or dtype].size

    def before(problem: Problem) -> tuple[Program, ...]:
        dtype = problem.trait("dtype")
        return quantize.quantize(dtype, form, align or matmul.DTYPES[dtype].size) if form else ()

    def programs(problem: Problem, params: Params) -> tuple[Program, ...]:
        return (*before(problem), *product(problem, params))

    def bind(problem: Problem, params: Params, weight: torch.Tensor, bias: torch.Tensor | None) -> Run:
        """weight (n, k), bias (n,) or None -> run(x (..., k)[, residual (..., n)]) -> (..., n), of x's dtype.

        Raises:
            Missing: a program has no compiled form here.
            ValueError: the weight can't be quantised.
        """
        held, scale = quantize.quantized(weight, form) if form else (weight.detach().contiguous(), None)
        constants: dict[str, Value] = {
            "weight": held,
            "weight_scale": 0 if scale is None else scale,
            "bias": 0 if bias is None else bias.detach().contiguous(),
        }
        return run(problem, params, constants, weight.device)

    def run(problem: Problem, params: Params, constants: dict[str, Value], device: torch.device) -> Run:
        n, k, dtype = problem.dim("n"), problem.dim("k"), problem.trait("dtype")
        adds = problem.trait("epilogue") == "add"
        buffers = [Buffer(last=n)]
        values: dict[str, Value] = {
            **{"x": given(0), "y": buffer(0), "residual": given(1) if adds else 0, "x_scale": 0},
            **{"m": rows(0), "n": n, "k": k},
            **{"x_stride": k, "weight_stride": k, "y_stride": n, "residual_stride": n},
            **constants,
        }
        launched: Steps = ()
        if form:
            values |= {"x": buffer(1), "x_scale": buffer(2)}
            buffers += [Buffer(dtype=form, returned=False), Buffer(last=0, dtype="float32", returned=False)]
            first: dict[str, Value] = {
                "x": given(0),
                "y": buffer(1),
                "scale": buffer(2),
                "m": rows(0),
                "n": k,
                "x_stride": k,
            }
            launched = steps(before(problem), first)
        for leading, size in zip((True, False), module.workspace(n, params, _multiprocessors(device)), strict=True):
            if size:
                values["workspace"] = buffer(len(buffers))
                buffers.append(Buffer(last=size // 4, dtype="float32", returned=False, leading=leading))
        inputs = (dtype, dtype) if adds else (dtype,)
        recipe = Recipe(inputs, (*launched, *steps(product(problem, params), values)), tuple(buffers))
        return bound(recipe, device=device)  # type: ignore[return-value]

    def supports(problem: Problem) -> str | None:
        if form and align and problem.dim("k") % align:
            return f"k={problem.dim('k')} is not divisible by {align}, and each element is a byte"
        return None

    def suits(problem: Problem, params: Params) -> str | None:
        why: str | None = module.suits(*(problem.dim(name) for name in ("m", "n", "k")), params)
        return why

    return Kernel(
        id="triton." + "_".join(filter(None, (family, _SHORT.get(form), "" if align else "scalar"))),
        op="linear",
        precision=_QUANTISED if form else _EXACTNESS,
        bind=bind,
        form=f"{form} weight, a scale a channel" if form else "the address of the weight",
        form_bytes=lambda p: p.dim("n") * (p.dim("k") + 4) if form else 8,
        reads_in_place=not form,
        params=module.params_for(form or "bfloat16", align or 1),
        programs=programs,
        sources=(*(f"{each}.py" for each in ("matmul", "gemv", "streamk")), *(("quantize.py",) if form else ())),
        align=align,
        supports=supports,
        suits=suits,
        rank=rank,
        devices=("cuda",),
    )


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else matmul.MANY


_SHORT = {"int8": "int8", "float8_e4m3fn": "fp8"}

KERNELS = (
    linear("matmul", 16),
    linear("gemv", 16),
    linear("matmul", 0, rank=21),
    linear("gemv", 0, rank=21),
    linear("matmul", 16, "float8_e4m3fn", rank=22),
    linear("gemv", 16, "float8_e4m3fn", rank=22),
    linear("matmul", 16, "int8", rank=23),
    linear("gemv", 16, "int8", rank=23),
)
