"""Linear's Triton programs, interpreted, against float64: matrix products in tiles and with few rows.

Not to be seen here: tensor cores' own arithmetic, and whatever depends on threads.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from dks.dispatch.gpu import gemv, matmul
from dks.dispatch.gpu.limits import lacks
from dks.dispatch.gpu.program import Program
from dks.dispatch.kernel import Params
from dks.dispatch.ops.linear.epilogue import EPILOGUES
from tests.gpu.interpreted import SOAK, kernel_of, launch

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # exp of a large number is infinite

OUTPUTS, MULTIPROCESSORS = ("y", "workspace"), 2  # few, so that resident blocks take turns
ALIGNED, RAGGED = (32, 64, 64), (37, 41, 53)
ODD = ((1, 1, 1), (5, 70, 16), (50, 3, 100), (16, 32, 31))
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-10}
"""One unit in the last place: interpreted, float32 is cut off to bf16."""


def surrounded(tensor: torch.Tensor, gap: int = 0) -> torch.Tensor:
    """A copy (rows, columns) or (n,) whose rows are ``gap`` elements further apart, NaN or 111 all around it."""
    rows, columns = tensor.shape if tensor.dim() == 2 else (1, tensor.shape[0])
    stride, margin = columns + gap, 64
    filler = float("nan") if tensor.dtype.is_floating_point else 111
    storage = torch.full((rows * stride + 2 * margin,), filler).to(tensor.dtype)
    view = storage.as_strided((rows, columns), (stride, 1), margin)
    view.copy_(tensor.view(rows, columns))
    return view if tensor.dim() == 2 else view[0]


def tiles(bm: int = 16, bn: int = 32, bk: int = 16, group: int = 2, **more: int) -> Params:
    sizes = {"bm": bm, "bn": bn, "bk": bk, "w": 4, "s": 3, "group": group}
    return tuple({**sizes, "split": 1, "resident": 0, "streamk": 0, "tma": 0, "flat": 0, **more}.items())


SHARED = tiles(resident=1, streamk=1)
TMA = (tiles(tma=1), tiles(split=3, tma=1), tiles(resident=1, tma=1, flat=1), tiles(resident=1, streamk=1, tma=1))


def rows(count: int, bn: int = 8, bk: int = 32, split: int = 1) -> Params:
    return (("rows", count), ("bn", bn), ("bk", bk), ("w", 4), ("s", 1), ("split", split))


def draw(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    if dtype == "int8":
        return torch.randint(-128, 128, shape, dtype=torch.int8)
    return torch.randn(shape).to(getattr(torch, dtype))


def case(
    shape: tuple[int, int, int], dtype: str, *, bias: bool = False, epilogue: str = "none", gap: int = 0
) -> tuple[dict[str, Any], torch.Tensor]:
    """Arguments by name, and y in float64."""
    m, n, k = shape
    out = getattr(torch, dtype if matmul.DTYPES[dtype].size == 2 else "bfloat16")
    tensors: dict[str, torch.Tensor] = {
        "x": surrounded(draw((m, k), dtype), gap),
        "weight": surrounded(draw((n, k), dtype), 2 * gap),
        "y": surrounded(torch.zeros((m, n), dtype=out), gap + 1),
    }
    expected = tensors["x"].double() @ tensors["weight"].double().T
    if matmul.DTYPES[dtype].size == 1:
        tensors["x_scale"], tensors["weight_scale"] = (surrounded(torch.rand(size) + 0.5) for size in (m, n))
        expected = expected * tensors["x_scale"].double()[:, None] * tensors["weight_scale"].double()
    if bias:
        tensors["bias"] = surrounded(torch.randn(n).to(out))
        expected = expected + tensors["bias"].double()
    others = []
    if epilogue == "add":
        tensors["residual"] = surrounded(torch.randn(m, n).to(out), gap)
        others.append(tensors["residual"].double())
    apart = {f"{name}_stride": each.stride(0) for name, each in tensors.items() if each.dim() == 2}
    absent = dict.fromkeys(("bias", "residual", "x_scale", "weight_scale", "residual_stride"), 0)
    return {**absent, **tensors, **apart, "m": m, "n": n, "k": k}, EPILOGUES[epilogue](expected, *others)


def run(
    programs: tuple[Program, ...], values: dict[str, Any], params: Params, multiprocessors: int = MULTIPROCESSORS
) -> torch.Tensor:
    """y (m, n), and nothing around it has changed."""
    y, size = values["y"], matmul.workspace_bytes(values["m"], values["n"], params, multiprocessors)
    around = torch.ones(y.untyped_storage().nbytes() // y.element_size(), dtype=torch.bool)
    around.as_strided(y.shape, y.stride(), y.storage_offset()).fill_(False)
    workspace = surrounded(torch.full((size // 4,), float("nan"))) if size else 0
    launch(programs, {**values, "workspace": workspace}, OUTPUTS, multiprocessors)
    storage = y.as_strided((len(around),), (1,), 0)
    assert storage[around].isnan().all()
    return y.double()


def assert_right(y: torch.Tensor, expected: torch.Tensor, dtype: str) -> None:
    torch.testing.assert_close(y, expected, rtol=TOLERANCE.get(dtype, 2**-7), atol=2e-3)


@pytest.mark.parametrize(
    "params",
    [tiles(), tiles(split=3), tiles(resident=1), SHARED],
    ids=["whole", "split", "resident", "streamk"],
)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((RAGGED, dtype) for dtype in matmul.DTYPES), (ALIGNED, "bfloat16"), *((odd, "float16") for odd in ODD)],
    ids=str,
)
def test_a_product_in_tiles_is_right(shape: tuple[int, int, int], dtype: str, params: Params) -> None:
    values, expected = case(shape, dtype, gap=3)
    assert_right(run(matmul.matmul(dtype, params, 1), values, params), expected, dtype)


def padded(columns: int, size: int) -> int:
    """Columns from which on rows of elements of so many bytes lie 16 bytes apart, and some more."""
    return -(-columns * size // 16) * 16 // size + 16 // size


def case_16(shape: tuple[int, int, int], dtype: str, **more: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """The same with addresses and rows that 16 bytes divide, whatever the shape."""
    values, expected = case(shape, dtype, **more)
    for name in ("x", "weight", "y"):
        given = values[name]
        columns = given.shape[1]
        values[name] = surrounded(given, padded(columns, given.element_size()) - columns)
        values[f"{name}_stride"] = values[name].stride(0)
    return values, expected


@pytest.mark.parametrize("params", TMA, ids=["whole", "split", "resident", "streamk"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(RAGGED, "bfloat16"), (RAGGED, "int8"), (RAGGED, "float8_e4m3fn"), (ALIGNED, "float16"), (ODD[0], "float16")],
    ids=str,
)
def test_a_product_whose_tiles_the_hardware_copies_is_right(
    shape: tuple[int, int, int], dtype: str, params: Params
) -> None:
    values, expected = case_16(shape, dtype, bias=True, epilogue="add")
    programs = matmul.matmul(dtype, params, 16, bias=True, epilogue="add")
    assert_right(run(programs, values, params), expected, dtype)


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(
    ("m", "count", "dtype"),
    [*((3, 4, dtype) for dtype in matmul.DTYPES), *((m, m, "float16") for m in (1, 2, 8)), (11, 4, "float16")],
    ids=str,
)
def test_a_product_of_few_rows_is_right(m: int, count: int, dtype: str, split: int) -> None:
    for n, k in ((8, 64), (13, 75)):
        values, expected = case((m, n, k), dtype, gap=3)
        params = rows(count, split=split)
        assert_right(run(gemv.gemv(dtype, params, 1), values, params), expected, dtype)


@pytest.mark.parametrize("epilogue", matmul.EPILOGUES)
def test_endings_are_right(epilogue: str) -> None:
    for dtype, params, build in (
        ("float16", tiles(), matmul.matmul),
        ("int8", tiles(split=2), matmul.matmul),
        ("int8", SHARED, matmul.matmul),
        ("float16", rows(2), gemv.gemv),
    ):
        values, expected = case((2, 40, 20), dtype, bias=True, epilogue=epilogue)
        y = run(build(dtype, params, 1, bias=True, epilogue=epilogue), values, params)
        assert_right(y, expected, dtype)


@pytest.mark.parametrize("epilogue", matmul.EPILOGUES)
def test_extreme_sums_end_as_the_frameworks(epilogue: str) -> None:
    values, _ = case((1, 6, 16), "float16", epilogue=epilogue)
    values["x"].zero_()
    values["x"][0, 0] = 1
    values["weight"].zero_()
    values["weight"][:, 0] = torch.tensor([float("nan"), float("inf"), 60000.0, -60000.0, 0.0, -20.0])
    others = [values["residual"].double()] if epilogue == "add" else []
    y = run(matmul.matmul("float16", tiles(), 1, epilogue=epilogue), values, tiles())
    expected = EPILOGUES[epilogue](values["weight"].double()[:, 0][None], *others)
    torch.testing.assert_close(y, expected.half().double(), rtol=2**-10, atol=1e-6, equal_nan=True)


def test_resident_blocks_take_all_tiles_between_them() -> None:
    params = tiles(resident=1)
    (program,) = matmul.matmul("float16", params, 2)
    assert program.blocks({"m": 70, "n": 100}, 2) == (2, 1, 1)  # of 5 x 4 tiles
    values, expected = case((70, 100, 16), "float16")
    assert_right(run((program,), values, params), expected, "float16")


@pytest.mark.parametrize("group", [1, 3, 8])
def test_every_order_of_tiles_covers_the_output(group: int) -> None:
    params = tiles(bn=16, group=group)
    values, expected = case((100, 52, 16), "float16")
    assert_right(run(matmul.matmul("float16", params, 2), values, params), expected, "float16")


@pytest.mark.parametrize(
    ("shape", "multiprocessors"),
    [
        ((16, 32, 112), 3),
        ((40, 60, 40), 4),
        ((33, 70, 16), 7),
        ((48, 96, 33), 3),
        ((20, 40, 100), 5),
        ((5, 5, 20), 64),
    ],
    ids=str,
)
def test_even_shares_cover_the_output_once(shape: tuple[int, int, int], multiprocessors: int) -> None:
    """One tile in pieces; fewer and more tiles than blocks; one step a tile; no rest; uneven shares; few steps."""
    values, expected = case(shape, "float16", bias=True)
    programs = matmul.matmul("float16", SHARED, 2, bias=True)
    first, second = (each.blocks(values, multiprocessors) for each in programs)
    assert first[0] == second[0] <= multiprocessors and second[1] == 1
    y = run(programs, values, SHARED, multiprocessors)
    assert_right(y, expected, "float16")
    assert torch.equal(y, run(programs, values, SHARED, multiprocessors))


def test_no_more_blocks_share_than_the_workspace_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "MANY", 3)
    values, expected = case((40, 60, 70), "float16")
    assert matmul.workspace_bytes(40, 60, SHARED) == matmul.workspace_bytes(40, 60, SHARED, 5)
    y = run(matmul.matmul("float16", SHARED, 2), values, SHARED, 5)
    assert_right(y, expected, "float16")


def test_the_workspace_is_as_large_as_the_pieces() -> None:
    tile = 16 * 32 * 4
    assert matmul.workspace(320, SHARED, 5) == (0, 10 * tile)
    assert matmul.workspace(320, SHARED) == (0, 2 * 256 * tile)
    assert matmul.workspace(320, tiles(split=3)) == (4 * 3 * 320, 0)
    assert matmul.workspace(320, tiles()) == (0, 0)
    assert matmul.workspace_bytes(7, 320, tiles(split=3)) == 7 * 4 * 3 * 320


def test_resident_blocks_have_room_beside_each_other() -> None:
    room = 228 * 1024  # of a multiprocessor from sm_90 on, 1 KiB of it the system's for each block
    for params in matmul.PARAMS:
        assert dict(params)["resident"] * (matmul.shared_bytes(params, "bfloat16") + 1024) <= room, params


def test_an_access_outside_of_the_tensors_is_seen() -> None:
    values, _ = case((16, 32, 16), "float16")
    (program,) = matmul.matmul("float16", tiles(), 2)
    with pytest.raises(Exception, match=r"read .* outside"):
        launch((program,), {**values, "k": 17}, OUTPUTS)
    with pytest.raises(Exception, match=r"wrote .* outside"):
        launch((program,), {**values, "y_stride": values["y_stride"] + 1}, OUTPUTS)


def test_all_programs_name_their_functions_arguments_and_have_a_symbol_of_their_own() -> None:
    programs = [*matmul.programs(), *gemv.programs()]
    for program in programs:
        names = [each.name for each in program.arguments]
        expected = kernel_of(program).arg_names
        assert expected[: len(names)] == names
        assert sorted(expected[len(names) :]) == sorted(name for name, _ in program.constants)
    by_symbol = {program.symbol: program for program in programs}
    assert len(set(programs)) == len(by_symbol)
    assert {program.align for program in programs} == {16, 2, 1}


def test_a_row_has_its_elements_alignment() -> None:
    for dtype, widths in (("bfloat16", (8, 8)), ("int8", (8, 16))):
        for program in matmul.matmul(dtype, tiles(split=2), 16):
            named = {program.arguments[i].name: divisor for i, divisor in program.divisible().items()}
            assert named["n"] == widths[0]
            assert named.get("k", widths[1]) == widths[1]
            assert "m" not in named
    (program,) = matmul.matmul("bfloat16", tiles(), 2)
    assert {program.arguments[i].type[0] for i in program.divisible()} == {"*"}


def test_what_a_device_has_no_memory_for_is_known_beforehand() -> None:
    large = tiles(bm=256, bn=256, bk=64)
    assert matmul.shared_bytes(large, "bfloat16") >= 3 * 512 * 64 * 2
    assert "shared memory, sm_80 has 166912" in (matmul.impossible("bfloat16", large, 80) or "")
    assert matmul.impossible("bfloat16", large, 90) is None
    assert matmul.impossible("float8_e4m3fn", tiles(), 80) == "sm_80 has no fp8"
    assert matmul.shared_bytes(tiles(bm=128, bn=128, split=2), "bfloat16") >= 128 * 128 * 4  # sums on their way out
    assert matmul.impossible("bfloat16", TMA[0], 80) == "sm_80 has no TMA: sm_90 is the first"
    assert lacks(matmul.matmul("bfloat16", TMA[0], 16)[0], 80) == "sm_80 has no TMA: sm_90 is the first"
    assert not any(dict(params)["tma"] for params in matmul.params_for("bfloat16", 8))
    for dtype, arch in itertools.product(("bfloat16", "float16", "int8"), (80, 90, 100)):
        sets = [params for params in matmul.params_for(dtype) if arch >= 90 or not dict(params)["tma"]]
        assert not [params for params in sets if matmul.impossible(dtype, params, arch)]
        assert not [params for params in gemv.params_for(dtype) if gemv.impossible(dtype, params, arch)]


def test_every_shape_has_sets_that_are_meant_for_it() -> None:
    used = set()
    for m, n, k in itertools.product((1, 8, 16, 100, 512, 4096, 16384), (64, 1024, 4096, 28672), (64, 4096, 16384)):
        meant = [params for params in matmul.PARAMS if matmul.suits(m, n, k, params) is None]
        assert meant, (m, n, k)
        used.update(meant)
        few = [params for params in gemv.PARAMS if gemv.suits(m, n, k, params) is None]
        assert bool(few) == (m <= gemv.MOST_ROWS) or k < 256
        used.update(few)
    assert used >= set(matmul.PARAMS)
    shared = tiles(bm=128, bn=128, bk=64, resident=1, streamk=1)
    assert "the last wave is nearly full" in (matmul.suits(16384, 16384, 4096, shared) or "")
    assert "less than 16 steps" in (matmul.suits(1024, 1024, 1000, shared) or "")
    assert matmul.suits(128 * 14, 128 * 11, 4096, shared) is None  # 154 tiles: two waves of any device today
    assert "takes 4 rows" in (gemv.suits(5, 64, 4096, rows(4)) or "")


def test_what_can_not_be_built_says_why() -> None:
    with pytest.raises(ValueError, match="dtype: found 'float64', expected one of bfloat16"):
        matmul.matmul("float64", tiles(), 16)
    with pytest.raises(ValueError, match="epilogue: found 'tanh'"):
        gemv.gemv("bfloat16", rows(1), 16, epilogue="tanh")
    with pytest.raises(ValueError, match="out: found 'int8'"):
        matmul.matmul("int8", tiles(), 16, out="int8")
    with pytest.raises(ValueError, match="split=2 with resident=1"):
        matmul.matmul("int8", tiles(split=2, resident=1), 16)
    with pytest.raises(ValueError, match="streamk=1 with resident=0"):
        matmul.matmul("int8", tiles(streamk=1), 16)
    with pytest.raises(ValueError, match="flat=1 without whole tiles of resident blocks"):
        matmul.matmul("int8", tiles(flat=1), 16)
    with pytest.raises(ValueError, match="tma=1 with an alignment of 8, expected 16 bytes"):
        matmul.matmul("int8", tiles(tma=1), 8)


@pytest.mark.skipif(not SOAK, reason="takes minutes: make soak runs it")
def test_random_shapes_are_right() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        m, n, k = (int(torch.randint(1, 90, (), generator=generator)) for _ in range(3))
        dtype = [*matmul.DTYPES][int(torch.randint(0, 4, (), generator=generator))]
        gap, multiprocessors = (int(torch.randint(1, 5, (), generator=generator)) for _ in range(2))
        values, expected = case((m, n, k), dtype, bias=True, epilogue="add", gap=gap)
        values_16, expected_16 = case_16((m, n, k), dtype, bias=True, epilogue="add")
        for params in (tiles(split=gap), SHARED, TMA[0], TMA[-1]):
            given, right, align = (values_16, expected_16, 16) if dict(params)["tma"] else (values, expected, 1)
            programs = matmul.matmul(dtype, params, align, bias=True, epilogue="add")
            assert_right(run(programs, given, params, multiprocessors), right, dtype)
