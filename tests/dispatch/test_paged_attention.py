"""``paged_attention`` as served: ragged lengths, grouped heads, garbage past every end, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dks.dispatch import pool
from dks.dispatch.generation import Generation
from dks.dispatch.kernel import Inputs
from dks.dispatch.ops.paged_attention import NO_PAGE
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.runtime import Runtime

H, HKV, D, PAGE = 4, 2, 8, 4
LENGTHS = (13, 1, 8, 12, 5)  # a page and one more, one key, whole pages
GATHER, LOOP = "torch.paged_gather_sdpa", "torch.paged_loop_sdpa"
STATICS = {"h": H, "hkv": HKV, "d": D, "page": PAGE}

Args = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def made(
    lengths: tuple[int, ...] = LENGTHS,
    hkv: int = HKV,
    dtype: torch.dtype = torch.float32,
    garbage: float = math.nan,
    no_page: int = -1,
) -> tuple[Args, torch.Tensor]:
    """(q, k_cache, v_cache, block_table, lengths) and the answer in float64, from keys before they are paged."""
    counts = [-(-n // PAGE) for n in lengths]
    caches = [torch.full((sum(counts) + 2, PAGE, hkv, D), garbage, dtype=dtype) for _ in range(2)]
    order = torch.randperm(len(caches[0]))[: sum(counts)].split(counts)
    table = torch.full((len(lengths), max(counts) + 1), no_page, dtype=torch.int32)
    q = torch.randn(len(lengths), H, D).to(dtype)
    rows = []
    for one, row, mine, n in zip(q, table, order, lengths, strict=True):
        row[: len(mine)] = mine
        k, v = (torch.randn(n, hkv, D).to(dtype) for _ in range(2))
        for cache, t in zip(caches, (k, v), strict=True):
            for key in range(n):
                cache[mine[key // PAGE], key % PAGE] = t[key]
        wide_k, wide_v = (t.double().repeat_interleave(H // hkv, dim=1) for t in (k, v))
        weights = torch.softmax(torch.einsum("hd,nhd->hn", one.double(), wide_k) / math.sqrt(D), dim=-1)
        rows.append(torch.einsum("hn,nhd->hd", weights, wide_v))
    return (q, *caches, table, torch.tensor(lengths, dtype=torch.int32)), torch.stack(rows)


def close(y: torch.Tensor, wanted: torch.Tensor) -> bool:
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-5, torch.float64: 1e-12}[y.dtype]
    return y.shape == wanted.shape and torch.allclose(y.double(), wanted, rtol=tolerance, atol=tolerance)


def counts(runtime: Runtime) -> dict[str, int]:
    ops = runtime.stats()["ops"].get("paged_attention", {"hits": {}, "fallbacks": {}})
    return {**ops["hits"], **ops["fallbacks"]}


@pytest.fixture(params=[GATHER, LOOP])
def runtime(route: Any, request: Any) -> Runtime:
    served: Runtime = route("paged_attention", (request.param,), [STATICS])
    return served


# -- kernels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", pool.kernels_for("paged_attention", "cpu"), ids=lambda kernel: kernel.id)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("no_page", [-1, NO_PAGE])
@pytest.mark.parametrize("hkv", [1, 2, 4])
@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (4,), (7, 7), (3, 17), (16, 16, 2)], ids=str)
def test_each_kernel_is_right_whatever_lies_past_the_end(
    kernel: Any, dtype: str, garbage: float, no_page: int, hkv: int, lengths: tuple[int, ...]
) -> None:
    args, wanted = made(lengths, hkv, getattr(torch, dtype), garbage, no_page)
    dims = {"b": 1, "kv": 1, "h": H, "hkv": hkv, "d": D, "page": PAGE}
    problem = Problem.of("paged_attention", {"dtype": dtype}, dims, 16)
    if kernel.objection(problem) is not None or kernel.unavailable() is not None:
        pytest.skip("not one that it takes here")
    for candidate in kernel.candidates():
        assert close(kernel.bind(problem, candidate.params)(*args, None), wanted)


@pytest.mark.parametrize("kernel", pool.kernels_for("paged_attention", "cpu"), ids=lambda kernel: kernel.id)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_of_one_sequence_stays_and_stays_there(kernel: Any, dtype: str) -> None:
    """In a query, whatever the length; in a value; never in another sequence."""
    problem = Problem.of("paged_attention", {"dtype": dtype}, {"b": 1, "kv": 1, **STATICS}, 16)
    if kernel.objection(problem) is not None or kernel.unavailable() is not None:
        pytest.skip("not one that it takes here")
    run = kernel.bind(problem, kernel.candidates()[0].params)
    for lengths in ((3, 40, 1), (40, 3, 17), (2, 2, 2), (30, 30, 30)):
        (q, k, v, table, counted), wanted = made(lengths, dtype=getattr(torch, dtype))
        bad_q, bad_v = q.clone(), v.clone()
        bad_q[0, 1, 2] = math.nan
        bad_v[table[0, 0], 0, 0, 0] = math.nan
        y = run(bad_q, k, v, table, counted, None)
        assert bool(y[0, 1].isnan().all()) and bool(y[0, [0, 2, 3]].isfinite().all())
        assert close(y[1:], wanted[1:])
        y = run(q, k, bad_v, table, counted, None)
        assert bool(y[0, :2, 0].isnan().all()) and bool(y[0, 2:].isfinite().all())
        assert close(y[1:], wanted[1:])


def test_inputs_of_a_sweep_are_ragged_shuffled_and_hold_garbage_past_the_end() -> None:
    operator = pool.operator("paged_attention")
    dims = {"b": 6, "kv": 21, "h": H, "hkv": HKV, "d": D, "page": PAGE}
    problem = Problem.of("paged_attention", {"dtype": "bfloat16"}, dims, 16)
    inputs = operator.make_inputs(problem, torch.Generator().manual_seed(3), "normal")
    q, k, v, table, lengths, scale = inputs.dynamic
    assert lengths[0] == 21 and 11 <= int(lengths.min()) < 21 == int(lengths.max())
    used = [row[: -(-n // PAGE)].tolist() for row, n in zip(table, lengths.tolist(), strict=True)]
    pages = [page for row in used for page in row]
    assert len(set(pages)) == len(pages) == len(k) - 1 and pages != sorted(pages)
    for cache in (k, v):
        finite = cache.isfinite().all(dim=-1).all(dim=-1)
        assert int(finite.sum()) == int(lengths.sum()), "NaN wherever there is no key"
        for row, n in zip(used, lengths.tolist(), strict=True):
            assert bool(finite[row].flatten()[:n].all())
    assert all(row[len(mine) :].eq(NO_PAGE).all() for row, mine in zip(table, used, strict=True))
    assert {t.data_ptr() % 32 for t in (q, k, v)} == {16} and scale == D**-0.5
    assert operator.reference(problem, inputs).isfinite().all()


def test_the_reference_is_the_plain_formula() -> None:
    args, wanted = made(hkv=HKV)
    problem = Problem.of("paged_attention", {"dtype": "float32"}, {"b": 5, "kv": 13, **STATICS})
    found = pool.operator("paged_attention").reference(problem, Inputs((), (*args, D**-0.5)))
    assert torch.allclose(found, wanted, rtol=1e-13, atol=1e-13)


# -- serving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ints", [torch.int32, torch.int64])
def test_a_call_finds_its_kernel(runtime: Runtime, dtype: torch.dtype, ints: torch.dtype) -> None:
    (q, k, v, table, lengths), wanted = made((13, 2, 8), dtype=dtype)
    copies = [q.clone(), table.clone(), lengths.clone()]
    y = runtime.server("paged_attention").call(q, k, v, table.to(ints), lengths.to(ints))
    assert y.dtype == dtype and close(y, wanted)
    assert counts(runtime) == {"bin": 1}
    assert all(torch.equal(a, b) for a, b in zip((q, table, lengths), copies, strict=True))


def test_the_longest_sequence_and_the_batch_are_what_is_looked_up(runtime: Runtime) -> None:
    call = runtime.server("paged_attention").call
    for lengths in ((16,), (3,), (16, 1, 1, 1), (100, 2), (300,)):
        args, wanted = made(lengths)
        assert close(call(*args), wanted)
    assert counts(runtime) == {"exact": 2, "bin": 1, "nearest": 1, "out_of_range": 1}


def test_the_scale_is_passed_on(runtime: Runtime) -> None:
    args, wanted = made()
    call = runtime.server("paged_attention").call
    assert close(call(args[0] * 4, *args[1:], D**-0.5 / 4), wanted)
    assert close(call(*args, scale=1 / math.sqrt(D)), wanted)
    uniform = call(*args, scale=0.0)
    assert close(uniform[1], wanted[1]) and not close(uniform[0], wanted[0]), "one key has weight one"


def test_a_strided_query_and_a_part_of_a_larger_table_are_served(runtime: Runtime) -> None:
    (q, k, v, table, lengths), wanted = made((13, 2, 8))
    fused = torch.randn(3, 3, H, D)
    fused[:, 0] = q
    larger = torch.full((7, 40), -1, dtype=torch.int32)
    larger[:3, : table.shape[1]] = table
    assert close(runtime.server("paged_attention").call(fused[:, 0], k, v, larger[:3], lengths), wanted)
    assert counts(runtime) == {"bin": 1}


FALLBACKS: dict[str, tuple[str, Callable[[Args], Args]]] = {
    "dtype": ("dtype", lambda a: (a[0].double(), a[1].double(), a[2].double(), *a[3:])),
    "gradient": ("gradient", lambda a: (a[0].clone().requires_grad_(), *a[1:])),
    "cache wants gradients": ("gradient", lambda a: (*a[:2], a[2].clone().requires_grad_(), *a[3:])),
    "heads outside": (
        "strides",
        lambda a: (a[0], *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in a[1:3]), *a[3:]),
    ),
    "subclass": ("subclass", lambda a: (a[0].as_subclass(Own), *a[1:])),
    "lengths of a subclass": ("subclass", lambda a: (*a[:4], a[4].as_subclass(Own))),
}


class Own(torch.Tensor):
    """Somebody else's tensor."""


