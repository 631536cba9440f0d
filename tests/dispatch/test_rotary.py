"""``rotary`` as served: strided projections, halves of one cache, positions of both widths, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dks.dispatch import pool
from dks.dispatch.kernel import Inputs, Kernel
from dks.dispatch.problem import Precision, Problem

MARKED = "test.rotary"
H, HKV, D, ROWS = 4, 2, 16, 40

Args = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def server(route: Any) -> Iterator[Any]:
    """All that the table serves goes through a kernel of another name than the framework's."""
    precision = {"float32": Precision.EXACT, "bfloat16": Precision.BF16}
    bind = pool.kernels()["torch.rotary"].bind
    pool.kernels()[MARKED] = Kernel(MARKED, "rotary", precision, bind, rank=1)
    yield route("rotary", (MARKED,), [{"h": H, "hkv": HKV, "d": D}]).server("rotary")
    del pool.kernels()[MARKED]


def made(tokens: int = 8, dtype: torch.dtype = torch.float32, cache: torch.dtype = torch.float32) -> Args:
    """(q, k, cos, sin, positions), as a model of Llama's kind has them."""
    draw = torch.Generator().manual_seed(tokens)
    inverse = 10000.0 ** (-torch.arange(0, D, 2) / D)
    angles = torch.arange(ROWS)[:, None] * inverse
    positions = torch.randint(0, ROWS, (tokens,), generator=draw)
    q, k = (torch.randn(tokens, n, D, generator=draw).to(dtype) for n in (H, HKV))
    return q, k, angles.cos().to(cache), angles.sin().to(cache), positions


def plainly(args: Args) -> list[torch.Tensor]:
    """Turned in float64, as complex numbers."""
    q, k, cos, sin, positions = args
    turn = torch.complex(cos.double(), sin.double())[positions][:, None]
    wide = [torch.complex(*t.detach().double().chunk(2, -1)) * turn for t in (q, k)]
    return [torch.cat((t.real, t.imag), -1) for t in wide]


def close(found: Any, wanted: list[torch.Tensor]) -> bool:
    assert type(found) is tuple and len(found) == 2
    off = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-5, torch.float64: 1e-6}
    return all(
        y.shape == w.shape and torch.allclose(y.double(), w, rtol=off[y.dtype], atol=off[y.dtype])
        for y, w in zip(found, wanted, strict=True)
    )


def counts(server: Any) -> dict[str, int]:
    ops = server.runtime.stats()["ops"].get("rotary", {"hits": {}, "fallbacks": {}})
    return {**ops["hits"], **ops["fallbacks"]}


def test_the_reference_is_the_plain_formula() -> None:
    operator = pool.operator("rotary")
    problem = Problem.of(
        "rotary", {"dtype": "float32", "cache": "float32"}, {"tokens": 8, "h": H, "hkv": HKV, "d": D}
    )
    found = operator.reference(problem, Inputs((), made()))
    assert all(torch.allclose(y, w, rtol=1e-13, atol=1e-13) for y, w in zip(found, plainly(made()), strict=True))


@pytest.mark.parametrize("cache", ["float32", "same"])
def test_inputs_of_a_sweep_have_positions_of_their_own_and_nan_elsewhere(cache: str) -> None:
    operator = pool.operator("rotary")
    dims = {"tokens": 9, "h": H, "hkv": HKV, "d": D}
    problem = Problem.of("rotary", {"dtype": "bfloat16", "cache": cache}, dims, 16)
    q, k, cos, sin, positions = operator.make_inputs(problem, torch.Generator().manual_seed(3), "normal").dynamic
    assert cos.dtype is (torch.float32 if cache == "float32" else torch.bfloat16)
    assert sorted(positions.tolist()) != positions.tolist() and len(set(positions.tolist())) == 9
    for t in (cos, sin):
        assert t.isfinite().all(1).nonzero()[:, 0].tolist() == sorted(positions.tolist())
    assert {t.data_ptr() % 32 for t in (q, k, cos, sin)} == {16}
    assert operator.odd_dims(dims) is None and operator.odd_dims(dims | {"d": 7}) == "d must be even"


