"""What the families of programs share: elements as Triton names them, arguments, names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dks.dispatch.gpu.program import Argument
from dks.dispatch.kernel import Params
from dks.dispatch.problem import Precision


@dataclass(frozen=True, slots=True)
class Element:
    """A dtype.

    Attributes:
        name: Triton's.
        size: bytes.
    """

    name: str
    size: int

    def pointer(self, name: str) -> Argument:
        """An address of such elements, which has the call's alignment."""
        return Argument(name, f"*{self.name}", 1)

    def step(self, name: str) -> Argument:
        """A stride or a width, in elements, that keeps addresses in the call's alignment."""
        return Argument(name, "i32", self.size)


ELEMENTS: Mapping[str, Element] = {
    "float32": Element("fp32", 4),
    "bfloat16": Element("bf16", 2),
    "float16": Element("fp16", 2),
    "int8": Element("i8", 1),
    "float8_e4m3fn": Element("fp8e4nv", 1),
}
"""By their names in torch."""

FLOATS = ("float32", "bfloat16", "float16")
"""What most families take; linear has its own."""


def element_of(dtype: str) -> Element:
    """Raises ValueError for a dtype that is none of ``FLOATS``."""
    if dtype not in FLOATS:
        raise ValueError(f"dtype: found {dtype!r}, expected one of {', '.join(FLOATS)}")
    return ELEMENTS[dtype]


EXACTNESS: Mapping[str, Precision] = {
    "float32": Precision.EXACT,
    "bfloat16": Precision.BF16,
    "float16": Precision.BF16,
}
"""Of arithmetic in float32."""

SWEPT = ("bfloat16",)
"""The dtypes that a sweep compiles unless it is asked for others."""


def aligns(dtype: str) -> tuple[int, int]:
    """The alignment classes that are compiled, in bytes: whole vectors, and nothing but elements."""
    return 16, ELEMENTS[dtype].size


def class_of(dtype: str, align: int) -> int:
    """An alignment class in bytes; where ``align`` is 0 that of nothing but elements."""
    return align or element_of(dtype).size


def counts(*names: str) -> tuple[Argument, ...]:
    """Numbers of which nothing is known."""
    return tuple(Argument(name, "i32") for name in names)


def symbol(*words: str | int, params: Params, align: int) -> str:
    """A program's name, from what tells it from others of its family."""
    return "_".join(("dks", *map(str, words), *(f"{name}{value}" for name, value in params), f"a{align}"))
