"""``optimize``: what is swapped, what is left, and that the model computes the same either way."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from dks.dispatch.ops.linear.pair import linear_then_activation
from dks.dispatch.ops.linear.serve import PreparedLinear

PACKED = "mkldnn.linear_packed"
SIZES = (8, 16)
SHAPES = [{"n": n, "k": k} for n in SIZES for k in SIZES]


@pytest.fixture
def runtime(route: Any) -> Any:
    return route("linear", (PACKED, "mkldnn.linear_packed_float32"), SHAPES)  # the second takes bfloat16


def x(rows: int = 8, k: int = 8) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(5))


def hits(runtime: Any) -> int:
    return sum(runtime.stats()["ops"].get("linear", {"hits": {}})["hits"].values())


def fallbacks(runtime: Any) -> dict[str, int]:
    found: dict[str, int] = runtime.stats()["ops"].get("linear", {"fallbacks": {}})["fallbacks"]
    return found


def check(runtime: Any, model: nn.Module, swapped: int, given: torch.Tensor | None = None) -> Any:
    """Optimize, and hold results, gradients and state against the original."""
    given = x() if given is None else given
    original = copy.deepcopy(model)
    keys, training = list(model.state_dict()), {m.training for m in model.modules()}
    report = runtime.optimize(model)
    assert report.swapped == swapped, str(report)
    assert list(model.state_dict()) == keys
    assert {m.training for m in model.modules()} == training
    with torch.no_grad():
        assert torch.allclose(model(given), original(given), atol=1e-5)
    for net in (model, original):
        net(given).pow(2).sum().backward()
    ours, theirs = (dict(net.named_parameters()) for net in (model, original))
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert torch.allclose(ours[name].grad, parameter.grad, rtol=1e-4, atol=1e-4), name
    model.zero_grad(set_to_none=True)
    return report


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return t + self.down(self.act(self.up(t)))


class Pair(nn.Module):
    """A linear and its activation, as transformers' intermediate layers are made."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(8, 16), act or nn.GELU()

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.act(self.dense(t))


def test_a_sequential_pair_is_fused(runtime: Any) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.GELU()), nn.Linear(16, 8))
    report = check(runtime, model, 2)
    assert "gelu" in str(report) and type(model[0][1]) is nn.GELU
    assert model[0][0].epilogue == "gelu" and hits(runtime) == 2


@pytest.mark.parametrize(
    ("act", "epilogue"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.SiLU(inplace=True), "silu"),
    ],
)
def test_pairs_are_found_by_behaviour(runtime: Any, act: nn.Module, epilogue: str) -> None:
    model = nn.Sequential(Pair(act))
    check(runtime, model, 1)
    assert model[0].dense.epilogue == epilogue


class Clipped(nn.Module):
    """transformers' clipped activations: right on every small value."""

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return F.gelu(t).clamp(-1000.0, 1000.0)


class Odd(nn.Module):
    """All that holds a linear and an activation and is yet another thing; ``kind`` says what."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(8, 8), nn.ReLU()
        self._kind = kind

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        y = self.dense(t)
        match self._kind:
            case "residual":
                return t + self.act(y)
            case "before":
                return self.dense(self.act(t))
            case "twice":
                return self.act(self.dense(self.act(y)))
            case "dropped":
                return self.act(F.dropout(y, 0.5, self.training))
            case "clamped before":
                return self.act(y.clamp(max=1e4))
            case "branches":
                return self.act(y) if y.max() < 1e4 else y
            case "none":
                return y
            case _:
                return self.act(y).clamp(max=1e4)


class Scaled(Pair):
    """Its own parameter is one until a state dict is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.act(self.dense(t) * self.scale)


class Switch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(8, 8), nn.ReLU()

    def forward(self, t: torch.Tensor, raw: bool = False) -> torch.Tensor:
        y = self.dense(t)
        return y if raw else self.act(y)


class TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(8, 8), nn.ReLU()

    def project(self, t: torch.Tensor) -> torch.Tensor:
        return self.dense(t)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.act(self.project(t))


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(8, 8), nn.ReLU()
        self.active = True

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        y = self.dense(t)
        return self.act(y) if self.active else y


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(8, 8), nn.ReLU()

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        if t.dim() != 3:
            raise ValueError("three dims, please")
        return self.act(self.dense(t))


@pytest.mark.parametrize(
    "model",
    [
        *(
            pytest.param(Odd(kind), id=kind)
            for kind in ("residual", "before", "twice", "dropped", "none", "clamp", "clamped before", "branches")
        ),
        Scaled(),
        Switch(),
        TwoWays(),
        Flagged(),
        Raises(),
        Pair(Clipped()),
        Pair(nn.ReLU6()),
        Pair(nn.Hardtanh(0.0, 1e6)),
        Pair(nn.LeakyReLU()),
        Pair(nn.PReLU()),
        Pair(nn.Tanh()),
        Pair(nn.Dropout(0.5)),
        Pair(nn.Identity()),
        Pair(nn.RReLU()),
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.ReLU()),
        nn.Sequential(nn.ReLU(), nn.Linear(8, 8)),
        nn.ModuleList([nn.Linear(8, 8), nn.ReLU()]),
    ],
    ids=lambda model: type(model).__name__ + type(getattr(model, "act", None)).__name__,
)
def test_what_only_looks_like_a_pair_is_not_one(runtime: Any, model: nn.Module) -> None:
    state = torch.random.get_rng_state()
    assert linear_then_activation(model) is None
    assert torch.equal(torch.random.get_rng_state(), state)
    runtime.optimize(model)
    layers = [m for m in model.modules() if isinstance(m, PreparedLinear)]
    assert layers and all(layer.epilogue == "none" for layer in layers)


def test_a_switch_keeps_both_its_ways(runtime: Any) -> None:
    model = Switch()
    wanted = [model(x()), model(x(), raw=True)]
    runtime.optimize(model)
    assert all(
        torch.allclose(f, w, atol=1e-6) for f, w in zip([model(x()), model(x(), raw=True)], wanted, strict=True)
    )


def test_a_pair_stays_in_its_mode_and_one_layer_in_its_hooks(runtime: Any) -> None:
    model = nn.Sequential(Pair())
    model.eval()
    model[0].act.train()
    runtime.optimize(model)
    assert [m.training for m in (model, model[0], model[0].dense)] == [False] * 3
    hooked = nn.Sequential(Pair())
    hooked[0].act.register_forward_hook(lambda *_: None)
    runtime.optimize(hooked)
    assert isinstance(hooked[0].act, nn.GELU) and hooked[0].dense.epilogue == "none"


def test_an_mlp(runtime: Any) -> None:
    model = Mlp()
    check(runtime, model, 2)
    assert hits(runtime) == 2 and isinstance(model.act, nn.GELU)


def test_layers_without_bias(runtime: Any) -> None:
    check(runtime, nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False)), 2)


def test_one_layer_in_two_places(runtime: Any) -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Sequential(shared, nn.Tanh(), nn.Tanh()))
    check(runtime, model, 3)
    assert model[0] is model[2] and model[0] is model[3][0], "one layer, one packed weight"


def test_one_layer_in_a_pair_and_alone(runtime: Any) -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared)
    check(runtime, model, 2)
    assert model[0][0] is model[1] and model[1].epilogue == "none" and hits(runtime) == 2


def test_one_parameter_in_two_layers(runtime: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    check(runtime, model, 2)
    assert model[0].weight is model[2].weight
    state = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).state_dict()
    model.load_state_dict(state)
    model.requires_grad_(False)
    wanted = F.linear(F.linear(x(), model[0].weight, model[0].bias).tanh(), model[2].weight, model[2].bias)
    assert torch.allclose(model(x()), wanted, atol=1e-5)
    # The second layer's load wrote to the first one's weight after that had bound it.
    report = runtime.optimize(model)
    assert [s.path for s in report.swaps] == ["0"] and "bound again" in str(report)
    before = hits(runtime)
    assert torch.allclose(model(x()), wanted, atol=1e-5) and hits(runtime) == before + 2


