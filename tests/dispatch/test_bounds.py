"""What serving keeps is bounded, whatever requests bring. ``DKS_SOAK=1`` makes 30,000 shapes of each operator."""

from __future__ import annotations

import gc
import os
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dks.dispatch import misses, pool, traced
from dks.dispatch.generation import Generation
from dks.dispatch.misses import Misses
from dks.dispatch.ops.linear import panels
from dks.dispatch.runtime import Runtime
from tests.conftest import Route
from tests.dispatch.swapping import MARKS, add_marked, constants, table

SOAK = os.environ.get("DKS_SOAK") == "1"
SHAPES = 30_000 if SOAK else 1_200
LAYERS = 10_000 if SOAK else 150
MOST = misses.MOST_KEPT if SOAK else 100  # reached in the first third
EACH = 64  # bytes that a third of the shapes may add for each, for what Python itself keeps; a plan takes 2,400

STATICS = {
    "linear": {"n": 64, "k": 32},
    "layer_norm": {"n": 2**20},
    "rms_norm": {"n": 2**20},
    "softmax": {},
    "attention": {"h": 2, "hkv": 2, "d": 2**20},
    "paged_attention": {"h": 2, "hkv": 2, "d": 2**20, "page": 16},
    "silu_and_mul": {"n": 2**20},
    "rotary": {"h": 2, "hkv": 2, "d": 2**20},
    "cross_entropy": {"n": 2**20},
}
"""The one entry of an operator's table: out of reach of the shapes below, but for linear's and softmax's."""

memory = torch.randn(1 << 18)
ZERO, ONE = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)


def shaped(*shape: int) -> torch.Tensor:
    return memory[: torch.Size(shape).numel()].view(shape)


