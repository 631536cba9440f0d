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

Without a split of k that is one program and no workspace. With one, the first writes the float32 sums of each
piece to the workspace, (split, m, n), and the second adds them in order and ends as the other would: two launches,
and no atomics, so that every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

from dks.dispatch.gpu.limits import LIMITS
from dks.dispatch.gpu.program import Argument, Program
from dks.dispatch.kernel import Params

SOURCE, EPILOGUE_SOURCE = "matmul.py", "epilogue.py"

DTYPES = {"bfloat16": ("bf16", 2), "float16": ("fp16", 2), "int8": ("i8", 1), "float8_e4m3fn": ("fp8e4nv", 1)}
"""Triton's name and bytes of an element, by dtype of x and weight. Those of one byte have scales."""

EPILOGUES = ("none", "relu", "gelu", "gelu_tanh", "silu", "add")


def _tile(bm: int, bn: int, bk: int, w: int, s: int, **more: int) -> Params:
    values = {"bm": bm, "bn": bn, "bk": bk, "w": w, "s": s, "group": 8, "split": 1, "resident": 0, **more}
    return tuple(values.items())


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
    # Middle: more tiles, for shapes that large ones leave multiprocessors idle with.
    _tile(64, 256, 64, 4, 4),
    _tile(128, 64, 64, 4, 4),
    _tile(64, 128, 64, 4, 4),
    _tile(64, 64, 64, 4, 5),
    _tile(128, 128, 64, 8, 4, split=4),
    _tile(64, 64, 64, 4, 5, split=4),
    # Few rows: bound by reading the weight, so that deep pipelines and many blocks count.
    _tile(32, 128, 128, 4, 4),
    _tile(32, 64, 128, 4, 4, split=4),
    _tile(16, 128, 128, 4, 4),
    _tile(16, 64, 128, 4, 5),
    _tile(16, 32, 256, 4, 4),
    _tile(16, 128, 128, 4, 4, split=4),
    _tile(16, 64, 128, 4, 4, split=8),
)
"""What is measured for elements of two bytes.

bm, bn, bk: a tile's rows, columns and step along k; w: warps; s: stages of the pipeline; group: rows of tiles
that run beside each other; split: pieces of k; resident: 0, or blocks that a multiprocessor runs for good.
"""


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
    times = 2 // DTYPES[dtype][1]
    return tuple(tuple((name, size * times if name == "bk" else size) for name, size in each) for each in PARAMS)


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
        ValueError: dtype, out or epilogue is none of those; a split that is also resident.
    """
    p = dict(params)
    out = checked(dtype, epilogue, out)
    if p["split"] > 1 and p["resident"]:
        raise ValueError(f"params: found split={p['split']} with resident={p['resident']}, expected one of them")
    tile = {"BM": p["bm"], "BN": p["bn"], "BK": p["bk"], "GROUP": p["group"]}
    blocks, ending = (("m", p["bm"]), ("n", p["bn"])), endings(dtype, bias, epilogue)
    if p["split"] == 1:
        return (
            Program(
                symbol=symbol("matmul", params, dtype, out, bias, epilogue, align),
                source=SOURCE,
                function="matmul",
                arguments=arguments(dtype, out),
                constants=tuple({**tile, "RESIDENT": p["resident"], **ending, "UPCAST": 0}.items()),
                align=align,
                warps=p["w"],
                stages=p["s"],
                grid=(blocks, (), ()),
                resident=p["resident"],
            ),
        )
    parts = Program(
        symbol=symbol("matmul_parts", params, dtype, "", False, "none", align),
        source=SOURCE,
        function="matmul_parts",
        arguments=parts_arguments(dtype, out),
        constants=tuple({**tile, "SPLIT": p["split"], "UPCAST": 0}.items()),
        align=align,
        warps=p["w"],
        stages=p["s"],
        grid=(blocks, (("", p["split"]),), ()),
    )
    return parts, add_parts(dtype, out, p["split"], align, bias, epilogue)


def workspace_bytes(m: int, n: int, params: Params) -> int:
    """Bytes of scratch memory that a call needs: float32 sums of every piece, or none."""
    split = dict(params)["split"]
    return 4 * split * m * n if split > 1 else 0


def shared_bytes(params: Params, dtype: str) -> int:
    """Bytes of shared memory of a block at most: what the pipeline holds of x and weight, or a tile on its way out.

    It is what sm_90 and sm_100 take with tiles of 64 rows and more; others hold a stage less. The 256 are barriers.
    """
    p = dict(params)
    pipeline = p["s"] * (p["bm"] + p["bn"]) * p["bk"] * DTYPES[dtype][1]
    return max(pipeline, p["bm"] * p["bn"] * (4 if p["split"] > 1 else 2)) + 256


def impossible(dtype: str, params: Params, arch: int) -> str | None:
    """Why there is no such program on an architecture (80, 90 ...), or None. Asked before it is compiled."""
    return lack(dtype, shared_bytes(params, dtype), arch)


MANY = 256
"""Tiles that fill a device: more multiprocessors than today's have."""


