"""A CUTLASS kernel of ``linear`` before it is compiled, and the ones that are worth measuring.

What CUTLASS itself would build is in ``upstream``. Nothing here needs CUTLASS or a compiler.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from dks.dispatch.gpu.limits import LIMITS

HERE = Path(__file__).parent
_SHARED = ("abi.h", "call.hpp", "functions.j2")
SOURCES = (*_SHARED, "multistage.cu.j2", "hopper.cu.j2")
"""All that kernels are rendered from, beside this file."""

Shape = tuple[int, int, int]
"""Extents along m (rows of x), n (output channels) and k."""

SIZES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}
"""Bytes of an element of x and of the weight; what a kernel may take."""

_ELEMENTS = {
    "bfloat16": "cutlass::bfloat16_t",
    "float16": "cutlass::half_t",
    "float8_e4m3fn": "cutlass::float_e4m3_t",
    "int8": "int8_t",
}

# NaN passes through all of them. GELU_taylor is the tanh form, on the GPU's approximate tanh.
_THREAD = "cutlass::epilogue::thread::"
ACTIVATIONS: Mapping[str, str] = {
    "none": "",
    "relu": f"{_THREAD}ReLu",
    "gelu": f"{_THREAD}GELU",
    "gelu_tanh": f"{_THREAD}GELU_taylor",
    "silu": f"{_THREAD}SiLu",
    "add": "",
}
"""CUTLASS's functor of each epilogue of ``linear``; ``add`` adds a residual instead."""

_COOPERATIVE, _PINGPONG = "Cooperative", "Pingpong"
_HOPPER_SCHEDULES: Mapping[str, tuple[str, bool]] = {
    "cooperative": (_COOPERATIVE, False),
    "cooperative_stream_k": (_COOPERATIVE, False),
    "cooperative_fast": (_COOPERATIVE, True),
    "pingpong": (_PINGPONG, False),
    "pingpong_fast": (_PINGPONG, True),
}
"""Schedule -> CUTLASS's word for it, and whether fp8 products are summed without promotion to full float32."""

