"""Tables of GPUs and of CPUs: whose tensors they serve, in Python and in the compiled fast path.

No test of this file needs a GPU: tensors pretend to be on one (``pretended.py``). What PyTorch and kernels do on a
real one is not tested here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from dks.dispatch import environment, misses, native, pool, prepared, traced
from dks.dispatch.environment import Environment
from dks.dispatch.errors import BadInput
from dks.dispatch.generation import Generation
from dks.dispatch.kernel import Kernel
from dks.dispatch.manifest import Manifest, dead_kernels, misfits
from dks.dispatch.native import probes
from dks.dispatch.ops.attention.traced import fits
from dks.dispatch.ops.linear.pair import linear_then_activation
from dks.dispatch.ops.paged_attention import serve as paged
from dks.dispatch.problem import Precision
from dks.dispatch.runtime import FORKED, Runtime
from dks.dispatch.switches import switches
from dks.dispatch.watch import Watch
from tests.dispatch import pretended

N = 16
ADDMM = "torch.addmm"
ROUTES: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    "linear": ((ADDMM, "torch.linear"), {"n": N, "k": N}),
    "layer_norm": (("torch.native_layer_norm",), {"n": N}),
    "rms_norm": (("torch.rms_vector_norm",), {"n": N}),
    "softmax": (("torch.softmax",), {}),
    "attention": (("torch.sdpa",), {"h": 2, "hkv": 2, "d": 8}),
    "paged_attention": (("torch.paged_loop_sdpa",), {"h": 2, "hkv": 2, "d": 8, "page": 4}),
}


def rows(m: int = 4, n: int = N) -> torch.Tensor:
    return torch.randn(m, n)


def heads() -> torch.Tensor:
    return torch.randn(2, 2, 4, 8)


def pages() -> list[torch.Tensor]:
    cache, table = torch.randn(8, 4, 2, 8), torch.arange(8, dtype=torch.int32).view(2, 4)
    return [torch.randn(2, 2, 8), cache, cache.clone(), table, torch.tensor([16, 16], dtype=torch.int32)]


Call = Callable[[Any, list[torch.Tensor]], object]
CALLS: dict[str, tuple[str, Callable[[], list[torch.Tensor]], Call]] = {
    "linear": ("linear", lambda: [rows(), rows(N), torch.randn(N)], lambda op, t: op.call(*t)),
    "linear with a residual": (
        "linear",
        lambda: [rows(), rows(N), torch.randn(N), rows()],
        lambda op, t: op.call(*t[:3], "none", t[3]),
    ),
    "layer_norm": (
        "layer_norm",
        lambda: [rows(), torch.randn(N), torch.randn(N)],
        lambda op, t: op.call(t[0], (N,), *t[1:]),
    ),
    "rms_norm": (
        "rms_norm",
        lambda: [rows(), torch.randn(N), rows()],
        lambda op, t: op.call(t[0], (N,), t[1], 1e-6, t[2]),
    ),
    "softmax": ("softmax", lambda: [rows()], lambda op, t: op.call(*t)),
    "attention": (
        "attention",
        lambda: [heads(), heads(), heads(), torch.ones(4, 4, dtype=torch.bool)],
        lambda op, t: op.call(*t),
    ),
    "paged_attention": ("paged_attention", pages, lambda op, t: op.call(*t)),
}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[pretended.Gpus]:
    # It makes masks where its arguments say that they are.
    monkeypatch.setattr(paged, "attend", lambda q, *_: q.clone())
    with pretended.gpus() as made:
        yield made


@pytest.fixture(params=["compiled", "python"])
def form(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which form of the dispatcher serves; asked for before a runtime is made."""
    if request.param == "python":
        monkeypatch.setattr(native, "module", None)
    else:
        assert native.module is not None
    return str(request.param)


def made(route: Any, op: str, device: str) -> Runtime:
    candidates, statics = ROUTES[op]
    runtime: Runtime = route(op, candidates, [statics], device=device)
    return runtime


