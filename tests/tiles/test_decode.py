"""Generated decode kernels against float64: every layout, ragged lengths, and nothing read or written beside."""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F

from dks.dispatch.kernel import DTYPES, Candidate, Declined, relative_error
from dks.dispatch.ops.attention import tile_decode
from dks.dispatch.ops.paged_attention import tile_decode as paged_decode
from dks.dispatch.problem import Problem
from dks.dispatch.tiles import build, decode, library
from dks.dispatch.tiles.isa import ISAS

# A prefetching one of few keys a block and one that does not prefetch: all that the template decides.
TILES = {"float32": (16, 1), "bfloat16": (32, 0)}
CASES = [(isa, dtype) for isa in ("avx512", "avx2") for dtype in TILES]
GUARD = 64
BAD_PAGE = 2**30

Function = Callable[..., int]


def params(dtype: str, threads: int = 1) -> tuple[tuple[str, int], ...]:
    block, pf = TILES[dtype]
    return (("block", block), ("pf", pf), ("t", threads))


@pytest.fixture(scope="module", autouse=True)
def _built() -> Iterator[None]:
    isas = [isa for isa in ("avx512", "avx2") if ISAS[isa].lack() is None]
    problems = [Problem.of("attention", {"dtype": dtype}, {}) for dtype in TILES]
    units = [decode.decode_unit(isa, p, params(p.trait("dtype"))) for isa in isas for p in problems]
    assert build.build(units) == {}
    before = library._locate
    library.look_in(build.locate)
    yield
    library.look_in(before)


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[Function, str]:
    isa, dtype = request.param
    if (why := ISAS[isa].lack()) is not None:
        pytest.skip(why)
    unit = decode.decode_unit(isa, Problem.of("attention", {"dtype": dtype}, {}), params(dtype))
    return library.function(unit), dtype


def limit(dtype: str) -> float:
    return tile_decode.KERNELS[0].precision[dtype].limit


def attend(
    function: Function,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int] | None = None,
    *,
    table: torch.Tensor | None = None,
    threads: int = 1,
    offset: int = 0,
) -> torch.Tensor:
    """q (b, h, d); k, v (b, hkv, kv, d) or, with a table, (pages, hkv, page, d) -> (b, h, d), at an offset."""
    b, h, d = q.shape
    hkv, kv = k.shape[1:3]
    counts = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    room = torch.full((q.numel() + 2 * GUARD,), 77.0, dtype=q.dtype)
    begin = GUARD - offset
    y = room[begin : begin + q.numel()]
    total = kv if table is None else table.shape[1] * kv
    call = library.Decode(b, h, hkv, d, total, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3])
    if table is not None:
        call.page, call.block_table, call.table_stride = kv, table.data_ptr(), table.stride(0)
    call.lengths = None if counts is None else counts.data_ptr()
    call.scale, call.threads = d**-0.5, threads
    code = function(ctypes.addressof(call), q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr())
    if code:
        raise Declined(str(code))
    assert (room[:begin] == 77).all() and (room[begin + q.numel() :] == 77).all(), "written beside y"
    return y.view(b, h, d).clone()


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    rows = []
    for i, n in enumerate(lengths):
        keys, values = (t[i, :, :n].double().repeat_interleave(groups, 0) for t in (k, v))
        weights = torch.softmax((keys @ q[i].double()[..., None])[..., 0] * q.shape[2] ** -0.5, -1)
        rows.append((weights[:, None] @ values)[:, 0])
    return torch.stack(rows)


def heads(b: int, n: int, hkv: int, d: int, dtype: str, layout: str = "bshd", offset: int = 0) -> torch.Tensor:
    """(b, hkv, n, d) in one of the layouts, ``offset`` elements into its memory."""
    shape = (b, n, hkv, d) if layout == "bshd" else (b, hkv, n, d)
    t = torch.empty(math.prod(shape) + offset, dtype=DTYPES[dtype])[offset:].view(shape)
    t.copy_(torch.randn(shape))
    return t.transpose(1, 2) if layout == "bshd" else t


