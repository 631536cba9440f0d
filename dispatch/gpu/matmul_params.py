"""The parameter sets of linear in tiles: which there are, what they need, and the shapes that they are meant for.

bm, bn, bk: a tile's rows, columns and step along k; w: warps; s: stages of the pipeline; group: rows of tiles that
run beside each other; split: pieces of k; resident: 0, or blocks that a multiprocessor runs for good; streamk: 1
for even shares of all of them; tma: 1 where the hardware copies tiles; flat: 1 where a resident block's tiles are
one loop, so that one comes in while another goes out. See ``matmul.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from dks.dispatch.gpu.limits import no_tma
from dks.dispatch.gpu.linear import DTYPES, MANY, lack
from dks.dispatch.kernel import Params


def tile(bm: int, bn: int, bk: int, w: int, s: int, **more: int) -> Params:
    """A parameter set; what is not said is plain."""
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
        "flat": 0,
    }
    assert more.keys() <= values.keys()
    return tuple((values | more).items())


PARAMS: tuple[Params, ...] = (
    # Large: as much arithmetic for a byte read as registers and shared memory allow.
    tile(128, 256, 64, 8, 3),
    tile(256, 128, 64, 8, 3),
    tile(128, 128, 64, 8, 4),
    tile(128, 128, 64, 4, 4),
    tile(128, 128, 32, 4, 5),
    # The same, as many blocks as run at once: no tail of launches, neighbours stay in L2.
    tile(128, 256, 64, 8, 3, resident=1),
    tile(128, 128, 64, 8, 4, resident=1),
    tile(128, 128, 64, 4, 3, resident=2),
    # The same, copied by the hardware: no registers and no instructions for addresses.
    tile(128, 256, 64, 8, 3, tma=1),
    tile(128, 128, 64, 8, 4, tma=1),
    tile(128, 256, 64, 8, 3, resident=1, tma=1),
    tile(256, 128, 64, 8, 3, resident=1, tma=1),
    tile(128, 128, 64, 8, 4, resident=1, tma=1),
    tile(128, 256, 64, 8, 3, resident=1, tma=1, flat=1),
    tile(128, 128, 64, 8, 4, resident=1, tma=1, flat=1),
    tile(64, 128, 64, 4, 4, resident=2, tma=1),
    # Even shares: for shapes whose last wave of tiles would leave multiprocessors idle.
    tile(128, 256, 64, 8, 3, resident=1, streamk=1),
    tile(128, 128, 64, 8, 4, resident=1, streamk=1),
    tile(128, 256, 64, 8, 3, resident=1, streamk=1, tma=1),
    tile(128, 128, 64, 8, 4, resident=1, streamk=1, tma=1),
    tile(64, 128, 64, 4, 4, resident=2, streamk=1, tma=1),
    # Middle: more tiles, for shapes that large ones leave multiprocessors idle with.
    tile(64, 256, 64, 4, 4),
    tile(128, 64, 64, 4, 4),
    tile(64, 128, 64, 4, 4),
    tile(64, 64, 64, 4, 5),
    tile(64, 128, 64, 4, 4, tma=1),
    tile(128, 128, 64, 8, 4, split=4),
    tile(64, 64, 64, 4, 5, split=4),
    # Few rows: bound by reading the weight, so that deep pipelines and many blocks count.
    tile(32, 128, 128, 4, 4),
    tile(32, 64, 128, 4, 4, split=4),
    tile(16, 128, 128, 4, 4),
    tile(16, 64, 128, 4, 5),
    tile(16, 32, 256, 4, 4),
    tile(16, 64, 128, 4, 5, tma=1),
    tile(16, 128, 128, 4, 4, split=4),
    tile(16, 64, 128, 4, 4, split=8),
    tile(16, 128, 128, 4, 4, split=4, tma=1),
)
"""What is measured for elements of two bytes."""


TMA_ALIGN = 16  # bytes that divide the addresses and strides of what the hardware copies

UNALIGNED: tuple[Params, ...] = (
    tile(128, 128, 64, 8, 2),
    tile(128, 128, 32, 8, 2),
    tile(64, 64, 64, 4, 2),
    tile(64, 64, 64, 4, 2, split=4),
    tile(32, 64, 64, 4, 2),
    tile(16, 64, 64, 4, 2),
    tile(16, 64, 64, 4, 2, split=4),
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


def contradiction(params: Params, align: int) -> str | None:
    """What of a parameter set can't be together, with what is expected, or None."""
    p = dict(params)
    if p["split"] > 1 and p["resident"]:
        return f"split={p['split']} with resident={p['resident']}, expected one of them"
    if p["streamk"] and not p["resident"]:
        return "streamk=1 with resident=0, expected the blocks that share the work to be resident"
    if p["flat"] and (p["streamk"] or not p["resident"]):
        return "flat=1 without whole tiles of resident blocks, expected resident=1 and streamk=0"
    if p["tma"] and align < TMA_ALIGN:
        return f"tma=1 with an alignment of {align}, expected {TMA_ALIGN} bytes"
    return None


def shared_bytes(params: Params, dtype: str) -> int:
    """Bytes of shared memory of a block at most: what the pipeline holds of x and weight, or a tile on its way out.

    It is what sm_90 and sm_100 take with tiles of 64 rows and more; others hold a stage less. The 256 are barriers.
    With flat a residual is held ahead as well, which is seen of the compiled program.
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
"""Share of all time that must be idle with whole tiles for even shares to be worth their second launch."""


def _idle(tiles: int, blocks: int) -> float:
    """Share of the time that so many blocks are idle, where each takes whole tiles."""
    return 1 - tiles / (-(-tiles // blocks) * blocks)


def _even(tiles: int, k: int, p: Mapping[str, int]) -> str | None:
    """Why even shares of so many tiles gain nothing, or None."""
    if all(_idle(tiles, p["resident"] * each) < RAGGED for each in MULTIPROCESSORS):
        return f"{tiles} tiles: the last wave is nearly full"
    return f"k={k} has less than 16 steps to share" if k < 16 * p["bk"] else None


def suits(m: int, n: int, k: int, params: Params) -> str | None:
    """Why a parameter set can't be meant for a shape, or None. It would be right, and is not measured there."""
    p = dict(params)
    for name, size, least in (("bm", m, 16), ("bn", n, 16), ("bk", k, 128)):
        if p[name] > least and p[name] >= 2 * size:
            return f"{name}={p[name]} is half empty or more with {size}"
    if m > 16 * p["bm"] and p["bm"] < 64:
        return f"bm={p['bm']} reads the weight {-(-m // p['bm'])} times"
    tiles = -(-m // p["bm"]) * -(-n // p["bn"])
    return _even(tiles, k, p) if p["streamk"] else _whole(tiles, k, p)


def _whole(tiles: int, k: int, p: Mapping[str, int]) -> str | None:
    """Why so many whole tiles, or pieces of them, are too many or too few, or None."""
    if p["resident"] and tiles <= MANY // 2:
        return f"{tiles} tiles: no block would take a second one"
    if p["split"] > 1 and tiles > MANY:
        return f"{tiles} tiles fill a device without a split"
    if p["split"] > 1 and k < 4 * p["split"] * p["bk"]:
        return f"k={k} makes pieces of less than 4 steps"
    return None