@pytest.mark.parametrize("ints", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
def test_a_call_finds_its_kernel(server: Any, dtype: torch.dtype, cache: torch.dtype, ints: torch.dtype) -> None:
    args = made(8, dtype, cache)
    found = server.call(*args[:4], args[4].to(ints))
    assert close(found, plainly(args)) and all(y.is_contiguous() and y.dtype is dtype for y in found)
    narrow = dtype is torch.float32 and cache is torch.bfloat16
    assert counts(server) == ({"dtype": 1} if narrow else {"exact": 1})


def test_tokens_are_what_is_looked_up(server: Any) -> None:
    for tokens in (1, 3, 64, 100, 1000):
        assert close(server.call(*made(tokens)), plainly(made(tokens)))
    assert counts(server) == {"exact": 2, "bin": 1, "nearest": 1, "out_of_range": 1}


def test_what_a_projection_gives_and_halves_of_one_cache_are_served_as_they_lie(server: Any) -> None:
    q, k, cos, sin, positions = made()
    fused = torch.randn(8, H + 2 * HKV, D)
    fused[:, :H], fused[:, H : H + HKV] = q, k
    parts = fused.split((H, HKV, HKV), 1)
    halves = torch.cat((cos, sin), -1).chunk(2, -1)
    seen: list[Any] = []
    bind = pool.kernels()[MARKED].bind(None, ())  # type: ignore[arg-type]
    object.__setattr__(pool.kernels()[MARKED], "bind", lambda *_: lambda *args: seen.append(args) or bind(*args))
    assert close(server.call(parts[0], parts[1], *halves, positions), plainly(made()))
    assert counts(server) == {"exact": 1}
    assert all(a is b for a, b in zip(seen[0], (*parts[:2], *halves, positions), strict=True)), "nothing is copied"
    heads_first = torch.randn(H, 8, D).transpose(0, 1).copy_(q)
    assert close(server.call(heads_first, *made()[1:]), plainly(made()))
    every_second = torch.stack((positions, positions), 1)[:, 0]
    assert close(server.call(q, k, cos, sin, every_second), plainly(made())) and seen[-1][4].is_contiguous()


class Own(torch.Tensor):
    """Somebody else's tensor."""


FALLBACKS: dict[str, tuple[str, Callable[[Args], tuple[Any, ...]]]] = {
    "float64": ("dtype", lambda a: (a[0].double(), a[1].double(), *a[2:])),
    "k of another dtype": ("dtype", lambda a: (a[0], a[1].bfloat16(), *a[2:])),
    "caches of another width": ("dtype", lambda a: (*a[:2], a[2].half(), a[3].half(), a[4])),
    "sin of another width": ("dtype", lambda a: (*a[:3], a[3].double(), a[4])),
    "gradient": ("gradient", lambda a: (a[0].clone().requires_grad_(), *a[1:])),
    "learned caches": ("gradient", lambda a: (*a[:2], a[2].clone().requires_grad_(), *a[3:])),
    "elements apart": ("strides", lambda a: (torch.stack((a[0], a[0]), -1)[..., 0], *a[1:])),
    "caches apart": ("strides", lambda a: (*a[:2], torch.cat((a[2], a[2]), 1)[:, : D // 2], *a[3:])),
    "subclass": ("subclass", lambda a: (a[0].as_subclass(Own), *a[1:])),
    "positions of a subclass": ("subclass", lambda a: (*a[:4], a[4].as_subclass(Own))),
    "no tokens": ("zero_sized", lambda a: (a[0][:0], a[1][:0], *a[2:4], a[4][:0])),
    "no key heads": ("zero_sized", lambda a: (a[0], a[1][:, :0], *a[2:])),
    "other heads": ("unknown_shape", lambda a: (a[0][:, :3].contiguous(), *a[1:])),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_what_is_odd_is_the_frameworks_with_its_reason(server: Any, case: str) -> None:
    reason, change = FALLBACKS[case]
    given = change(made())
    found = server.call(*given)
    assert close(tuple(y.detach().as_subclass(torch.Tensor) for y in found), plainly(given))  # type: ignore[arg-type]
    assert counts(server) == {reason: 1}
    assert any(y.requires_grad for y in found) is (reason == "gradient")
    assert [y.dtype for y in found] == [t.dtype for t in given[:2]]


def test_gradients_and_transforms(server: Any) -> None:
    q, k, cos, sin, positions = made()
    assert torch.autograd.gradcheck(
        lambda *args: server.call(*args, positions[:2]),
        [t.double().requires_grad_() for t in (q[:2, :1], k[:2, :1], cos, sin)],
    )
    batched = torch.func.vmap(lambda q: server.call(q, k, cos, sin, positions)[0])(torch.stack((q, q + 1)))
    assert torch.equal(batched[0], server.call(q, k, cos, sin, positions)[0])


MISFITS: dict[str, tuple[type[Exception], Callable[[Args], tuple[Any, ...]], str]] = {
    "a list": (TypeError, lambda a: (a[0].tolist(), *a[1:]), "found q of list, expected a torch.Tensor"),
    "no cache": (TypeError, lambda a: (*a[:2], None, *a[3:]), "found cos of NoneType, expected a torch.Tensor"),
    "float positions": (TypeError, lambda a: (*a[:4], a[4].float()), "found positions of torch.float32, expected"),
    "bool positions": (TypeError, lambda a: (*a[:4], a[4] > 3), "found positions of torch.bool, expected"),
    "batched": (ValueError, lambda a: (a[0][None], *a[1:]), "found q (1, 8, 4, 16), expected (tokens, h, d)"),
    "odd": (ValueError, lambda a: (a[0][..., :15], *a[1:]), "found q (8, 4, 15), expected an even d"),
    "other tokens": (ValueError, lambda a: (a[0], a[1][:7], *a[2:]), "found k (7, 2, 16), expected (8, hkv, 16)"),
    "whole caches": (
        ValueError,
        lambda a: (*a[:2], *(torch.cat((t, t), 1) for t in a[2:4]), a[4]),
        "found cos (40, 16), sin (40, 16), expected both (positions, 8)",
    ),
    "other caches": (
        ValueError,
        lambda a: (*a[:3], a[3][:7], a[4]),
        "found cos (40, 8), sin (7, 8), expected both",
    ),
    "few positions": (ValueError, lambda a: (*a[:4], a[4][:3]), "found positions (3,), expected (8,)"),
    "past the caches": (ValueError, lambda a: (*a[:4], a[4] + ROWS), "expected 0 to 39: the caches have 40"),
    "before them": (ValueError, lambda a: (*a[:4], a[4] - ROWS - 1), "rotary: found position -"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_nobody_could_compute_is_refused(server: Any, case: str) -> None:
    kind, change, said = MISFITS[case]
    with pytest.raises(kind, match="rotary: .*" + re.escape(said.removeprefix("rotary: "))):
        server.call(*change(made()))


def test_optimize_has_nothing_to_swap(server: Any) -> None:
    assert server.runtime.optimize(torch.nn.Sequential(torch.nn.Identity())).swaps == ()
    assert server.runtime.explain("rotary", tokens=8, h=H, hkv=HKV, d=D).candidate == MARKED
