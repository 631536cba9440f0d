"""``layer_norm`` as served: the same results and the same errors as ``F.layer_norm``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dks.dispatch import pool
from dks.dispatch.ops.layer_norm.serve import PreparedLayerNorm

N = 12
NATIVE, WIDE = "torch.native_layer_norm", "torch.layer_norm_wide_affine"


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(N, generator=torch.Generator().manual_seed(1)) * 0.1 + 1).to(dtype)


def bias(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(2)).to(dtype)


def x(*lead: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*lead, N, generator=torch.Generator().manual_seed(3)).to(dtype)


CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "1-d": lambda: (x(), (N,), weight(), bias()),
    "2-d": lambda: (x(8), [N], weight(), bias()),
    "5-d": lambda: (x(2, 1, 2, 2), torch.Size([N]), weight(), bias(), 1e-3),
    "no affine": lambda: (x(8), (N,)),
    "weight alone": lambda: (x(8), (N,), weight()),
    "bias alone": lambda: (x(8), (N,), None, bias()),
    "bf16": lambda: (x(8, dtype=torch.bfloat16), (N,), weight(torch.bfloat16), bias(torch.bfloat16)),
    "bf16 with float32 affine": lambda: (x(8, dtype=torch.bfloat16), (N,), weight(), bias()),
    "two dims": lambda: (x(3, 4), (4, N), torch.randn(4, N), torch.randn(4, N)),
    "no dims": lambda: (x(3), ()),
    "a number as shape": lambda: (x(3), N),
    "other shape": lambda: (x(3), (N + 1,), weight(), bias()),
    "other affine": lambda: (x(3), (N,), torch.randn(N + 1), bias()),
    "negative shape": lambda: (x(3), (-N,)),
    "0-d": lambda: (torch.tensor(1.0), (N,)),
    "no rows": lambda: (torch.randn(0, N), (N,), weight(), bias()),
    "n=0": lambda: (torch.randn(3, 0), (0,), torch.randn(0), torch.randn(0)),
    "transposed": lambda: (torch.randn(N, 8).t(), (N,), weight(), bias()),
    "expanded": lambda: (x(1).expand(8, N), (N,), weight(), bias()),
    "every second weight": lambda: (x(8), (N,), torch.randn(2 * N)[::2], bias()),
    "float64": lambda: (x(8, dtype=torch.float64), (N,), weight(torch.float64), bias(torch.float64)),
    "float16": lambda: (x(8, dtype=torch.float16), (N,), weight(torch.float16), bias(torch.float16)),
    "int64": lambda: (x(8).long(), (N,)),
    "mixed": lambda: (x(8), (N,), weight(torch.float64), bias()),
    "meta": lambda: (x(8).to("meta"), (N,), weight().to("meta"), bias().to("meta")),
    "sparse": lambda: (x(8).to_sparse(), (N,)),
    "None": lambda: (None, (N,)),
    "a list": lambda: ([1.0], (1,)),
    "eps is text": lambda: (x(8), (N,), weight(), bias(), "small"),
    "not finite": lambda: (x(8).fill_diagonal_(float("inf")), (N,), weight(), bias()),
    "wants gradients": lambda: (x(8).requires_grad_(), (N,), weight(), bias()),
}


def outcome(call: Callable[[], torch.Tensor]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error)


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, type):
        assert found is wanted, f"found {found}, expected {wanted}"
        return
    assert isinstance(found, torch.Tensor), f"found {found}, expected a result"
    assert (found.dtype, found.shape, found.device) == (wanted.dtype, wanted.shape, wanted.device)
    assert found.requires_grad == wanted.requires_grad
    if wanted.device.type == "cpu":
        tolerance = 3e-2 if wanted.dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.fixture
def server(route: Any) -> Any:
    # bf16 layers get the wide form, all else the native one.
    return route("layer_norm", (WIDE, NATIVE), [{"n": N}]).server("layer_norm")


@pytest.fixture
def layer(server: Any) -> PreparedLayerNorm:
    return server.prepare(nn.Parameter(weight(), False), nn.Parameter(bias(), False))


def counts(owner: Any) -> dict[str, int]:
    runtime = owner.runtime if hasattr(owner, "runtime") else owner._server.runtime
    ops = runtime.stats()["ops"].get("layer_norm", {"hits": {}, "fallbacks": {}})
    return {**ops["hits"], **ops["fallbacks"]}


@pytest.mark.parametrize("case", CASES)
def test_call_is_the_frameworks(server: Any, case: str) -> None:
    args = CASES[case]()
    wanted = outcome(lambda: F.layer_norm(*args))
    assert_same(outcome(lambda: server.call(*args)), wanted)
    if not isinstance(wanted, type):
        assert sum(counts(server).values()) == 1


@pytest.mark.parametrize("case", CASES)
def test_prepared_is_the_frameworks(server: Any, case: str) -> None:
    args = CASES[case]()
    if len(args) < 4 or args[2] is None or args[2].dim() != 1 or args[2].shape != args[3].shape:
        return
    made = server.prepare(args[2], args[3], args[4] if len(args) > 4 and args[4] != "small" else 1e-5)
    wanted = outcome(lambda: F.layer_norm(args[0], tuple(made.weight.shape), args[2], args[3], made.eps))
    assert_same(outcome(lambda: made(args[0])), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_candidate_in_turn(route: Any, dtype: torch.dtype) -> None:
    name = "float32" if dtype == torch.float32 else "bfloat16"
    for kernel in pool.kernels_for("layer_norm", "cpu"):
        if name not in kernel.precision or kernel.unavailable() is not None:
            continue
        candidate = kernel.candidates()[0].id
        server = route("layer_norm", (candidate,), [{"n": N}]).server("layer_norm")
        made = server.prepare(weight(dtype), bias(dtype))
        given = x(2, 3, dtype=dtype)
        wanted = F.layer_norm(given, (N,), made.weight, made.bias)
        assert_same(made(given), wanted)
        assert list(counts(made)) == ["bin"] and list(made.binding.dispatch.kernels) == [candidate]


def test_which_calls_dispatch(server: Any) -> None:
    server.call(x(8), (N,), weight(), bias())
    server.call(x(8), (N,))
    server.call(x(8), (N,), weight(), bias(), 0.5)
    assert counts(server) == {"exact": 3}, "eps is no part of the key"
    server.call(torch.randn(3, 4), (4,))
    assert counts(server) == {"exact": 3, "unknown_shape": 1}


def test_prepare_refuses_other_shapes(server: Any) -> None:
    for w, b in ((weight(), torch.randn(N + 1)), (torch.randn(2, N), torch.randn(2, N))):
        with pytest.raises(ValueError, match=r"expected \(n,\) and \(n,\)"):
            server.prepare(w, b)


def test_derivatives(server: Any) -> None:
    made = server.prepare(nn.Parameter(weight()), nn.Parameter(bias()))
    results = []
    for f in (made, lambda a: server.call(a, (N,), made.weight, made.bias), None):
        a = x(4).requires_grad_()
        y = F.layer_norm(a, (N,), made.weight, made.bias) if f is None else f(a)
        first = torch.autograd.grad(y.pow(3).sum(), (a, made.weight, made.bias), create_graph=True)
        results.append((*first, *torch.autograd.grad(first[0].pow(2).sum(), (a, made.weight))))
    for found in results[:2]:
        assert all(torch.allclose(f, w, rtol=1e-4, atol=1e-4) for f, w in zip(found, results[2], strict=True))


def test_transforms_and_modes(layer: PreparedLayerNorm, server: Any) -> None:
    stack = x(5, 3)
    wanted = F.layer_norm(stack, (N,), layer.weight, layer.bias)
    for f in (layer, lambda a: server.call(a, (N,), layer.weight, layer.bias)):
        assert torch.allclose(torch.vmap(f)(stack), wanted, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert f(stack).dtype == F.layer_norm(stack, (N,), layer.weight, layer.bias).dtype
        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(stack), wanted, atol=1e-5)
    assert set(counts(layer)) == {"transformed", "autocast", "bin"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_are_noticed(server: Any, dtype: torch.dtype) -> None:
    made = server.prepare(nn.Parameter(weight(dtype), False), nn.Parameter(bias(dtype), False))
    for change in (lambda: made.weight.mul_(2), lambda: made.bias.mul_(2), lambda: made.weight.detach().mul_(2)):
        change()
        wanted = F.layer_norm(x(8, dtype=dtype), (N,), made.weight, made.bias)
        assert_same(made(x(8, dtype=dtype)), wanted)
        made.refresh()
        assert_same(made(x(8, dtype=dtype)), wanted)
    assert counts(made) == {"weight_changed": 3, "exact": 3}


def test_state_travels_as_nn_layer_norm_does(layer: PreparedLayerNorm, server: Any) -> None:
    twin = nn.LayerNorm(N)
    assert list(layer.state_dict()) == list(twin.state_dict())
    twin.load_state_dict(layer.state_dict())
    assert torch.allclose(twin(input=x(8)), layer(input=x(8)), atol=1e-5)
    layer.load_state_dict({"weight": torch.ones(N), "bias": torch.zeros(N)})
    assert torch.allclose(layer(x(8)), F.layer_norm(x(8), (N,)), atol=1e-5)


class Own(nn.LayerNorm):
    pass


def test_optimize(server: Any) -> None:
    shared = nn.LayerNorm(N)
    model = nn.ModuleDict(
        {
            "plain": nn.LayerNorm(N, eps=1e-3),
            "shared": nn.ModuleList([shared, shared]),
            "own": Own(N),
            "wide": nn.LayerNorm((4, N)),
            "bare": nn.LayerNorm(N, elementwise_affine=False),
            "unbiased": nn.LayerNorm(N, bias=False),
            "unknown": nn.LayerNorm(N + 1),
            "wider": nn.LayerNorm(N).double(),
            "hooked": nn.LayerNorm(N),
        }
    )
    model["hooked"].register_forward_hook(lambda *_: None)
    keys = list(model.state_dict())
    report = server.runtime.optimize(model.eval())
    assert {s.path for s in report.swaps if s.done} == {"plain", "shared.0", "shared.1"}
    assert list(model.state_dict()) == keys
    assert model["shared"][0] is model["shared"][1] and not model["plain"].training
    for text in ("expected the last dim alone", "no weight or no bias", "not in the table", "dtype", "hooks"):
        assert text in str(report)
    assert "Own is a subclass" in {s.path: s.note for s in report.swaps}["own"]
    plain = model["plain"]
    assert (plain.eps, plain.normalized_shape, plain.elementwise_affine) == (1e-3, (N,), True)
    with torch.no_grad():
        assert torch.allclose(plain(x(8)), F.layer_norm(x(8), (N,), plain.weight, plain.bias, 1e-3), atol=1e-5)
    assert server.runtime.optimize(model).swapped == 0, "a second time changes nothing"
    alone = nn.LayerNorm(N)
    assert server.runtime.optimize(alone).swapped == 1 and isinstance(alone, PreparedLayerNorm)


def test_optimize_leaves_what_gains_nothing(route: Any) -> None:
    runtime = route("layer_norm", ("torch.layer_norm",), [{"n": N}])
    model = nn.Sequential(nn.LayerNorm(N))
    assert "own kernel is the choice everywhere" in str(runtime.optimize(model))
    assert type(model[0]) is nn.LayerNorm
