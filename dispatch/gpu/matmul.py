"""Programs of linear in tiles of the tensor cores: y = epilogue(x @ weight.T + bias); see ``kernels/matmul.py``.

``matmul`` returns the programs of one call, to be launched in order on one stream. All take their arguments by
name from the same values:

    x, weight, y          addresses; x (m, k), weight (n, k), y (m, n), elements of a row side by side
    bias, residual        (n,) and (m, n), of y's dtype; 0 where the variant has none
    x_scale, weight_scale float32 (m,) and (n,) of int8 and fp8: y = (x * x_scale) @ (weight * weight_scale).T;
                          0 otherwise. One scale for a whole tensor is handed over as so many equal ones.
    m, n, k               at least 1 each
    x_stride, ...         of x, weight, y and residual: elements from one row to the next, below 2**23
    workspace             address of ``workspace_bytes`` that nothing else uses meanwhile, aligned to 16

Most are one program and need no workspace. Two ways share work along k between blocks; in each a first program
writes float32 sums of pieces to the workspace, and a second adds them in their order and ends as the other would:
two launches, and no atomics, so that every run gives the same bits.

- split: every tile in so many pieces, (split, m, n).
- streamk: the tiles of the last wave in even shares of all blocks that run at once (``kernels/streamk.py``). Both
  programs take the number of blocks from their grid, which the launcher cuts to what the device runs at once.
  So nothing but the workspace's size depends on the device, and that has a bound: ``workspace_bytes``. Bits repeat
  on devices of the same number of multiprocessors.

With tma the hardware copies whole tiles (from sm_90 on): addresses and strides must be divisible by 16 bytes, which
the 16-byte class says, and strides be at least a row's width. The descriptions of the matrices are made on the
device, in the launcher's scratch memory (``dks_gpu_scratch``).
"""

from __future__ import annotations

from collections.abc import Iterator

from dks.dispatch.gpu.linear import (
    DTYPES,
    EPILOGUES,
    MANY,
    WORKSPACE,
    add_parts,
    arguments,
    checked,
    endings,
    parts_arguments,
    some,
    symbol,
)
from dks.dispatch.gpu.matmul_params import (
    PARAMS,
    UNALIGNED,
    contradiction,
    impossible,
    params_for,
    shared_bytes,
    suits,
    tile,
)
from dks.dispatch.gpu.program import Factor, Program
from dks.dispatch.kernel import Params

__all__ = [
    "DTYPES",
    "EPILOGUES",
    "MANY",
    "PARAMS",
    "UNALIGNED",
    "impossible",
    "matmul",
    "params_for",
    "programs",
    "shared_bytes",
    "suits",
    "workspace",
    "workspace_bytes",
]

SOURCE, STREAMK_SOURCE = "matmul.py", "streamk.py"


def matmul(
    dtype: str, params: Params, align: int, *, bias: bool = False, epilogue: str = "none", out: str = ""
) -> tuple[Program, ...]:
    """The programs of one variant, in launching order; see the module.

    Args:
        dtype: of x and weight, a key of ``DTYPES``.
        params: as in ``PARAMS``.
        align: bytes that divide every address and row's distance, k in x's elements and n in y's.
        bias: whether one is added.
        epilogue: one of ``EPILOGUES``; ``add`` adds the residual.
        out: dtype of y, bias and residual; x's where nothing is said, bfloat16 for those of one byte.

    Raises:
        ValueError: dtype, out or epilogue is none of those; parameters that contradict each other.
    """
    out = checked(dtype, epilogue, out)
    if why := contradiction(params, align):
        raise ValueError(f"params: found {why}")
    p = dict(params)
    if p["streamk"]:
        return _shared(dtype, params, align, bias=bias, epilogue=epilogue, out=out)
    if p["split"] > 1:
        return _split(dtype, params, align, bias=bias, epilogue=epilogue, out=out)
    constants = {**_sizes(params), "RESIDENT": p["resident"], **endings(dtype, bias, epilogue)}
    return (
        Program(
            symbol=symbol("matmul", params, dtype, out, bias, epilogue, align),
            source=SOURCE,
            function="matmul",
            arguments=arguments(dtype, out),
            constants=tuple({**constants, "TMA": p["tma"], "FLAT": p["flat"], "UPCAST": 0}.items()),
            align=align,
            warps=p["w"],
            stages=p["s"],
            grid=(_tiles(params), (), ()),
            resident=p["resident"],
        ),
    )


