"""Generations for tests of reloading: tables whose kernels write into their output which of them ran."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dks.dispatch import native, pool
from dks.dispatch.generation import Generation
from dks.dispatch.kernel import Kernel
from dks.dispatch.problem import Precision
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import Group, Rule, Table

N, K = 64, 32  # as tests/codegen/rows.py has them
MARKS = {"test.one": 1000.0, "test.two": 2000.0}
TRAITS = (("bias", "yes"), ("dtype", "float32"), ("epilogue", "none"))

Run = Callable[..., torch.Tensor]


def add_kernel(monkeypatch: pytest.MonkeyPatch, id: str, run: Callable[..., Run], align: int = 0) -> None:
    """Put a linear kernel in the pool until the test ends. ``run`` makes it of its weight and bias."""

    def bind(_problem: Any, _params: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> Run:
        return run(weight, bias)

    monkeypatch.setitem(
        pool.kernels(), id, Kernel(id, "linear", {"float32": Precision.EXACT}, bind, align=align, rank=1)
    )


def add_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of MARKS: each adds its mark to a linear's output."""
    for id, mark in MARKS.items():
        add_kernel(monkeypatch, id, lambda w, b, mark=mark: lambda x: F.linear(x, w, b) + mark)


def mark_of(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> str:
    """Which kernel made all of ``y``; "framework" where none did. Anything else is a failure."""
    plain = F.linear(x, weight, bias)
    found = [id for id, mark in {**MARKS, "framework": 0.0}.items() if torch.equal(y, plain + mark)]
    assert len(found) == 1, (found, y)
    return found[0]


def table(*cells: str, edges: tuple[int, ...] = (1, 8, 64), needs: int = 4) -> Table:
    """Both forms of one linear: the candidate of each bin, or one for all."""
    chosen = cells if len(cells) == len(edges) else cells * len(edges)
    ids = list(dict.fromkeys(chosen))
    indices = {needs: tuple(ids.index(id) for id in chosen)}
    statics = (("n", N), ("k", K))
    groups = tuple(Group("linear", form, TRAITS, statics, (edges,), indices) for form in ("prepared", "direct"))
    return Table(tuple(Rule(id, needs) for id in ids), groups)


def opened(path: Path) -> Generation:
    """What ``reload`` loads in tests without packages: the kernel that the path's last name says serves all."""
    return Generation(table(path.name), origin=str(path), hash=path.name)


def runtime(*cells: str) -> Runtime:
    """A runtime whose first generation chooses ``cells``."""
    return Runtime("swapped", Generation(table(*cells), hash=cells[0]), opened)


def constants() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a bias."""
    return torch.randn(N, K), torch.randn(N)


def census() -> dict[str, int]:
    """How many living objects there are of each type of the extension."""
    gc.collect()
    kinds = Counter(type(found) for found in gc.get_objects())
    return {kind.__name__: number for kind, number in kinds.items() if kind.__module__ == "_dispatch"}


FORMS = ("compiled", "python")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runtimes made in a test of this serve by the compiled fast path, then by the Python form."""
    if request.param == "python":
        monkeypatch.setattr(native, "module", None)
        monkeypatch.setattr(native, "why", "a test")
    return str(request.param)
