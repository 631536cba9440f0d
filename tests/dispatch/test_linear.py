"""``linear`` as served: the same results and the same errors as ``F.linear``, whatever comes in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dks.dispatch import pool
from dks.dispatch.kernel import Kernel, aligned, relative_error
from dks.dispatch.ops.linear.epilogue import EPILOGUES
from dks.dispatch.ops.linear.layers import PreparedLinear
from dks.dispatch.problem import Precision, Problem
from dks.dispatch.runtime import FAILURES

N, K = 6, 8
SHAPES = [{"n": N, "k": K}]
PACKED = "mkldnn.linear_packed"  # not the default, exact in float32, and fuses epilogues
PACKED_BF16 = "mkldnn.linear_packed_float32"  # takes bfloat16 on every machine


class Loud(torch.Tensor):
    """A subclass that says so in its results."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(7)).to(dtype)


def bias(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(8)).to(dtype)


def x(*lead: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*lead, K, generator=torch.Generator().manual_seed(9)).to(dtype)


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([x(2), x(3)])


CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "1-d": lambda: (x(), weight(), bias()),
    "2-d": lambda: (x(4), weight(), bias()),
    "no bias": lambda: (x(4), weight()),
    "3-d": lambda: (x(2, 3), weight(), bias()),
    "4-d": lambda: (x(2, 1, 3), weight(), bias()),
    "5-d": lambda: (x(2, 1, 3, 2), weight(), bias()),
    "bf16": lambda: (x(4, dtype=torch.bfloat16), weight(torch.bfloat16), bias(torch.bfloat16)),
    "a parameter": lambda: (nn.Parameter(x(4), requires_grad=False), weight(), bias()),
    "past the last bin": lambda: (x(100), weight(), bias()),
    "far past the last bin": lambda: (x(1000), weight(), bias()),
    "transposed": lambda: (torch.randn(K, 4).t(), weight(), bias()),
    "every second": lambda: (torch.randn(4, 2 * K)[:, ::2], weight(), bias()),
    "every second row": lambda: (x(8)[::2], weight(), bias()),
    "expanded": lambda: (x(1).expand(4, K), weight(), bias()),
    "expanded scalar": lambda: (torch.randn(1, 1).expand(4, K), weight(), bias()),
    "permuted": lambda: (torch.randn(3, 2, K).transpose(0, 1), weight(), bias()),
    "offset view": lambda: (torch.randn(4 * K + 1)[1:].view(4, K), weight(), bias()),
    "weight transposed": lambda: (x(4), torch.randn(K, N).t(), bias()),
    "weight expanded": lambda: (x(4), torch.randn(1, K).expand(N, K), bias()),
    "bias expanded": lambda: (x(4), weight(), torch.randn(1).expand(N)),
    "0-d": lambda: (torch.tensor(1.0), weight(), bias()),
    "no rows": lambda: (torch.randn(0, K), weight(), bias()),
    "no rows, 3-d": lambda: (torch.randn(2, 0, K), weight(), bias()),
    "k=0": lambda: (torch.randn(4, 0), torch.randn(N, 0), bias()),
    "k=0, no bias": lambda: (torch.randn(4, 0), torch.randn(N, 0)),
    "n=0": lambda: (x(4), torch.randn(0, K), torch.randn(0)),
    "float64": lambda: (x(4, dtype=torch.float64), weight(torch.float64), bias(torch.float64)),
    "float16": lambda: (x(4, dtype=torch.float16), weight(torch.float16), bias(torch.float16)),
    "complex": lambda: (x(4, dtype=torch.complex64), weight(torch.complex64), bias(torch.complex64)),
    "int64": lambda: (x(4).long(), weight().long(), bias().long()),
    "bool": lambda: (x(4) > 0, weight() > 0),
    "meta": lambda: (x(4).to("meta"), weight().to("meta"), bias().to("meta")),
    "meta x": lambda: (x(4).to("meta"), weight(), bias()),
    "mixed x": lambda: (x(4, dtype=torch.bfloat16), weight(), bias()),
    "mixed weight": lambda: (x(4), weight(torch.bfloat16), bias()),
    "mixed bias": lambda: (x(4), weight(), bias(torch.float64)),
    "wrong k": lambda: (torch.randn(4, K + 1), weight(), bias()),
    "wrong k, 1-d": lambda: (torch.randn(K - 1), weight(), bias()),
    "wrong bias": lambda: (x(4), weight(), torch.randn(N + 1)),
    "bias of one": lambda: (x(4), weight(), torch.randn(1)),
    "bias 2-d": lambda: (x(4), weight(), torch.randn(4, N)),
    "bias 0-d": lambda: (x(4), weight(), torch.tensor(1.0)),
    "weight 1-d": lambda: (x(4), torch.randn(K)),
    "weight 3-d": lambda: (x(4), torch.randn(2, N, K)),
    "weight 0-d": lambda: (x(4), torch.tensor(1.0)),
    "None": lambda: (None, weight(), bias()),
    "a list": lambda: ([1.0] * K, weight(), bias()),
    "an array": lambda: (np.ones((4, K), np.float32), weight(), bias()),
    "a number": lambda: (3, weight(), bias()),
    "no weight": lambda: (x(4), None, bias()),
    "bias is a number": lambda: (x(4), weight(), 1.0),
    "sparse": lambda: (x(4).to_sparse(), weight()),
    "sparse csr": lambda: (x(4).to_sparse_csr(), weight()),
    "sparse weight": lambda: (x(4), weight().to_sparse()),
    "mkldnn": lambda: (x(4).to_mkldnn(), weight().to_mkldnn(), bias().to_mkldnn()),
    "mkldnn x": lambda: (x(4).to_mkldnn(), weight(), bias()),
    "nested": lambda: (nested(), weight(), bias()),
    "negative view": lambda: (torch._neg_view(x(4)), weight(), bias()),
    "imaginary part": lambda: (x(1, dtype=torch.complex64).conj().imag, weight(), bias()),
    "zero tensor": lambda: (torch._efficientzerotensor(4, K), weight(), bias()),
    "conjugate": lambda: (x(4, dtype=torch.complex64).conj(), weight(torch.complex64)),
    "quantized": lambda: (torch.quantize_per_tensor(x(4), 0.1, 0, torch.quint8), weight(), bias()),
    "subclass": lambda: (x(4).as_subclass(Loud), weight(), bias()),
    "subclass weight": lambda: (x(4), weight().as_subclass(Loud), bias()),
    "not finite": lambda: (x(4).fill_diagonal_(float("nan")), weight(), bias()),
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def outcome(call: Callable[[], torch.Tensor]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error)