CALLS: dict[str, Callable[[Any, int], Any]] = {
    "linear": lambda call, i: call(shaped(1, 1 + i // 128), shaped(1 + i % 128, 1 + i // 128)),
    "layer_norm": lambda call, i: call(shaped(1, 1 + i), (1 + i,)),
    "rms_norm": lambda call, i: call(shaped(1, 1 + i), (1 + i,)),
    "softmax": lambda call, i: call(shaped(1 + i % 200, 1 + i // 200)),
    "attention": lambda call, i: call(*[shaped(1, 1 + i % 64, 1, 1 + i // 64)] * 3),
    "paged_attention": lambda call, i: call(
        shaped(1, 1 + i % 64, 1 + i // 64), *[shaped(1, 1, 1 + i % 64, 1 + i // 64)] * 2, ZERO[None].int(), ONE
    ),
    "silu_and_mul": lambda call, i: call(shaped(1, 2 + 2 * i)),
    "rotary": lambda call, i: call(
        *[shaped(1, 1 + i % 64, 2 + 2 * (i // 64))] * 2, *[shaped(1, 1 + i // 64)] * 2, ZERO
    ),
    "cross_entropy": lambda call, i: call(shaped(1, 1 + i), ZERO),
}


def kept(runtime: Runtime) -> dict[str, int]:
    """How much is in each place that calls fill."""
    now = runtime.generation
    return {
        "plans": len(now._plans),
        "dispatches": len(now.dispatches),
        "fast": len(now.fast),
        "misses": runtime.misses.kept,
        "counters": len(runtime.counters._counts) + len(runtime.counters._served),
        "texts": len(runtime.failures) + len(runtime.declined) + len(runtime.switched_off),
        "graphs": len(traced._layers) + len(traced._keys),
        "forms": len(panels._forms),
    }


def grown(work: Callable[[int], Any], count: int) -> int:
    """Bytes that Python holds more after the last third than after the second one."""
    gc.collect()
    tracemalloc.start()
    for i in range(2 * count // 3):
        work(i)
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    for i in range(2 * count // 3, count):
        work(i)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return after - before


@pytest.mark.parametrize("op", sorted(pool.operators()))
def test_shapes_leave_nothing(op: str, route: Route) -> None:
    runtime = route(op, (pool.operator(op).default,), [STATICS[op]])
    runtime.misses = Misses(MOST)
    call, ask = runtime.server(op).call, CALLS[op]
    with torch.inference_mode():
        ask(call, 0)
        assert grown(lambda i: ask(call, i), SHAPES) < EACH * SHAPES // 3
    groups = len(runtime.generation.table.groups)
    found = kept(runtime)
    assert found["plans"] <= groups and found["dispatches"] <= groups and found["misses"] == MOST
    assert found["counters"] <= 12 and found["texts"] == 0
    assert sum(sum(kind.values()) for kind in runtime.stats()["ops"][op].values()) == SHAPES + 1
    assert MOST + runtime.misses.others <= SHAPES + 1


def test_dtypes_strides_and_alignments_leave_nothing(route: Route) -> None:
    runtime = route("linear", ("torch.linear",), [{"n": 64, "k": 32}])
    runtime.misses = Misses(MOST)
    call = runtime.server("linear").call
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int8)
    weights = {dtype: torch.ones(64, 32, dtype=dtype) for dtype in dtypes}

    def work(i: int) -> None:
        dtype = dtypes[i % 6]
        x = torch.ones(40 * 32 * 2 + 32, dtype=dtype)[i % 17 :]
        x = x[: 2 * (1 + i % 40) * 32].view(-1, 32)
        call(x[:: 1 + i % 2], weights[dtype] if i % 3 else weights[dtype].t().contiguous().t())

    with torch.inference_mode():
        assert grown(work, SHAPES) < EACH * SHAPES // 3
    found = kept(runtime)
    assert found["dispatches"] <= 3 and found["misses"] <= MOST and found["counters"] <= 20


@pytest.mark.parametrize("candidate", ["torch.linear", "mkldnn.linear_packed"])
def test_layers_that_come_and_go_leave_nothing(candidate: str, route: Route) -> None:
    runtime = route("linear", (candidate,), [{"n": 64, "k": 32}])
    before = kept(runtime)

    def work(_: int) -> None:
        layer = runtime.server("linear").prepare(torch.randn(64, 32))
        with torch.no_grad():
            layer(torch.randn(100, 32))  # nearest: noted
        model = nn.Sequential(nn.Linear(32, 64))
        runtime.optimize(model)

    assert grown(work, LAYERS) < 1024 * LAYERS // 3
    assert len(runtime.layers) == 0
    after = kept(runtime)
    assert (after["graphs"], after["forms"]) == (before["graphs"], before["forms"])
    assert after["misses"] <= 2 and after["dispatches"] == 0


def test_a_layer_whose_weights_come_and_go_is_known_under_the_last_ones(route: Route) -> None:
    runtime = route("linear", ("torch.linear",), [{"n": 64, "k": 32}])
    layer = runtime.server("linear").prepare(torch.randn(64, 32))
    gc.collect()
    before = len(traced._layers)
    weights = [nn.Parameter(torch.randn(64, 32)) for _ in range(50)]
    for weight in weights:
        layer.weight = weight
        layer.refresh()
    assert len(traced._layers) == before
    assert traced.layer_for("t", "linear", weights[-1], None, "none") is layer
    assert traced.layer_for("t", "linear", weights[0], None, "none") is None


def test_layers_of_one_shape_share_their_misses(route: Route) -> None:
    runtime = route("linear", ("torch.linear",), [{"n": 64, "k": 32}])
    layers = [runtime.server("linear").prepare(torch.randn(64, 32)) for _ in range(4)]
    with torch.no_grad():
        for layer in layers:
            layer(torch.randn(300, 32))
    assert [missed.calls for missed in runtime.misses.snapshot()] == [4]


def test_reloads_leave_two_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    add_marked(monkeypatch)
    made: weakref.WeakSet[Generation] = weakref.WeakSet()

    def opened(_: object) -> Generation:
        generation = Generation(table(next(iter(MARKS))))
        made.add(generation)
        return generation

    runtime = Runtime("t", opened(None), opened)
    layer = runtime.server("linear").prepare(*constants()).requires_grad_(False)
    weight, bias = constants()

    def work(_: int) -> None:
        runtime.reload("anywhere")
        for rows in (1, 16, 600):
            x = torch.randn(rows, weight.shape[1])
            layer(x)
            runtime.server("linear").call(x, weight, bias)
            runtime.server("linear").call(x[:, :4].contiguous(), weight[:, :4].contiguous())

    assert grown(work, 60) < 1024 * 20
    assert len(made) == 2 and len(layer._bindings) == 2
