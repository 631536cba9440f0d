"""Models that travel: copies, pickles and files hold PyTorch's own layers; ``restore`` makes them so in place."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import pickletools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dks.dispatch.ops.linear.layers import ActivatedLinear, Pair, PairedLinear, PreparedLinear
from dks.dispatch.prepared import PreparedModule
from dks.dispatch.runtime import Runtime

PACKED = "mkldnn.linear_packed"
SHAPES = [{"n": n, "k": k} for n in (8, 16) for k in (8, 16)]


class Mlp(nn.Module):
    """A linear and its activation, as transformers' intermediate layers are made."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(8, 16), nn.GELU()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.act(self.dense(hidden))


class Net(nn.Module):
    """A pair of both kinds, a linear by itself, one under two names, and a norm that no table serves."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(8, 16), nn.SiLU())
        self.down, self.mlp = nn.Linear(16, 8), Mlp()
        self.again = self.down
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.mlp(self.norm(self.down(self.pair(x)))))


def x(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def runtime(route: Any) -> Any:
    return route("linear", (PACKED,), SHAPES)


def optimized(runtime: Any) -> tuple[Net, torch.Tensor]:
    """A model that serves, and what it gave before it did."""
    model = Net().eval().requires_grad_(False)
    wanted = model(x())
    assert runtime.optimize(model).swapped == 4
    assert {type(m).__name__ for m in model.modules()} == {
        "Net",
        "Sequential",
        "Linear",
        "SiLU",
        "Mlp",
        "GELU",
        "LayerNorm",
    }
    assert torch.allclose(model(x()), wanted, atol=1e-5)
    return model, wanted


def kinds(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def counts(runtime: Any, op: str = "linear") -> dict[str, int]:
    found = runtime.stats()["ops"].get(op, {"hits": {}, "fallbacks": {}})
    return {**found["hits"], **found["fallbacks"]}


def saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def pickled(protocol: int) -> Callable[[nn.Module], nn.Module]:
    return lambda model: pickle.loads(pickle.dumps(model, protocol))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "torch.save": lambda model: torch.load(io.BytesIO(saved(model)), weights_only=False),
    "replicated": lambda model: copy.deepcopy(model)._replicate_for_data_parallel(),
    **{f"pickle {protocol}": pickled(protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)},
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_the_plain_model(runtime: Any, way: str) -> None:
    model, wanted = optimized(runtime)
    model.down.note = "mine"  # type: ignore[assignment]
    model.mlp.register_forward_hook(_hook)
    twin = COPIES[way](model)
    assert kinds(twin) == kinds(Net()) and list(twin.state_dict()) == list(model.state_dict())
    assert twin.down is twin.again and twin.down.note == "mine" and not twin.down.training
    assert len(twin.mlp._forward_hooks) == 1
    assert {*vars(twin.down)} == {*vars(nn.Linear(8, 8)), "note"}
    assert torch.allclose(twin(x()), wanted, atol=1e-5)
    if way != "replicated":
        twin.mlp._forward_hooks.clear()
        assert runtime.optimize(twin).swapped == 4, "a copy can be optimized again"
        assert torch.allclose(twin(x()), wanted, atol=1e-5)


def _hook(*_: Any) -> None:
    """One that a pickle can name."""


def test_a_copy_has_its_own_parameters_and_a_shallow_one_shares_them(runtime: Any) -> None:
    model, wanted = optimized(runtime)
    twin, shallow = copy.deepcopy(model), copy.copy(model.down)
    assert type(shallow) is nn.Linear and shallow.weight is model.down.weight
    with torch.no_grad():
        twin.down.weight.zero_()
    assert torch.allclose(model(x()), wanted, atol=1e-5)


def test_a_layer_that_refers_to_itself_is_copied(runtime: Any) -> None:
    model, _ = optimized(runtime)
    model.down.__dict__["owner"] = [model, model.down]
    twin = copy.deepcopy(model.down)
    assert twin.owner[1] is twin and type(twin) is nn.Linear and type(twin.owner[0]) is Net


class _OwnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, (8,), self.weight, self.eps)


@pytest.mark.parametrize("method", ["forward", "__call__"])
def test_a_kept_method_goes_on_when_its_module_is_plain_again(runtime: Any, route: Any, method: str) -> None:
    norms = route("layer_norm", ("torch.native_layer_norm",), [{"n": 8}])
    rms_norms = route("rms_norm", ("torch.rms_vector_norm",), [{"n": 8}])
    pair = nn.Sequential(nn.Linear(8, 16), nn.GELU())
    model = nn.ModuleList([pair, nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8), _OwnNorm()])
    wanted = [module(x()) for module in model]
    for table in (runtime, norms, rms_norms):
        assert table.optimize(model).swapped
    for module in (*model, model[0][0]):
        module.kept = getattr(module, method)
    twin = copy.deepcopy(model)
    for table in (runtime, norms, rms_norms):
        table.restore(model)
    for net in (twin, model):
        for module, y in zip(net, wanted, strict=True):
            assert torch.allclose(module.kept(x()), y, atol=1e-5)
        assert torch.equal(net[0][0].kept(x()), net[0][0](x()))


def test_no_pickle_names_a_module_of_ours(runtime: Any) -> None:
    model = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.GELU()), nn.Linear(8, 8)])
    runtime.optimize(model)
    prepare = runtime.server("linear").prepare
    model.extend([prepare(torch.randn(8, 8), None, epilogue) for epilogue in ("none", "gelu_tanh", "silu", "add")])
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        texts = {
            str(arg) for _, arg, _ in pickletools.genops(pickle.dumps(model, protocol)) if isinstance(arg, str)
        }
        assert texts and not [text for text in texts if "dks" in text]


ELSEWHERE = """
import sys
sys.modules["dks"] = None
import torch
models, given, wanted = torch.load(sys.argv[1], weights_only=False)
for model, args, y in zip(models, given, wanted):
    assert torch.allclose(model(*args), y, atol=1e-5), model
    assert "dks" not in str({type(m) for m in model.modules()})
