"""Programs of paged attention of one query row a sequence (``kernels/paged.py``).

The number of splits is an argument: one compiled program serves all of them, and its value is that of the parameter
of the same name.
"""

from __future__ import annotations

from collections.abc import Iterator

from dks.dispatch.gpu.elements import SWEPT, aligns, counts, element_of, symbol
from dks.dispatch.gpu.program import Argument, Program
from dks.dispatch.kernel import Params

HEAD_SIZES = (64, 128)
PAGES = (16, 64)
_MOST_SPLITS = 32
_FEWEST_ROWS = 16  # of a matrix product, which is what query heads are that share their keys

PARAMS: tuple[Params, ...] = tuple(
    (("splits", splits), ("bn", bn), ("warps", warps), ("stages", stages))
    for bn, warps, stages in ((32, 4, 7), (64, 4, 5), (128, 4, 3))
    for splits in (1, 2, 4, 8, 16, _MOST_SPLITS)
)
"""Programs that share the keys of a sequence, keys of a block, warps, stages.

Numbers of pages are loaded first and keys after them, so that stages are shared: of 5, each is two blocks ahead.
"""

SCALAR_PARAMS: tuple[Params, ...] = tuple(params for params in PARAMS if dict(params)["bn"] == 32)
"""Those for calls that are not aligned: single elements are loaded without a pipeline, into registers."""


def objection(d: int) -> str | None:
    """Why there is no program for heads of d elements, or None."""
    return None if d in HEAD_SIZES else f"takes heads of {' or '.join(map(str, HEAD_SIZES))} elements, not {d}"


def unsuited(params: Params, kv: int) -> str | None:
    """Why a parameter set can't be meant for sequences of kv keys, though it would be right, or None."""
    p = dict(params)
    blocks = -(-kv // p["bn"])
    return None if p["splits"] <= blocks else f"{blocks} blocks of keys leave some of {p['splits']} splits idle"


def decode(dtype: str, d: int, page: int, groups: int, params: Params, align: int) -> tuple[Program, ...]:
    """q (b, h, d), k and v (pages, page, hkv, d), block_table (b, max_pages) and lengths (b,) int32 -> y (b, h, d).

    With several splits, two programs run one after the other, with ``workspace_bytes`` between them.

    Args:
        dtype: of q, k, v and y.
        d: one of ``HEAD_SIZES``.
        page: keys of a page.
        groups: h / hkv.
        params: one of ``PARAMS``.
        align: of the addresses but those of block_table and lengths, and of the strides but that of block_table.

    Raises:
        ValueError: dtype or d is none of those, or there are more splits than the second program adds up.
    """
    element, p = element_of(dtype), dict(params)
    if d not in HEAD_SIZES:
        raise ValueError(f"d: found {d}, expected one of {', '.join(map(str, HEAD_SIZES))}")
    if not 1 <= p["splits"] <= _MOST_SPLITS:
        raise ValueError(f"splits: found {p['splits']}, expected 1 to {_MOST_SPLITS}")
    code = tuple(pair for pair in params if pair[0] != "splits")
    rows = max(_FEWEST_ROWS, 1 << (groups - 1).bit_length())
    first = Program(
        symbol=symbol("decode", element.name, f"d{d}", f"page{page}", f"rows{rows}", params=code, align=align),
        source="paged.py",
        function="decode",
        arguments=(
            *map(element.pointer, "qkv"),
            Argument("block_table", "*i32"),
            Argument("lengths", "*i32"),
            element.pointer("y"),
            _WORKSPACE,
            *counts("b", "h", "hkv", "splits"),
            *map(element.step, ("q_b", "q_h", "k_p", "k_s", "k_h", "v_p", "v_s", "v_h")),
            *counts("table_stride"),
            Argument("scale", "fp32"),
        ),
        constants=(("D", d), ("PAGE", page), ("BH", rows), ("BN", p["bn"]), ("UPCAST", 0)),
        align=align,
        warps=p["warps"],
        stages=p["stages"],
        grid=((("b", 1),), (("hkv", 1),), (("splits", 1),)),
    )
    return (first,) if p["splits"] == 1 else (first, _combine(dtype, d, align))


def workspace_bytes(b: int, h: int, d: int, params: Params) -> int:
    """Bytes of float32 that ``decode`` leaves for the second program: for each split its d values and a sum."""
    splits = dict(params)["splits"]
    return 0 if splits == 1 else 4 * b * h * splits * (d + 1)


def programs() -> Iterator[Program]:
    """What a sweep compiles: as many groups as fit the fewest rows."""
    found = (
        program
        for dtype in SWEPT
        for align in aligns(dtype)
        for d in HEAD_SIZES
        for page in PAGES
        for params in (PARAMS if align > element_of(dtype).size else SCALAR_PARAMS)
        for program in decode(dtype, d, page, 1, params, align)
    )
    yield from dict.fromkeys(found)


_WORKSPACE = element_of("float32").pointer("workspace")


def _combine(dtype: str, d: int, align: int) -> Program:
    element = element_of(dtype)
    return Program(
        symbol=symbol("decode_combine", element.name, f"d{d}", params=(), align=align),
        source="paged.py",
        function="combine",
        arguments=(_WORKSPACE, element.pointer("y"), *counts("b", "h", "splits")),
        constants=(("D", d), ("SPLITS", _MOST_SPLITS)),
        align=align,
        warps=4,
        stages=1,
        grid=((("b", 1), ("h", 1)), (), ()),
    )
