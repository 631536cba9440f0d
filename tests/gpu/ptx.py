"""What PTX, the compiler's last form that people can read, says of how a program reads and writes memory."""

from __future__ import annotations

import re

_GLOBAL = r"\b(?:ld|st)\.global(?:\.\w+)*"
_WIDE = re.compile(
    rf"cp\.async\.c[ag]\.shared\.global[^;]*\b0x10,|{_GLOBAL}\.(?:v4\.[bfu]32|v2\.[bfu]64)\b|cp\.async\.bulk\.tensor"
)
_VECTOR = re.compile(rf"cp\.async\.(?:c[ag]\.shared\.global|bulk)|{_GLOBAL}\.v\d\.")


def moves_16_bytes(text: str) -> bool:
    """Whether it moves 16 bytes of global memory at once."""
    return _WIDE.search(text) is not None


def copies_tiles(text: str) -> bool:
    """Whether the hardware copies whole tiles from global memory and back (TMA)."""
    return all(
        re.search(rf"cp\.async\.bulk\.tensor\.2d\.{way}", text) for way in (r"shared\S*global", r"global\.shared")
    )


def multiplies_on(text: str, arch: int) -> bool:
    """Whether products are an architecture's own whole-tile instructions, and not those of the one before."""
    return {90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch] in text


def moves_elements(text: str, size: int) -> bool:
    """Whether it moves at most elements of ``size`` bytes at once, and so faults at none of their addresses."""
    bits = [int(each) for each in re.findall(rf"{_GLOBAL}\.[bfsu](\d+)\b", text)]
    return bits != [] and max(bits) <= 8 * size and _VECTOR.search(text) is None