def counted(runtime: Runtime) -> dict[str, int]:
    """Outcomes of all calls since the last time, all hits as one."""
    seen: dict[str, int] = {}
    for found in runtime.stats()["ops"].values():
        for name, n in (("hit", sum(found["hits"].values())), *found["fallbacks"].items()):
            seen[name] = seen.get(name, 0) + n
    before = runtime.__dict__.setdefault("counted", {})
    runtime.__dict__["counted"] = seen
    return {name: n - before.get(name, 0) for name, n in seen.items() if n != before.get(name, 0)}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_table_serves_tensors_of_its_kind_of_device_alone(
    route: Any, gpus: pretended.Gpus, form: str, name: str, device: str
) -> None:
    op, tensors, call = CALLS[name]
    runtime = made(route, op, device)
    server = runtime.server(op)
    for where in ("cuda:0", "cpu", "cuda:1"):
        fits_it = torch.device(where).type == device
        for _ in range(2):  # the second may go the fast path
            call(server, [gpus.put(t, where) for t in tensors()])
            assert counted(runtime) == {"hit" if fits_it else "device": 1}, (where, form)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "softmax"])
@pytest.mark.parametrize(("device", "others"), [("cuda", ("cpu", "cuda:1")), ("cpu", ("cuda:0",))])
def test_all_tensors_of_a_call_are_on_one_device(
    route: Any, gpus: pretended.Gpus, form: str, name: str, device: str, others: tuple[str, ...]
) -> None:
    op, tensors, call = CALLS[name]
    runtime = made(route, op, device)
    home = "cuda:0" if device == "cuda" else "cpu"
    call(runtime.server(op), [gpus.put(t, home) for t in tensors()])  # the fast path knows the kind of call
    counted(runtime)
    for other in others:
        for odd in range(len(tensors())):
            given = [gpus.put(t, other if i == odd else home) for i, t in enumerate(tensors())]
            call(runtime.server(op), given)
            assert counted(runtime) == {"device": 1}, (other, odd, form)


def test_the_fast_path_takes_functional_calls_of_its_own_device(route: Any, gpus: pretended.Gpus) -> None:
    runtime = made(route, "linear", "cuda")
    tensors = [rows(), rows(N), torch.randn(N)]
    runtime.server("linear").call(*tensors)
    fast = runtime.generation.fast["linear"]
    assert fast.call(*tensors) is not NotImplemented and fast.choose(*tensors) >= 0
    for place in ("cpu", "cuda:3"):
        for odd in range(3):
            given = [gpus.put(t.clone(), place) if i == odd else t for i, t in enumerate(tensors)]
            assert fast.call(*given) is NotImplemented and fast.choose(*given) is NotImplemented
    everything = [gpus.put(t, "cuda:3") for t in tensors]
    assert fast.call(*everything) is not NotImplemented


def layers(runtime: Runtime) -> Any:
    return runtime.server("linear").prepare(rows(N), torch.randn(N))


