"""What linear's families of programs share: dtypes, endings, arguments, and the sum of pieces of k."""

from __future__ import annotations

from collections.abc import Iterable

from dks.dispatch.gpu.elements import ELEMENTS, Element
from dks.dispatch.gpu.limits import LIMITS
from dks.dispatch.gpu.program import Argument, Program
from dks.dispatch.kernel import Params

EPILOGUE_SOURCE = "epilogue.py"

WORKSPACE = ELEMENTS["float32"].pointer("workspace")

DTYPES: dict[str, Element] = {name: ELEMENTS[name] for name in ("bfloat16", "float16", "int8", "float8_e4m3fn")}
"""Of x and weight. Those of one byte have scales."""

EPILOGUES = ("none", "relu", "gelu", "gelu_tanh", "silu", "add")

MANY = 256
"""Tiles that fill a device: more multiprocessors than today's have."""


def checked(dtype: str, epilogue: str, out: str) -> str:
    """The dtype of y, after a look at what was asked for. Raises ValueError."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    if epilogue not in EPILOGUES:
        raise ValueError(f"epilogue: found {epilogue!r}, expected one of {', '.join(EPILOGUES)}")
    out = out or (dtype if DTYPES[dtype].size == 2 else "bfloat16")
    if out not in ("bfloat16", "float16"):
        raise ValueError(f"out: found {out!r}, expected bfloat16 or float16")
    return out


def lack(dtype: str, shared: int, arch: int) -> str | None:
    """What an architecture lacks for a dtype and so many bytes of shared memory, or None."""
    if dtype == "float8_e4m3fn" and arch < 89:
        return f"sm_{arch} has no fp8"
    limit = LIMITS[arch].shared
    return f"needs {shared} bytes of shared memory, sm_{arch} has {limit}" if shared > limit else None


def arguments(dtype: str, out: str) -> tuple[Argument, ...]:
    """Of a kernel that computes y whole. n is a row of y, k one of x and weight, so each has its element's size."""
    x, y = DTYPES[dtype], DTYPES[out]
    return (
        *(x.pointer(name) for name in ("x", "weight")),
        *(y.pointer(name) for name in ("y", "bias", "residual")),
        *(ELEMENTS["float32"].pointer(name) for name in ("x_scale", "weight_scale")),
        *(Argument("m", "i32"), y.step("n"), x.step("k")),
        *(x.step(name) for name in ("x_stride", "weight_stride")),
        *(y.step(name) for name in ("y_stride", "residual_stride")),
    )


def some(names: Iterable[str], dtype: str, out: str) -> tuple[Argument, ...]:
    """Those of ``arguments`` with these names, in their order."""
    by_name = {each.name: each for each in arguments(dtype, out)}
    return tuple(by_name[name] for name in names)


def parts_arguments(dtype: str, out: str) -> tuple[Argument, ...]:
    """Of a kernel that keeps the sums of pieces."""
    before, after = ("x", "weight"), ("m", "n", "k", "x_stride", "weight_stride")
    return *some(before, dtype, out), WORKSPACE, *some(after, dtype, out)


def endings(dtype: str, bias: bool, epilogue: str) -> dict[str, int | str]:
    """The constants of ``finish``."""
    return {"BIAS": int(bias), "EPILOGUE": epilogue, "SCALED": int(DTYPES[dtype].size == 1)}


def add_parts(dtype: str, out: str, split: int, align: int, bias: bool, epilogue: str) -> Program:
    """The program that adds the sums of ``split`` pieces and ends y."""
    names = ("y", "bias", "residual", "x_scale", "weight_scale", "m", "n", "y_stride", "residual_stride")
    rows, columns = 4, 256
    scaled = endings(dtype, bias, epilogue)["SCALED"]
    return Program(
        # Of x's dtype it knows no more than whether there are scales.
        symbol=symbol("add_parts", (("split", split),), "scaled" if scaled else "", out, bias, epilogue, align),
        source=EPILOGUE_SOURCE,
        function="add_parts",
        arguments=(WORKSPACE, *some(names, dtype, out)),
        constants=tuple({"BM": rows, "BN": columns, "SPLIT": split, **endings(dtype, bias, epilogue)}.items()),
        align=align,
        warps=4,
        stages=1,
        grid=((("m", rows),), (("n", columns),), ()),
    )


def symbol(kernel: str, params: Params, dtype: str, out: str, bias: bool, epilogue: str, align: int) -> str:
    """A name that only this variant has."""
    ending = ("" if out == dtype else out, "bias" if bias else "", "" if epilogue == "none" else epilogue)
    sizes = (f"{name}{value}" for name, value in params)
    return "_".join(part for part in ("dks", kernel, dtype, *ending, *sizes, f"a{align}") if part)
