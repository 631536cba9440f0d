"""Tools that look for, wrap, change or replace layers: an optimized model is to them what the plain one is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from dks.dispatch.ops.linear.layers import Pair, PreparedLinear

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

PACKED = "mkldnn.linear_packed"
SIZES = (8, 16, 32, 64, 96)
SHAPES = [{"n": n, "k": k} for n in SIZES for k in SIZES]

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)


@pytest.fixture
def runtime(route: Any) -> Any:
    return route("linear", (PACKED,), SHAPES)


def counts(runtime: Any) -> dict[str, int]:
    found = runtime.stats()["ops"].get("linear", {"hits": {}, "fallbacks": {}})
    return {**found["hits"], **found["fallbacks"]}


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.GELU()), nn.Linear(16, 8))


def x() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(9))


def llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=96, max_position_embeddings=64, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(config).eval()


IDS = torch.tensor([[3, 5, 7, 11, 2], [9, 1, 4, 6, 8]])


def both(runtime: Any, make: Callable[[], Any]) -> tuple[Any, Any]:
    """A model, and the same optimized."""
    plain = make()
    ours = copy.deepcopy(plain)
    assert runtime.optimize(ours).swapped > 0
    return plain, ours


class TestLora:
    @pytest.mark.parametrize("targets", [["q_proj", "v_proj", "down_proj"], "all-linear"])
    def test_what_a_step_trains_and_a_merge_gives(self, runtime: Any, targets: Any) -> None:
        models = []
        for model in both(runtime, llama):
            torch.manual_seed(2)
            config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
            tuned = peft.get_peft_model(model, config)
            before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
            optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
            tuned.train()
            tuned(IDS, labels=IDS).loss.backward()
            optimizer.step()
            changed = {name for name, p in tuned.named_parameters() if not torch.equal(p, before[name])}
            assert changed and all("lora_" in name for name in changed)
            models.append(tuned.eval())
        plain, ours = models
        assert [n for n, _ in plain.named_parameters()] == [n for n, _ in ours.named_parameters()]
        with torch.no_grad():
            assert torch.allclose(ours(IDS).logits, plain(IDS).logits, atol=1e-4)
            with ours.disable_adapter(), plain.disable_adapter():
                assert torch.allclose(ours(IDS).logits, plain(IDS).logits, atol=1e-4)
            merged, wanted = ours.merge_and_unload(), plain.merge_and_unload()
            for _ in range(2):  # as it comes, and once its new weights are bound
                assert torch.allclose(merged(IDS).logits, wanted(IDS).logits, atol=1e-4)
                hits = counts(runtime).get("bin", 0)
                runtime.optimize(merged)
            merged(IDS)
            assert counts(runtime)["bin"] == hits + 15, "all of them serve again"

    def test_the_linear_inside_of_a_pair_is_wrapped(self, runtime: Any) -> None:
        plain, ours = both(runtime, pair)
        for model in (plain, ours):
            torch.manual_seed(3)
            peft.inject_adapter_in_model(
                peft.LoraConfig(r=2, target_modules=["0.0"], init_lora_weights=False), model
            )
        assert isinstance(ours[0], Pair) and not ours[0].intact
        with torch.no_grad():
            assert torch.allclose(ours(x()), plain(x()), atol=1e-5)
            assert counts(runtime) == {"unpaired": 1, "bin": 1}
            assert runtime.optimize(ours).swapped == 1 and not isinstance(ours[0], Pair)
            assert torch.allclose(ours(x()), plain(x()), atol=1e-5)
            assert counts(runtime) == {"unpaired": 1, "bin": 3}

    def test_optimized_after_the_adapter(self, runtime: Any) -> None:
        config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
        plain, ours = both(runtime, lambda: peft.get_peft_model(llama(), config).eval())
        with torch.no_grad():
            assert torch.allclose(ours(IDS).logits, plain(IDS).logits, atol=1e-4)


class TestTransformers:
    def test_more_tokens(self, runtime: Any) -> None:
        plain, ours = both(runtime, llama)
        for model in (plain, ours):
            torch.manual_seed(4)
            model.resize_token_embeddings(100, mean_resizing=False)
        ids = torch.tensor([[3, 99, 97]])
        with torch.no_grad():
            assert ours(ids).logits.shape == (1, 3, 100)
            assert torch.allclose(ours(ids).logits, plain(ids).logits, atol=1e-4)
        assert isinstance(ours.lm_head, nn.Linear) and ours.lm_head.out_features == 100

    def test_tied_weights(self, runtime: Any) -> None:
        plain, ours = both(runtime, llama)
        for model in (plain, ours):
            model.config.tie_word_embeddings = True
            model.lm_head.weight = model.model.embed_tokens.weight
            model.tie_weights()
        assert ours.lm_head.weight is ours.get_input_embeddings().weight
        with torch.no_grad():
            assert torch.allclose(ours(IDS).logits, plain(IDS).logits, atol=1e-4)

    def test_saved_and_loaded(self, runtime: Any, tmp_path: Any) -> None:
        plain, ours = both(runtime, llama)
        ours.save_pretrained(tmp_path)
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            assert torch.allclose(loaded(IDS).logits, plain(IDS).logits, atol=1e-5)


def change_the_activation(model: nn.Sequential) -> None:
    model[0][1].approximate = "tanh"


def replace_the_activation(model: nn.Sequential) -> None:
    model[0][1] = nn.ReLU()


def replace_a_child_where_nobody_looks(model: nn.Sequential) -> None:
    model[0]._modules["0"] = nn.Linear(8, 16)


def double(_module: nn.Module, _given: Any, y: torch.Tensor) -> torch.Tensor:
    return y * 2


def wrap(model: nn.Sequential) -> None:
    class Wrapped(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.more = base, nn.Linear(base.in_features, base.out_features)

        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return self.base_layer(t) + self.more(t)

    for parent, name in ((model[0], "0"), (model, "1")):
        setattr(parent, name, Wrapped(getattr(parent, name)))


def patch(model: nn.Sequential, *path: int) -> None:
    module: Any = model
    for index in path:
        module = module[index]
    forward = module.forward
    module.forward = lambda t: forward(t) + 1


TOOLS: dict[str, Callable[[nn.Sequential], Any]] = {
    "a changed activation": change_the_activation,
    "another activation": replace_the_activation,
    "another linear": replace_a_child_where_nobody_looks,
    "a third child": lambda model: model[0].append(nn.Tanh()),
    "one child less": lambda model: model[0].pop(1),
    "the children in turn": lambda model: [model[0].insert(0, model[0].pop(1)), setattr(model[0], "0", nn.Tanh())],
    "wrapped": wrap,
    "a hook on the pair": lambda model: model[0].register_forward_hook(double),
    "a hook on its linear": lambda model: model[0][0].register_forward_hook(double),
    "a hook on its activation": lambda model: model[0][1].register_forward_hook(double),
    "a hook before its activation": lambda model: model[0][1].register_forward_pre_hook(
        lambda _, args: args[0] + 1
    ),
    "new dicts of hooks": lambda model: [
        setattr(m, "_forward_hooks", {0: double}) for m in (model[0], model[0][1], model[1])
    ],
    "a forward on the pair": lambda model: patch(model, 0),
    "a forward on its linear": lambda model: patch(model, 0, 0),
    "a forward on its activation": lambda model: patch(model, 0, 1),
    "a forward on a linear": lambda model: patch(model, 1),
    "pruned": lambda model: [prune.l1_unstructured(m, "weight", 0.5) for m in (model[0][0], model[1])],
    "pruned for good": lambda model: [
        [prune.l1_unstructured(m, "weight", 0.5), prune.remove(m, "weight")] for m in (model[0][0], model[1])
    ],
    "weight_norm": lambda model: [parametrizations.weight_norm(m) for m in (model[0][0], model[1])],
    "old weight_norm": lambda model: [nn.utils.weight_norm(m) for m in (model[0][0], model[1])],
    "parametrized": lambda model: [
        parametrize.register_parametrization(m, "weight", nn.Tanh()) for m in (model[0][0], model[1])
    ],
    "parametrized and back": lambda model: [
        [
            parametrize.register_parametrization(m, "weight", nn.Tanh()),
            parametrize.remove_parametrizations(m, "weight"),
        ]
        for m in (model[0][0], model[1])
    ],
    "reset": lambda model: model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None),
    "initialized": lambda model: model.apply(
        lambda m: nn.init.xavier_uniform_(m.weight) if isinstance(m, nn.Linear) else None
    ),
    "loaded": lambda model: model.load_state_dict(pair().state_dict()),
    "assigned": lambda model: model.load_state_dict(pair().state_dict(), assign=True),
    "loaded into the linear": lambda model: model[0][0].load_state_dict(nn.Linear(8, 16).state_dict()),
    "double": lambda model: model.double().float(),
    "no bias": lambda model: [setattr(m, "bias", None) for m in (model[0][0], model[1])],
    "wider": lambda model: [
        setattr(model[0][0].weight, "data", torch.randn(32, 8)),
        setattr(model[0][0], "bias", None),
        setattr(model[1].weight, "data", torch.randn(8, 32)),
    ],
    "training": lambda model: model.train(),
    "cast to its own class": lambda model: setattr(model[1], "__class__", nn.Linear),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_changed_model_computes_what_the_plain_one_does(runtime: Any, tool: str) -> None:
    plain, ours = both(runtime, pair)
    for model in (plain, ours):
        torch.manual_seed(5)
        TOOLS[tool](model)
    with torch.no_grad():
        wanted = plain(x())
        assert torch.allclose(ours(x()), wanted, atol=1e-5)
        assert [str(m) for m in copy.deepcopy(ours).modules()] == [str(m) for m in plain.modules()]
        assert torch.allclose(copy.deepcopy(copy.deepcopy(ours))(x()), wanted, atol=1e-5)
        runtime.optimize(ours)
        assert torch.allclose(ours(x()), wanted, atol=1e-5)
        runtime.restore(ours)
        assert [type(m).__name__ for m in ours.modules()] == [type(m).__name__ for m in plain.modules()]
        assert not any(isinstance(m, (PreparedLinear, Pair)) for m in ours.modules())
        assert torch.equal(ours(x()), wanted)
    for a, b in ((ours, plain),):
        a(x()).pow(2).sum().backward()
        b(x()).pow(2).sum().backward()
        for ours_, theirs in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.allclose(ours_.grad, theirs.grad, atol=1e-5) if theirs.grad is not None else True


def test_calls_of_a_pair_in_every_form(runtime: Any) -> None:
    plain, ours = both(runtime, pair)
    with torch.no_grad():
        for call in (
            lambda m: m[0](x()),
            lambda m: m[0](input=x()),
            lambda m: m[0].forward(x()),
            lambda m: m[0][0](x()),
            lambda m: m[0][1](m[0][0](x())),
            lambda m: m[0][:1](x()),
            lambda m: (m[0] + nn.Sequential(nn.Tanh()))(x()),
            lambda m: torch.vmap(m[0])(x()),
            lambda m: torch.func.functional_call(m, {"0.0.weight": torch.ones(16, 8)}, (x(),)),
        ):
            assert torch.allclose(call(ours), call(plain), atol=1e-5)
        for model in (plain, ours):
            with pytest.raises(TypeError):
                model[0]()
            with pytest.raises(TypeError):
                model[0](x(), x())
            with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
                model[0](torch.randn(4, 9))
    assert type(ours[0][:1]) is nn.Sequential and type(type(ours[1])(8, 8)) is nn.Linear


def test_each_call_of_a_pair_is_counted_once(runtime: Any) -> None:
    _, ours = both(runtime, pair)
    ours[0](x())
    assert counts(runtime) == {"gradient": 1}
    ours.requires_grad_(False)
    ours[0](x())
    ours[0](x()[::2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours[0](x())
    assert counts(runtime) == {"gradient": 1, "bin": 1, "strides": 1, "autocast": 1}
    ours[0][0](x())
    ours[0](input=x())
    assert counts(runtime)["unpaired"] == 2
    handle = ours[0][1].register_forward_hook(double)
    ours[0](x())
    assert counts(runtime)["unpaired"] == 3
    handle.remove()
    ours[0](x())
    assert counts(runtime)["bin"] == 2, "as before"


def test_a_global_hook_sees_the_children_of_a_pair(runtime: Any) -> None:
    _, ours = both(runtime, pair)
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        ours(x())
    finally:
        handle.remove()
    assert seen == ["Linear", "GELU", "Sequential", "Linear", "Sequential"]


def test_an_activation_with_gradients_of_its_own_keeps_them(runtime: Any) -> None:
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, t: torch.Tensor) -> torch.Tensor:
            return F.relu(t)

        @staticmethod
        def backward(_ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    class Odd(nn.Module):
        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return Straight.apply(t)

    plain, ours = both(runtime, lambda: nn.Sequential(nn.Linear(8, 16), Odd()))
    grads = [torch.autograd.grad(model(x()).sum(), model[0].weight)[0] for model in (plain, ours)]
    assert torch.allclose(*grads, atol=1e-6)


class TestQuantized:
    def test_a_copy(self, runtime: Any) -> None:
        plain, ours = both(runtime, pair)
        found, wanted = (torch.ao.quantization.quantize_dynamic(m, {nn.Linear}) for m in (ours, plain))
        assert [type(m) for m in found.modules()] == [type(m) for m in wanted.modules()]
        assert torch.equal(found(x()), wanted(x()))
        assert isinstance(ours[1], PreparedLinear)

    def test_in_place_after_restore(self, runtime: Any) -> None:
        plain, ours = both(runtime, pair)
        runtime.restore(ours)
        for model in (plain, ours):
            torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
        assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
        assert torch.equal(ours(x()), plain(x()))


def test_traced_symbolically(runtime: Any) -> None:
    plain, ours = both(runtime, pair)
    graph, wanted = torch.fx.symbolic_trace(ours), torch.fx.symbolic_trace(plain)
    assert torch.allclose(graph(x()), plain(x()), atol=1e-5)
    assert [n.op for n in graph.graph.nodes] == [n.op for n in wanted.graph.nodes]
    twin = copy.deepcopy(graph)
    assert torch.allclose(twin(x()), plain(x()), atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_traced(runtime: Any) -> None:
    plain, ours = both(runtime, pair)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for graph in (torch.jit.trace(ours, (x(),)), torch.jit.script(copy.deepcopy(ours))):
            assert torch.allclose(graph(x()), plain(x()), atol=1e-5)
        assert isinstance(ours[0], Pair)
        assert torch.allclose(torch.jit.script(ours)(x()), plain(x()), atol=1e-5)
    assert torch.allclose(ours(x()), plain(x()), atol=1e-5)


def test_averaged_and_sharded_by_class(runtime: Any) -> None:
    plain, ours = both(runtime, pair)
    averaged = torch.optim.swa_utils.AveragedModel(ours)
    averaged.update_parameters(ours)
    assert type(averaged.module[1]) is nn.Linear
    made = type("Sharded" + type(ours[1]).__name__, (type(ours[1]),), {"__module__": "elsewhere"})
    ours[1].__class__ = made
    assert made.__mro__ == (made, *nn.Linear.__mro__) and type(ours[1]) is made
    assert {*vars(ours[1])} == {*vars(nn.Linear(8, 8))}
    assert torch.allclose(ours(x()), plain(x()), atol=1e-5)


def test_a_class_written_upon_a_serving_layers_is_one_of_the_plain_class(runtime: Any) -> None:
    plain, ours = both(runtime, pair)

    class Scaled(type(ours[1])):  # type: ignore[misc]
        def __init__(self, k: int, n: int, scale: float = 2.0) -> None:
            super().__init__(k, n)
            self.scale = scale

        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return self.scale * super().forward(t)

    class Both(type(ours[1]), nn.Linear):  # type: ignore[misc]
        pass

    given = torch.randn(4, 16)
    made = Scaled(16, 8, scale=3.0)
    made.load_state_dict(plain[1].state_dict())
    assert Scaled.__mro__ == (Scaled, *nn.Linear.__mro__) and Both.__mro__ == (Both, *nn.Linear.__mro__)
    for layer in (made, copy.deepcopy(made)):
        assert torch.equal(layer(given), 3.0 * plain[1](given))
    assert isinstance(ours[1], PreparedLinear), "which goes on serving"


@pytest.mark.parametrize(
    ("kind", "op"), [(nn.Linear, "linear"), (nn.LayerNorm, "layer_norm"), (nn.RMSNorm, "rms_norm")]
)
def test_a_class_whose_forward_was_replaced_is_left(
    route: Any, monkeypatch: pytest.MonkeyPatch, kind: Any, op: str
) -> None:
    id = {"linear": PACKED, "layer_norm": "torch.native_layer_norm", "rms_norm": "torch.rms_vector_norm"}[op]
    table = route(op, (id,), [{"n": 8, "k": 8} if op == "linear" else {"n": 8}])
    original, layer = kind.forward, nn.Sequential(kind(8, 8) if op == "linear" else kind(8))
    monkeypatch.setattr(kind, "forward", lambda self, t: 2 * original(self, t))
    wanted = layer(x())
    assert f"{kind.__name__}.forward was replaced" in str(table.optimize(layer))
    assert torch.equal(layer(x()), wanted)
    monkeypatch.undo()
    assert table.optimize(layer).swapped == 1


def test_names_that_serving_needs_are_left_to_who_has_them(runtime: Any) -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.act = nn.Linear(8, 16), nn.ReLU()
            self._parts = ["mine"]

        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return self.act(self.dense(t))

    model = nn.Sequential(Counted())
    runtime.optimize(model)
    assert type(model[0]) is Counted and model[0]._parts == ["mine"]
    assert isinstance(model[0].dense, PreparedLinear) and model[0].dense.epilogue == "none"
    for name in ("epilogue", "_server", "refresh"):
        layer = nn.Linear(8, 8)
        setattr(layer, name, "mine")
        assert f"has {name}, a name that serving needs" in str(runtime.optimize(layer))
        assert type(layer) is nn.Linear and getattr(layer, name) == "mine"