SCHEDULES = ("multistage", "multistage_stream_k", *_HOPPER_SCHEDULES)
"""How a kernel works: cp.async and mma.sync on sm_80 and later, or warps with a role each on sm_90."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """One kernel.

    Attributes:
        arch: compute capability that it is compiled for, 80 or 90.
        schedule: one of SCHEDULES.
        dtype: of x and of the weight; one of SIZES. The output is of that type, of bfloat16 for fp8 and int8.
        tile: what a block computes.
        warps: multistage: warps of a block.
        stages: multistage: tiles in flight. Else 0: as many as shared memory has room for.
        cluster: sm_90: blocks that share what they load.
        align: bytes by which addresses, rows' distances, n and k are divisible.
        epilogue: one of ACTIVATIONS. A bias is optional in each call.
    """

    arch: int
    schedule: str
    dtype: str
    tile: Shape
    warps: Shape = (0, 0, 0)
    stages: int = 0
    cluster: Shape = (1, 1, 1)
    align: int = 16
    epilogue: str = "none"

    @property
    def symbol(self) -> str:
        """Of the exported functions; unique among configurations."""
        parts = _by(self.warps) if self.multistage else _by(self.cluster)
        name = f"dks_cutlass_{self.arch}_{self.schedule}_{self.dtype}_{_by(self.tile)}_{parts}_s{self.stages}"
        return f"{name}_align{self.align}_{self.epilogue}"

    @property
    def multistage(self) -> bool:
        """Whether it works as on sm_80."""
        return self.schedule not in _HOPPER_SCHEDULES

    @property
    def stream_k(self) -> bool:
        """Whether blocks share the sums of a tile where the last wave would be ragged; needs a workspace."""
        return self.schedule.endswith("stream_k")

    @property
    def tma(self) -> bool:
        """Whether the bulk copy engine loads, which takes 16-byte alignment."""
        return not self.multistage and self.align >= 16

    @property
    def scales(self) -> bool:
        """Whether sums are multiplied by scales of rows and channels."""
        return SIZES[self.dtype] == 1

    @property
    def target(self) -> str:
        """nvcc's name of the architecture; wgmma and TMA are in its ``a`` form alone."""
        return f"{self.arch}{'' if self.multistage else 'a'}"

    @property
    def memory(self) -> int:
        """Bytes that compiling it takes at most: 0.8 and 3.6 GB were measured with nvcc 13.0."""
        return 1_000_000_000 if self.multistage else 4_000_000_000

    # What the templates read.

    @property
    def template(self) -> str:
        return "multistage.cu.j2" if self.multistage else "hopper.cu.j2"

    @property
    def element(self) -> str:
        return _ELEMENTS[self.dtype]

    @property
    def out_element(self) -> str:
        return _ELEMENTS["bfloat16" if self.scales else self.dtype]

    @property
    def accumulator(self) -> str:
        return "int32_t" if self.dtype == "int8" else "float"

    @property
    def activation(self) -> str:
        return ACTIVATIONS[self.epilogue]

    @property
    def warp_tile(self) -> Shape:
        m, n, k = (size // warps for size, warps in zip(self.tile, self.warps, strict=True))
        return m, n, k

    @property
    def instruction_k(self) -> int:
        return 32 // SIZES[self.dtype]

    @property
    def operation(self) -> str:
        return f"cutlass::arch::OpMultiplyAdd{'Saturate' if self.dtype == 'int8' else ''}"

    @property
    def mainloop_schedule(self) -> str:
        word, fast = _HOPPER_SCHEDULES[self.schedule]
        return f"Kernel{'Tma' if self.tma else 'CpAsync'}WarpSpecialized{word}{'FP8FastAccum' if fast else ''}"

    @property
    def epilogue_schedule(self) -> str:
        word, _ = _HOPPER_SCHEDULES[self.schedule]
        return f"TmaWarpSpecialized{word if word == _COOPERATIVE else ''}"

    def on(self, device: int) -> Configuration:
        """As it is compiled for a device of this compute capability: what works as on sm_80 runs on all later ones,
        in code of their own."""
        return replace(self, arch=device) if self.multistage else self

    def objection(self) -> str | None:
        """Why there can be no such kernel, or None; asked before anything is compiled."""
        return next(self._objections(), None)

    def _objections(self) -> Iterator[str]:
        """Each may rely on those before it not having been raised."""
        if self.schedule not in SCHEDULES or self.dtype not in SIZES or self.epilogue not in ACTIVATIONS:
            yield f"{self.schedule}, {self.dtype}, {self.epilogue}: not all of them are known"
        if self.arch not in LIMITS:
            yield f"sm_{self.arch}: expected one of {', '.join(f'sm_{arch}' for arch in LIMITS)}"
        yield from self._multistage_objections() if self.multistage else self._hopper_objections()
        # Two stages at least, or nothing overlaps.
        shared = max(self.stages, 2) * (self.tile[0] + self.tile[1]) * self.tile[2] * SIZES[self.dtype]
        most = LIMITS[self.arch].shared
        if shared > most:
            yield f"needs {shared} bytes of shared memory, sm_{self.arch} gives {most}"

    def _multistage_objections(self) -> Iterator[str]:
        wide = SIZES[self.dtype] == 2
        if self.dtype == "float8_e4m3fn":
            yield "fp8 is multiplied on sm_90 by the other schedules"
        if self.align not in ((16, 8, 4, 2) if wide else (16, 8, 4)):
            yield f"{self.dtype} aligned to {self.align} bytes: expected 16, 8{', 4 or 2' if wide else ' or 4'}"
        # cp.async copies 4 bytes at least: below that, registers hold what is in flight, and there are two stages.
        if (self.stages == 2) != (self.align == 2) or self.stages < 2:
            yield f"{self.stages} stages aligned to {self.align} bytes: expected 2 with 2 bytes, else more"
        if 0 in self.warps or any(tile % warps for tile, warps in zip(self.tile, self.warps, strict=True)):
            yield f"warps {_by(self.warps)} do not divide the tile {_by(self.tile)}"
        m, n, k = self.warp_tile
        if m % 16 or n % 8 or k % self.instruction_k:
            yield f"a warp's {m}x{n}x{k}: expected multiples of 16x8x{self.instruction_k}"

    def _hopper_objections(self) -> Iterator[str]:
        word, fast = _HOPPER_SCHEDULES[self.schedule]
        size = SIZES[self.dtype]
        if self.arch != 90 or self.dtype == "int8":
            yield f"{self.schedule} is for bfloat16, float16 and fp8 on sm_90"
        if fast and size != 1:
            yield f"{self.schedule} is for fp8: other types are summed in float32 anyway"
        if self.align != 16 and (self.align != 8 or size != 2):
            yield f"{self.dtype} aligned to {self.align} bytes: expected 16, or 8 for 16-bit types"
        if not self.tma and (self.cluster != (1, 1, 1) or self.stream_k):
            yield "clusters and stream-K go with 16-byte alignment"
        least = 128 if word == _COOPERATIVE else 64
        if self.tile[0] % least or self.tile[1] % 8 or self.tile[2] * size % 128:
            yield f"tile {_by(self.tile)}: {self.schedule} takes multiples of {least}x8x{128 // size}"

    def digest(self) -> str:
        """First 16 hex digits of a SHA-256 over all that decides the code but nvcc and CUTLASS."""
        text = "\0".join(str(getattr(self, name)) for name in self.__slots__)
        return hashlib.sha256(f"{text}\0{_sources(self.template)}".encode()).hexdigest()[:16]


@lru_cache
def _sources(template: str) -> str:
    return "\0".join((HERE / name).read_text(encoding="utf-8") for name in (template, *_SHARED))


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape))


