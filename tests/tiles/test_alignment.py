"""Generated kernels on pointers of every alignment, and the alignment they declare: bound, and as served."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from dks.dispatch import pool
from dks.dispatch.kernel import Kernel, Launch, Output
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.runtime import Runtime
from tests.tiles.generated import CASES, DIMS, assert_right, inputs_for, problem_for, same, with_threads

Serve = Callable[[Any, Problem, Sequence[Any], Sequence[Any]], Output]

SERVED: dict[str, Serve] = {
    "linear": lambda server, problem, static, given: server.prepare(*static, problem.trait("epilogue"))(*given),
    "layer_norm": lambda server, problem, static, given: server.prepare(*static)(*given),
    "rms_norm": lambda server, problem, static, given: server.prepare(*static)(*given),
    "softmax": lambda server, problem, static, given: server.call(*given),
    "attention": lambda server, problem, static, given: server.call(*given[:3], scale=given[4], enable_gqa=True),
    "paged_attention": lambda server, problem, static, given: server.call(*given),
}

DECLARED = 16  # more than any of these kernels asks for, and what the strides of DIMS allow


def moved(t: Any, offset: int) -> Any:
    """A copy in the same strides whose address is ``offset`` bytes past a multiple of 128."""
    if not isinstance(t, torch.Tensor) or offset % t.element_size():
        return t
    room = torch.zeros(t.numel() + 256 // t.element_size(), dtype=t.dtype)
    begin = (offset - room.data_ptr()) % 128 // t.element_size()
    there = room.as_strided(t.shape, t.stride(), begin)
    assert there.data_ptr() % 128 == offset
    return there.copy_(t)


def problems(kernel: Kernel, dtype: str) -> list[Problem]:
    """One with everything its first traits bring, and one with a residual where it takes one."""
    made = [problem_for(kernel, dtype)]
    traits = pool.operator(kernel.op).traits
    for name, value in (("epilogue", "add"), ("residual", "yes")):
        if value in traits.get(name, ()):
            try:
                made.append(problem_for(kernel, dtype, **{name: value}))
            except AssertionError:  # it takes none
                continue
    return made


@pytest.mark.parametrize(("kernel", "dtype"), CASES)
def test_every_offset_of_every_pointer(kernel: Kernel, dtype: str) -> None:
    for problem in problems(kernel, dtype):
        inputs, wanted = inputs_for(problem)
        static, dynamic = inputs.static, inputs.dynamic
        step = kernel.alignment_for(dtype)
        first = kernel.bind(problem, with_threads(kernel, 1), *static)(*dynamic)
        assert_right(first, wanted, kernel, problem)
        for offset in range(0, 128, step):
            run = kernel.bind(problem, with_threads(kernel, 1), *(moved(t, offset) for t in static))
            assert same(run(*dynamic), first), f"constants at {offset}"
            for i, t in enumerate(dynamic):
                given = (*dynamic[:i], moved(t, offset), *dynamic[i + 1 :])
                assert same(run(*given), first), f"argument {i} at {offset}"


@pytest.fixture
def strict(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel in the pool declares DECLARED bytes, and must then get them; has how many calls it got."""
    calls: list[int] = []

    def bind(problem: Problem, params: Any, *static: Any) -> Launch:
        run = kernel.bind(problem, params, *static)

        def checked(*given: Any) -> Output:
            calls.append(1)
            for t in (*static, *given):
                if isinstance(t, torch.Tensor) and t.is_floating_point():
                    assert t.data_ptr() % DECLARED == 0, f"an address that ends in {t.data_ptr() % 128}"
            return run(*given)

        return checked

    monkeypatch.setitem(pool.kernels(), kernel.id, dataclasses.replace(kernel, align=DECLARED, bind=bind))
    return calls


def serve(route: Any, kernel: Kernel, dtype: str) -> tuple[Runtime, Problem]:
    problem = problem_for(kernel, dtype, 64 if kernel.align == 0 else None)
    operator = pool.operator(kernel.op)
    statics = {name: DIMS[kernel.op][name] for name in operator.static}
    return route(kernel.op, (Candidate(kernel.id, with_threads(kernel, 1)).id,), [statics]), problem


@pytest.mark.parametrize(("kernel", "dtype"), CASES)
def test_served_at_every_offset(route: Any, kernel: Kernel, dtype: str) -> None:
    runtime, problem = serve(route, kernel, dtype)
    inputs, wanted = inputs_for(problem)
    hits = 0
    for offset in range(0, 128, 2 if dtype == "bfloat16" else 4):
        static, dynamic = ([moved(t, offset) for t in part] for part in (inputs.static, inputs.dynamic))
        assert_right(
            SERVED[kernel.op](runtime.server(kernel.op), problem, static, dynamic), wanted, kernel, problem
        )
        hits += offset % kernel.alignment_for(dtype) == 0
    counted = runtime.stats()["ops"][kernel.op]
    assert sum(counted["hits"].values()) == hits and "kernel_failed" not in counted["fallbacks"], counted


@pytest.mark.parametrize(("kernel", "dtype"), CASES)
def test_an_alignment_that_is_declared_is_kept(route: Any, strict: list[int], kernel: Kernel, dtype: str) -> None:
    runtime, problem = serve(route, pool.kernels()[kernel.id], dtype)
    inputs, wanted = inputs_for(problem)
    served = SERVED[kernel.op]
    aligned = 0
    for offset in range(0, 128, 4):
        for i, t in enumerate(inputs.dynamic):
            if not isinstance(t, torch.Tensor) or not t.is_floating_point():
                continue
            given = [moved(other, 0) for other in inputs.dynamic]
            given[i] = moved(t, offset)
            server, static = runtime.server(kernel.op), [moved(each, 0) for each in inputs.static]
            # The framework is more precise than some kernels: their class holds for both.
            assert_right(served(server, problem, static, given), wanted, kernel, problem)
            aligned += offset % DECLARED == 0
    counted = runtime.stats()["ops"][kernel.op]
    assert len(strict) == sum(counted["hits"].values()) == aligned > 0, counted
    assert set(counted["fallbacks"]) == {"misaligned"}, counted


@pytest.mark.parametrize(("kernel", "dtype"), CASES)
def test_strides_that_no_kernel_takes_are_the_framework_s(route: Any, kernel: Kernel, dtype: str) -> None:
    runtime, problem = serve(route, kernel, dtype)
    inputs, wanted = inputs_for(problem)
    # Residuals are tried with the operators; paged attention makes q contiguous itself.
    asked = {"attention": (0, 1, 2), "paged_attention": (1, 2)}.get(kernel.op, (0,))
    for count, i in enumerate(asked, 1):
        t = inputs.dynamic[i]
        given = list(inputs.dynamic)
        given[i] = t.repeat_interleave(2, dim=-1)[..., ::2]
        y = SERVED[kernel.op](runtime.server(kernel.op), problem, inputs.static, given)
        assert_right(y, wanted, kernel, problem)
        counted = runtime.stats()["ops"][kernel.op]
        assert counted["fallbacks"].get("strides") == count and not counted["hits"], counted
