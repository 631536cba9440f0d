"""Instruction sets that kernels are generated for, and whether this machine has them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

from dks.dispatch.environment import cpu_flags

_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64


@lru_cache(maxsize=1)
def _amx_permitted() -> bool:
    """Linux gives tiles to processes that ask; some containers don't let them."""
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA) == 0)


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set.

    Attributes:
        name: in kernels' ids.
        flags: what /proc/cpuinfo must list.
        options: what the compiler is told.
    """

    name: str
    flags: tuple[str, ...]
    options: tuple[str, ...]

    def lack(self) -> str | None:
        """Why this machine can't run it, or None."""
        missing = [flag for flag in self.flags if flag not in cpu_flags()]
        if missing:
            return f"this CPU has no {', '.join(missing)}"
        return "the system refuses this process AMX" if "amx_tile" in self.flags and not _amx_permitted() else None

    def unavailable(self) -> str | None:
        """Why this machine can't run it, or why it need not; or None."""
        if (lack := self.lack()) is not None:
            return lack
        if self.name == "avx2" and all(flag in cpu_flags() for flag in _AVX512.flags):
            return "this CPU has AVX-512: its kernels are these with vectors twice as wide"
        return None


_AVX2 = Isa("avx2", ("avx2", "fma"), ("-mavx2", "-mfma"))
_AVX512 = Isa(
    "avx512",
    (*_AVX2.flags, "avx512f", "avx512bw", "avx512vl", "avx512dq"),
    (*_AVX2.options, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"),
)


def _more(name: str, *features: tuple[str, str]) -> Isa:
    flags, options = zip(*features, strict=True)
    return Isa(name, (*_AVX512.flags, *flags), (*_AVX512.options, *options))


ISAS = {
    isa.name: isa
    for isa in (
        _AVX2,
        _AVX512,
        _more("avx512_vnni", ("avx512_vnni", "-mavx512vnni")),
        _more("avx512_bf16", ("avx512_bf16", "-mavx512bf16")),
        _more("amx_bf16", ("amx_tile", "-mamx-tile"), ("amx_bf16", "-mamx-bf16")),
        _more("amx_int8", ("amx_tile", "-mamx-tile"), ("amx_int8", "-mamx-int8")),
    )
}
"""Every instruction set by name."""

VECTORS = {"avx2": "dks::Avx2", "avx512": "dks::Avx512"}
"""C++ type of a vector of floats, by instruction set."""

ELEMENTS = {"float32": "float", "bfloat16": "dks::bf16"}
"""C++ type of an element, by dtype."""