@pytest.mark.parametrize("case", FALLBACKS)
def test_what_is_odd_is_the_frameworks_with_its_reason(runtime: Runtime, case: str) -> None:
    reason, change = FALLBACKS[case]
    args, wanted = made((13, 2, 8))
    y = runtime.server("paged_attention").call(*change(args))
    assert close(y.detach().as_subclass(torch.Tensor), wanted)
    assert counts(runtime) == {reason: 1}


def test_other_shapes_and_an_empty_table_are_the_frameworks(runtime: Runtime) -> None:
    args, wanted = made((13, 2), hkv=1)
    assert close(runtime.server("paged_attention").call(*args), wanted)
    assert counts(runtime) == {"unknown_shape": 1}
    bare = Runtime("t", Generation())
    assert close(bare.server("paged_attention").call(*args), wanted)
    refused = Runtime("t", Generation(refused="another machine"))
    assert close(refused.server("paged_attention").call(*args), wanted)
    assert counts(refused) == {"refused": 1}


def test_no_sequence_at_all(runtime: Runtime) -> None:
    (q, k, v, table, lengths), _ = made((3,))
    y = runtime.server("paged_attention").call(q[:0], k, v, table[:0], lengths[:0])
    assert y.shape == (0, H, D) and counts(runtime) == {"zero_sized": 1}