def suits(m: int, n: int, k: int, params: Params) -> str | None:
    """Why a parameter set can't be meant for a shape, or None. It would be right, and is not measured there."""
    p = dict(params)
    for name, size, least in (("bm", m, 16), ("bn", n, 16), ("bk", k, 128)):
        if p[name] > least and p[name] >= 2 * size:
            return f"{name}={p[name]} is half empty or more with {size}"
    if m > 16 * p["bm"] and p["bm"] < 64:
        return f"bm={p['bm']} reads the weight {-(-m // p['bm'])} times"
    tiles = -(-m // p["bm"]) * -(-n // p["bn"])
    if p["resident"] and tiles <= MANY // 2:
        return f"{tiles} tiles: no block would take a second one"
    if p["split"] > 1 and tiles > MANY:
        return f"{tiles} tiles fill a device without a split"
    if p["split"] > 1 and k < 4 * p["split"] * p["bk"]:
        return f"k={k} makes pieces of less than 4 steps"
    return None


def programs() -> Iterator[Program]:
    """All that the default sweep compiles: aligned and not; every set for bf16, some for other variants."""
    found: dict[Program, None] = {}
    for dtype, (_, size) in DTYPES.items():
        for align in (16, size):
            sets = params_for(dtype, align)
            for params in sets if dtype == "bfloat16" else sets[::5]:
                found.update(dict.fromkeys(matmul(dtype, params, align)))
    for epilogue in EPILOGUES:
        for params in (PARAMS[2], PARAMS[13]):  # without and with a split
            found.update(dict.fromkeys(matmul("bfloat16", params, 16, bias=True, epilogue=epilogue)))
    yield from found


# What the product with few rows shares.


def checked(dtype: str, epilogue: str, out: str) -> str:
    """The dtype of y, after a look at what was asked for. Raises ValueError."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    if epilogue not in EPILOGUES:
        raise ValueError(f"epilogue: found {epilogue!r}, expected one of {', '.join(EPILOGUES)}")
    out = out or (dtype if DTYPES[dtype][1] == 2 else "bfloat16")
    if out not in ("bfloat16", "float16"):
        raise ValueError(f"out: found {out!r}, expected bfloat16 or float16")
    return out


def lack(dtype: str, shared: int, arch: int) -> str | None:
    """What an architecture lacks for a dtype and so many bytes of shared memory, or None."""
    if dtype == "float8_e4m3fn" and arch < 89:
        return f"sm_{arch} has no fp8"
    limit = LIMITS[arch].shared
    return f"needs {shared} bytes of shared memory, sm_{arch} has {limit}" if shared > limit else None


def arguments(dtype: str, out: str) -> tuple[Argument, ...]:
    """Of a kernel that computes y whole. n is a row of y, k one of x and weight, so each has its element's size."""
    (x, size), (y, wide) = DTYPES[dtype], DTYPES[out]
    return (
        *(Argument(name, f"*{x}", 1) for name in ("x", "weight")),
        *(Argument(name, f"*{y}", 1) for name in ("y", "bias", "residual")),
        *(Argument(name, "*fp32", 1) for name in ("x_scale", "weight_scale")),
        *(Argument("m", "i32"), Argument("n", "i32", wide), Argument("k", "i32", size)),
        *(Argument(name, "i32", size) for name in ("x_stride", "weight_stride")),
        *(Argument(name, "i32", wide) for name in ("y_stride", "residual_stride")),
    )


def parts_arguments(dtype: str, out: str) -> tuple[Argument, ...]:
    """Of a kernel that keeps the sums of pieces."""
    by_name = {each.name: each for each in arguments(dtype, out)}
    names = ("m", "n", "k", "x_stride", "weight_stride")
    return by_name["x"], by_name["weight"], Argument("workspace", "*fp32", 1), *(by_name[name] for name in names)


def endings(dtype: str, bias: bool, epilogue: str) -> dict[str, int | str]:
    """The constants of ``finish``."""
    return {"BIAS": int(bias), "EPILOGUE": epilogue, "SCALED": int(DTYPES[dtype][1] == 1)}


def add_parts(dtype: str, out: str, split: int, align: int, bias: bool, epilogue: str) -> Program:
    """The program that adds the sums of ``split`` pieces and ends y."""
    by_name = {each.name: each for each in arguments(dtype, out)}
    names = ("y", "bias", "residual", "x_scale", "weight_scale", "m", "n", "y_stride", "residual_stride")
    rows, columns = 4, 256
    scaled = endings(dtype, bias, epilogue)["SCALED"]
    return Program(
        # Of x's dtype it knows no more than whether there are scales.
        symbol=symbol("add_parts", (("split", split),), "scaled" if scaled else "", out, bias, epilogue, align),
        source=EPILOGUE_SOURCE,
        function="add_parts",
        arguments=(Argument("workspace", "*fp32", 1), *(by_name[name] for name in names)),
        constants=tuple({"BM": rows, "BN": columns, "SPLIT": split, **endings(dtype, bias, epilogue)}.items()),
        align=align,
        warps=4,
        stages=1,
        grid=((("m", rows),), (("n", columns),), ()),
    )


def symbol(kernel: str, params: Params, dtype: str, out: str, bias: bool, epilogue: str, align: int) -> str:
    """A name that only this variant has."""
    ending = ("" if out == dtype else out, "bias" if bias else "", "" if epilogue == "none" else epilogue)
    sizes = (f"{name}{value}" for name, value in params)
    return "_".join(part for part in ("dks", kernel, dtype, *ending, *sizes, f"a{align}") if part)