def test_embedding_tied_to_a_head(runtime: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(t))

    model = Tied()
    check(runtime, model, 1, torch.arange(8))
    assert model.head.weight is model.embed.weight
    with torch.no_grad():
        model.embed.weight.mul_(2)
        wanted = F.linear(F.embedding(torch.arange(8), model.embed.weight), model.embed.weight)
        assert torch.allclose(model(torch.arange(8)), wanted, atol=1e-5)
    assert fallbacks(runtime) == {"gradient": 1, "weight_changed": 1}


class Own(nn.Linear):
    """Means something by being one."""


def test_what_is_left_alone_says_why(runtime: Any) -> None:
    model = nn.ModuleDict(
        {
            "own": Own(8, 8),
            "hooked": nn.Linear(8, 8),
            "pre": nn.Linear(8, 8),
            "backward": nn.Linear(8, 8),
            "state": nn.Linear(8, 8),
            "loading": nn.Linear(8, 8),
            "patched": nn.Linear(8, 8),
            "buffered": nn.Linear(8, 8),
            "more": nn.Linear(8, 8),
            "compiled": nn.Linear(8, 8),
            "normed": parametrizations.weight_norm(nn.Linear(8, 8)),
            "unknown": nn.Linear(9, 8),
            "wide": nn.Linear(8, 8).double(),
            "halved": nn.Linear(8, 8).half(),
            "meta": nn.Linear(8, 8, device="meta"),
            "empty": nn.Linear(0, 8),
            "flat": nn.Linear(8, 8),
            "lazy": nn.LazyLinear(8),
            "attention": nn.MultiheadAttention(8, 2),
        }
    )
    model["hooked"].register_forward_hook(lambda *_: None)
    model["pre"].register_forward_pre_hook(lambda *_: None)
    model["backward"].register_full_backward_hook(lambda *_: None)
    model["state"].register_state_dict_post_hook(lambda *_: None)
    model["loading"].register_load_state_dict_post_hook(lambda *_: None)
    model["patched"].forward = lambda t: t  # type: ignore[method-assign]
    model["buffered"].register_buffer("mask", torch.ones(8))
    model["more"].lora = nn.Linear(8, 2)
    model["compiled"].compile()
    model["flat"].weight = nn.Parameter(torch.randn(64))
    kinds = {path: type(m) for path, m in model.named_modules() if path != "more.lora"}
    report = runtime.optimize(model)
    assert report.swapped == 0, str(report)
    assert {path: type(m) for path, m in model.named_modules() if path != "more.lora"} == kinds
    notes = {s.path: s.note for s in report.swaps if s.op == "linear"}
    for path in ("hooked", "pre", "backward", "state", "loading"):
        assert "hooks" in notes[path]
    assert "forward of its own" in notes["patched"] and "compiled" in notes["compiled"]
    assert "more than a weight" in notes["buffered"] and "more than a weight" in notes["more"]
    assert "not in the table" in notes["unknown"] and "not in the table" in notes["halved"]
    assert notes["wide"] == "dtype" and notes["meta"] == "device" and notes["empty"] == "zero_sized"
    assert all(
        "is a subclass, and means something by being one" in notes[name] for name in ("own", "normed", "lazy")
    )


def test_the_model_itself_is_swapped(runtime: Any) -> None:
    check(runtime, nn.Linear(8, 8), 1)
    check(runtime, Pair(), 1)
    assert hits(runtime) == 2