def plain(t: torch.Tensor) -> torch.Tensor:
    if t.is_nested:
        return torch.cat([part.reshape(-1) for part in t.unbind()])
    if t.layout is not torch.strided:
        return t.to_dense()
    return t


def assert_same(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    if isinstance(wanted, type):
        assert found is wanted, f"found {found}, expected {wanted}"
        return
    assert isinstance(found, torch.Tensor), f"found {found}, expected a result"
    assert type(found) is type(wanted) and found.dtype == wanted.dtype and found.layout == wanted.layout
    assert found.device == wanted.device and found.is_nested == wanted.is_nested
    if not wanted.is_nested:
        assert found.shape == wanted.shape
    if wanted.device.type == "cpu":
        assert torch.allclose(plain(found), plain(wanted), rtol=tolerance, atol=tolerance, equal_nan=True)


def tolerance_of(t: Any) -> float:
    return 3e-2 if isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16 else 1e-5


@pytest.fixture
def server(route: Any) -> Any:
    return route("linear", ("torch.linear_inplace", PACKED, PACKED_BF16, "torch.linear"), SHAPES).server("linear")


@pytest.fixture
def layer(server: Any) -> PreparedLinear:
    made = server.prepare(nn.Parameter(weight()), nn.Parameter(bias()))
    assert served(made) == [PACKED]
    return made


def served(layer: PreparedLinear) -> list[str]:
    return sorted(id for d in layer.binding.dispatches for id in d.kernels) if layer.binding is not None else []


def counts(owner: Any) -> dict[str, int]:
    runtime = owner.runtime if hasattr(owner, "runtime") else owner._server.runtime
    ops = runtime.stats()["ops"].get("linear", {"hits": {}, "fallbacks": {}})
    return {**ops["hits"], **ops["fallbacks"]}


def total(owner: Any) -> int:
    return sum(counts(owner).values())


def fresh(build: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    torch.manual_seed(3)
    return build()


class TestSameAsTheFramework:
    @pytest.mark.parametrize("epilogue", ["none", "gelu"])
    @pytest.mark.parametrize("case", CASES)
    def test_call(self, server: Any, case: str, epilogue: str) -> None:
        args = fresh(CASES[case])
        wanted = outcome(lambda: EPILOGUES[epilogue](F.linear(*args)))
        found = outcome(lambda: server.call(*args, epilogue=epilogue))
        assert_same(found, wanted, tolerance_of(args[0]))
        assert total(server) == (0 if isinstance(wanted, type) and counts(server) == {} else 1)

    @pytest.mark.parametrize("epilogue", ["none", "gelu"])
    @pytest.mark.parametrize("case", CASES)
    def test_prepared(self, server: Any, case: str, epilogue: str) -> None:
        given, w, *rest = fresh(CASES[case])
        b = rest[0] if rest else None
        try:
            made = server.prepare(w, b, epilogue)
        except (ValueError, AttributeError, TypeError, RuntimeError):
            fits = isinstance(w, torch.Tensor) and w.dim() == 2 and not isinstance(b, float)
            assert not (fits and (b is None or b.shape == w.shape[:1])) or w.dtype == torch.bool
            return
        wanted = outcome(lambda: EPILOGUES[epilogue](F.linear(given, w, b)))
        assert_same(outcome(lambda: made(given)), wanted, tolerance_of(given))
        if not isinstance(wanted, type):
            assert total(made) == 1

    def test_unknown_epilogues_and_shapes_are_named(self, server: Any) -> None:
        for call in (
            lambda: server.call(x(2), weight(), None, "tanh"),
            lambda: server.prepare(weight(), None, ""),
        ):
            with pytest.raises(ValueError, match="expected one of none, relu, gelu, gelu_tanh, silu"):
                call()
        with pytest.raises(ValueError, match=r"weight \(8,\), bias None, expected \(n, k\) and \(n,\)"):
            server.prepare(torch.randn(K))

    def test_which_calls_dispatch(self, server: Any) -> None:
        made = server.prepare(weight(), bias())
        for size, match in ((1, "exact"), (8, "exact"), (5, "bin"), (100, "nearest"), (1000, "out_of_range")):
            before = counts(made).get(match, 0)
            made(x(size))
            assert counts(made)[match] == before + 1
        made(x(4)[::2])
        assert counts(made)["strides"] == 1

    @pytest.mark.parametrize("epilogue", EPILOGUES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_every_candidate_in_turn(self, route: Any, dtype: torch.dtype, epilogue: str) -> None:
        n, k = 64, 128
        w, b = torch.randn(n, k).to(dtype) / k**0.5, torch.randn(n).to(dtype)
        more = [torch.randn(2, 9, n).to(dtype)] if epilogue == "add" else []
        x_wide = torch.randn(2, 9, k).to(dtype)
        wanted = EPILOGUES[epilogue](F.linear(x_wide.double(), w.double(), b.double()), *more)
        name = "float32" if dtype == torch.float32 else "bfloat16"
        for candidate in pool.candidates_for("linear", "cpu"):
            kernel = pool.kernels()[candidate.kernel]
            traits = {"dtype": name, "bias": "yes", "epilogue": epilogue}
            problem = Problem.of("linear", traits, {"m": 1, "n": n, "k": k})
            if kernel.unavailable() or kernel.objection(problem):
                continue
            made = route("linear", (candidate.id,), [{"n": n, "k": k}]).server("linear").prepare(w, b, epilogue)
            given = aligned(x_wide, 64)
            before = [t.clone() for t in (given, *more)]
            y = made(given, *more)
            assert counts(made) == {"bin": 1} and all(map(torch.equal, (given, *more), before))
            assert y.dtype == dtype and relative_error(y, wanted) <= kernel.precision[name].limit, candidate.id
            assert y.data_ptr() != made(given, *more).data_ptr()


def residual(*lead: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*lead, N, generator=torch.Generator().manual_seed(10)).to(dtype)


RESIDUALS: dict[str, tuple[Callable[[], Any], str]] = {
    "same shape": (lambda: residual(8), "exact"),
    "at another address": (lambda: torch.randn(8 * N + 1)[1:].view(8, N), "exact"),
    "not finite": (lambda: residual(8).fill_diagonal_(float("nan")), "exact"),
    "one row": (lambda: residual(1), "shape"),
    "a vector": (residual, "shape"),
    "one column": (lambda: torch.randn(8, 1), "shape"),
    "0-d": (lambda: torch.tensor(2.0), "shape"),
    "more dims": (lambda: residual(2, 8), "shape"),
    "too few rows": (lambda: residual(7), "shape"),
    "too wide": (lambda: torch.randn(8, N + 1), "shape"),
    "expanded": (lambda: residual(1).expand(8, N), "strides"),
    "every second row": (lambda: residual(16)[::2], "strides"),
    "transposed": (lambda: torch.randn(N, 8).t(), "strides"),
    "float64": (lambda: residual(8, dtype=torch.float64), "dtype"),
    "bf16": (lambda: residual(8, dtype=torch.bfloat16), "dtype"),
    "int64": (lambda: residual(8).long(), "dtype"),
    "meta": (lambda: residual(8).to("meta"), "device"),
    "sparse": (lambda: residual(8).to_sparse(), "layout"),
    "negative view": (lambda: torch._neg_view(residual(8)), "layout"),
    "subclass": (lambda: residual(8).as_subclass(Loud), "subclass"),
    "a number": (lambda: 2.0, "subclass"),
    "a list": (lambda: [1.0] * N, "subclass"),
    "wants a gradient": (lambda: residual(8).requires_grad_(), "gradient"),
}  # fmt: skip


class TestResidual:
    @pytest.mark.parametrize("prepared", [False, True])
    @pytest.mark.parametrize("case", RESIDUALS)
    def test_same_as_the_framework(self, server: Any, case: str, prepared: bool) -> None:
        build, reason = RESIDUALS[case]
        given = fresh(lambda: (build(),))[0]
        wanted = outcome(lambda: F.linear(x(8), weight(), bias()) + given)
        made = server.prepare(weight(), bias(), "add")
        call = (
            (lambda: made(x(8), given)) if prepared else lambda: server.call(x(8), weight(), bias(), residual=given)
        )
        assert_same(outcome(call), wanted)
        assert counts(server) == {reason: 1}

    def test_gradients_reach_the_residual_and_all_else(self, server: Any) -> None:
        made = server.prepare(nn.Parameter(weight()), nn.Parameter(bias()), "add")
        for call in (made, lambda a, r: server.call(a, made.weight, made.bias, residual=r)):
            args = [x(3).requires_grad_(), residual(3).requires_grad_()]
            inputs = (*args, made.weight, made.bias)
            found = torch.autograd.grad(call(*args).pow(2).sum(), inputs)
            wanted = torch.autograd.grad((F.linear(args[0], made.weight, made.bias) + args[1]).pow(2).sum(), inputs)
            assert all(map(torch.allclose, found, wanted))
        assert counts(made) == {"gradient": 2}

    def test_its_address_counts_for_the_alignment(self, route: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        n, k = 16, 16
        seen: list[int] = []

        def bind(_p: Any, _q: Any, w: torch.Tensor, b: torch.Tensor | None) -> Any:
            def run(a: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
                seen.append(r.data_ptr() % 32)
                return F.linear(a, w, b) + r

            return run

        server = route("linear", (fault(monkeypatch, bind, align=32),), [{"n": n, "k": k}]).server("linear")
        w, a = aligned(torch.randn(n, k), 64), aligned(torch.randn(8, k), 64)
        made = server.prepare(w, None, "add")
        for align in (4, 8, 16, 32, 64):
            r = aligned(torch.randn(8, n), align)
            assert torch.equal(made(a, r), F.linear(a, w) + r)
            assert torch.equal(server.call(a, w, residual=r), F.linear(a, w) + r)
        assert seen == [0] * 4 and counts(made) == {"misaligned": 6, "exact": 4}

    def test_x_itself_may_be_the_residual(self, route: Any) -> None:
        for candidate in (PACKED, "torch.addmm", "torch.linear_inplace"):
            made = (
                route("linear", (candidate,), [{"n": K, "k": K}])
                .server("linear")
                .prepare(torch.eye(K), None, "add")
            )
            given = x(8)
            assert torch.allclose(made(given, given), 2 * x(8)) and torch.equal(given, x(8))
            assert counts(made) == {"exact": 1}

    def test_what_does_not_go_together_is_named(self, server: Any, route: Any) -> None:
        with pytest.raises(ValueError, match="found a residual and epilogue='gelu', expected one of the two"):
            server.call(x(8), weight(), bias(), "gelu", residual(8))
        with pytest.raises(ValueError, match=r"found 'add', expected one of .* goes in residual="):
            server.call(x(8), weight(), bias(), "add")
        with pytest.raises(TypeError, match=r"found no residual, expected layer\(x, residual\)"):
            server.prepare(weight(), bias(), "add")(x(8))
        norm = route("layer_norm", ("torch.layer_norm",), [{"n": N}]).server("layer_norm").prepare(bias(), bias())
        for layer in (server.prepare(weight(), bias()), server.prepare(weight(), bias(), "relu"), norm):
            with pytest.raises(TypeError, match=r"found a residual, expected layer\(x\)"):
                layer(x(8), residual(8))
        assert counts(server) == {}

    def test_the_framework_adds_it_where_a_kernel_fails(self, route: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        server = route("linear", (fault(monkeypatch, lambda *_: lambda x, r: 1 / 0),), SHAPES).server("linear")
        made = server.prepare(weight(), bias(), "add")
        wanted = F.linear(x(8), weight(), bias()) + residual(8)
        assert torch.equal(made(x(8), residual=residual(8)), wanted)
        assert torch.equal(server.call(x(8), weight(), bias(), residual=residual(8)), wanted)
        assert counts(made) == {"kernel_failed": 2}

    def test_compiled_whole(self, server: Any) -> None:
        torch._dynamo.reset()
        made = server.prepare(weight(), bias(), "add")
        wanted = F.linear(x(8), weight(), bias()) + residual(8)
        direct = torch.compile(server.call, fullgraph=True, backend="aot_eager")
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x(8), residual(8)), wanted, atol=1e-5)
        assert torch.allclose(direct(x(8), weight(), bias(), residual=residual(8)), wanted, atol=1e-5)
        assert counts(made) == {"exact": 2}


class TestAutograd:
    @pytest.mark.parametrize("epilogue", ["none", "silu"])
    def test_first_and_second_derivatives(self, server: Any, epilogue: str) -> None:
        made = server.prepare(nn.Parameter(weight()), nn.Parameter(bias()), epilogue)
        for call in (lambda a, w, b: server.call(a, w, b, epilogue), lambda a, w, b: made(a)):
            results = []
            for f in (call, lambda a, w, b: EPILOGUES[epilogue](F.linear(a, w, b))):
                a, w, b = x(3).requires_grad_(), made.weight, made.bias
                y = f(a, w, b)
                first = torch.autograd.grad(y.pow(2).sum(), (a, w, b), create_graph=True)
                second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), (a, w))
                results.append((y, *first, *second))
            for found, wanted in zip(*results, strict=True):
                assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
        assert counts(made) == {"gradient": 2}

    def test_gradients_of_each_alone(self, server: Any) -> None:
        for needs in range(3):
            args = [x(3), weight(), bias()]
            args[needs].requires_grad_()
            server.call(*args).sum().backward()
            found = args[needs].grad
            args[needs].grad = None
            F.linear(*args).sum().backward()
            assert torch.equal(found, args[needs].grad)

    def test_a_frozen_layer_dispatches_with_gradients_enabled(self, layer: PreparedLinear) -> None:
        layer.requires_grad_(False)
        assert not layer(x(8)).requires_grad
        assert counts(layer) == {"exact": 1}
        layer.requires_grad_(True)
        assert layer(x(8)).requires_grad

    def test_a_tensor_that_wants_gradients_stays_one_that_does(self, server: Any) -> None:
        made = server.prepare(weight().requires_grad_())
        made(x(2)).sum().backward()
        assert made.weight.grad is not None

    def test_no_grad_and_inference_mode(self, layer: PreparedLinear) -> None:
        wanted = F.linear(x(8), layer.weight, layer.bias)
        with torch.no_grad():
            y = layer(x(8))
            assert not y.requires_grad and torch.allclose(y, wanted, atol=1e-5)
        with torch.inference_mode():
            y = layer(x(8))
            assert y.is_inference() and torch.allclose(y, wanted, atol=1e-5)
        assert counts(layer) == {"exact": 2}

    def test_prepared_in_inference_mode_serves_outside_it(self, server: Any) -> None:
        with torch.inference_mode():
            made = server.prepare(weight(), bias())
            made(x(8))
        y = made(x(8))
        assert not y.is_inference() and counts(made) == {"exact": 2}
        with torch.inference_mode():
            made.weight.mul_(2)
        assert torch.allclose(made(x(8)), F.linear(x(8), made.weight, made.bias))
        assert counts(made)["weight_changed"] == 1

    def test_forward_mode(self, layer: PreparedLinear, server: Any) -> None:
        for call in (layer, lambda a: server.call(a, layer.weight, layer.bias)):
            with torch.no_grad(), forward_ad.dual_level():
                dual = forward_ad.make_dual(x(3), torch.ones(3, K))
                found = forward_ad.unpack_dual(call(dual)).tangent
                wanted = forward_ad.unpack_dual(F.linear(dual, layer.weight)).tangent
            assert torch.allclose(found, wanted)

    def test_functorch(self, layer: PreparedLinear, server: Any) -> None:
        stack = torch.randn(5, 3, K)
        for call in (layer, lambda a: server.call(a, layer.weight, layer.bias)):
            with torch.no_grad():
                wanted = F.linear(stack, layer.weight, layer.bias)
                assert torch.allclose(torch.vmap(call)(stack), wanted, atol=1e-5)
                assert torch.allclose(torch.vmap(call, in_dims=1, out_dims=1)(stack), wanted, atol=1e-5)
            found = torch.func.grad(lambda a, f=call: f(a).sum())(x(3))
            assert torch.allclose(found, layer.weight.sum(0).expand(3, K))
            assert torch.allclose(torch.func.jacrev(call)(x()), layer.weight, atol=1e-6)
            assert torch.allclose(torch.func.jacfwd(call)(x()), layer.weight, atol=1e-6)
        assert set(counts(layer)) <= {"transformed", "gradient"}

    def test_functional_call_uses_the_parameters_it_is_given(self, layer: PreparedLinear) -> None:
        other = {"weight": torch.randn(N, K), "bias": torch.randn(N)}
        with torch.no_grad():
            found = torch.func.functional_call(layer, other, (x(8),))
            assert torch.allclose(found, F.linear(x(8), other["weight"], other["bias"]))
            layer(x(8))
        assert counts(layer) == {"weight_changed": 1, "exact": 1}


class TestModes:
    def test_autocast(self, layer: PreparedLinear, server: Any) -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            wanted = F.linear(x(8), layer.weight, layer.bias)
            assert wanted.dtype == torch.bfloat16
            assert torch.equal(layer(x(8)), wanted)
            assert torch.equal(server.call(x(8), layer.weight, layer.bias), wanted)
        assert counts(layer) == {"autocast": 2}

    def test_prepared_under_autocast_or_a_default_device(self, server: Any) -> None:
        w, b = weight(), bias()
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            made = server.prepare(w, b)
        assert torch.allclose(made(x(8)), F.linear(x(8), w, b), atol=1e-5)
        given = x(8)
        with torch.device("meta"):
            assert made(given).device.type == "cpu"
        assert counts(made) == {"exact": 2}

    def test_fake_tensors(self, layer: PreparedLinear, server: Any) -> None:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            given = mode.from_tensor(x(8))
            for y in (layer(given), server.call(given, layer.weight, layer.bias)):
                assert type(y).__name__ == "FakeTensor" and y.shape == (8, N)
            # A real tensor inside the mode must come out fake as well.
            assert type(layer(x(8))).__name__ == "FakeTensor"

    def test_a_layer_made_under_a_mode_binds_later(self, server: Any) -> None:
        w = weight()
        with FakeTensorMode(allow_non_fake_inputs=True):
            made = server.prepare(nn.Parameter.__new__(nn.Parameter, w, False))
        assert served(made) == [] and torch.allclose(made(x(8)), F.linear(x(8), w))
        made.refresh()
        made(x(8))
        assert counts(made) == {"transformed": 1, "exact": 1}

    def test_modes_see_the_operator(self, layer: PreparedLinear, server: Any) -> None:
        class Seen(TorchFunctionMode):
            def __init__(self) -> None:
                super().__init__()
                self.names: list[str] = []

            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                self.names.append(func.__name__)
                return func(*args, **(kwargs or {}))

        for call in (layer, lambda a: server.call(a, layer.weight, layer.bias)):
            given = x(8)
            with torch.no_grad(), Seen() as seen:
                call(given)
            assert "linear" in seen.names
            with torch.no_grad(), FlopCounterMode(display=False) as flops:
                call(given)
            assert flops.get_total_flops() == 2 * 8 * N * K

    def test_traces_hold_the_operator(self, layer: PreparedLinear) -> None:
        layer.requires_grad_(False)
        traced = torch.jit.trace(layer, (x(8),))
        assert "aten::linear" in str(traced.inlined_graph)
        assert torch.allclose(traced(x(3)), F.linear(x(3), layer.weight, layer.bias))
        graph = make_fx(layer)(x(8))
        assert "mkldnn" not in graph.code
        assert torch.allclose(graph(x(8)), F.linear(x(8), layer.weight, layer.bias))

    @pytest.mark.parametrize("grad", [False, True])
    def test_compiled_whole(self, layer: PreparedLinear, server: Any, grad: bool) -> None:
        torch._dynamo.reset()
        model = nn.Sequential(layer, nn.ReLU())
        wanted = F.relu(F.linear(x(8), layer.weight, layer.bias))
        with torch.set_grad_enabled(grad):
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert torch.allclose(compiled(x(8)), wanted, atol=1e-5)
            assert torch.allclose(compiled(x(8)), wanted, atol=1e-5)
            direct = torch.compile(server.call, fullgraph=True, backend="aot_eager")
            assert torch.allclose(direct(x(8), layer.weight, layer.bias, "relu"), wanted, atol=1e-5)
        # The framework's own operator is counted once a trace; the table's at each call.
        assert counts(layer) == ({"compiling": 2} if grad else {"exact": 3})

    def test_compiled_sees_new_weights(self, layer: PreparedLinear) -> None:
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            compiled(x(8))
            layer.weight.mul_(2)
            assert torch.allclose(compiled(x(8)), F.linear(x(8), layer.weight, layer.bias), atol=1e-5)

    def test_exported(self, layer: PreparedLinear) -> None:
        exported = torch.export.export(layer, (x(8),))
        assert torch.allclose(exported.module()(x(8)), F.linear(x(8), layer.weight, layer.bias))


class TestState:
    def test_keys_and_arguments_of_nn_linear(self, layer: PreparedLinear, server: Any) -> None:
        twin = nn.Linear(K, N)
        assert list(layer.state_dict()) == list(twin.state_dict())
        assert list(server.prepare(weight()).state_dict()) == list(nn.Linear(K, N, bias=False).state_dict())
        twin.load_state_dict(layer.state_dict())
        assert torch.allclose(layer(input=x(4)), twin(input=x(4)))

    @pytest.mark.parametrize("assign", [False, True])
    def test_loaded_weights_are_served(self, layer: PreparedLinear, assign: bool) -> None:
        twin = nn.Linear(K, N)
        layer.load_state_dict(twin.state_dict(), assign=assign)
        layer.requires_grad_(False)
        assert torch.allclose(layer(x(8)), twin(x(8)), atol=1e-5)
        assert counts(layer) == {"exact": 1}

    def test_a_wrong_state_dict_raises_as_always(self, layer: PreparedLinear) -> None:
        with pytest.raises(RuntimeError, match="size mismatch"):
            layer.load_state_dict({"weight": torch.randn(1, 1), "bias": torch.randn(N)})
        with pytest.raises(RuntimeError, match="Missing key"):
            layer.load_state_dict({})

    def test_moving_binds_again(self, layer: PreparedLinear) -> None:
        layer.requires_grad_(False)
        layer.to(torch.bfloat16)
        assert served(layer) == [PACKED_BF16]
        wanted = F.linear(x(8).bfloat16(), layer.weight, layer.bias)
        assert torch.allclose(layer(x(8).bfloat16()), wanted, atol=3e-2)
        layer.double()
        assert served(layer) == []
        assert torch.equal(layer(x(8).double()), F.linear(x(8).double(), layer.weight, layer.bias))
        layer.to("meta")
        assert layer(x(8).double().to("meta")).shape == (8, N)
        layer.to_empty(device="cpu").float()
        layer.load_state_dict({"weight": weight(), "bias": bias()})
        assert torch.allclose(layer(x(8)), F.linear(x(8), weight(), bias()), atol=1e-5)
        assert counts(layer) == {"exact": 2, "dtype": 2}

    def test_moving_nowhere_keeps_the_packed_weight(self, layer: PreparedLinear) -> None:
        bound = layer.binding
        assert layer.to("cpu").float().binding is bound

    def test_share_memory(self, layer: PreparedLinear) -> None:
        layer.requires_grad_(False).share_memory()
        assert torch.allclose(layer(x(8)), F.linear(x(8), layer.weight, layer.bias), atol=1e-5)
        assert counts(layer) == {"exact": 1}


def optimizer_step(layer: PreparedLinear, **options: Any) -> None:
    layer.weight.grad, layer.bias.grad = torch.ones(N, K), torch.ones(N)
    torch.optim.AdamW(layer.parameters(), lr=0.1, **options).step()


def replaced_in_place(layer: PreparedLinear) -> None:
    """A new parameter that the allocator likes to put where the old one lay."""
    del layer.weight
    layer.weight = nn.Parameter(torch.randn(N, K))


CHANGES: dict[str, Callable[[PreparedLinear], Any]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "one element": lambda layer: layer.weight[0, 0].zero_(),
    "bias": lambda layer: layer.bias.add_(1),
    "detached": lambda layer: layer.weight.detach().mul_(2),
    "data": lambda layer: layer.weight.data.mul_(2),
    "data, copied into": lambda layer: layer.weight.data.copy_(torch.randn(N, K)),
    "data, replaced": lambda layer: setattr(layer.weight, "data", torch.randn(N, K)),
    "data, of the bias": lambda layer: layer.bias.data.mul_(2),
    "data, emptied and replaced": lambda layer: [
        setattr(layer.weight, "data", t) for t in (torch.empty(0), torch.randn(N, K))
    ],
    "numpy": lambda layer: layer.weight.detach().numpy().__imul__(2),
    "inference mode": lambda layer: torch.inference_mode()(lambda: layer.weight.mul_(2))(),
    "a new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(N, K))),
    "a new parameter at the old address": replaced_in_place,
    "no bias": lambda layer: setattr(layer, "bias", None),
    "another bias": lambda layer: setattr(layer, "bias", nn.Parameter(torch.randn(N))),
    "a step": optimizer_step,
    "a fused step": lambda layer: optimizer_step(layer, fused=True),
    "a vector": lambda layer: nn.utils.vector_to_parameters(torch.randn(N * K), [layer.weight]),
    "an initializer": lambda layer: nn.init.ones_(layer.weight),
}


class TestWeightChanges:
    @pytest.mark.parametrize("change", CHANGES)
    def test_is_noticed_and_refreshed(self, layer: PreparedLinear, change: str) -> None:
        with torch.no_grad():
            layer(x(8))
            CHANGES[change](layer)
            assert layer.stale
            for _ in range(2):
                assert torch.equal(layer(x(8)), F.linear(x(8), layer.weight, layer.bias))
            assert counts(layer) == {"exact": 1, "weight_changed": 2}
            layer.refresh()
            assert torch.allclose(layer(x(8)), F.linear(x(8), layer.weight, layer.bias), atol=1e-5)
            assert counts(layer) == {"exact": 2, "weight_changed": 2}

    def test_a_resized_weight_is_not_read(self, layer: PreparedLinear) -> None:
        layer.weight.untyped_storage().resize_(0)
        assert layer.stale

    def test_other_shapes(self, layer: PreparedLinear) -> None:
        with torch.no_grad():
            layer.weight.data = torch.randn(N, K + 2)
            given = torch.randn(8, K + 2)
            assert torch.equal(layer(given), F.linear(given, layer.weight, layer.bias))

    def test_pruned_and_normed(self, server: Any) -> None:
        for change in (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), nn.utils.weight_norm):
            layer = server.prepare(nn.Parameter(weight()), nn.Parameter(bias()))
            change(layer)
            with torch.no_grad():
                assert torch.allclose(layer(x(8)), F.linear(x(8), layer.weight, layer.bias), atol=1e-6)
            layer.refresh()
            with torch.no_grad():
                assert torch.allclose(layer(x(8)), F.linear(x(8), layer.weight, layer.bias), atol=1e-6)
            assert counts(server)["weight_changed"] >= 2

    def test_hooks_run(self, layer: PreparedLinear) -> None:
        seen: list[str] = []
        layer.register_forward_pre_hook(lambda *_: seen.append("before"))
        layer.register_forward_hook(lambda *_: seen.append("after"))
        layer(x(8))
        assert seen == ["before", "after"]

    @pytest.mark.parametrize("offset", [4, 8, 12, 20])
    def test_misaligned_weights_still_serve_at_best_alignment(self, route: Any, offset: int) -> None:
        """As in a safetensors file that is mapped: the address is whatever the header's length made it."""
        n, k = 32, 32
        buffer = torch.empty(4 * n * k + 4 * n + 64, dtype=torch.uint8)
        w = buffer[offset : offset + 4 * n * k].view(torch.float32).view(n, k).copy_(torch.randn(n, k))
        b = buffer[offset + 4 * n * k : offset + 4 * (n * k + n)].view(torch.float32).copy_(torch.randn(n))
        server = route("linear", (PACKED, "torch.linear"), [{"n": n, "k": k}]).server("linear")
        made = server.prepare(w, b)
        given = torch.randn(8, k)
        assert torch.allclose(made(given), F.linear(given, w, b), atol=1e-5)
        assert torch.allclose(server.call(given, w, b), F.linear(given, w, b), atol=1e-5)
        assert counts(made) == {"exact": 2}
        with torch.no_grad():
            buffer.view(torch.uint8)[offset : offset + 4 * n * k] = 0
        assert torch.allclose(made(given), b.expand(8, n))

    def test_weights_in_other_strides(self, server: Any) -> None:
        w = torch.randn(K, N).t()
        made = server.prepare(w, torch.randn(2 * N)[::2])
        assert torch.allclose(made(x(8)), F.linear(x(8), w, made.bias), atol=1e-5)
        with torch.no_grad():
            w.mul_(2)
        assert torch.allclose(made(x(8)), F.linear(x(8), w, made.bias), atol=1e-5)
        assert counts(made) == {"exact": 1, "weight_changed": 1}


def fault(monkeypatch: pytest.MonkeyPatch, bind: Callable[..., Any], align: int = 0) -> str:
    kernel = Kernel("test.fault", "linear", dict.fromkeys(("float32",), Precision.EXACT), bind, align=align)
    monkeypatch.setitem(pool.kernels(), kernel.id, kernel)
    return kernel.id


class TestFailingKernels:
    @pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, NotImplementedError, MemoryError])
    def test_a_kernel_that_refuses_its_launch_is_switched_off(
        self, route: Any, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
    ) -> None:
        calls = []

        def bind(*_: Any) -> Any:
            def run(a: torch.Tensor) -> torch.Tensor:
                calls.append(1)
                raise error("no such launch\nsecond line")

            return run

        server = route("linear", (fault(monkeypatch, bind),), SHAPES).server("linear")
        made = server.prepare(weight(), bias())
        for _ in range(FAILURES + 2):
            assert torch.equal(made(x(8)), F.linear(x(8), weight(), bias()))
            assert torch.equal(server.call(x(8), weight(), bias()), F.linear(x(8), weight(), bias()))
        assert len(calls) == 2 * FAILURES, "prepared and direct"
        assert counts(server) == {"kernel_failed": 2 * (FAILURES + 2)}
        assert server.runtime.stats()["switched_off"] == {"test.fault": 2}
        assert "no such launch" in server.runtime.stats()["failed"]["test.fault"]
        assert "\n" not in server.runtime.stats()["failed"]["test.fault"]
        assert "failed in this process" in server.runtime.explain("linear", m=8, n=N, k=K).reason

    def test_a_wrong_call_does_not_break_the_circuit(self, route: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the framework raises as well, its error is the answer, and the kernel is not to blame."""
        state = {"fail": True}

        def bind(_p: Any, _q: Any, w: torch.Tensor, b: torch.Tensor) -> Any:
            def run(a: torch.Tensor) -> torch.Tensor:
                if state["fail"]:
                    raise RuntimeError("kernel's own words")
                return F.linear(a, w, b)

            return run

        made = route("linear", (fault(monkeypatch, bind),), SHAPES).server("linear").prepare(weight(), bias())
        monkeypatch.setattr(made, "framework", lambda a: torch.randn(2, 3) @ torch.randn(2, 3))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
            made(x(8))
        assert caught.value.__context__ is None
        state["fail"] = False
        made(x(8))
        assert counts(made) == {"exact": 1}

    def test_a_kernel_that_cannot_be_bound_leaves_the_others(
        self, route: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def bind(*_: Any) -> Any:
            raise OSError("no engine")

        runtime = route("linear", (fault(monkeypatch, bind),), SHAPES)
        model = nn.Sequential(nn.Linear(K, N), nn.Tanh()).requires_grad_(False)
        wanted = model(x(8))
        report = runtime.optimize(model)
        assert report.swapped == 0 and "could not be bound" in str(report) and type(model[0]) is nn.Linear
        made = runtime.server("linear").prepare(model[0].weight, model[0].bias)
        assert torch.equal(model(x(8)), wanted) and torch.equal(made(x(8)).tanh(), wanted)
        assert counts(made) == {"kernel_failed": 1}
        assert runtime.stats()["failed"] == {"test.fault": "OSError: no engine"}

    def test_values_that_a_kernel_declines(self, route: Any) -> None:
        server = route("linear", ("onednn.qlinear",), SHAPES).server("linear")
        made = server.prepare(weight(), bias())
        given = x(8)
        given[2, 3] = float("nan")
        for _ in range(2):
            assert torch.equal(made(given).isnan(), F.linear(given, weight(), bias()).isnan())
        made(x(8))
        assert counts(made) == {"declined": 2, "exact": 1}
        assert "not finite" in server.runtime.stats()["declined"]["onednn.qlinear"]

    def test_a_dead_kernel_never_runs(self, route: Any) -> None:
        runtime = route("linear", (PACKED,), SHAPES, dead={PACKED: "its source changed"})
        made = runtime.server("linear").prepare(weight(), bias())
        assert torch.equal(made(x(8)), F.linear(x(8), weight(), bias()))
        assert counts(made) == {"kernel_changed": 1} and served(made) == []
        choice = runtime.explain("linear", m=8, n=N, k=K)
        assert choice.match == "default" and "its source changed" in choice.reason
        assert runtime.optimize(nn.Sequential(nn.Linear(K, N))).swapped == 0

    def test_a_misaligned_input_never_reaches_a_stricter_kernel(
        self, route: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        n, k = 16, 16
        seen: list[int] = []

        def bind(_p: Any, _q: Any, w: torch.Tensor, b: torch.Tensor | None) -> Any:
            def run(a: torch.Tensor) -> torch.Tensor:
                seen.append(a.data_ptr() % 32)
                return F.linear(a, w, b)

            return run

        server = route("linear", (fault(monkeypatch, bind, align=32),), [{"n": n, "k": k}]).server("linear")
        w = torch.randn(n, k)
        made = server.prepare(w)
        for align in (4, 8, 16, 32, 64):
            given = aligned(torch.randn(8, k), align)
            assert torch.equal(made(given), F.linear(given, w))
            odd = aligned(w, align)
            assert torch.equal(server.call(given, odd), F.linear(given, odd))
        assert seen and not any(seen)
        assert counts(made) == {"misaligned": 6, "exact": 4}


def test_threads_lose_no_count_and_share_no_output(layer: PreparedLinear, server: Any) -> None:
    threads, calls = 8, 200
    layer.requires_grad_(False)
    wrong: list[Any] = []

    def work(seed: int) -> None:
        given = torch.randn(8, K, generator=torch.Generator().manual_seed(seed))
        wanted = F.linear(given, layer.weight, layer.bias)
        for i in range(calls):
            y = layer(given) if i % 2 else server.call(given[::2] if i % 4 else given, layer.weight, layer.bias)
            if y.shape == wanted.shape and not torch.allclose(y, wanted, atol=1e-5):
                wrong.append(seed)

    running = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong and total(layer) == threads * calls


def test_preparing_in_threads_keeps_the_quantized_engine(route: Any) -> None:
    """The engine is a setting of the process; two packings at once must not leave the wrong one behind."""
    before = torch.backends.quantized.engine
    made: list[PreparedLinear] = []

    def work(candidate: str) -> None:
        server = route("linear", (candidate,), SHAPES).server("linear")
        made.extend(server.prepare(weight(), bias()) for _ in range(20))

    names = [
        k.id for k in pool.kernels_for("linear", "cpu") if k.id.startswith("quantized") and not k.unavailable()
    ]
    running = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert torch.backends.quantized.engine == before
    assert all(served(layer) for layer in made)
