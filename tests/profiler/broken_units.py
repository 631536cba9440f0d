"""Generated kernels that do not compile. Named by ``DKS_KERNELS`` in tests; nothing else knows them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dks.dispatch.kernel import Kernel, Params, Run
from dks.dispatch.problem import Precision, Problem
from dks.dispatch.tiles import library
from dks.dispatch.tiles.unit import Unit


def declared(name: str, make: Callable[[], Unit], lack: str | None = None) -> Kernel:
    """A right linear that has its generated function looked up."""

    def unit(problem: Problem, params: Params) -> Unit:
        return make()

    def bind(problem: Problem, params: Params, weight: torch.Tensor, bias: torch.Tensor | None) -> Run:
        library.function(make())
        return lambda x: torch.nn.functional.linear(x, weight, bias)

    return Kernel(
        id=f"unit.{name}",
        op="linear",
        precision={"float32": Precision.EXACT},
        bind=bind,
        form="none",
        unit=unit,
        header="rows.hpp",
        unavailable=lambda: lack,
    )


def softmax(name: str, type: str) -> Unit:
    return Unit(f"dks_test_sweep_{name}", "avx2", "softmax", "rows.hpp", type)


def raises() -> Unit:
    raise RuntimeError("no unit today")


KERNELS = [
    declared("good", lambda: softmax("good", "dks::Softmax<dks::Avx2, float, 1, 1>")),
    declared("broken", lambda: softmax("broken", "dks::NoSuch<1>")),
    declared("raises", raises),
    declared(
        "elsewhere", lambda: softmax("elsewhere", "dks::Softmax<dks::Avx2, float, 1, 1>"), "not on this machine"
    ),
]
