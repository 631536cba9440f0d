"""What a multiprocessor has room for: a program that needs more is dropped before anything is launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dks.dispatch.gpu.cubin import Cubin
    from dks.dispatch.gpu.program import Program

ARCHS = (80, 90, 100)
"""Compute capabilities, ten times the major and once the minor number, that programs are compiled for."""

WARP = 32  # threads


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one block. From the CUDA C++ programming guide, table of technical specifications.

    Attributes:
        shared: bytes of shared memory, where a kernel opts in to more than 48 KiB.
        registers: of 32 bits, all threads together.
        per_thread: registers of one thread.
        threads: at most.
        columns: of tensor memory.
    """

    shared: int
    registers: int = 65536
    per_thread: int = 255
    threads: int = 1024
    columns: int = 0


_KIB = 1024
LIMITS = {
    80: Limits(163 * _KIB),
    86: Limits(99 * _KIB),
    87: Limits(163 * _KIB),
    89: Limits(99 * _KIB),
    90: Limits(227 * _KIB),
    100: Limits(227 * _KIB, columns=512),
    103: Limits(227 * _KIB, columns=512),
}
"""By compute capability of the device."""

_GRANULE = 256  # registers are handed out to a warp in so many


def runs_on(arch: int, device: int) -> bool:
    """Whether code compiled for ``arch`` runs on a device of capability ``device``.

    From 9.0 on it is compiled with the features of that one capability (``sm_90a``), which no other has.
    """
    return device == arch if arch >= 90 else device // 10 == arch // 10 and device >= arch


def fits(cubin: Cubin, device: int) -> str | None:
    """Why a compiled program can never be launched on a device of this capability, or None.

    Args:
        device: as ``ARCHS`` has them. What the compiler did not say of the registers is no reason.
    """
    limits = LIMITS.get(device)
    if limits is None or not runs_on(cubin.arch, device):
        return f"compiled for sm_{cubin.arch}, which sm_{device} doesn't run"
    threads = cubin.warps * WARP
    registers = cubin.registers or 0
    held = -(-registers * WARP // _GRANULE) * _GRANULE * cubin.warps
    for what, found, most in (
        ("bytes of shared memory", cubin.shared, limits.shared),
        ("threads a block", threads, limits.threads),
        ("registers a thread", registers, limits.per_thread),
        ("registers a block", held, limits.registers),
        ("columns of tensor memory", cubin.tensor_memory, limits.columns),
    ):
        if found > most:
            return f"needs {found} {what}, sm_{device} has {most}"
    return None


def spilled(cubin: Cubin) -> str | None:
    """Why a program that could be launched is not worth it: it ran out of registers, or None.

    What a thread has no register for lies on its stack, in memory. An ending that needs more room than the sums
    along k leaves some hundred bytes there, once a tile, and such a tile may still be the fastest. Where more lies
    in memory than in all registers, the sums themselves do, and each step along k moves them. Where the compiler
    did not say how large stacks are, that is no reason.
    """
    stack, registers = cubin.stack or 0, 4 * LIMITS[cubin.arch].per_thread
    if stack > registers:
        return f"spills {stack} bytes a thread, more than its {registers} bytes of registers"
    return None


def lacks(program: Program, arch: int) -> str | None:
    """Why a program is not even compiled for an architecture, or None."""
    if arch < 89 and any(each.type == "*fp8e4nv" for each in program.arguments):
        return f"sm_{arch} has no float8_e4m3"
    if dict(program.constants).get("TMA"):
        return no_tma(arch)
    return None


def no_tma(arch: int) -> str | None:
    """Why an architecture copies no tiles by itself, or None."""
    return f"sm_{arch} has no TMA: sm_90 is the first" if arch < 90 else None
