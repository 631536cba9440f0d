"""What ``optimize`` says of a model: each module that the table has an operator for is swapped, or named."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from dks.dispatch.generation import Generation
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import Group, Rule, Table

transformers = pytest.importorskip("transformers")

N, WIDE = 32, 64
HEADS = {"h": 2, "hkv": 2, "d": 16}
ROUTES: dict[str, tuple[tuple[str, ...], list[dict[str, int]]]] = {
    "linear": (("mkldnn.linear_packed",), [{"n": n, "k": k} for n in (N, WIDE) for k in (N, WIDE)]),
    "layer_norm": (("torch.native_layer_norm",), [{"n": N}]),
    "rms_norm": (("torch.rms_vector_norm", "torch.rms_norm_wide_weight"), [{"n": N}]),
    "softmax": (("torch.softmax",), [{}]),
    "attention": (("torch.matmul_attention",), [HEADS]),
    "silu_and_mul": (("torch.silu_and_mul",), [{"n": WIDE}]),
    "rotary": (("torch.rotary",), [HEADS]),
    "cross_entropy": (("torch.cross_entropy",), [{"n": WIDE}]),
}


@pytest.fixture
def runtime(route: Any) -> Runtime:
    return made(route, *ROUTES)


def made(route: Any, *ops: str) -> Runtime:
    """A runtime with one table of these operators."""
    rules: list[Rule] = []
    groups: list[Group] = []
    for op in ops:
        part = route(op, *ROUTES[op]).generation.table
        for g in part.groups:
            cells = {align: tuple(rule + len(rules) for rule in row) for align, row in g.cells.items()}
            groups.append(Group(g.op, g.form, g.traits, g.statics, g.edges, cells))
        rules += part.rules
    return Runtime("tiny", Generation(Table(tuple(rules), tuple(groups))))


def notes(runtime: Runtime, model: nn.Module) -> dict[str, tuple[str, bool, str]]:
    return {swap.path: (swap.op, swap.done, swap.note) for swap in runtime.optimize(model).swaps}


def hits(runtime: Runtime, op: str) -> int:
    return sum(runtime.stats()["ops"].get(op, {"hits": {}})["hits"].values())


SMALL = {
    "hidden_size": N, "intermediate_size": WIDE, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": WIDE, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
T5 = {
    "d_model": N, "d_kv": 16, "d_ff": WIDE, "num_layers": 1, "num_heads": 2, "vocab_size": WIDE,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SMALL),
    "gemma": ("GemmaForCausalLM", SMALL | {"head_dim": 16}),
    "gpt2": ("GPT2LMHeadModel", SMALL),
    "bert": ("BertModel", SMALL),
    "t5": ("T5ForConditionalGeneration", T5),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_module_is_swapped_or_named(runtime: Runtime, name: str) -> None:
    torch.manual_seed(0)
    kind, options = MODELS[name]
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**options)).eval()
    ids = torch.arange(3, 17).view(2, 7)
    more = {"decoder_input_ids": ids} if name == "t5" else {}
    with torch.no_grad():
        wanted = model(ids, **more)[0]
        said = notes(runtime, model)
        found = model(ids, **more)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    looks = re.compile("Norm|Linear|Softmax|Conv1D")
    modules = {path: type(m).__name__ for path, m in model.named_modules() if looks.search(type(m).__name__)}
    assert modules and not {*modules} - {*said}
    done = {kind: {said[path][1] for path, of in modules.items() if of == kind} for kind in {*modules.values()}}
    assert done == {kind: {kind not in ("GemmaRMSNorm", "Conv1D")} for kind in done}
    assert len(str(runtime.optimize(model)).splitlines()) <= 10, "grouped"


class Llama(nn.Module):
    """As Llama has it: rounds before it multiplies by the weight."""

    def __init__(self, n: int = N, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(n)), eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


def norm(name: str, forward: Callable[..., Any], **attributes: Any) -> nn.Module:
    """An instance of a class of its own, of that name and ``forward``."""

    def init(self: Any) -> None:
        nn.Module.__init__(self)
        own = {"weight": nn.Parameter(torch.ones(N)), "eps": 1e-6, **attributes}
        for key, value in own.items():
            setattr(self, key, value)

    made: nn.Module = type(name, (nn.Module,), {"__init__": init, "forward": forward})()
    return made


def rms(x: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6) -> torch.Tensor:
    return F.rms_norm(x, (N,), weight, eps)


SWAPPED: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "Llama's": ("rms_norm", Llama),
    "one that goes by another name": ("rms_norm", lambda: norm("Scale", lambda s, x: rms(x, s.weight, s.eps))),
    "with its size beside it": ("rms_norm", lambda: norm("RMSNorm", lambda s, x: rms(x, s.weight, s.eps), dim=N)),
    "a layer norm": (
        "layer_norm",
        lambda: norm(
            "BertLayerNorm",
            lambda s, x: F.layer_norm(x, (N,), s.weight, s.bias, s.eps),
            bias=nn.Parameter(torch.ones(N)),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SWAPPED)
def test_norms_are_found_by_what_they_compute(runtime: Runtime, case: str) -> None:
    op, make = SWAPPED[case]
    model = nn.Sequential(make()).eval().requires_grad_(False)
    nn.init.normal_(model[0].weight)
    x = torch.randn(3, N)
    wanted, kind = model(x), type(model[0])
    assert notes(runtime, model)["0"][:2] == (op, True)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    assert hits(runtime, op) == 1 and isinstance(model[0], kind)
    assert runtime.restore(model).swapped == 1 and type(model[0]) is kind


def test_what_no_kernel_serves_is_the_modules_own(runtime: Runtime) -> None:
    model, plain = (nn.Sequential(Llama()).eval().requires_grad_(False) for _ in range(2))
    assert runtime.optimize(model).swapped == 1
    x = torch.randn(3, N)
    half = x.bfloat16()
    assert torch.equal(model(half), plain(half)) and model(half).dtype == torch.float32
    with torch.autocast("cpu"):
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model[0](hidden_states=half), plain[0](hidden_states=half))
    torch.testing.assert_close(model[0](hidden_states=x), plain(x))
    assert hits(runtime, "rms_norm") == 1
    for wrong in ({"input": x}, {}):
        with pytest.raises(TypeError, match="forward"):
            model[0](**wrong)
    model[0].variance_epsilon = plain[0].variance_epsilon = 10.0
    torch.testing.assert_close(model(x), plain(x))
    gradient = x.clone().requires_grad_()
    assert torch.equal(model(gradient), plain(gradient)) and model(gradient).requires_grad


def test_bf16_differs_by_no_more_than_rounding(runtime: Runtime) -> None:
    """Llama's rounds twice, a kernel once: it is no further from the exact result."""
    model = nn.Sequential(Llama()).eval().requires_grad_(False)
    nn.init.normal_(model[0].weight)
    model.bfloat16()
    x = torch.randn(64, N).bfloat16()
    plain = model(x).double()
    wanted = rms(x.double(), model[0].weight.double(), 1e-5)
    assert runtime.optimize(model).swapped == 1
    served = model(x).double()
    assert hits(runtime, "rms_norm") == 1
    assert ((served - wanted).abs() / wanted.abs()).max() <= ((plain - wanted).abs() / wanted.abs()).max()