def test_gradients_are_those_of_the_plain_formula(runtime: Runtime) -> None:
    (q, k, v, table, lengths), _ = made((6, 3), dtype=torch.float64, garbage=0.0)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    call = runtime.server("paged_attention").call
    assert torch.autograd.gradcheck(lambda *t: call(*t, table, lengths), leaves)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_modes_and_compiling(runtime: Runtime) -> None:
    args, wanted = made((13, 2, 8))
    call = runtime.server("paged_attention").call
    stacked = torch.vmap(lambda q: call(q, *args[1:]))(torch.stack((args[0], args[0])))
    assert close(stacked[1], wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(*args).dtype == torch.bfloat16
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert close(compiled(*args), wanted)
    meta = call(*(t.to("meta") for t in args))
    assert meta.shape == wanted.shape and meta.is_meta
    assert set(counts(runtime)) == {"transformed", "autocast", "bin", "device"}


def test_a_kernel_that_fails_is_replaced_by_the_framework(route: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = route("paged_attention", (LOOP,), [STATICS])
    args, wanted = made()

    def broken(*_: object) -> Any:
        return lambda *args: args[0].no_such_thing

    monkeypatch.setitem(pool.kernels(), LOOP, _with_bind(LOOP, broken))
    call = runtime.server("paged_attention").call
    assert close(call(*args), wanted) and close(call(*args), wanted)
    assert counts(runtime) == {"kernel_failed": 2} and LOOP in runtime.failures


def _with_bind(id: str, bind: Any) -> Any:
    from dataclasses import replace

    return replace(pool.kernels()[Candidate.parse(id).kernel], bind=bind)


def test_no_module_is_swapped(runtime: Runtime) -> None:
    assert runtime.server("paged_attention").swap(nn.MultiheadAttention(8, 2)) == []


# -- what is refused -------------------------------------------------------------------------------------


def put(t: torch.Tensor, index: Any, value: int) -> torch.Tensor:
    t = t.clone()
    t[index] = value
    return t


WRONG: dict[str, tuple[Callable[[Args], Any], type[Exception], str]] = {
    "no tensor": (lambda a: (a[0], None, *a[2:]), TypeError, "found k_cache of NoneType, expected a torch.Tensor"),
    "table of floats": (lambda a: (*a[:3], a[3].float(), a[4]), TypeError, "block_table of torch.float32"),
    "lengths of bytes": (lambda a: (*a[:4], a[4].byte()), TypeError, "found lengths of torch.uint8"),
    "q of 4 dims": (lambda a: (a[0][:, :, None], *a[1:]), ValueError, r"found q \(3, 4, 1, 8\), expected \(b, h"),
    "caches differ": (lambda a: (*a[:2], a[2][1:], *a[3:]), ValueError, "expected both .pages, page, hkv, d"),
    "cache of 3 dims": (
        lambda a: (a[0], a[1].flatten(0, 1), a[2].flatten(0, 1), *a[3:]), ValueError, "expected both .pages",
    ),
    "another d": (lambda a: (a[0][..., 1:], *a[1:]), ValueError, "expected one d"),
    "heads in three": (lambda a: (a[0][:, 1:], *a[1:]), ValueError, "3 heads and 2 key heads, expected a multiple"),
    "no key heads": (
        lambda a: (a[0], a[1][:, :, :0], a[2][:, :, :0], *a[3:]), ValueError, "4 heads and 0 key heads",
    ),
    "table of another batch": (
        lambda a: (*a[:3], a[3][1:], a[4]), ValueError, r"found block_table \(2, 5\), expected \(3, max_pages\)",
    ),
    "table of 1 dim": (lambda a: (*a[:3], a[3][0], a[4]), ValueError, "found block_table"),
    "lengths of another batch": (lambda a: (*a[:4], a[4][1:]), ValueError, r"lengths \(2,\), expected \(3,\)"),
    "length 0": (lambda a: (*a[:4], put(a[4], 1, 0)), ValueError, "found 0 in lengths, expected 1 to 20"),
    "negative length": (lambda a: (*a[:4], put(a[4], 0, -7)), ValueError, "found -7 in lengths"),
    "too long": (lambda a: (*a[:4], put(a[4], 2, 21)), ValueError, "found 21 in lengths, expected 1 to 20"),
    "no columns": (lambda a: (*a[:3], a[3][:, :0], a[4]), ValueError, "expected 1 to 0"),
    "a page that is not there": (
        lambda a: (*a[:3], put(a[3], (0, 3), 9), a[4]), ValueError, "found page 9 in block_table.*expected 0 to 8",
    ),
    "garbage before the end": (lambda a: (*a[:4], put(a[4], 1, 9)), ValueError, "found page -1 in block_table"),
    "no pages": (lambda a: (a[0], a[1][:0], a[2][:0], *a[3:]), ValueError, "the cache has 0 pages"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_before_anything_runs(runtime: Runtime, case: str) -> None:
    change, kind, said = WRONG[case]
    args, _ = made((13, 2, 8))
    assert len(args[1]) == 4 + 1 + 2 + 2
    with pytest.raises(kind, match=f"^paged_attention: .*{said}"):
        runtime.server("paged_attention").call(*change(args))
    assert counts(runtime) == {}


def test_floats_of_two_dtypes_are_the_frameworks_to_refuse(runtime: Runtime) -> None:
    args, _ = made()
    with pytest.raises(RuntimeError, match="dtype"):
        runtime.server("paged_attention").call(args[0].double(), *args[1:])
