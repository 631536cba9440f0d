"""What CUTLASS's own generator would build, as configurations: a wide sweep starts from these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dks.dispatch.gpu.cutlass.configuration import Configuration

_CUDA = "13.0"  # versions decide what the generator offers
# Digits say how much of what: all schedules of a tile, clusters of one block too, tiles of 256 rows too, the plain
# shapes of wgmma. 9992 is everything, some 700 kernels a type, in half a minute.
_LEVEL = 1221
_ARGUMENTS = {"bfloat16": "bf16", "float16": "f16", "float8_e4m3fn": "e4m3", "int8": "s8"}
_SCHEDULES = {
    "TmaWarpSpecializedCooperative": "cooperative",
    "TmaWarpSpecializedPingpong": "pingpong",
    "TmaWarpSpecializedCooperativeFP8FastAccum": "cooperative_fast",
    "TmaWarpSpecializedPingpongFP8FastAccum": "pingpong_fast",
    "CpAsyncWarpSpecializedCooperative": "cooperative",
    "CpAsyncWarpSpecializedPingpong": "pingpong",
}


class _Recorder:
    """Stands for a manifest of CUTLASS's: keeps the operations that a generator appends."""

    kernel_filter = "all"  # or the generator keeps to one tile and one alignment

    def __init__(self) -> None:
        self.operations: list[Any] = []

    def append(self, operation: Any) -> None:
        self.operations.append(operation)

    def get_instantiation_level(self, **_: int) -> int:
        return _LEVEL


def described(arch: int, dtype: str) -> list[Configuration]:
    """CUTLASS's GEMMs of row-major x and column-major weight that accumulate in 32 bits, without an epilogue.

    Raises:
        ImportError: the package nvidia-cutlass is not installed.
    """
    from cutlass_library import generator

    generators: list[Callable[[Any, str], None]] = []
    if dtype == "int8":
        generators.append(generator.GenerateSM80_TensorOp_16832_TN)
    elif dtype in ("bfloat16", "float16"):
        generators.append(generator.GenerateSM80_TensorOp_16816)
    if arch == 90 and dtype == "float8_e4m3fn":
        generators.append(generator.GenerateSM90_TensorOp_fp8_WGMMA_gemm)
    elif arch == 90 and dtype != "int8":
        generators.append(generator.GenerateSM90_TensorOp_16b_WGMMA_gemm)
    recorder = _Recorder()
    for generate in generators:
        generate(recorder, _CUDA)
    found = (each for operation in recorder.operations for each in _configuration(arch, dtype, operation))
    return list(dict.fromkeys(each for each in found if each.objection() is None))


def _configuration(arch: int, dtype: str, operation: Any) -> Iterator[Configuration]:
    from cutlass_library import library

    if operation.operation_kind != library.OperationKind.Gemm or not _is_linear(dtype, operation):
        return
    tile = operation.tile_description
    shape = tuple(tile.threadblock_shape)
    size = library.DataTypeSize[operation.A.element] // 8
    align = min(operation.A.alignment * size, 16)
    if operation.gemm_kind == library.GemmKind.Universal:
        yield Configuration(arch, "multistage", dtype, shape, tuple(tile.warp_count), int(tile.stages), align=align)
    elif operation.gemm_kind == library.GemmKind.Universal3x:
        schedule = _SCHEDULES.get(operation.kernel_schedule.name, "")
        if operation.tile_scheduler == library.TileSchedulerType.StreamK:
            schedule = "cooperative_stream_k" if schedule == "cooperative" else ""
        if schedule:
            yield Configuration(90, schedule, dtype, shape, cluster=tuple(tile.cluster_shape), align=align)


def _is_linear(dtype: str, operation: Any) -> bool:
    from cutlass_library import library

    wanted = library.DataType[_ARGUMENTS[dtype]]
    sums = library.DataType.s32 if dtype == "int8" else library.DataType.f32
    return bool(
        operation.A.element == operation.B.element == wanted
        and operation.A.layout == library.LayoutType.RowMajor
        and operation.B.layout == library.LayoutType.ColumnMajor
        and operation.tile_description.math_instruction.element_accumulator == sums
    )
