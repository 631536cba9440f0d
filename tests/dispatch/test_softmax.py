"""``softmax`` as served: the same results and the same errors as ``torch.softmax``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dks.dispatch import pool
from dks.dispatch.kernel import Kernel, relative_error
from dks.dispatch.problem import Precision

MARKED = "test.softmax"


@pytest.fixture
def server(route: Any) -> Iterator[Any]:
    """All that the table serves goes through a kernel of another name than the framework's."""
    precision = {"float32": Precision.EXACT, "bfloat16": Precision.BF16}
    bind = pool.kernels()["torch.softmax"].bind
    pool.kernels()[MARKED] = Kernel(MARKED, "softmax", precision, bind, rank=1)
    yield route("softmax", (MARKED,), [{}]).server("softmax")
    del pool.kernels()[MARKED]


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


CASES: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "rows": ("exact", lambda: (x(8, 16),)),
    "between": ("bin", lambda: (x(5, 20), -1)),
    "scores": ("bin", lambda: (x(2, 3, 4, 5), 3)),
    "one row": ("exact", lambda: (x(16),)),
    "one row, dim 0": ("exact", lambda: (x(16), 0)),
    "bf16": ("exact", lambda: (x(8, 16).bfloat16(),)),
    "masked": ("exact", lambda: (x(8, 16).masked_fill_(x(8, 16) > 1, float("-inf")),)),
    "all masked": ("exact", lambda: (torch.full((8, 16), float("-inf")),)),
    "beyond the table": ("out_of_range", lambda: (x(2, 1000),)),
    "over rows": ("dim", lambda: (x(8, 16), 0)),
    "negative dim": ("dim", lambda: (x(8, 16), -2)),
    "no such dim": ("dim", lambda: (x(8, 16), 2)),
    "dim is a float": ("dim", lambda: (x(8, 16), 1.0)),
    "dim is None": ("dim", lambda: (x(8, 16), None)),
    "0-d": ("shape", lambda: (torch.tensor(1.0),)),
    "no rows": ("zero_sized", lambda: (x(0, 16),)),
    "n=0": ("zero_sized", lambda: (x(3, 0),)),
    "transposed": ("strides", lambda: (x(16, 8).t(),)),
    "cut": ("strides", lambda: (x(8, 32)[:, :16],)),
    "float64": ("dtype", lambda: (x(8, 16).double(),)),
    "float16": ("unknown_shape", lambda: (x(8, 16).half(),)),
    "int64": ("dtype", lambda: (x(8, 16).long(),)),
    "meta": ("device", lambda: (x(8, 16).to("meta"),)),
    "a list": ("subclass", lambda: ([1.0],)),
    "wants gradients": ("gradient", lambda: (x(8, 16).requires_grad_(),)),
}


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error)


def counts(server: Any) -> dict[str, int]:
    ops = server.runtime.stats()["ops"].get("softmax", {"hits": {}, "fallbacks": {}})
    return {**ops["hits"], **ops["fallbacks"]}


@pytest.mark.parametrize("case", CASES)
def test_call_is_the_frameworks(server: Any, case: str) -> None:
    expected, make = CASES[case]
    args = make()
    wanted = outcome(lambda: torch.softmax(*args[:1], args[1] if len(args) > 1 else -1))
    found = outcome(lambda: server.call(*args))
    assert counts(server) == {expected: 1}
    if isinstance(wanted, type):
        assert found is wanted
        return
    assert (found.dtype, found.shape, found.requires_grad) == (wanted.dtype, wanted.shape, wanted.requires_grad)
    if found.device.type == "cpu":
        assert torch.equal(found.isnan(), wanted.isnan())
        assert relative_error(found.detach().nan_to_num(), wanted.detach().double().nan_to_num()) <= 1e-6


def test_gradients_and_modes(server: Any) -> None:
    found, wanted = x(4, 16).requires_grad_(), x(4, 16).requires_grad_()
    for given, y in ((found, server.call(found)), (wanted, torch.softmax(wanted, -1))):
        y.pow(3).sum().backward()
        assert given.grad is not None
    assert torch.allclose(found.grad, wanted.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert server.call(x(4, 16).bfloat16()).dtype == torch.softmax(x(4, 16).bfloat16(), -1).dtype
    torch._dynamo.reset()
    compiled = torch.compile(server.call, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x(4, 16)), torch.softmax(x(4, 16), -1))
    assert counts(server) == {"gradient": 1, "autocast": 1, "bin": 1}


def test_optimize_has_nothing_to_swap(server: Any) -> None:
    (left,) = server.runtime.optimize(torch.nn.Sequential(torch.nn.Softmax(-1))).swaps
    assert not left.done and left.note == "Softmax holds nothing to prepare: t.softmax serves where it is called"
    assert server.runtime.explain("softmax", m=8, n=16).candidate == MARKED