def test_a_layer_takes_the_fast_path_on_the_gpu_that_its_weight_is_on(
    route: Any, gpus: pretended.Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = made(route, "linear", "cuda")
    layer = gpus.moved(layers(runtime), "cuda:2")
    with torch.no_grad():
        for where, outcome in (("cuda:0", "device"), ("cpu", "device"), ("cuda:2", "hit")):
            layer(gpus.put(rows(), where))
            assert counted(runtime) == {outcome: 1}, where
        monkeypatch.setattr(prepared.PreparedModule, "forward", None)
        layer(gpus.put(rows(), "cuda:2"))
    assert counted(runtime) == {"hit": 1}, "Python took no part"


def test_a_residual_comes_from_the_same_gpu(route: Any, gpus: pretended.Gpus, form: str) -> None:
    runtime = made(route, "rms_norm", "cuda")
    layer = runtime.server("rms_norm").prepare(torch.randn(N))
    with torch.no_grad():
        for where, outcome in (("cuda:0", "hit"), ("cuda:1", "device"), ("cpu", "device")):
            layer(rows(), gpus.put(rows(), where))
            assert counted(runtime) == {outcome: 1}, (where, form)


@pytest.mark.parametrize(("device", "home", "away"), [("cpu", "cpu", "cuda:0"), ("cuda", "cuda:1", "cpu")])
def test_moving_a_layer_binds_it_where_the_table_is_for(
    route: Any, gpus: pretended.Gpus, form: str, device: str, home: str, away: str
) -> None:
    runtime = made(route, "linear", device)
    layer = gpus.moved(layers(runtime), home)
    assert layer.binding is not None and layer.gains
    with torch.no_grad():
        for where, outcome in ((home, "hit"), (away, "device"), (home, "hit"), (away, "device")):
            gpus.moved(layer, where)
            assert (layer.binding is not None) == (where == home)
            x = gpus.put(rows(), where)
            assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
            assert counted(runtime) == {outcome: 1}, (where, form)
    assert "device" in layer.describe()


def test_a_layer_on_the_meta_device_binds_again_when_it_comes_back(route: Any, form: str) -> None:
    """With PyTorch's own moves, and nothing pretended."""
    runtime = made(route, "linear", "cpu")
    layer = layers(runtime)
    layer.to("meta")
    assert layer.binding is None and layer(rows().to("meta")).is_meta
    assert counted(runtime) == {"device": 1}
    layer.to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(2.0)
        layer.refresh()
        assert layer(rows()).eq(2.0).all() and counted(runtime) == {"hit": 1}, form


def test_what_is_bound_on_a_gpu_is_watched_by_identity_address_and_version(gpus: pretended.Gpus) -> None:
    weight, bias = rows(), torch.randn(N)
    watch = Watch(weight, bias)
    watch.cover()
    assert watch.scrub_calls == 0, "no byte of a GPU's memory is read"
    assert not watch.changed(weight, bias) and watch.changed(weight.clone(), bias)
    weight.data.zero_()  # what the bytes of a CPU's tensor would have shown
    assert not watch.changed(weight, bias)
    weight.add_(1)
    assert watch.changed(weight, bias)
    other = Watch(weight, None)
    weight.data = rows()
    assert other.changed(weight, None)
    on_cpu = Watch(gpus.put(rows(), "cpu"), bias)
    on_cpu.cover()
    assert on_cpu.scrub_calls > 0


def test_a_write_to_a_weight_on_a_gpu_reaches_the_framework(route: Any, gpus: pretended.Gpus, form: str) -> None:
    runtime = made(route, "linear", "cuda")
    layer = layers(runtime)
    with torch.no_grad():
        layer(rows())
        layer.weight.mul_(2)
        layer(rows())
        assert counted(runtime) == {"hit": 1, "weight_changed": 1}, form


@pytest.mark.parametrize(("device", "home"), [("cuda", "cuda:0"), ("cpu", "cpu")])
def test_autocast_of_the_tables_device_reaches_the_framework(
    route: Any, gpus: pretended.Gpus, form: str, device: str, home: str
) -> None:
    runtime = made(route, "linear", device)
    layer, x = gpus.moved(layers(runtime), home), gpus.put(rows(), home)
    with torch.no_grad():
        for on in (False, True, False):
            with probes._autocast_on(device) if on else nullcontext():
                layer(x)
                runtime.server("linear").call(x, layer.weight, layer.bias)
            assert counted(runtime) == {"autocast" if on else "hit": 2}, form
    assert not probes.unproved()


def test_binding_is_done_without_the_weights_own_autocast(
    route: Any, gpus: pretended.Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    kernel = pool.kernels()[ADDMM]

    def bind(*args: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cuda"))
        return kernel.bind(*args)

    monkeypatch.setitem(pool.kernels(), ADDMM, replace(kernel, bind=bind))
    runtime = made(route, "linear", "cuda")
    with probes._autocast_on("cuda"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layers(runtime).binding is not None
    assert seen == [False]


def test_what_is_bound_on_a_gpu_is_there_before_it_serves(
    route: Any, gpus: pretended.Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads have streams of their own; nothing orders one behind that on which a weight is packed."""
    runtime = made(route, "linear", "cuda")
    layer = layers(runtime)
    serving: list[tuple[str, int]] = []

    def stream(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: serving.append((str(device), len(layer._bindings))))

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    gpus.moved(layer, "cuda:1")
    gpus.moved(layer, "cpu")
    assert serving == [("cuda:1", 0)]


@pytest.mark.parametrize("op", ["linear", "layer_norm", "rms_norm"])
def test_optimize_leaves_layers_on_another_device_and_says_so(route: Any, gpus: pretended.Gpus, op: str) -> None:
    runtime = made(route, op, "cuda")
    kind = {"linear": nn.Linear(N, N), "layer_norm": nn.LayerNorm(N), "rms_norm": nn.RMSNorm(N, 1e-6)}[op]
    model = nn.ModuleList([kind])
    report = runtime.optimize(gpus.moved(model, "cpu"))
    assert [swap.note for swap in report.swaps] == ["device: its parameters are on cpu, not cuda"]
    assert runtime.optimize(gpus.moved(model, "cuda:1")).swapped == 1
    gpus.moved(model, "cpu")
    assert runtime.optimize(model).swapped == 0, "it was bound when it was moved, or is not to be"


def test_a_pair_is_fused_only_on_the_tables_device() -> None:
    pair = nn.Sequential(nn.Linear(N, N), nn.ReLU())
    assert linear_then_activation(pair, "cpu") is not None and linear_then_activation(pair, "cuda") is None


def cuda_layer_after_fork(runtime: Runtime, layer: Any) -> list[bool]:
    """What holds in the child of a fork."""
    with torch.no_grad():
        y = layer(rows())
        runtime.server("linear").call(rows(), layer.weight, layer.bias)
        later = runtime.server("linear").prepare(rows(N), None)
        later(rows())
    stats = runtime.stats()
    return [
        y.shape == (4, N),
        counted(runtime) == {"forked": 3},
        stats["table"] == f"refused: {FORKED}",
        runtime.misses.snapshot() == [],
        "was forked" in runtime.explain("linear", m=4, n=N, k=N).reason,
    ]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_leaves_a_table_of_gpus_to_the_framework(
    route: Any, gpus: pretended.Gpus, form: str
) -> None:
    """CUDA can't be used there: whatever the table holds, the framework's own error is what a call is to end in."""
    on_gpu, on_cpu = made(route, "linear", "cuda"), made(route, "linear", "cpu")
    layer, other = layers(on_gpu), gpus.moved(layers(on_cpu), "cpu")
    x = gpus.put(rows(), "cpu")
    with torch.no_grad():
        other(x)
    counted(on_cpu)
    with on_gpu.lock:  # as another thread might hold it
        child = os.fork()
        if child == 0:
            held = [False]
            try:
                held = cuda_layer_after_fork(on_gpu, layer)
                with torch.no_grad():
                    other(x)
                held.append(counted(on_cpu) == {"hit": 1})
            finally:
                os._exit(0 if all(held) else 1 + held.index(False))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with torch.no_grad():
        layer(rows())
    assert counted(on_gpu) == {"hit": 1}, "the parent serves on"


def test_a_table_of_another_device_does_not_take_over(route: Any, tmp_path: Path) -> None:
    on_cpu, on_gpu = made(route, "linear", "cpu").generation, made(route, "linear", "cuda").generation
    runtime = Runtime("t", on_cpu, lambda _: on_gpu)
    with pytest.raises(BadInput, match="found a table for cuda, expected one for cpu"):
        runtime.reload(tmp_path)
    assert runtime.generation is on_cpu and runtime.held == (on_cpu,)
    refused = Runtime("t", Generation(refused="damaged"), lambda _: on_gpu)
    assert "serves" in refused.reload(tmp_path) and refused.generation is on_gpu


def test_a_layer_on_a_gpu_is_bound_to_a_table_of_gpus_that_comes_later(
    route: Any, gpus: pretended.Gpus, tmp_path: Path
) -> None:
    on_gpu = made(route, "linear", "cuda").generation
    runtime = Runtime("t", Generation(refused="damaged", device="cuda"), lambda _: on_gpu)
    layer = layers(runtime)
    with torch.no_grad():
        layer(rows())
        assert counted(runtime) == {"refused": 1}
        runtime.reload(tmp_path)
        layer(rows())
    assert counted(runtime) == {"hit": 1}


GPU = Environment(
    *("cuda", "NVIDIA H200 132 SMs", "sm_90", "580.1", str(torch.__version__), "cuda-None+cudnn-None"),
    *("none", "none", switches("cuda", {})),
)


def seen(monkeypatch: pytest.MonkeyPatch, *multiprocessors: int) -> list[str]:
    """What a manifest of an H200 misses on a machine of such GPUs."""
    found = [
        SimpleNamespace(name="NVIDIA H200", multi_processor_count=count, major=9, minor=0)
        for count in multiprocessors
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    monkeypatch.setattr(environment, "_driver", lambda: "580.1")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    return misfits(Manifest("t", GPU, {}, {}, "compiled", ""))


def test_every_gpu_that_is_seen_must_be_like_the_one_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(monkeypatch, 132) == seen(monkeypatch, 132, 132) == []
    assert seen(monkeypatch, 114) == ["arch: NVIDIA H200 132 SMs != NVIDIA H200 114 SMs"]
    assert seen(monkeypatch, 132, 114, 132, 114) == [
        "cuda:1, cuda:3: arch: NVIDIA H200 132 SMs != NVIDIA H200 114 SMs"
    ]
    assert seen(monkeypatch) == ["device: found 'cuda:0', expected cpu: PyTorch sees no NVIDIA GPU"]


def test_where_cuda_can_not_be_used_the_table_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def forked(_index: int) -> None:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.\nUse spawn")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", forked)
    manifest = Manifest("t", GPU, {}, {}, "compiled", "")
    assert misfits(manifest) == ["Cannot re-initialize CUDA in forked subprocess. Use spawn"]


@pytest.fixture
def cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel of linear for GPUs alone, in the pool."""
    kernel = Kernel(
        id="test.gpu_linear",
        op="linear",
        precision={"float32": Precision.EXACT},
        bind=lambda *_: torch.relu,
        devices=("cuda",),
    )
    known = {**pool.kernels(), kernel.id: kernel}
    monkeypatch.setattr(pool, "kernels", lambda: known)
    return kernel


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_explain_tells_of_kernels_for_the_tables_device(route: Any, cuda_kernel: Kernel, device: str) -> None:
    runtime = made(route, "linear", device)
    rule = '{"candidate": "torch.addmm", "others": []}'
    runtime.generation.evidence = f'{{"rules": [{rule}, {rule}], "others": []}}'
    text = str(runtime.explain("linear", m=4, n=N, k=N)).partition("not measured")[2]
    told = {name.split()[0] for name in text.split(",")}
    for kernel in pool.kernels_for("linear"):
        assert (kernel.id in told) == (kernel.runs_on(device) and kernel.id not in (ADDMM, "torch.linear"))
    assert (cuda_kernel.id in told) == (device == "cuda")


def test_a_rule_of_a_kernel_for_another_device_is_dead(cuda_kernel: Kernel) -> None:
    on_cpu = Manifest("t", Environment.current(), {cuda_kernel.id: "any"}, {}, "compiled", "")
    assert dead_kernels(on_cpu) == {cuda_kernel.id: "it is no kernel for cpu"}
    packed = next(k for k in pool.kernels_for("linear", "cpu") if not k.runs_on("cuda"))
    assert dead_kernels(replace(on_cpu, environment=GPU, kernels={packed.id: "any"})) == {
        packed.id: "it is no kernel for cuda"
    }


def test_what_a_table_of_gpus_missed_is_measured_on_one(route: Any, gpus: pretended.Gpus, tmp_path: Path) -> None:
    runtime = made(route, "linear", "cuda")
    runtime.server("linear").call(rows(4, 32), rows(8, 32))
    assert runtime.export_misses(tmp_path / "missed.yaml") == 1
    text = (tmp_path / "missed.yaml").read_text()
    assert "\ndevice: cuda\n" in text and "threads" not in text
    assert "device" not in misses.render(misses.plan({}, runtime.generation.table), "t")


class Model(nn.Module):
    """What asks a table by name, on one device."""

    def __init__(self, runtime: Runtime, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(N, N, device=device), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(N, device=device), requires_grad=False)
        self.calls = [runtime.server(op).call for op in ("linear", "rms_norm", "softmax", "attention")]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear, norm, softmax, attention = self.calls
        y = softmax(norm(linear(x, self.weight, self.scale), (N,), self.scale, 1e-6))
        q = y.view(1, -1, 2, 8).transpose(1, 2)
        found: torch.Tensor = attention(q, q, q, torch.ones(4, 4, dtype=torch.bool, device=q.device))
        return found


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_on_a_gpu_holds_the_tables_operators(strict: bool) -> None:
    """With PyTorch's fake tensors, which say that they are on a GPU and need none."""
    runtime = Runtime("exported_on_a_gpu", Generation(device="cuda"))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model, x = Model(runtime, "cuda"), torch.empty(4, N, device="cuda")
        program = torch.export.export(model, (x,), strict=strict)
    found = [node for node in program.graph.nodes if "dks" in str(node.target)]
    names = [str(node.target).split(".")[1] for node in found]
    assert names == ["linear", "rms_norm", "softmax", "attention"]
    assert {node.meta["val"].device for node in found} == {torch.device("cuda", 0)}


def test_graphs_take_tensors_of_one_device(gpus: pretended.Gpus) -> None:
    x, other = rows(), gpus.put(rows(), "cuda:1")
    assert traced.takes(x, rows(), None) and not traced.takes(x, other) and traced.takes(other, other)
    assert traced.lie_beside(x, None, rows()) and not traced.lie_beside(x, other)
    assert not traced.takes(gpus.put(rows(), "meta"))
    q, mask = heads(), torch.ones(4, 4, dtype=torch.bool)
    assert fits(q, q, q, mask, 0.0) and not fits(q, q, q, gpus.put(mask, "cpu"), 0.0)
    with probes._autocast_on("cuda"):
        assert not traced.takes(x) and traced.takes(gpus.put(rows(), "cpu"))
    with probes._autocast_on("cpu"):
        assert traced.takes(rows()) and not traced.takes(gpus.put(rows(), "cpu"))
