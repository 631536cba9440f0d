"""Programs of linear for at most 8 rows of x, which read each row of weight once; see ``kernels/gemv.py``.

Launched as those of ``matmul.py`` are: the same arguments by name, the same two programs where k is split.
"""

from __future__ import annotations

from collections.abc import Iterator

from dks.dispatch.gpu.linear import (
    DTYPES,
    EPILOGUES,
    MANY,
    add_parts,
    arguments,
    checked,
    endings,
    lack,
    parts_arguments,
    symbol,
)
from dks.dispatch.gpu.matmul import workspace, workspace_bytes
from dks.dispatch.gpu.program import Program
from dks.dispatch.kernel import Params

__all__ = [
    "PARAMS",
    "gemv",
    "impossible",
    "params_for",
    "programs",
    "shared_bytes",
    "suits",
    "workspace",
    "workspace_bytes",
]

SOURCE = "gemv.py"
MOST_ROWS = 8


def _set(rows: int, bn: int, w: int, s: int = 1, split: int = 1) -> Params:
    """With steps of 16 bytes a thread: then x arrives in the registers where its products are made."""
    return (("rows", rows), ("bn", bn), ("bk", 32 * 8 * w), ("w", w), ("s", s), ("split", split))


PARAMS: tuple[Params, ...] = (
    _set(1, 2, 4),
    _set(1, 4, 4),
    _set(1, 8, 4),
    _set(1, 4, 2),
    _set(1, 8, 2),
    _set(1, 4, 1),
    _set(1, 4, 8),
    _set(1, 4, 4, s=3),
    _set(1, 4, 2, split=4),
    _set(1, 8, 2, split=8),
    _set(2, 4, 4),
    _set(2, 4, 2, split=4),
    _set(4, 2, 4),
    _set(4, 4, 4),
    _set(4, 4, 2, split=4),
    _set(8, 2, 4),
    _set(8, 2, 2, split=4),
)
"""What is measured for elements of two bytes.

rows: of x, a power of two; bn, bk: rows and elements of weight that a block reads a step; w: warps; s: steps read
ahead through shared memory, 1 for none; split: pieces of k.
"""


def params_for(dtype: str, _align: int = 16) -> tuple[Params, ...]:
    """The parameter sets that are measured, of any class: with one-byte elements, as many bytes a step."""
    if DTYPES[dtype].size == 2:
        return PARAMS
    sets = (dict(each) for each in PARAMS)
    return tuple(tuple({**each, "bn": each["bn"] // 2, "bk": each["bk"] * 2}.items()) for each in sets)


def gemv(
    dtype: str, params: Params, align: int, *, bias: bool = False, epilogue: str = "none", out: str = ""
) -> tuple[Program, ...]:
    """The programs of one variant, meant for m <= rows, in launching order; else as ``matmul``."""
    p = dict(params)
    out = checked(dtype, epilogue, out)
    block = {"ROWS": p["rows"], "BN": p["bn"], "BK": p["bk"], "STAGES": p["s"]}
    if p["split"] == 1:
        return (
            Program(
                symbol=symbol("gemv", params, dtype, out, bias, epilogue, align),
                source=SOURCE,
                function="gemv",
                arguments=arguments(dtype, out),
                constants=tuple({**block, **endings(dtype, bias, epilogue)}.items()),
                align=align,
                warps=p["w"],
                stages=p["s"],
                grid=((("n", p["bn"]),), (), (("m", p["rows"]),)),
            ),
        )
    parts = Program(
        symbol=symbol("gemv_parts", params, dtype, "", False, "none", align),
        source=SOURCE,
        function="gemv_parts",
        arguments=parts_arguments(dtype, out),
        constants=tuple({**block, "SPLIT": p["split"]}.items()),
        align=align,
        warps=p["w"],
        stages=p["s"],
        grid=((("n", p["bn"]),), (("", p["split"]),), (("m", p["rows"]),)),
    )
    return parts, add_parts(dtype, out, p["split"], align, bias, epilogue)


def shared_bytes(params: Params, dtype: str) -> int:
    """Bytes of shared memory of a block, estimated: what is read ahead of x and weight, and the sums of warps."""
    p = dict(params)
    ahead = p["s"] * (p["rows"] + p["bn"]) * p["bk"] * DTYPES[dtype].size if p["s"] > 1 else 0
    return max(ahead, 4 * p["w"] * p["rows"] * p["bn"])


def impossible(dtype: str, params: Params, arch: int) -> str | None:
    """Why there is no such program on an architecture (80, 90 ...), or None. Asked before it is compiled."""
    return lack(dtype, shared_bytes(params, dtype), arch)


def suits(m: int, n: int, k: int, params: Params) -> str | None:
    """Why a parameter set can't be meant for a shape, or None. It would be right, and is not measured there."""
    p = dict(params)
    if m > p["rows"]:
        return f"takes {p['rows']} rows, not {m}"
    if p["rows"] >= 2 * m:
        return f"half of its {p['rows']} rows or more would be empty"
    if p["bk"] >= 2 * k:
        return f"bk={p['bk']} is half empty or more with {k}"
    blocks = -(-n // p["bn"])
    if p["split"] > 1 and blocks > 8 * MANY:
        return f"{blocks} blocks fill a device without a split"
    if p["split"] > 1 and k < 2 * p["split"] * p["bk"]:
        return f"k={k} makes pieces of less than 2 steps"
    return None


def programs() -> Iterator[Program]:
    """All that the default sweep compiles: aligned and not; every set for bf16, some for other variants."""
    found: dict[Program, None] = {}
    for dtype, element in DTYPES.items():
        for align in (16, element.size):
            for params in params_for(dtype) if dtype == "bfloat16" else params_for(dtype)[1::6]:
                found.update(dict.fromkeys(gemv(dtype, params, align)))
    for epilogue in EPILOGUES:
        found.update(dict.fromkeys(gemv("bfloat16", PARAMS[1], 16, bias=True, epilogue=epilogue)))
    yield from found