print(len(models))
"""


def test_a_saved_file_loads_where_there_is_no_dks(runtime: Any, route: Any, tmp_path: Path) -> None:
    prepare = runtime.server("linear").prepare
    norm = route("layer_norm", ("torch.native_layer_norm",), [{"n": 8}])
    rms = route("rms_norm", ("torch.rms_vector_norm",), [{"n": 8}])
    models = [
        nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.GELU()), nn.Linear(16, 8)),
        prepare(torch.randn(8, 8), torch.randn(8), "gelu"),
        prepare(torch.randn(8, 8), None, "relu"),
        prepare(torch.randn(8, 8), torch.randn(8), "add"),
        norm.server("layer_norm").prepare(torch.rand(8), torch.rand(8), 0.25),
        rms.server("rms_norm").prepare(torch.rand(8), 0.5),
    ]
    runtime.optimize(models[0])
    given = [(x(), x()) if i == 3 else (x(),) for i in range(len(models))]
    wanted = [model.requires_grad_(False)(*args) for model, args in zip(models, given, strict=True)]
    torch.save((models, given, wanted), tmp_path / "models.pt")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "models.pt")],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(models))]


@pytest.mark.parametrize("epilogue", ["relu", "gelu", "gelu_tanh", "silu", "add"])
def test_a_layer_prepared_with_an_epilogue_travels_as_a_graph_of_pytorchs(runtime: Any, epilogue: str) -> None:
    layer = runtime.server("linear").prepare(torch.randn(8, 8), torch.randn(8), epilogue)
    args = (x(), x()) if epilogue == "add" else (x(),)
    wanted = layer(*args)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(copy.deepcopy(layer))):
        assert isinstance(twin, torch.fx.GraphModule) and not isinstance(twin, PreparedModule)
        assert torch.allclose(twin(*args), wanted, atol=1e-5)
        twin.load_state_dict(layer.state_dict())
    assert not isinstance(layer, nn.Linear), "tools would add to it inside of the epilogue"
    report = runtime.restore(nn.Sequential(layer))
    assert report.swapped == 0 and "no layer of the framework's computes this" in str(report)
    assert torch.allclose(layer(*args), wanted, atol=1e-5)


def _answer(model: nn.Module, given: torch.Tensor, queue: Any) -> None:
    queue.put((model(given).numpy(), str({type(m).__module__ for m in model.modules()})))


def test_a_spawned_worker_gives_the_same(runtime: Any) -> None:
    model, wanted = optimized(runtime)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=_answer, args=(model, x(), queue))
    worker.start()
    y, modules = queue.get(timeout=120)
    worker.join(30)
    assert torch.allclose(torch.as_tensor(y), wanted, atol=1e-5) and "dks" not in modules
    assert torch.allclose(model(x()), wanted, atol=1e-5)


def test_restore_undoes_optimize_in_place(runtime: Any) -> None:
    model = Net().requires_grad_(False)
    modules, parameters = list(model.modules()), list(model.parameters())
    before = [dict(vars(m)) for m in modules]
    wanted = model(x())
    runtime.optimize(model)
    assert {PreparedLinear, PairedLinear, Pair} <= {base for m in model.modules() for base in type(m).__mro__}
    report = runtime.restore(model)
    assert {s.path for s in report.swaps if s.done} == {"pair.0", "down", "again", "mlp.dense"}
    assert str(report).startswith("4 of 4 modules are plain again") and "Linear again" in str(report)
    assert kinds(model) == kinds(Net())
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [vars(m) for m in modules] == before and not runtime.layers
    served = counts(runtime)
    assert torch.equal(model(x()), wanted) and counts(runtime) == served
    assert runtime.restore(model).swaps == ()
    assert runtime.optimize(model).swapped == 4


def test_restore_takes_what_prepare_made_and_leaves_another_tables(runtime: Any, route: Any) -> None:
    other = Runtime("other", runtime.generation)
    theirs, ours = nn.Linear(8, 8), runtime.server("linear").prepare(torch.randn(8, 8))
    pair = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
    model = nn.ModuleList([theirs, ours, pair])
    other.optimize(nn.ModuleList([theirs, pair]))
    assert [s.path for s in runtime.restore(model).swaps] == ["1"]
    assert type(ours) is nn.Linear and type(ours).__init__ is nn.Linear.__init__
    assert isinstance(theirs, PreparedLinear) and isinstance(pair, Pair)
    assert other.restore(model).swapped == 2 and kinds(model)[1:] == [
        nn.Linear,
        nn.Linear,
        nn.Sequential,
        nn.Linear,
        nn.ReLU,
    ]


def test_a_layer_takes_its_argument_by_the_plain_layers_name(runtime: Any, route: Any) -> None:
    layers = {"input": [nn.Linear(8, 8), nn.LayerNorm(8)], "x": [nn.RMSNorm(8)], "hidden": [_OwnNorm()]}
    for name, modules in layers.items():
        for module in modules:
            wanted = module(x())
            for op, id in (("layer_norm", "torch.native_layer_norm"), ("rms_norm", "torch.rms_vector_norm")):
                route(op, (id,), [{"n": 8}]).optimize(module)
            runtime.optimize(module)
            assert isinstance(module, PreparedModule)
            for call in (module, module.forward):
                assert torch.allclose(call(**{name: x()}), wanted, atol=1e-5)
                with pytest.raises(TypeError):
                    call(another=x())


def test_a_layer_that_another_table_serves_is_named(runtime: Any) -> None:
    other = Runtime("other", runtime.generation)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.GELU()), nn.Linear(16, 8))
    assert other.optimize(model).swapped == 2
    report = runtime.optimize(model)
    assert [(s.path, s.done, s.note) for s in report.swaps] == [
        (path, False, "is served by the table 'other' already") for path in ("1", "0.0")
    ]


def test_norms_are_restored(route: Any) -> None:
    for op, candidate, norm in (
        ("layer_norm", "torch.native_layer_norm", nn.LayerNorm(8)),
        ("rms_norm", "torch.rms_vector_norm", nn.RMSNorm(8)),
    ):
        runtime, kind = route(op, (candidate,), [{"n": 8}]), type(norm)
        model = nn.Sequential(norm).requires_grad_(False)
        wanted = model(x())
        assert runtime.optimize(model).swapped == 1 and isinstance(model[0], kind) and type(model[0]) is not kind
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(twin[0]) is kind and torch.allclose(twin(x()), wanted, atol=1e-5)
        assert runtime.restore(model).swapped == 1 and type(model[0]) is kind and model[0] is norm
        assert repr(model) == repr(nn.Sequential(kind(8)))


def test_a_setting_that_changes_is_bound_again(route: Any) -> None:
    for op, candidate, norm in (
        ("layer_norm", "torch.native_layer_norm", nn.LayerNorm(8)),
        ("rms_norm", "torch.rms_vector_norm", nn.RMSNorm(8, 1e-5)),
    ):
        runtime = route(op, (candidate,), [{"n": 8}])
        norm.requires_grad_(False)
        runtime.optimize(norm)
        norm(x())
        norm.eps = 0.5
        plain = copy.deepcopy(norm)
        assert plain.eps == 0.5 and torch.allclose(norm(x()), plain(x()), atol=1e-6)
        assert counts(runtime, op) == {"bin": 2}


def test_a_reload_after_restore_binds_nothing_to_plain_layers(runtime: Any) -> None:
    model, _wanted = optimized(runtime)
    runtime.restore(model)
    served = counts(runtime)
    assert runtime._bind(runtime.generation) == 0
    assert torch.equal(model(x()), copy.deepcopy(model)(x())) and counts(runtime) == served


def test_graphs_of_a_restored_layer_are_served_by_the_direct_form_or_the_framework(runtime: Any) -> None:
    torch._dynamo.reset()
    layer = nn.Linear(8, 8).requires_grad_(False)
    runtime.optimize(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    compiled(x())
    runtime.restore(layer)
    assert torch.allclose(compiled(x()), F.linear(x(), layer.weight, layer.bias), atol=1e-5)


def test_an_activated_layer_is_what_prepare_makes_with_an_epilogue(runtime: Any) -> None:
    prepare = runtime.server("linear").prepare
    assert isinstance(prepare(torch.randn(8, 8), None, "relu"), ActivatedLinear)
    made = prepare(torch.randn(16, 8))
    assert isinstance(made, nn.Linear) and (made.in_features, made.out_features) == (8, 16) and made.bias is None
    assert repr(made) == "Linear(in_features=8, out_features=16, bias=False, served by t)"
