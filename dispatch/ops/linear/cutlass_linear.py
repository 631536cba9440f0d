"""CUTLASS kernels of linear on a GPU: one for each schedule and alignment class, its tiles as parameters.

Weights are read where the caller has them; those of one byte are quantised in ``bind``, and x by a Triton program
before the kernel.
"""

from __future__ import annotations

import torch

from dks.dispatch.gpu import quantize
from dks.dispatch.gpu.call import Buffer, Recipe, Source, Steps, bound, buffer, given, rows, steps
from dks.dispatch.gpu.cutlass import library
from dks.dispatch.gpu.cutlass.configuration import SOURCES, Configuration, configurations
from dks.dispatch.gpu.program import Program
from dks.dispatch.kernel import Kernel, Params, Run
from dks.dispatch.problem import Precision, Problem

_EXACTNESS = {"bfloat16": Precision.BF16, "float16": Precision.BF16}
_QUANTISED = {"bfloat16": Precision.INT8}  # their outputs are bfloat16 alone
_SHORT = {"": "", "int8": "_int8", "float8_e4m3fn": "_fp8"}


def linear(schedule: str, align: int, form: str = "", rank: int = 30) -> Kernel:
    """The kernel ``cutlass.<schedule>``.

    Args:
        schedule: as ``Configuration`` has it.
        align: bytes; below 16 they are in the name.
        form: what x and weight are quantised to; empty where they stay as they are.
    """

    def configuration(problem: Problem, params: Params) -> Configuration:
        return _configuration(schedule, form or problem.trait("dtype"), align, problem.trait("epilogue"), params)

    def programs(problem: Problem, _: Params) -> tuple[Program, ...]:
        return quantize.quantize(problem.trait("dtype"), form, align)

    def bind(problem: Problem, params: Params, weight: torch.Tensor, bias: torch.Tensor | None) -> Run:
        """weight (n, k), bias (n,) or None -> run(x (..., k)[, residual (..., n)]) -> (..., n), of x's dtype.

        Raises:
            Missing: the kernel or the program before it has no compiled form here.
            ValueError: the weight can't be quantised.
        """
        n, k, dtype = problem.dim("n"), problem.dim("k"), problem.trait("dtype")
        adds = problem.trait("epilogue") == "add"
        held, scale = quantize.quantized(weight, form) if form else (weight.detach().contiguous(), None)
        bias = None if bias is None else bias.detach().contiguous()
        before: Steps = ()
        x, buffers = given(0), [Buffer(last=n)]
        if form:
            x, before = buffer(1), _quantise(programs(problem, params), k)
            buffers += [Buffer(dtype=form, returned=False), Buffer(last=0, dtype="float32", returned=False)]
        constant = library.Linear(
            *(None if each is None else each.data_ptr() for each in (held, bias, scale)),
            *(n, k, k, _multiprocessors(weight.device)),
        )
        kernel = library.find(configuration(problem, params))
        values = (x, buffer(2) if form else 0, given(1) if adds else 0, buffer(0), rows(0), k, n if adds else 0, n)
        function = kernel.function(constant, values, (held, bias, scale))
        recipe = Recipe((dtype, dtype) if adds else (dtype,), before, tuple(buffers), function=function)
        return bound(recipe, device=weight.device)  # type: ignore[return-value]

    def supports(problem: Problem) -> str | None:
        if form and problem.dim("k") % align:
            return f"k={problem.dim('k')} is not divisible by {align}, and each element is a byte"
        return None

    return Kernel(
        id=f"cutlass.{schedule}{_SHORT[form]}{'' if align == 16 else f'_align{align}'}",
        op="linear",
        precision=_QUANTISED if form else _EXACTNESS,
        bind=bind,
        form=f"{form} weight, a scale a channel" if form else "the address of the weight",
        form_bytes=lambda p: p.dim("n") * (p.dim("k") + 4) if form else 8,
        reads_in_place=not form,
        params=params_for(schedule, form or "bfloat16", align),
        programs=programs if form else None,
        sources=("quantize.py",) if form else (),
        files=tuple(f"cutlass/{name}" for name in SOURCES),
        configuration=configuration,
        align=align,
        supports=supports,
        suits=_suits,
        unavailable=lambda: None if schedule.startswith("multistage") else _lacks_hopper(),
        rank=rank,
        devices=("cuda",),
    )


def params_for(schedule: str, dtype: str, align: int) -> tuple[Params, ...]:
    """Tile, then warps and stages, or blocks that share what they load, of each configuration worth measuring."""
    found = (it for it in configurations(90, (dtype,)) if (it.schedule, it.align) == (schedule, align))
    return tuple(
        (
            *zip(("bm", "bn", "bk"), it.tile, strict=True),
            *zip(("wm", "wn"), it.warps, strict=False),
            ("s", it.stages),
        )
        if it.multistage
        else (*zip(("bm", "bn", "bk"), it.tile, strict=True), *zip(("cm", "cn"), it.cluster, strict=False))
        for it in found
    )


def _configuration(schedule: str, dtype: str, align: int, epilogue: str, params: Params) -> Configuration:
    p = dict(params)
    tile = p["bm"], p["bn"], p["bk"]
    if "s" in p:
        return Configuration(80, schedule, dtype, tile, (p["wm"], p["wn"], 1), p["s"], (1, 1, 1), align, epilogue)
    return Configuration(90, schedule, dtype, tile, cluster=(p["cm"], p["cn"], 1), align=align, epilogue=epilogue)


def _quantise(programs: tuple[Program, ...], k: int) -> Steps:
    """x -> buffers 1 and 2."""
    values: dict[str, Source | int] = {"x": given(0), "y": buffer(1), "scale": buffer(2), "m": rows(0)}
    return steps(programs, {**values, "n": k, "x_stride": k})


def _suits(problem: Problem, params: Params) -> str | None:
    p = dict(params)
    for name, dim in (("bm", "m"), ("bn", "n")):
        if p[name] > 64 and p[name] >= 2 * problem.dim(dim):
            return f"{name}={p[name]} is half empty or more with {problem.dim(dim)}"
    return None


def _lacks_hopper() -> str | None:
    if not torch.cuda.is_available():  # what no GPU at all means, whoever loads the kernel says
        return None
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) == (9, 0):
        return None
    return (
        f"TMA and wgmma as it uses them are in GPUs of compute capability 9.0 alone, this one has {major}.{minor}"
    )


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_FORMS = ("", "float8_e4m3fn", "int8")
_CLASSES = {"": (16, 8, 4, 2), "float8_e4m3fn": (16,), "int8": (16,)}
_SCHEDULES = (
    *("multistage", "multistage_stream_k", "cooperative", "cooperative_stream_k", "cooperative_fast"),
    *("pingpong", "pingpong_fast"),
)

KERNELS = tuple(
    linear(schedule, align, form, rank)
    for rank, form in enumerate(_FORMS, 30)
    for align in _CLASSES[form]
    for schedule in _SCHEDULES
    if params_for(schedule, form or "bfloat16", align)
)