# CUTLASS's own shapes, those that win somewhere: large tiles where there are many rows, small ones with many stages
# where there are few.
_MULTISTAGE_16: tuple[tuple[Shape, Shape, int], ...] = (
    ((128, 256, 32), (2, 4, 1), 3),
    ((256, 128, 32), (4, 2, 1), 3),
    ((128, 128, 32), (2, 2, 1), 4),
    ((128, 128, 64), (2, 2, 1), 3),
    ((64, 256, 32), (1, 4, 1), 4),
    ((128, 64, 32), (2, 2, 1), 6),
    ((64, 128, 64), (2, 2, 1), 3),
    ((64, 64, 64), (2, 2, 1), 5),
)
_MULTISTAGE_INT8: tuple[tuple[Shape, Shape, int], ...] = (
    ((128, 256, 64), (2, 4, 1), 3),
    ((256, 128, 64), (4, 2, 1), 3),
    ((128, 128, 64), (2, 2, 1), 5),
    ((64, 128, 128), (2, 2, 1), 3),
    ((64, 64, 128), (2, 2, 1), 5),
)
_UNALIGNED: tuple[tuple[Shape, Shape, int], ...] = (
    ((128, 128, 32), (2, 2, 1), 2),
    ((64, 64, 32), (2, 2, 1), 2),
)
_STREAM_K: tuple[tuple[Shape, Shape, int], ...] = (((128, 128, 32), (2, 2, 1), 4),)

# Depth is 128 bytes, one swizzle of shared memory. Pairs of blocks share a tile of x or of the weight.
_HOPPER: tuple[tuple[str, Shape, Shape], ...] = (
    ("cooperative", (128, 128, 128), (1, 1, 1)),
    ("cooperative", (128, 128, 128), (2, 1, 1)),
    ("cooperative", (128, 256, 128), (1, 1, 1)),
    ("cooperative", (128, 256, 128), (2, 1, 1)),
    ("cooperative", (128, 256, 128), (1, 2, 1)),
    ("cooperative", (256, 128, 128), (2, 1, 1)),
    ("cooperative", (256, 128, 128), (1, 2, 1)),
    ("cooperative_stream_k", (128, 128, 128), (1, 1, 1)),
    ("cooperative_stream_k", (128, 256, 128), (2, 1, 1)),
    ("pingpong", (64, 64, 128), (1, 1, 1)),
    ("pingpong", (64, 128, 128), (1, 1, 1)),
    ("pingpong", (64, 128, 128), (2, 1, 1)),
    ("pingpong", (64, 256, 128), (1, 1, 1)),
    ("pingpong", (64, 256, 128), (2, 1, 1)),
)

_FAST: tuple[tuple[str, Shape, Shape], ...] = (
    ("cooperative_fast", (128, 128, 128), (1, 1, 1)),
    ("cooperative_fast", (128, 256, 128), (2, 1, 1)),
    ("pingpong_fast", (64, 128, 128), (1, 1, 1)),
)
_HOPPER_UNALIGNED: tuple[tuple[str, Shape], ...] = (
    ("cooperative", (128, 128, 128)),
    ("pingpong", (64, 128, 128)),
)


def configurations(
    arch: int, dtypes: tuple[str, ...] = tuple(SIZES), epilogues: tuple[str, ...] = ("none",)
) -> Iterator[Configuration]:
    """What the default sweep would compile for a device of this compute capability."""
    for dtype in dtypes:
        for epilogue in epilogues:
            if dtype != "float8_e4m3fn":
                yield from _multistage(arch, dtype, epilogue)
            if arch == 90 and dtype != "int8":
                yield from _hopper(dtype, epilogue)


def _multistage(arch: int, dtype: str, epilogue: str) -> Iterator[Configuration]:
    wide = SIZES[dtype] == 2
    for tile, warps, stages in _MULTISTAGE_16 if wide else _MULTISTAGE_INT8:
        for align in (16, 8, 4):
            yield Configuration(arch, "multistage", dtype, tile, warps, stages, align=align, epilogue=epilogue)
    for tile, warps, stages in _UNALIGNED if wide else ():
        yield Configuration(arch, "multistage", dtype, tile, warps, stages, align=2, epilogue=epilogue)
    for tile, warps, stages in _STREAM_K if wide else ():
        yield Configuration(arch, "multistage_stream_k", dtype, tile, warps, stages, epilogue=epilogue)


def _hopper(dtype: str, epilogue: str) -> Iterator[Configuration]:
    size = SIZES[dtype]
    for schedule, (m, n, depth), cluster in (*_HOPPER, *(_FAST if size == 1 else ())):
        tile = m, n, depth // size
        yield Configuration(90, schedule, dtype, tile, cluster=cluster, epilogue=epilogue)
    for schedule, (m, n, depth) in _HOPPER_UNALIGNED if size == 2 else ():
        yield Configuration(90, schedule, dtype, (m, n, depth // size), align=8, epilogue=epilogue)
