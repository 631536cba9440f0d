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

from dks.dispatch.gpu.limits import no_tma
from dks.dispatch.gpu.linear import (
    DTYPES,
    EPILOGUES,
    MANY,
    WORKSPACE,
    add_parts,
    arguments,
    checked,
    endings,
    lack,
    parts_arguments,
    some,
    symbol,
)
from dks.dispatch.gpu.program import Factor, Program
from dks.dispatch.kernel import Params

SOURCE, STREAMK_SOURCE = "matmul.py", "streamk.py"


def _tile(bm: int, bn: int, bk: int, w: int, s: int, **more: int) -> Params:
    values = {
        "bm": bm,
        "bn": bn,
        "bk": bk,
        "w": w,
        "s": s,
        "group": 8,
        "split": 1,
        "resident": 0,
        "streamk": 0,
        "tma": 0,
    }
    assert more.keys() <= values.keys()
    return tuple((values | more).items())


PARAMS: tuple[Params, ...] = (
    # Large: as much arithmetic for a byte read as registers and shared memory allow.
    _tile(128, 256, 64, 8, 3),
    _tile(256, 128, 64, 8, 3),
    _tile(128, 128, 64, 8, 4),
    _tile(128, 128, 64, 4, 4),
    _tile(128, 128, 32, 4, 5),
    # The same, as many blocks as run at once: no tail of launches, neighbours stay in L2.
    _tile(128, 256, 64, 8, 3, resident=1),
    _tile(128, 128, 64, 8, 4, resident=1),
    _tile(128, 128, 64, 4, 3, resident=2),
    # The same, copied by the hardware: no registers and no instructions for addresses.
    _tile(128, 256, 64, 8, 3, tma=1),
    _tile(128, 128, 64, 8, 4, tma=1),
    _tile(128, 256, 64, 8, 3, resident=1, tma=1),
    _tile(256, 128, 64, 8, 3, resident=1, tma=1),
    _tile(128, 128, 64, 8, 4, resident=1, tma=1),
    _tile(128, 128, 64, 4, 3, resident=2, tma=1),
    # Even shares: for shapes whose last wave of tiles would leave multiprocessors idle.
    _tile(128, 256, 64, 8, 3, resident=1, streamk=1),
    _tile(128, 128, 64, 8, 4, resident=1, streamk=1),
    _tile(128, 256, 64, 8, 3, resident=1, streamk=1, tma=1),
    _tile(128, 128, 64, 8, 4, resident=1, streamk=1, tma=1),
    _tile(64, 128, 64, 4, 4, resident=2, streamk=1, tma=1),
    # Middle: more tiles, for shapes that large ones leave multiprocessors idle with.
    _tile(64, 256, 64, 4, 4),
    _tile(128, 64, 64, 4, 4),
    _tile(64, 128, 64, 4, 4),
    _tile(64, 64, 64, 4, 5),
    _tile(64, 128, 64, 4, 4, tma=1),
    _tile(128, 128, 64, 8, 4, split=4),
    _tile(64, 64, 64, 4, 5, split=4),
    # Few rows: bound by reading the weight, so that deep pipelines and many blocks count.
    _tile(32, 128, 128, 4, 4),
    _tile(32, 64, 128, 4, 4, split=4),
    _tile(16, 128, 128, 4, 4),
    _tile(16, 64, 128, 4, 5),
    _tile(16, 32, 256, 4, 4),
    _tile(16, 64, 128, 4, 5, tma=1),
    _tile(16, 128, 128, 4, 4, split=4),
    _tile(16, 64, 128, 4, 4, split=8),
    _tile(16, 128, 128, 4, 4, split=4, tma=1),
)
"""What is measured for elements of two bytes.

bm, bn, bk: a tile's rows, columns and step along k; w: warps; s: stages of the pipeline; group: rows of tiles
that run beside each other; split: pieces of k; resident: 0, or blocks that a multiprocessor runs for good;
streamk: 1 for even shares of all of them; tma: 1 where the hardware copies tiles.
"""


TMA_ALIGN = 16  # bytes that divide the addresses and strides of what the hardware copies

UNALIGNED: tuple[Params, ...] = (
    _tile(128, 128, 64, 8, 2),
    _tile(128, 128, 32, 8, 2),
    _tile(64, 64, 64, 4, 2),
    _tile(64, 64, 64, 4, 2, split=4),
    _tile(32, 64, 64, 4, 2),
    _tile(16, 64, 64, 4, 2),
    _tile(16, 64, 64, 4, 2, split=4),
)
"""What is measured where nothing is known to be aligned to 4 bytes.

Nothing is copied ahead then, so that stages make no difference, and each element takes an address of two registers:
more than 64 of them for a thread and a step are spilled.
"""


