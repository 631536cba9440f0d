"""``silu_and_mul`` as served: vLLM's layout, any leading dims, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dks.dispatch import pool
from dks.dispatch.kernel import Inputs, Kernel, relative_error
from dks.dispatch.problem import Precision, Problem

MARKED = "test.silu_and_mul"
N = 16


@pytest.fixture
def server(route: Any) -> Iterator[Any]:
    """All that the table serves goes through a kernel of another name than the framework's."""
    precision = {"float32": Precision.EXACT, "bfloat16": Precision.BF16}
    bind = pool.kernels()["torch.silu_and_mul"].bind
    pool.kernels()[MARKED] = Kernel(MARKED, "silu_and_mul", precision, bind, rank=1)
    yield route("silu_and_mul", (MARKED,), [{"n": N}]).server("silu_and_mul")
    del pool.kernels()[MARKED]


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def right(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[-1] // 2
    return F.silu(x[..., :n]) * x[..., n:]


def counts(server: Any) -> dict[str, int]:
    ops = server.runtime.stats()["ops"].get("silu_and_mul", {"hits": {}, "fallbacks": {}})
    return {**ops["hits"], **ops["fallbacks"]}


CASES: dict[str, tuple[str, Callable[[], torch.Tensor]]] = {
    "rows": ("exact", lambda: x(8, 2 * N)),
    "between": ("bin", lambda: x(5, 2 * N)),
    "tokens": ("bin", lambda: x(2, 3, 2, 2 * N)),
    "one row": ("exact", lambda: x(2 * N)),
    "bf16": ("exact", lambda: x(8, 2 * N).bfloat16()),
    "beyond the table": ("out_of_range", lambda: x(1000, 2 * N)),
    "another width": ("unknown_shape", lambda: x(8, N)),
    "float16": ("unknown_shape", lambda: x(8, 2 * N).half()),
    "float64": ("dtype", lambda: x(8, 2 * N).double()),
    "complex": ("dtype", lambda: torch.complex(x(8, 2 * N), x(8, 2 * N))),
    "no rows": ("zero_sized", lambda: x(0, 2 * N)),
    "n=0": ("zero_sized", lambda: x(3, 0)),
    "transposed": ("strides", lambda: x(2 * N, 8).t()),
    "cut": ("strides", lambda: x(8, 3 * N)[:, : 2 * N]),
    "meta": ("device", lambda: x(8, 2 * N).to("meta")),
    "wants gradients": ("gradient", lambda: x(8, 2 * N).requires_grad_()),
}


@pytest.mark.parametrize("case", CASES)
def test_call_is_the_frameworks(server: Any, case: str) -> None:
    expected, make = CASES[case]
    given = make()
    found, wanted = server.call(given), right(given)
    assert counts(server) == {expected: 1}
    assert (found.dtype, found.shape, found.requires_grad) == (wanted.dtype, wanted.shape, wanted.requires_grad)
    if found.device.type == "cpu" and not found.is_complex():
        assert relative_error(found.detach(), wanted.detach().double()) <= 1e-6


def test_what_nobody_could_compute_is_refused(server: Any) -> None:
    with pytest.raises(ValueError, match=r"silu_and_mul: found x \(3, 7\), expected \(\.\.\., 2n\)"):
        server.call(x(3, 7))
    with pytest.raises(ValueError, match=r"found x \(\), expected"):
        server.call(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"found x of list, expected a torch\.Tensor"):
        server.call([1.0, 2.0])
    with pytest.raises(RuntimeError):  # torch's own word
        server.call(torch.ones(2, 4, dtype=torch.int32))


def test_gradients_modes_and_transforms(server: Any) -> None:
    found, wanted = x(4, 2 * N).requires_grad_(), x(4, 2 * N).requires_grad_()
    server.call(found).pow(3).sum().backward()
    right(wanted).pow(3).sum().backward()
    assert found.grad is not None and wanted.grad is not None and torch.allclose(found.grad, wanted.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert server.call(x(4, 2 * N)).dtype == torch.float32
    assert torch.allclose(torch.func.vmap(server.call)(x(4, 2 * N)), right(x(4, 2 * N)))
    assert counts(server) == {"gradient": 1, "autocast": 1, "transformed": 1}


def test_the_reference_is_the_plain_formula_and_optimize_has_nothing_to_swap(server: Any) -> None:
    operator = pool.operator("silu_and_mul")
    problem = Problem.of("silu_and_mul", {"dtype": "float32"}, {"m": 3, "n": N})
    given = x(3, 2 * N).double()
    assert torch.allclose(operator.reference(problem, Inputs((), (given,))), right(given), rtol=1e-13)
    assert server.runtime.optimize(torch.nn.Sequential(torch.nn.SiLU())).swaps == ()
    assert server.runtime.explain("silu_and_mul", m=8, n=N).candidate == MARKED