def paged(k: torch.Tensor, lengths: Sequence[int], page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache (pages, page, hkv, d), seen as (pages, hkv, page, d), with NaN wherever no key is, and its table."""
    b, hkv, n, d = k.shape
    most = -(-n // page)
    order = torch.randperm(b * most, generator=torch.Generator().manual_seed(3))
    cache = torch.full((b * most, page, hkv, d), math.nan, dtype=k.dtype)
    table = torch.full((b, most + 1), BAD_PAGE, dtype=torch.int32)
    for i, length in enumerate(lengths):
        for p in range(-(-length // page)):
            table[i, p] = order[i * most + p]
            part = k[i, :, p * page : min(length, (p + 1) * page)].transpose(0, 1)
            cache[table[i, p], : len(part)] = part
    return cache.transpose(1, 2), table


SIZES = [(64, 4, 4), (128, 6, 2), (1, 2, 2), (16, 3, 1), (70, 14, 2), (33, 5, 5)]


def sampled(count: int) -> list[tuple[int, int, int]]:
    pick = random.Random(1)
    return [
        (pick.randint(1, 70), g * hkv, hkv)
        for g, hkv in ((pick.randint(1, 9), pick.randint(1, 5)) for _ in range(count))
    ]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_is_right_for_every_size_layout_and_address(case: tuple[Function, str], layout: str) -> None:
    function, dtype = case
    pick = random.Random(2)
    for index, (d, h, hkv) in enumerate(SIZES + sampled(30)):
        kv, b, offset = (
            pick.choice([1, 15, 16, 17, 32, 33, 64, pick.randint(1, 200)]),
            pick.randint(1, 3),
            index % 4,
        )
        q = heads(b, 1, h, d, dtype, layout, offset)[:, :, 0]
        k, v = heads(b, kv, hkv, d, dtype, layout, offset), heads(b, kv, hkv, d, dtype, "bhsd")
        if index % 2:
            k, v = v, k  # each in a layout of its own
        wanted = expected(q, k, v, [kv] * b)
        for threads in (1, 1 + index % 4):
            y = attend(function, q, k, v, threads=threads, offset=offset)
            assert relative_error(y, wanted) <= limit(dtype), (d, h, hkv, kv, threads)


@pytest.mark.parametrize("page", [1, 5, 16, 48])
def test_reads_pages_up_to_each_sequences_end_and_nothing_else(case: tuple[Function, str], page: int) -> None:
    function, dtype = case
    pick = random.Random(page)
    for d, h, hkv in [*SIZES, *sampled(3)]:
        lengths = [pick.randint(1, 200) for _ in range(2)] + [1, page, 160]
        b, n = len(lengths), max(lengths)
        q = heads(b, 1, h, d, dtype)[:, :, 0]
        k, v = (heads(b, n, hkv, d, dtype) for _ in range(2))
        wanted = expected(q, k, v, lengths)
        (keys, table), (values, _) = (paged(t, lengths, page) for t in (k, v))
        for threads in (1, 2, 3, 4):
            y = attend(function, q, keys, values, lengths, table=table, threads=threads)
            assert relative_error(y, wanted) <= limit(dtype), (d, h, hkv, page, threads)


def test_ragged_contiguous_sequences_ignore_what_lies_behind_them(case: tuple[Function, str]) -> None:
    function, dtype = case
    lengths = [1, 40, 0, 77, 16]
    q = heads(5, 1, 6, 24, dtype)[:, :, 0]
    k, v = (heads(5, 77, 2, 24, dtype) for _ in range(2))
    wanted = expected(q, k, v, lengths)
    wanted[2] = 0
    for i, n in enumerate(lengths):
        k[i, :, n:], v[i, :, n:] = math.nan, math.nan
    for threads in (1, 3):
        y = attend(function, q, k, v, lengths, threads=threads)
        assert relative_error(y, wanted) <= limit(dtype)
        assert (y[2] == 0).all(), "a sequence of no keys is zeros"


@pytest.mark.parametrize("lengths", [[78, 1], [1, -1]])
def test_declines_lengths_that_are_not_there(case: tuple[Function, str], lengths: list[int]) -> None:
    function, dtype = case
    k = heads(2, 77, 2, 24, dtype)
    with pytest.raises(Declined):
        attend(function, k[:, :, 0], k, k, lengths)


def test_scores_that_grow_by_blocks_and_large_ones_are_corrected(case: tuple[Function, str]) -> None:
    function, dtype = case
    d, kv = 32, 130
    q = torch.ones(1, 2, d, dtype=DTYPES[dtype])
    v = heads(1, kv, 2, d, dtype)
    for sign in (1, -1):
        ramp = sign * torch.linspace(-40, 40, kv)
        k = ramp[None, None, :, None].expand(1, 2, kv, d).to(q.dtype).contiguous()
        for threads in (1, 4):
            y = attend(function, q, k, v, threads=threads)
            assert relative_error(y, expected(q, k, v, [kv])) <= limit(dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_goes_where_the_framework_sends_it(case: tuple[Function, str], value: float) -> None:
    function, dtype = case
    for where in ("k", "v"):
        for at in (0, 20, 69):
            q = torch.rand(2, 4, 40).to(DTYPES[dtype])
            k, v = (heads(2, 70, 2, 40, dtype) for _ in range(2))
            (k if where == "k" else v)[1, 0, at, 3] = value
            wanted = F.scaled_dot_product_attention(q[:, :, None].double(), k.double(), v.double(), enable_gqa=True)
            for threads in (1, 3):
                y = attend(function, q, k, v, threads=threads)
                assert not wanted.isfinite().all()
                assert torch.equal(y.isnan(), wanted[:, :, 0].isnan()), (where, at)
                assert torch.equal(y.isinf(), wanted[:, :, 0].isinf()), (where, at)


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
@pytest.mark.parametrize("dtype", list(TILES))
def test_kernels_of_both_operators_serve_what_they_declare(isa: str, dtype: str) -> None:
    if (why := ISAS[isa].lack()) is not None:
        pytest.skip(why)
    index = ("avx512", "avx2").index(isa)
    traits = {"dtype": dtype, "mask": "none", "causal": "no", "layout": "bshd"}
    dims = {"b": 2, "q": 1, "kv": 50, "h": 6, "hkv": 3, "d": 20}
    problem = Problem.of("attention", traits, dims)
    kernel = tile_decode.KERNELS[index]
    assert kernel.objection(problem) is None
    for change in ({"q": 2}, {"causal": "yes"}, {"mask": "bool"}):
        other = Problem.of(
            "attention",
            traits | {name: value for name, value in change.items() if name in traits},
            dims | {name: value for name, value in change.items() if name in dims},
        )
        assert kernel.objection(other) is not None
    run = kernel.bind(problem, params(dtype, 2))
    q, k, v = heads(2, 1, 6, 20, dtype), heads(2, 50, 3, 20, dtype), heads(2, 50, 3, 20, dtype)
    y = run(q, k, v, None, None)
    assert y.shape == q.shape and y.dtype == q.dtype
    assert relative_error(y[:, :, 0], expected(q[:, :, 0], k, v, [50, 50])) <= limit(dtype)
    assert relative_error(run(q, k, v, None, 0.0)[:, :, 0], v.double().mean(2).repeat_interleave(2, 1)) <= limit(
        dtype
    )
    with pytest.raises(Declined, match="query row"):
        run(torch.cat((q, q), 2), k, v, None, None)

    sizes = {"b": 2, "kv": 50, "h": 6, "hkv": 3, "d": 20, "page": 16}
    pages = paged_decode.KERNELS[index]
    bound = pages.bind(Problem.of("paged_attention", {"dtype": dtype}, sizes), params(dtype, 2))
    lengths = torch.tensor([50, 17], dtype=torch.int32)
    cache, table = paged(k, lengths.tolist(), 16)
    cache = cache.transpose(1, 2)
    z = bound(q[:, :, 0].contiguous(), cache, cache, table, lengths, None)
    assert relative_error(z, expected(q[:, :, 0], k, k, lengths.tolist())) <= limit(dtype)
    with pytest.raises(Declined, match="block table"):
        bound(q[:, :, 0].contiguous(), cache, cache, table, lengths * 16, None)


def test_ids_of_candidates_parse_back() -> None:
    for kernel in (*tile_decode.KERNELS, *paged_decode.KERNELS):
        for candidate in kernel.candidates():
            assert Candidate.parse(candidate.id) == candidate