def params_for(dtype: str, align: int = 16) -> tuple[Params, ...]:
    """The parameter sets that are measured: with elements of one byte, steps of as many bytes."""
    if align < 4:
        return UNALIGNED
    times = 2 // DTYPES[dtype].size
    sets = (each for each in PARAMS if align >= TMA_ALIGN or not dict(each)["tma"])
    return tuple(tuple((name, size * times if name == "bk" else size) for name, size in each) for each in sets)


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
            constants=tuple({**constants, "TMA": p["tma"], "UPCAST": 0}.items()),
            align=align,
            warps=p["w"],
            stages=p["s"],
            grid=(_tiles(params), (), ()),
            resident=p["resident"],
        ),
    )


def contradiction(params: Params, align: int) -> str | None:
    """What of a parameter set can't be together, with what is expected, or None."""
    p = dict(params)
    if p["split"] > 1 and p["resident"]:
        return f"split={p['split']} with resident={p['resident']}, expected one of them"
    if p["streamk"] and not p["resident"]:
        return "streamk=1 with resident=0, expected the blocks that share the work to be resident"
    if p["tma"] and align < TMA_ALIGN:
        return f"tma=1 with an alignment of {align}, expected {TMA_ALIGN} bytes"
    return None


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


def workspace_bytes(m: int, n: int, params: Params, multiprocessors: int = MANY) -> int:
    """Bytes of scratch memory that a call needs: float32 sums of every piece, or none.

    Args:
        multiprocessors: of the device; where nothing is said, enough for any. Only streamk asks.
    """
    p = dict(params)
    if p.get("streamk"):
        blocks = p["resident"] * min(multiprocessors, MANY)
        tiles = -(-m // p["bm"]) * -(-n // p["bn"])
        return 4 * p["bm"] * p["bn"] * (blocks + min(tiles, blocks))
    return 4 * p["split"] * m * n if p["split"] > 1 else 0


def shared_bytes(params: Params, dtype: str) -> int:
    """Bytes of shared memory of a block at most: what the pipeline holds of x and weight, or a tile on its way out.

    It is what sm_90 and sm_100 take with tiles of 64 rows and more; others hold a stage less. The 256 are barriers.
    """
    p = dict(params)
    pipeline = p["s"] * (p["bm"] + p["bn"]) * p["bk"] * DTYPES[dtype].size
    way_out = p["bm"] * p["bn"] * (4 if p["split"] > 1 or p["streamk"] else 2)
    if p["tma"] and p["resident"]:  # the tile leaves while the next ones arrive
        return pipeline + p["bm"] * p["bn"] * 2 + 256
    return max(pipeline, way_out) + 256


def impossible(dtype: str, params: Params, arch: int) -> str | None:
    """Why there is no such program on an architecture (80, 90 ...), or None. Asked before it is compiled."""
    if dict(params)["tma"] and (why := no_tma(arch)):
        return why
    return lack(dtype, shared_bytes(params, dtype), arch)


MULTIPROCESSORS = (108, 132, 148)
"""Of an A100; of an H100 and an H200; of a B200."""

RAGGED = 0.1
"""Share of the last wave's time that must be idle for even shares to be worth their second launch."""


def _idle(tiles: int, blocks: int) -> float:
    """Share of the time that so many blocks are idle, where each takes whole tiles."""
    return 1 - tiles / (-(-tiles // blocks) * blocks)


def suits(m: int, n: int, k: int, params: Params) -> str | None:
    """Why a parameter set can't be meant for a shape, or None. It would be right, and is not measured there."""
    p = dict(params)
    for name, size, least in (("bm", m, 16), ("bn", n, 16), ("bk", k, 128)):
        if p[name] > least and p[name] >= 2 * size:
            return f"{name}={p[name]} is half empty or more with {size}"
    if m > 16 * p["bm"] and p["bm"] < 64:
        return f"bm={p['bm']} reads the weight {-(-m // p['bm'])} times"
    tiles = -(-m // p["bm"]) * -(-n // p["bn"])
    if p["streamk"]:
        if all(_idle(tiles, p["resident"] * each) < RAGGED for each in MULTIPROCESSORS):
            return f"{tiles} tiles: the last wave is nearly full"
        if k < 16 * p["bk"]:
            return f"k={k} has less than 16 steps to share"
        return None
    if p["resident"] and tiles <= MANY // 2:
        return f"{tiles} tiles: no block would take a second one"
    if p["split"] > 1 and tiles > MANY:
        return f"{tiles} tiles fill a device without a split"
    if p["split"] > 1 and k < 4 * p["split"] * p["bk"]:
        return f"k={k} makes pieces of less than 4 steps"
    return None


_ENDED = (
    _tile(128, 128, 64, 8, 4),
    _tile(64, 64, 64, 4, 5, split=4),
    _tile(128, 256, 64, 8, 3, resident=1, tma=1),
    _tile(128, 128, 64, 8, 4, resident=1, streamk=1, tma=1),
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
