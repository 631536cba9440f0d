"""``cross_entropy`` as served: the same results and the same errors as ``F.cross_entropy``, for every reduction."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dks.dispatch import pool
from dks.dispatch.kernel import Kernel
from dks.dispatch.problem import Precision, Problem

MARKED = "test.cross_entropy"
N = 16


@pytest.fixture
def server(route: Any) -> Iterator[Any]:
    """All that the table serves goes through a kernel of another name than the framework's."""
    precision = {"float32": Precision.EXACT, "bfloat16": Precision.BF16}
    bind = pool.kernels()["torch.cross_entropy"].bind
    pool.kernels()[MARKED] = Kernel(MARKED, "cross_entropy", precision, bind, rank=1)
    yield route("cross_entropy", (MARKED,), [{"n": N}]).server("cross_entropy")
    del pool.kernels()[MARKED]


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 2


def t(m: int, ignored: int | None = -100) -> torch.Tensor:
    """Targets (m,), every third ignored."""
    made = torch.arange(m) * 7 % N
    if ignored is not None:
        made[1::3] = ignored
    return made


def wanted(logits: Any, targets: Any, ignore_index: Any = -100, reduction: str = "none") -> Any:
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


def outcome(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return call(*args, **options)
    except Exception as error:
        return type(error), str(error)


def counts(server: Any) -> dict[str, int]:
    ops = server.runtime.stats()["ops"].get("cross_entropy", {"hits": {}, "fallbacks": {}})
    return {**ops["hits"], **ops["fallbacks"]}


CASES: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "rows": ("exact", lambda: (x(8, N), t(8))),
    "between": ("bin", lambda: (x(5, N), t(5))),
    "one row": ("exact", lambda: (x(1, N), t(1))),
    "bf16": ("exact", lambda: (x(8, N).bfloat16(), t(8))),
    "a column is ignored": ("exact", lambda: (x(8, N), t(8, 3), 3)),
    "nothing is ignored": ("exact", lambda: (x(8, N), t(8, None))),
    "all are ignored": ("exact", lambda: (x(8, N), torch.full((8,), -100))),
    "beyond is ignored": ("exact", lambda: (x(8, N), t(8, 10**12), 10**12)),
    "every second target": ("exact", lambda: (x(8, N), torch.stack((t(8), t(8)), 1)[:, 0])),
    "hidden columns": ("exact", lambda: (x(8, N).masked_fill_(x(8, N) > 1, float("-inf")), t(8))),
    "beyond the table": ("out_of_range", lambda: (x(1000, N), t(1000))),
    "float16": ("unknown_shape", lambda: (x(8, N).half(), t(8))),
    "float64": ("dtype", lambda: (x(8, N).double(), t(8))),
    "probabilities": ("dtype", lambda: (x(8, N), x(8, N).softmax(-1))),
    "int32 targets": ("dtype", lambda: (x(8, N), t(8).int())),
    "ignored is a float": ("dtype", lambda: (x(8, N), t(8), 1.5)),
    "pixels": ("shape", lambda: (x(2, N, 3), t(6).view(2, 3))),
    "no batch": ("shape", lambda: (x(N), t(1)[0])),
    "fewer targets": ("shape", lambda: (x(8, N), t(7))),
    "no rows": ("zero_sized", lambda: (x(0, N), t(0))),
    "transposed": ("strides", lambda: (x(N, 8).t(), t(8))),
    "cut": ("strides", lambda: (x(8, 2 * N)[:, :N], t(8))),
    "meta": ("device", lambda: (x(8, N).to("meta"), t(8).to("meta"))),
    "a list": ("subclass", lambda: ([1.0], t(1))),
    "no targets": ("subclass", lambda: (x(8, N), None)),
    "wants gradients": ("gradient", lambda: (x(8, N).requires_grad_(), t(8))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_call_is_the_frameworks(server: Any, case: str, reduction: str) -> None:
    expected, make = CASES[case]
    args = make()
    right, found = (outcome(f, *args, reduction=reduction) for f in (wanted, server.call))
    assert counts(server) == {expected: 1}
    if isinstance(right, tuple):
        assert found == right
        return
    assert (found.dtype, found.shape, found.requires_grad) == (right.dtype, right.shape, right.requires_grad)
    if found.device.type == "cpu":
        tolerance = 1e-2 if found.dtype.itemsize == 2 else 1e-6
        assert torch.allclose(found, right, rtol=tolerance, atol=tolerance, equal_nan=True)
    if reduction == "none" and len(args) == 2 and found.device.type == "cpu" and args[1].dtype is torch.int64:
        assert (found[args[1] == -100] == 0).all()


def test_a_call_gives_losses_unless_it_is_asked_for_less(server: Any) -> None:
    assert server.call(x(8, N), t(8)).shape == (8,)
    with pytest.raises(ValueError, match="cross_entropy: found reduction 'all', expected none, mean, sum"):
        server.call(x(8, N), t(8), reduction="all")


@pytest.mark.parametrize("target", [-1, N, 2**40, -(2**40)])
def test_a_target_that_is_no_column_raises_what_the_framework_does(server: Any, target: int) -> None:
    targets = t(8)
    targets[5] = target
    right, found = (outcome(f, x(8, N), targets) for f in (wanted, server.call))
    assert right[0] is IndexError and found == right and counts(server) == {}


def test_gradients_modes_and_transforms(server: Any) -> None:
    found, right = x(4, N).requires_grad_(), x(4, N).requires_grad_()
    server.call(found, t(4), reduction="mean").backward()
    wanted(right, t(4), reduction="mean").backward()
    assert found.grad is not None and right.grad is not None and torch.allclose(found.grad, right.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = x(4, N).bfloat16(), t(4)
        assert server.call(*half).dtype == wanted(*half).dtype
    batched = torch.func.vmap(lambda x: server.call(x, t(4)))(x(3, 4, N))
    assert torch.allclose(batched[1], wanted(x(3, 4, N)[1], t(4)))
    assert counts(server) == {"gradient": 1, "autocast": 1, "transformed": 1}


def test_inputs_of_a_sweep_have_ignored_targets_of_both_kinds() -> None:
    operator = pool.operator("cross_entropy")
    seen = set()
    for m, seed in itertools.product((1, 2, 40), range(8)):
        problem = Problem.of("cross_entropy", {"dtype": "bfloat16"}, {"m": m, "n": N}, 16)
        inputs = operator.make_inputs(problem, torch.Generator().manual_seed(seed), "normal")
        logits, targets, ignored = inputs.dynamic
        assert logits.data_ptr() % 32 == 16 and targets.dtype is torch.int64 and targets.shape == (m,)
        used = targets[targets != ignored]
        assert used.numel() == 0 or (int(used.min()) >= 0 and int(used.max()) < N)
        assert m == 1 or bool((targets == ignored).any())
        assert torch.equal(
            operator.reference(problem, inputs)[targets == ignored], torch.zeros(m - len(used)).double()
        )
        seen.add(ignored)
    assert seen == {-100, N // 2}


def test_optimize_has_nothing_to_swap(server: Any) -> None:
    (swap,) = server.runtime.optimize(torch.nn.Sequential(torch.nn.CrossEntropyLoss())).swaps
    assert not swap.done and "holds nothing to prepare" in swap.note
    assert server.runtime.explain("cross_entropy", m=8, n=N).candidate == MARKED