def _sizes(params: Params) -> dict[str, int]:
    p = dict(params)
    return {"BM": p["bm"], "BN": p["bn"], "BK": p["bk"], "GROUP": p["group"]}


def _tiles(params: Params) -> tuple[Factor, ...]:
    p = dict(params)
    return ("m", p["bm"]), ("n", p["bn"])


def _split(dtype: str, params: Params, align: int, *, bias: bool, epilogue: str, out: str) -> tuple[Program, ...]:
    p = dict(params)
    parts = Program(
        symbol=symbol("matmul_parts", params, dtype, "", False, "none", align),
        source=SOURCE,
        function="matmul_parts",
        arguments=parts_arguments(dtype, out),
        constants=tuple({**_sizes(params), "SPLIT": p["split"], "TMA": p["tma"], "UPCAST": 0}.items()),
        align=align,
        warps=p["w"],
        stages=p["s"],
        grid=(_tiles(params), (("", p["split"]),), ()),
    )
    return parts, add_parts(dtype, out, p["split"], align, bias, epilogue)


def _shared(dtype: str, params: Params, align: int, *, bias: bool, epilogue: str, out: str) -> tuple[Program, ...]:
    p = dict(params)
    sizes, ending = {**_sizes(params), "BLOCKS": p["resident"] * MANY}, endings(dtype, bias, epilogue)
    steps = (*_tiles(params), ("k", p["bk"]))  # of all tiles: no block without one
    whole = Program(
        symbol=symbol("matmul_shared", params, dtype, out, bias, epilogue, align),
        source=STREAMK_SOURCE,
        function="matmul_shared",
        arguments=(*arguments(dtype, out), WORKSPACE),
        constants=tuple({**sizes, **ending, "TMA": p["tma"], "UPCAST": 0}.items()),
        align=align,
        warps=p["w"],
        stages=p["s"],
        grid=(steps, (), ()),
        resident=p["resident"],
    )
    names = ("y", "bias", "residual", "x_scale", "weight_scale", "m", "n", "k", "y_stride", "residual_stride")
    divided = tuple(each for each in params if each[0] in ("bm", "bn", "bk", "group", "resident"))
    rows = min(p["bm"], max(1, 1024 // p["bn"]))  # 8 sums a thread, and many blocks: tiles are few
    adds = Program(
        symbol=symbol("add_shared", divided, dtype, out, bias, epilogue, align),
        source=STREAMK_SOURCE,
        function="add_shared",
        arguments=(WORKSPACE, *some(names, dtype, out)),
        constants=tuple({**sizes, "ROWS": rows, **ending}.items()),
        align=align,
        warps=4,
        stages=1,
        grid=(steps, (("", p["bm"] // rows),), ()),  # x as of the first: it tells how that one divided
        resident=p["resident"],
    )
    return whole, adds


def workspace(n: int, params: Params, multiprocessors: int = MANY) -> tuple[int, int]:
    """Bytes of scratch memory that calls need: for each row of y, and beside that however many rows there are.

    Args:
        multiprocessors: of the device; where nothing is said, enough for any. Only streamk asks.
    """
    p = dict(params)
    if p.get("streamk"):  # a sum for each block and each tile that is shared, of which there are fewer
        return 0, 4 * p["bm"] * p["bn"] * 2 * p["resident"] * min(multiprocessors, MANY)
    return (4 * p["split"] * n if p["split"] > 1 else 0), 0


def workspace_bytes(m: int, n: int, params: Params, multiprocessors: int = MANY) -> int:
    """Bytes of scratch memory that a call needs; see ``workspace``."""
    row, beside = workspace(n, params, multiprocessors)
    return m * row + beside


_ENDED = (
    tile(128, 128, 64, 8, 4),
    tile(64, 64, 64, 4, 5, split=4),
    tile(128, 256, 64, 8, 3, resident=1, tma=1),
    tile(128, 128, 64, 8, 4, resident=1, streamk=1, tma=1),
)
"""One of each kind, for every ending."""


def programs() -> Iterator[Program]:
    """All that the default sweep compiles: aligned and not; every set for bf16, some for other variants."""
    found: dict[Program, None] = {}
    for dtype, element in DTYPES.items():
        for align in (16, element.size):
            sets = params_for(dtype, align)
            for params in sets if dtype == "bfloat16" else sets[::5]:
                found.update(dict.fromkeys(matmul(dtype, params, align)))
    for epilogue in EPILOGUES:
        for params in _ENDED:
            found.update(dict.fromkeys(matmul("bfloat16", params, 16, bias=True, epilogue=epilogue)))
    yield from found
