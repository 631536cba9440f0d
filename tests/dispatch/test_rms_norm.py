"""``rms_norm`` as served: the same results and the same errors as ``F.rms_norm``, after a residual or without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dks.dispatch import pool
from dks.dispatch.generation import Generation
from dks.dispatch.kernel import parts, relative_error
from dks.dispatch.ops.rms_norm.serve import PreparedRMSNorm
from dks.dispatch.problem import Problem
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import Table

N = 12
BF16 = torch.bfloat16
VECTOR, WIDE = "torch.rms_vector_norm", "torch.rms_norm_wide_weight"


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return drawn(1, N, dtype=dtype)


def x(*lead: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return drawn(3, *lead, N, dtype=dtype)


def r(*lead: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return drawn(4, *lead, N, dtype=dtype)


def framework(
    x: Any, shape: Any, weight: Any = None, eps: Any = None, residual: Any = None
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    if residual is None:
        return F.rms_norm(x, shape, weight, eps)
    h = x + residual
    return F.rms_norm(h, shape, weight, eps), h


CASES: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "1-d": ("exact", lambda: (x(), (N,), weight())),
    "2-d": ("exact", lambda: (x(8), [N], weight())),
    "5-d": ("exact", lambda: (x(2, 1, 2, 2), torch.Size([N]), weight(), 1e-3)),
    "no weight": ("exact", lambda: (x(8), (N,))),
    "bf16": ("exact", lambda: (x(8, dtype=BF16), (N,), weight(BF16))),
    "tiny rows, eps of the framework": ("exact", lambda: (x(8) * 1e-4, (N,), weight())),
    "tiny bf16 rows, eps of the framework": ("exact", lambda: (x(8, dtype=BF16) * 1e-4, (N,))),
    "residual": ("exact", lambda: (x(8), (N,), weight(), 1e-5, r(8))),
    "residual, 1-d": ("exact", lambda: (x(), (N,), weight(), None, r())),
    "residual, 4-d": ("exact", lambda: (x(2, 2, 2), (N,), None, None, r(2, 2, 2))),
    "residual, bf16": ("exact", lambda: (x(8, dtype=BF16), (N,), weight(BF16), None, r(8, dtype=BF16))),
    "residual is x": ("exact", lambda: (t := x(8), (N,), weight(), None, t)),
    "not finite": ("exact", lambda: (x(8).fill_diagonal_(float("inf")), (N,), weight(), None, r(8))),
    "residual to broadcast": ("shape", lambda: (x(8), (N,), weight(), None, r(1))),
    "residual of other rows": ("shape", lambda: (x(8), (N,), weight(), None, r(7))),
    "residual in bf16": ("dtype", lambda: (x(8), (N,), weight(), None, r(8, dtype=BF16))),
    "residual in float32": ("dtype", lambda: (x(8, dtype=BF16), (N,), weight(BF16), None, r(8))),
    "residual transposed": ("strides", lambda: (x(8), (N,), weight(), None, drawn(5, N, 8).t())),
    "residual expanded": ("strides", lambda: (x(8), (N,), weight(), None, r(1).expand(8, N))),
    "residual a number": ("subclass", lambda: (x(8), (N,), weight(), None, 1.0)),
    "residual wants gradients": ("gradient", lambda: (x(8), (N,), weight(), None, r(8).requires_grad_())),
    "bf16 with float32 weight": ("dtype", lambda: (x(8, dtype=BF16), (N,), weight())),
    "two dims": ("shape", lambda: (x(3, 4), (4, N), drawn(1, 4, N))),
    "no dims": ("shape", lambda: (x(3), ())),
    "a number as shape": ("shape", lambda: (x(3), N)),
    "other shape": ("shape", lambda: (x(3), (N + 1,), weight())),
    "other weight": ("shape", lambda: (x(3), (N,), torch.randn(N + 1))),
    "0-d": ("shape", lambda: (torch.tensor(1.0), (N,))),
    "no rows": ("zero_sized", lambda: (torch.randn(0, N), (N,), weight(), None, torch.randn(0, N))),
    "n=0": ("zero_sized", lambda: (torch.randn(3, 0), (0,), torch.randn(0))),
    "transposed": ("strides", lambda: (torch.randn(N, 8).t(), (N,), weight(), None, r(8))),
    "every second weight": ("strides", lambda: (x(8), (N,), torch.randn(2 * N)[::2])),
    "float64": ("dtype", lambda: (x(8).double(), (N,), weight().double(), None, r(8).double())),
    "float16": ("unknown_shape", lambda: (x(8).half(), (N,), weight().half())),
    "another n": ("unknown_shape", lambda: (torch.randn(3, 4), (4,))),
    "meta": ("device", lambda: (x(8).to("meta"), (N,), weight().to("meta"))),
    "None": ("subclass", lambda: (None, (N,))),
    "eps is text": ("shape", lambda: (x(8), (N,), weight(), "small")),
    "wants gradients": ("gradient", lambda: (x(8).requires_grad_(), (N,), weight(), None, r(8))),
}


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error)


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, type):
        assert found is wanted, f"found {found}, expected {wanted}"
        return
    assert type(found) is type(wanted), f"found {found}, expected {wanted}"
    for f, w in zip(parts(found), parts(wanted), strict=True):
        assert (f.dtype, f.shape, f.device, f.requires_grad) == (w.dtype, w.shape, w.device, w.requires_grad)
        if w.device.type == "cpu":
            tolerance = 3e-2 if w.dtype == BF16 else 1e-5
            assert torch.allclose(f, w, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.fixture
def server(route: Any) -> Any:
    # Prepared bf16 layers get the wide form, all else the vector norm.
    return route("rms_norm", (WIDE, VECTOR), [{"n": N}]).server("rms_norm")


def counts(owner: Any) -> dict[str, int]:
    runtime = owner.runtime if hasattr(owner, "runtime") else owner._server.runtime
    ops = runtime.stats()["ops"].get("rms_norm", {"hits": {}, "fallbacks": {}})
    return {**ops["hits"], **ops["fallbacks"]}


@pytest.mark.parametrize("case", CASES)
def test_call_is_the_frameworks(server: Any, case: str) -> None:
    expected, make = CASES[case]
    args = make()
    wanted = outcome(lambda: framework(*args))
    assert_same(outcome(lambda: server.call(*args)), wanted)
    if not isinstance(wanted, type):
        assert counts(server) == {expected: 1}


@pytest.mark.parametrize("case", CASES)
def test_prepared_is_the_frameworks(server: Any, case: str) -> None:
    args = CASES[case][1]()
    args = (*args, *(None,) * (5 - len(args)))
    if args[2] is None or args[2].shape != (N,) or args[3] == "small":
        return
    made = server.prepare(args[2], args[3])
    wanted = outcome(lambda: framework(args[0], (N,), *args[2:]))
    assert_same(outcome(lambda: made(args[0], args[4])), wanted)
    assert isinstance(wanted, type) or sum(counts(server).values()) == 1


@pytest.mark.parametrize("residual", ["no", "yes"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_candidate_in_turn_against_float64(route: Any, dtype: str, residual: str) -> None:
    operator = pool.operator("rms_norm")
    problem = Problem.of("rms_norm", {"dtype": dtype, "affine": "yes", "residual": residual}, {"m": 6, "n": N})
    inputs = operator.make_inputs(problem, torch.Generator().manual_seed(0), "normal")
    for kernel in pool.kernels_for("rms_norm", "cpu"):
        if kernel.unavailable() is not None or kernel.objection(problem) is not None:
            continue
        candidate = kernel.candidates()[0].id
        made = route("rms_norm", (candidate,), [{"n": N}]).server("rms_norm").prepare(*inputs.static)
        error = relative_error(made(*inputs.dynamic), operator.reference(problem, inputs))
        assert error <= kernel.precision[dtype].limit, (kernel.id, error)
        assert list(counts(made)) == ["bin"] and list(made.binding.dispatch.kernels) == [candidate]


def test_a_residual_is_a_question_of_its_own(route: Any) -> None:
    """A table that holds no fused group leaves such calls to the framework, prepared or not."""
    runtime = route("rms_norm", (VECTOR,), [{"n": N}])
    held = tuple(g for g in runtime.generation.table.groups if dict(g.traits)["residual"] == "no")
    runtime = Runtime("t", Generation(Table(runtime.generation.table.rules, held)))
    server = runtime.server("rms_norm")
    made = server.prepare(weight())
    for call in (made, lambda a, b=None: server.call(a, (N,), made.weight, residual=b)):
        with torch.no_grad():
            call(x(8))
            assert_same(call(x(8), r(8)), framework(x(8), (N,), made.weight, None, r(8)))
    assert counts(server) == {"exact": 2, "unknown_shape": 2}


def test_prepare_refuses_other_shapes(server: Any) -> None:
    with pytest.raises(ValueError, match=r"found weight \(2, 12\), expected \(n,\)"):
        server.prepare(torch.randn(2, N))


def test_derivatives(server: Any) -> None:
    made = server.prepare(nn.Parameter(weight()))
    results = []
    for f in (made, lambda a, b: server.call(a, (N,), made.weight, residual=b), None):
        a, b = x(4).requires_grad_(), r(4).requires_grad_()
        y, h = framework(a, (N,), made.weight, None, b) if f is None else f(a, b)
        results.append(torch.autograd.grad((y.pow(3) * h).sum(), (a, b, made.weight)))
    for found in results[:2]:
        assert all(torch.allclose(f, w, rtol=1e-4, atol=1e-4) for f, w in zip(found, results[2], strict=True))
    assert counts(server) == {"gradient": 2}


def test_modes(server: Any) -> None:
    layer = server.prepare(nn.Parameter(weight(), False))
    given = x(5), r(5)
    wanted = framework(given[0], (N,), layer.weight, None, given[1])
    for f in (layer, lambda a, b: server.call(a, (N,), layer.weight, residual=b)):
        with torch.autocast("cpu", dtype=BF16):
            assert f(*given)[0].dtype == F.rms_norm(given[0], (N,), layer.weight).dtype
        torch._dynamo.reset()
        assert_same(torch.compile(f, fullgraph=True, backend="aot_eager")(*given), wanted)
    assert set(counts(layer)) == {"autocast", "bin"}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_changed_weight_is_noticed(server: Any, dtype: torch.dtype) -> None:
    made = server.prepare(nn.Parameter(weight(dtype), False))
    given = x(8, dtype=dtype), r(8, dtype=dtype)
    made.weight.mul_(2)
    wanted = framework(given[0], (N,), made.weight, None, given[1])
    assert_same(made(*given), wanted)
    made.refresh()
    assert_same(made(*given), wanted)
    assert counts(made) == {"weight_changed": 1, "exact": 1}


def test_state_travels_as_nn_rms_norm_does(server: Any) -> None:
    layer, twin = server.prepare(nn.Parameter(weight(), False)), nn.RMSNorm(N)
    assert list(layer.state_dict()) == list(twin.state_dict())
    twin.load_state_dict(layer.state_dict())
    assert torch.allclose(twin(x(8)), layer(x=x(8)), atol=1e-5)
    layer.load_state_dict({"weight": torch.ones(N)})
    assert torch.allclose(layer(x(8)), F.rms_norm(x(8), (N,)), atol=1e-5)


class Own(nn.RMSNorm):
    pass


def test_optimize(server: Any) -> None:
    shared = nn.RMSNorm(N)
    model = nn.ModuleDict(
        {
            "plain": nn.RMSNorm(N, eps=1e-3),
            "shared": nn.ModuleList([shared, shared]),
            "own": Own(N),
            "wide": nn.RMSNorm((4, N)),
            "bare": nn.RMSNorm(N, elementwise_affine=False),
            "unknown": nn.RMSNorm(N + 1),
            "wider": nn.RMSNorm(N).double(),
            "more": nn.RMSNorm(N),
            "layer_norm": nn.LayerNorm(N),
        }
    )
    model["more"].register_buffer("mean", torch.zeros(N))
    keys = list(model.state_dict())
    report = server.runtime.optimize(model.eval())
    assert {s.path for s in report.swaps if s.done} == {"plain", "shared.0", "shared.1"}
    assert list(model.state_dict()) == keys
    assert model["shared"][0] is model["shared"][1] and not model["plain"].training
    for text in ("expected the last dim alone", "has no weight", "not in the table", "dtype", "more than a weight"):
        assert text in str(report)
    plain = model["plain"]
    assert (plain.eps, plain.normalized_shape) == (1e-3, (N,))
    with torch.no_grad():
        assert torch.allclose(plain(x(8)), F.rms_norm(x(8), (N,), plain.weight, 1e-3), atol=1e-5)
        tiny = x(8) * 1e-4  # eps was None
        assert torch.allclose(model["shared"][0](tiny), F.rms_norm(tiny, (N,), shared.weight), atol=1e-5)
    assert server.runtime.optimize(model).swapped == 0, "a second time changes nothing"
    alone = nn.RMSNorm(N)
    assert server.runtime.optimize(alone).swapped == 1 and isinstance(alone, PreparedRMSNorm)