def test_what_a_user_put_on_a_layer_stays(runtime: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh()).eval()
    model[0].note, model[0]._is_hf_initialized = "mine", True
    model[0].weight.requires_grad_(False)
    runtime.optimize(model)
    layer = model[0]
    assert (layer.note, layer._is_hf_initialized, layer.in_features, layer.out_features) == ("mine", True, 8, 16)
    assert not layer.training and not layer.weight.requires_grad and layer.bias.requires_grad


def test_hooks_of_parents_and_of_swapped_layers_work(runtime: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    seen: list[str] = []
    model.register_forward_hook(lambda *_: seen.append("parent"))
    runtime.optimize(model)
    model[0].register_forward_hook(lambda *_: seen.append("layer"))
    model(x())
    assert seen == ["layer", "parent"]


def test_twice_and_by_two_tables(runtime: Any, route: Any) -> None:
    model = Mlp()
    runtime.optimize(model)
    layers = [model.up, model.down]
    assert runtime.optimize(model).swaps == ()
    assert route("linear", ("torch.addmm",), SHAPES).optimize(model).swapped == 0
    assert [model.up, model.down] == layers


def test_nothing_gained_nothing_swapped(route: Any) -> None:
    model = Mlp()
    report = route("linear", ("torch.linear",), SHAPES).optimize(model)
    assert "own kernel is the choice everywhere" in str(report) and report.swapped == 0
    assert type(model.up) is nn.Linear


def test_copies_and_pickles_of_models(runtime: Any) -> None:
    model = nn.Sequential(Pair(), nn.Linear(16, 8)).requires_grad_(False)
    runtime.optimize(model)
    wanted = model(x())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model[1].weight.zero_()
    assert torch.allclose(twin(x()), wanted) and not torch.allclose(model(x()), wanted)
    loaded = pickle.loads(pickle.dumps(twin))
    assert torch.allclose(loaded(x()), wanted, atol=1e-5)
    assert runtime.optimize(loaded).swapped == 2 and torch.allclose(loaded(x()), wanted, atol=1e-5)


def test_torchs_own_encoder_layer(runtime: Any) -> None:
    """Its fast path in evaluation reads weights of its layers without calling them."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    given = torch.randn(2, 4, 8)
    with torch.no_grad():
        wanted = model(given)
        runtime.optimize(model)
        assert isinstance(model.linear1, PreparedLinear)
        assert torch.allclose(model(given), wanted, atol=1e-5)
        model.train()
        assert model(given).shape == given.shape


def test_moving_a_whole_model(runtime: Any) -> None:
    model = Mlp().requires_grad_(False)
    runtime.optimize(model)
    model.to(torch.bfloat16)
    found = model(x().bfloat16())
    wanted = Mlp()
    wanted.load_state_dict(model.state_dict())
    assert torch.allclose(found, wanted.to(torch.bfloat16)(x().bfloat16()), atol=5e-2)
    assert hits(runtime) == 2
    model.double()
    assert model(x().double()).dtype == torch.float64 and fallbacks(runtime) == {"dtype": 2}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted(runtime: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    wanted = model(x())
    runtime.optimize(model)
    scripted = torch.jit.script(model)
    assert torch.allclose(scripted(x()), wanted) and list(scripted.state_dict()) == list(model.state_dict())
    assert runtime.optimize(model).swapped == 1, "scripting put the framework's layer back"


def test_compiled_whole(runtime: Any) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(Pair(), nn.Linear(16, 8))
    wanted = model(x())
    runtime.optimize(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x()), wanted, atol=1e-5)
    compiled(x()).sum().backward()
    assert model[0].dense.weight.grad is not None and set(fallbacks(runtime)) == {"compiling"}


def test_a_refused_table_swaps_nothing_and_warns(route: Any) -> None:
    runtime = route("linear", (PACKED,), SHAPES, refused="threads: 2 != 4")
    model = Mlp()
    with pytest.warns(RuntimeWarning, match="nothing optimized: threads: 2 != 4"):
        assert runtime.optimize(model).swaps == ()
    assert type(model.up) is nn.Linear