def test_pytorchs_own_kernel_is_a_gain_over_another_class(route: Any) -> None:
    runtime = route("rms_norm", ("torch.rms_norm",), [{"n": N}])
    model = nn.Sequential(Llama(), nn.RMSNorm(N)).eval().requires_grad_(False)
    said = notes(runtime, model)
    assert said["0"][1] and "choice everywhere" in said["1"][2]
    model(torch.randn(3, N))
    assert hits(runtime, "rms_norm") == 1


def test_such_norms_copy_travel_and_compile(runtime: Runtime) -> None:
    model = nn.Sequential(Llama(), nn.Linear(N, N)).eval().requires_grad_(False)
    x = torch.randn(3, N)
    wanted = model(x)
    assert runtime.optimize(model).swapped == 2
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted)
    assert hits(runtime, "rms_norm") == 1
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    for twin in (copy.deepcopy(model), torch.load(kept, weights_only=False)):
        assert type(twin[0]) is Llama
        assert torch.equal(twin(x), wanted)


SOMETHING_ELSE = "computes something else"


def parametrized(module: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    return module


def test_a_compiled_transformer_outlives_reloads(route: Any) -> None:
    torch._dynamo.reset()
    first, empty = made(route, *ROUTES).generation, Generation()
    runtime = Runtime("tiny", first, lambda path: first if path.name == "first" else empty)
    model = transformers.BertModel(transformers.BertConfig(**SMALL)).eval().requires_grad_(False)
    ids = torch.arange(3, 17).view(2, 7)
    assert runtime.optimize(model).swapped > 5
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        wanted = compiled(ids)[0]
        graphs = counter.frame_count
        for name in ("empty", "first") * 5:
            runtime.reload(name)
            before = hits(runtime, "attention")
            torch.testing.assert_close(compiled(ids)[0], wanted, rtol=1e-4, atol=1e-4)
            assert hits(runtime, "attention") - before == (name == "first")
    assert counter.frame_count == graphs


def gated(s: Any, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    return rms(x, s.weight, s.eps) if gate is None else rms(x, s.weight, s.eps) * gate


def with_state(s: Any, x: torch.Tensor) -> torch.Tensor:
    return rms(x, s.weight, s.eps) * (2 if s.twice else 1)


LEFT: dict[str, tuple[str, str, Callable[[], nn.Module]]] = {
    "one plus the weight": (
        "rms_norm", SOMETHING_ELSE, lambda: norm("GemmaRMSNorm", lambda s, x: rms(x, 1 + s.weight, s.eps))
    ),
    "an epsilon that is not used": (
        "rms_norm", SOMETHING_ELSE, lambda: norm("RMSNorm", lambda s, x: rms(x, s.weight, 1e-3))
    ),
    "training alone differs": (
        "rms_norm", SOMETHING_ELSE,
        lambda: norm("RMSNorm", lambda s, x: rms(x, s.weight, s.eps) * (1.5 if s.training else 1)),
    ),
    "another dtype": (
        "rms_norm", SOMETHING_ELSE, lambda: norm("RMSNorm", lambda s, x: rms(x, s.weight, s.eps).double())
    ),
    "in place": (
        "rms_norm", SOMETHING_ELSE, lambda: norm("RMSNorm", lambda s, x: x.copy_(rms(x, s.weight, s.eps)))
    ),
    "it raises": ("rms_norm", "raised ZeroDivisionError", lambda: norm("RMSNorm", lambda s, x: 1 // 0)),
    "a gate": ("rms_norm", "takes more than one argument", lambda: norm("GatedRMSNorm", gated)),
    "a switch": ("rms_norm", "holds twice", lambda: norm("RMSNorm", with_state, twice=False)),
    "a private switch": ("rms_norm", "holds _twice", lambda: norm("RMSNorm", gated, _twice=False)),
    "no epsilon": ("rms_norm", "has no epsilon", lambda: norm("RMSNorm", lambda s, x: rms(x, s.weight), eps="")),
    "no weight": (
        "rms_norm", "holds more than a weight", lambda: norm("L2RMSNorm", lambda s, x: rms(x, None), weight=None)
    ),
    "a layer norm without a bias": ("layer_norm", "has no weight or no bias", lambda: nn.LayerNorm(N, bias=False)),
    "a norm over two dims": ("layer_norm", "normalises over", lambda: nn.LayerNorm((2, N))),
    "a norm's subclass": ("layer_norm", "is a subclass", lambda: type("Fp32LayerNorm", (nn.LayerNorm,), {})(N)),
    "a parametrized norm": (
        "rms_norm", "ParametrizedRMSNorm is a subclass",
        lambda: parametrized(nn.RMSNorm(N)),
    ),
    "a linear's subclass": ("linear", "is a subclass", lambda: type("Lora", (nn.Linear,), {})(N, N)),
    "a parametrized linear": (
        "linear", "ParametrizedLinear is a subclass",
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(N, N)),
    ),
    "a lazy linear": ("linear", "LazyLinear is a subclass", lambda: nn.LazyLinear(N)),
    "a linear of another kind": ("linear", "expected nn.Linear", lambda: norm("BitLinear", lambda s, x: x)),
    "torch's attention": ("attention", "tiny.attention", lambda: nn.MultiheadAttention(N, 2)),
    "torch's encoder": ("linear", "past the modules in it", lambda: nn.TransformerEncoderLayer(N, 2, WIDE)),
    "a softmax": ("softmax", "tiny.softmax", lambda: nn.Softmax(-1)),
    "a loss": ("cross_entropy", "tiny.cross_entropy", nn.CrossEntropyLoss),
    "an attention by hand": ("attention", "tiny.attention", lambda: norm("SelfAttention", lambda s, x: x)),
    "a rotation": ("rotary", "tiny.rotary", lambda: norm("RotaryEmbedding", lambda s, x: x)),
    "a gated MLP": ("silu_and_mul", "tiny.silu_and_mul", lambda: norm("SwiGLU", lambda s, x: x)),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_a_module_that_is_left_has_its_reason(runtime: Runtime, case: str) -> None:
    op, reason, make = LEFT[case]
    model = nn.ModuleDict({"it": make()}).eval()
    kind = type(model["it"])
    found_op, done, note = notes(runtime, model)["it"]
    assert (found_op, done) == (op, False) and reason in note, note
    assert type(model["it"]) is kind
    alone = make().eval()
    kind = type(alone)
    assert reason in str(runtime.optimize(alone)) and type(alone) is kind


def test_nothing_is_said_of_what_the_table_does_not_hold(route: Any) -> None:
    runtime = made(route, "linear")
    others = (nn.Softmax(-1), nn.CrossEntropyLoss(), Llama(), norm("RotaryEmbedding", lambda s, x: x))
    model = nn.Sequential(*others, nn.BatchNorm1d(N), nn.GroupNorm(2, N), nn.ReLU(), nn.Embedding(N, N)).eval()
    assert notes(runtime, model) == {}
    everything = made(route, *ROUTES)
    assert {*notes(everything, model)} == {"0", "1", "2", "3"}
