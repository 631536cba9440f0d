"""Weights that change once they are bound: what the next call notices, and what a stated number of calls does."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dks.dispatch import pool
from dks.dispatch.generation import Generation
from dks.dispatch.kernel import Kernel
from dks.dispatch.prepared import PreparedModule
from dks.dispatch.problem import Problem
from dks.dispatch.watch import DEBUG, Watch
from tests.dispatch import pretended
from tests.dispatch.swapping import form

__all__ = ["form"]  # a fixture

N, K = 64, 96
PACKED = "torch.addmm"  # keeps the weight transposed
SIZES = (1, 7, 16, 17, 1000, 1024, 1025, 5000, 65536 + 8, 256 * 1024, 256 * 1024 + 1, 300_001, 2**20 + 24)


def watched(t: torch.Tensor, bias: torch.Tensor | None = None) -> Watch:
    watch = Watch(t, bias)
    watch.cover()
    return watch


def calls_until_noticed(watch: Watch, t: torch.Tensor, bias: torch.Tensor | None = None) -> int:
    """How many calls it took, or one more than it may."""
    return next((i for i in range(1, watch.scrub_calls + 1) if watch.changed(t, bias)), watch.scrub_calls + 1)


@pytest.mark.parametrize("size", SIZES)
def test_any_single_byte_is_noticed_within_the_stated_calls(size: int, form: str) -> None:
    drawn = random.Random(size)
    t = torch.randint(256, (size,), dtype=torch.uint8)
    places = {0, 1, size // 2, max(0, size - 17), size - 1} | {drawn.randrange(size) for _ in range(15)}
    for place in sorted(p for p in places if p < size):
        watch, before = watched(t), t[place].item()
        for _ in range(drawn.randrange(watch.scrub_calls)):  # wherever the look goes on
            assert not watch.changed(t, None)
        t.data[place] = before ^ (1 << drawn.randrange(8))
        assert calls_until_noticed(watch, t) <= watch.scrub_calls, place
        assert watch.differs(t, None) and watched(t).scrub_calls == watch.scrub_calls <= 128
        t.data[place] = before
        assert watch.changed(t, None), "for good: what was packed meanwhile is not known"
        assert not watched(t).differs(t, None)
    assert t._version == 0


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "all of it": lambda t: t.data.copy_(torch.randn_like(t)),
    "the sign of all": lambda t: t.data.neg_(),
    "doubled": lambda t: t.data.mul_(2),
    "zeros": lambda t: t.data.zero_(),
    "rows in another order": lambda t: t.data.copy_(t.flip(0)),
    "1 % of the elements": lambda t: t.data.copy_(t + (torch.rand_like(t) < 0.01)),
    "one row": lambda t: t.data[100].copy_(torch.randn(t.shape[1])),
    "one column": lambda t: t.data[:, 100].copy_(torch.randn(t.shape[0])),
}


LAID_OUT_ANEW: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda t: t.t(),
    "fewer rows": lambda t: t[:16],
    "fewer columns": lambda t: t[:, :16],
    "one row more often": lambda t: t[:1].expand_as(t),
    "as numbers of another kind": lambda t: t.view(torch.int32),
}


@pytest.mark.parametrize("case", LAID_OUT_ANEW)
def test_other_values_at_the_same_address_are_noticed_by_the_very_next_call(case: str, form: str) -> None:
    t = nn.Parameter(torch.randn(32, 32), requires_grad=False)
    watch, address = watched(t), t.data_ptr()
    assert not watch.changed(t, None)
    before, t.data = t.data, LAID_OUT_ANEW[case](t.data)
    assert t.data_ptr() == address and t._version == 0, "neither of which says so"
    assert watch.changed(t, None)
    t.data = before
    assert not watch.changed(t, None)


@pytest.mark.parametrize("write", WRITES)
def test_what_is_noticed_by_the_very_next_call(write: str, form: str) -> None:
    t = torch.randn(256, 256)
    watch = watched(t)
    WRITES[write](t)
    assert t._version == 0
    assert calls_until_noticed(watch, t) <= (1 if write != "one column" else watch.scrub_calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2), (7, 13), (64, 64)])
def test_hidden_writes_to_all_of_a_tensor(shape: tuple[int, ...], dtype: torch.dtype, form: str) -> None:
    t = torch.ones(shape, dtype=dtype)
    watch = watched(t)
    assert not watch.changed(t, None)
    t.data.add_(1)
    assert t._version == 0 and watch.changed(t, None)


def test_views_of_any_stride_are_read_inside_their_memory(form: str) -> None:
    views = (torch.randn(6, 8).t(), torch.randn(9)[1:], torch.randn(4, 1).expand(4, 5), torch.randn(8, 8)[::2])
    for t in views:
        watch = watched(t, t)
        assert not any(watch.changed(t, t) for _ in range(2 * watch.scrub_calls))
        assert watch.changed(t.clone(), t) and watch.changed(t, None) and watch.changed(None, t)


def test_parameters_that_are_lent_are_not_a_write(form: str) -> None:
    t = torch.randn(4, 4)
    watch = watched(t)
    assert watch.changed(t.clone(), None) and not watch.changed(t, None)


def test_threads_share_what_is_looked_at(form: str) -> None:
    t = torch.zeros(512, 512)
    watch, noticed = watched(t), list[bool]()
    t.data[300, 77] = 1.0

    def look(count: int) -> None:
        noticed.extend(watch.changed(t, None) for _ in range(count))

    threads = [threading.Thread(target=look, args=(watch.scrub_calls // 4,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watch.scrub_calls % 4 == 0 and any(noticed)


def test_a_watch_is_freed_with_its_parameters(form: str) -> None:
    parameter = nn.Parameter(torch.randn(4, 4))
    parameter.watch = watched(parameter)  # type: ignore[attr-defined] # a cycle
    gone = weakref.ref(parameter)
    del parameter
    gc.collect()
    assert gone() is None


# A whole layer, of every operator that prepares one.


def linear(route: Any, candidate: str = PACKED, epilogue: str = "none") -> PreparedModule:
    runtime = route("linear", (candidate, "torch.linear"), [{"n": N, "k": K}])
    made: PreparedModule = runtime.server("linear").prepare(torch.randn(N, K), torch.randn(N), epilogue)
    return made.requires_grad_(False)


def layer_norm(route: Any) -> PreparedModule:
    runtime = route("layer_norm", ("torch.layer_norm_wide_affine",), [{"n": K}])
    made: PreparedModule = runtime.server("layer_norm").prepare(
        torch.randn(K).bfloat16(), torch.randn(K).bfloat16()
    )
    return made.requires_grad_(False)


def rms_norm(route: Any) -> PreparedModule:
    runtime = route("rms_norm", ("torch.rms_norm_wide_weight",), [{"n": K}])
    made: PreparedModule = runtime.server("rms_norm").prepare(torch.randn(K).bfloat16())
    return made.requires_grad_(False)


LAYERS = {"linear": linear, "layer_norm": layer_norm, "rms_norm": rms_norm}


def framework(layer: PreparedModule, x: torch.Tensor) -> torch.Tensor:
    y = layer.framework(x)
    return y[0] if isinstance(y, tuple) else y


def served(layer: PreparedModule, x: torch.Tensor) -> torch.Tensor:
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def rows(layer: PreparedModule) -> torch.Tensor:
    return torch.randn(4, K).to(layer.weight.dtype)


def counts(layer: PreparedModule) -> dict[str, int]:
    found = layer.server.runtime.stats()["ops"][layer.server.op]
    return {"hits": sum(found["hits"].values()), **found["fallbacks"]}


def flat(t: torch.Tensor) -> torch.Tensor:
    return t.detach().view(-1).view(torch.uint8)


def as_numpy(t: torch.Tensor) -> None:
    flat(t).numpy()[13] ^= 0x40


def by_address(t: torch.Tensor) -> None:
    ctypes.c_uint8.from_address(t.data_ptr() + 13).value ^= 0x40


HIDDEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "one element, through data": lambda t: t.data.view(-1)[-1].add_(1),
    "one element, copied through data": lambda t: t.data.view(-1)[5:6].copy_(torch.ones(1)),
    "numpy": as_numpy,
    "dlpack": lambda t: torch.from_dlpack(t.detach()).view(-1)[7].add_(1),
    "its address": by_address,
    "its storage": lambda t: t.untyped_storage().__setitem__(13, t.untyped_storage()[13] ^ 0x40),
    "a view's data": lambda t: t.detach()[0:1].data.add_(1),
}


def notices(layer: PreparedModule) -> None:
    """Within the stated calls the framework serves, and goes on until the layer is bound again."""
    x = rows(layer)
    assert layer.scrub_calls > 0
    for _ in range(layer.scrub_calls):
        served(layer, x)
    before = counts(layer)
    for _ in range(3):
        assert torch.equal(served(layer, x), framework(layer, x))
    assert counts(layer) == before | {"weight_changed": before["weight_changed"] + 3}
    assert layer.stale
    layer.refresh()
    assert torch.allclose(served(layer, x), framework(layer, x), atol=1e-2) and not layer.stale
    assert counts(layer)["hits"] == before["hits"] + 1


@pytest.mark.parametrize("op", LAYERS)
@pytest.mark.parametrize("write", HIDDEN)
def test_a_hidden_write_to_a_layer(route: Any, op: str, write: str, form: str) -> None:
    with torch.no_grad():
        layer = LAYERS[op](route)
        served(layer, rows(layer))
        HIDDEN[write](layer.weight)
        notices(layer)
        bias = layer._parameters.get("bias")
        if bias is not None:
            HIDDEN[write](bias)
            notices(layer)


@pytest.mark.parametrize("op", LAYERS)
def test_an_inference_tensor_written_in_place(route: Any, op: str, form: str) -> None:
    with torch.inference_mode():
        layer = LAYERS[op](route)
        layer.weight = nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)
        layer.refresh()
        assert layer.weight.is_inference()
        served(layer, rows(layer))
        layer.weight.view(-1)[3] += 1
        notices(layer)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_write_by_another_process(route: Any, form: str) -> None:
    with torch.no_grad():
        layer = linear(route)
        layer.share_memory()
        served(layer, rows(layer))
        child = os.fork()
        if child == 0:
            by_address(layer.weight)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        notices(layer)


def test_a_write_to_the_file_that_a_weight_is_mapped_from(route: Any, form: str, tmp_path: Path) -> None:
    file = tmp_path / "weight"
    file.write_bytes(torch.randn(N, K).numpy().tobytes())
    with torch.no_grad(), file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as other:
        layer = linear(route)
        layer.weight = nn.Parameter(torch.from_file(str(file), True, N * K).view(N, K), requires_grad=False)
        layer.refresh()
        served(layer, rows(layer))
        other[4 * K + 2] ^= 0x40
        notices(layer)


@pytest.mark.parametrize(
    "kernel",
    [k for k in pool.kernels().values() if k.op in LAYERS and not k.keeps_values and k.runs_on("cpu")],
    ids=lambda kernel: kernel.id,
)
def test_a_kernel_that_reads_in_place_sees_every_write(kernel: Kernel) -> None:
    if (why := kernel.unavailable()) is not None:
        pytest.skip(why)
    operator = pool.operator(kernel.op)
    for dtype in kernel.precision:
        traits = {name: values[0] for name, values in operator.traits.items()} | {"dtype": dtype}
        problem = Problem.of(
            kernel.op, traits, {name: 64 if name in operator.static else 4 for name in operator.dims}
        )
        if kernel.objection(problem) is not None:
            continue
        for params in kernel.params:
            inputs = operator.make_inputs(problem, torch.Generator().manual_seed(1), "normal")
            with torch.no_grad():
                run = kernel.bind(problem, params, *inputs.static)
                for t in inputs.static:
                    if isinstance(t, torch.Tensor):
                        t.data.mul_(-2)
                found = run(*inputs.dynamic)
                wanted = kernel.bind(problem, params, *inputs.static)(*inputs.dynamic)
            found, wanted = (y if isinstance(y, tuple) else (y,) for y in (found, wanted))
            assert all(map(torch.equal, found, wanted)), (dtype, params)


def test_a_layer_whose_kernels_read_in_place_pays_for_no_look(route: Any, form: str) -> None:
    with torch.no_grad():
        layer = linear(route, "torch.linear_inplace", "relu")
        x = rows(layer)
        assert layer.scrub_calls == 0
        layer.weight.data.mul_(2)
        assert torch.equal(served(layer, x), framework(layer, x)) and counts(layer) == {"hits": 1}


def test_a_copy_of_a_misaligned_weight_is_looked_at(route: Any, form: str) -> None:
    with torch.no_grad():
        layer = linear(route, "torch.linear_inplace", "relu")
        layer.weight = nn.Parameter(torch.randn(N * K + 1)[1:].view(N, K), requires_grad=False)
        layer.refresh()
        served(layer, rows(layer))
        as_numpy(layer.weight)
        notices(layer)


def test_a_later_table_whose_kernels_keep_values_begins_the_look(route: Any, form: str, tmp_path: Path) -> None:
    with torch.no_grad():
        layer = linear(route, "torch.linear_inplace", "relu")
        runtime = layer.server.runtime
        later = route("linear", (PACKED, "torch.linear"), [{"n": N, "k": K}]).generation.table
        runtime._open = lambda _: Generation(later)
        assert layer.scrub_calls == 0
        layer.weight.data.mul_(2)  # what is packed then is what it is by now
        runtime.reload(tmp_path)
        x = rows(layer)
        assert torch.allclose(served(layer, x), framework(layer, x), atol=1e-4) and counts(layer) == {"hits": 1}
        as_numpy(layer.weight)
        notices(layer)


@pytest.mark.parametrize("op", LAYERS)
def test_debug_raises_at_the_very_next_call(
    route: Any, op: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEBUG, "1")
    with torch.no_grad():
        layer = LAYERS[op](route)
        x = rows(layer)
        served(layer, x)
        for name, t in layer.named_parameters():
            as_numpy(t)
            with pytest.raises(RuntimeError, match=rf"t: {op} .*found other bytes in {name}.*layer\.refresh\(\)"):
                layer(x)
            layer.refresh()
            served(layer, x)
            t.mul_(2)  # PyTorch counts it: the framework serves, as ever
            assert torch.equal(served(layer, x), framework(layer, x))
            layer.refresh()
        assert "weight_changed" in counts(layer) and layer.scrub_calls == 1


def test_on_a_gpu_a_hidden_write_needs_refresh_and_debug_finds_it(
    route: Any, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = route("linear", (PACKED, "torch.linear"), [{"n": N, "k": K}], device="cuda")
    with pretended.gpus(), torch.no_grad():
        layer = runtime.server("linear").prepare(torch.randn(N, K), None).requires_grad_(False)
        x = rows(layer)
        old = served(layer, x)
        layer.weight.data.mul_(2)
        assert layer.scrub_calls == 0 and torch.equal(served(layer, x), old), "as the docs say"
        layer.refresh()
        assert torch.allclose(served(layer, x), framework(layer, x), atol=1e-4)
        monkeypatch.setenv(DEBUG, "1")
        layer.refresh()
        served(layer, x)
        layer.weight.data.mul_(2)
        with pytest.raises(RuntimeError, match="found other bytes in weight"):
            layer(x)


def test_what_can_not_be_watched_is_not_bound(route: Any, form: str) -> None:
    runtime = route("linear", (PACKED, "torch.linear"), [{"n": N, "k": K}], device="cuda")
    with pretended.gpus(), torch.inference_mode():
        layer = runtime.server("linear").prepare(torch.randn(N, K), torch.randn(N))
        x = rows(layer)
        for _ in range(2):
            assert torch.equal(served(layer, x), framework(layer, x))
            layer.weight[3] = 0
        assert layer.binding is None and counts(layer) == {"hits": 0, "unwatched": 2}
        model = nn.ModuleList([nn.Linear(K, N)])
        assert [swap.note for swap in runtime.optimize(model).swaps] == [
            "unwatched: inference tensors on a GPU; make the model outside of torch.inference_mode()"
        ]


def test_a_layer_in_a_compiled_graph_is_watched_too(route: Any) -> None:
    with torch.no_grad():
        layer = linear(route)
        x = rows(layer)
        compiled = torch.compile(lambda given: F.relu(layer(given)), backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), F.relu(framework(layer, x)), atol=1e-4)
        as_numpy(layer.weight)
        for _ in range(layer.scrub_calls):
            compiled(x)
        assert torch.equal(compiled(x), F.relu(framework(layer, x)))
