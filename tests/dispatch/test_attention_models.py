"""Attention inside models of transformers: what the table serves, what stays theirs, and how such models travel."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from dks.dispatch.generation import Generation
from dks.dispatch.ops.attention import models
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import Group, Rule, Table
from tests.dispatch.test_attention import CAST, MATMUL, SDPA, SHAPES, D, H, assert_same, counts, heads


@pytest.fixture(scope="module")
def transformers() -> Any:
    found = pytest.importorskip("transformers")
    found.logging.set_verbosity_error()
    return found


def small(**options: Any) -> dict[str, Any]:
    shape = {"hidden_size": H * D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": H}
    return shape | {"vocab_size": 60, "max_position_embeddings": 64} | options


def bert(transformers: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**small(attn_implementation="sdpa", **options))
    return transformers.BertModel(config).eval()


def llama(transformers: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**small(attn_implementation="sdpa", **options))
    return transformers.LlamaForCausalLM(config).eval()


def tokens(b: int = 3, s: int = 9) -> torch.Tensor:
    return torch.randint(0, 60, (b, s), generator=torch.Generator().manual_seed(4))


def padding(b: int = 3, s: int = 9, left: bool = False) -> torch.Tensor:
    mask = torch.ones(b, s, dtype=torch.int64)
    mask[1, : s // 2] = 0
    mask[2, :1] = 0
    return mask if left else mask.flip(1)


@pytest.fixture(params=[(CAST,), (MATMUL, CAST)], ids=["cast", "matmul"])
def dispatching(route: Any, request: Any) -> Any:
    return route("attention", request.param, SHAPES)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_bert(transformers: Any, dispatching: Any, masked: bool) -> None:
    model = bert(transformers)
    mask = padding() if masked else None
    wanted = model(tokens(), attention_mask=mask).last_hidden_state
    ours = copy.deepcopy(model)
    report = dispatching.optimize(ours)
    assert report.swapped == 2 and "attention: its plain calls ask the table" in str(report)
    found = ours(tokens(), attention_mask=mask).last_hidden_state
    seen = wanted if mask is None else wanted[mask.bool()]
    assert_same(found if mask is None else found[mask.bool()], seen)
    assert counts(dispatching) == {"bin": 2}
    assert ours.config._attn_implementation == "sdpa", "masks are made by this name"
    assert dispatching.optimize(ours).swapped == 0, "a second time changes nothing"


def test_a_model_on_another_device_than_the_tables_keeps_its_attention(transformers: Any, route: Any) -> None:
    model = bert(transformers)
    swaps = route("attention", (CAST,), SHAPES, device="cuda").optimize(model).swaps
    notes = {(swap.done, swap.note) for swap in swaps if swap.op == "attention"}
    assert notes == {(False, "device: its parameters are on cpu, not cuda")}
    assert route("attention", (CAST,), SHAPES).optimize(model.to("meta")).swapped == 2, "its weights come later"


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_llama_generates_the_same_tokens(transformers: Any, route: Any, groups: int, masked: bool) -> None:
    """Exact kernels only: a cast could turn a tie between two tokens."""
    model = llama(transformers, num_key_value_heads=H // groups)
    mask = padding(left=True) if masked else None
    runtime = route("attention", (MATMUL, SDPA), SHAPES)
    ours = copy.deepcopy(model)
    assert runtime.optimize(ours).swapped == 2
    for cached in (True, False):
        options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, "use_cache": cached}
        wanted, found = (m.generate(tokens(), pad_token_id=0, **options) for m in (model, ours))
        assert torch.equal(found, wanted)
    logits = [m(tokens(), attention_mask=mask).logits for m in (model, ours)]
    seen = slice(None) if mask is None else mask.bool()
    assert torch.allclose(logits[0][seen], logits[1][seen], atol=1e-4)
    assert counts(runtime).get("bin", 0) + counts(runtime).get("exact", 0) > 0


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_llama_is_close_with_a_cast(transformers: Any, route: Any, masked: bool) -> None:
    model = llama(transformers, num_key_value_heads=2)
    mask = padding(left=True) if masked else None
    ours = copy.deepcopy(model)
    route("attention", (CAST,), SHAPES).optimize(ours)
    wanted, found = (m.model(tokens(), attention_mask=mask).last_hidden_state for m in (model, ours))
    seen = slice(None) if mask is None else mask.bool()
    assert_same(found[seen], wanted[seen], 6e-2)


def test_training_and_static_caches_and_compiling_keep_working(transformers: Any, dispatching: Any) -> None:
    model = llama(transformers)
    ours = copy.deepcopy(model)
    dispatching.optimize(ours)
    losses = [m.train()(tokens(), labels=tokens()).loss for m in (model, ours)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, atol=1e-5)
    assert torch.allclose(model.lm_head.weight.grad, ours.lm_head.weight.grad, atol=1e-5)
    with torch.no_grad():
        options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0, "cache_implementation": "static"}
        wanted, found = (m.eval().generate(tokens(), disable_compile=True, **options) for m in (model, ours))
        assert wanted.shape == found.shape
        torch._dynamo.reset()
        compiled = torch.compile(ours.model, backend="aot_eager", fullgraph=True)
        expected = ours.model(tokens(), use_cache=False).last_hidden_state
        served = counts(dispatching)["bin"]
        assert torch.allclose(compiled(tokens(), use_cache=False).last_hidden_state, expected, atol=1e-4)
    assert "gradient" in counts(dispatching) and counts(dispatching)["bin"] == served + 2


@torch.no_grad()
def test_a_model_inside_another_is_found(transformers: Any, dispatching: Any) -> None:
    wrapped = nn.ModuleDict({"encoder": bert(transformers), "head": nn.Linear(2, 2)})
    report = dispatching.optimize(wrapped)
    paths = [f"encoder.encoder.layer.{i}.attention.self" for i in range(2)]
    assert [(s.path, s.done) for s in report.swaps if s.op == "attention"] == [(path, True) for path in paths]
    wrapped["encoder"](tokens())
    assert counts(dispatching) == {"bin": 2}


def test_what_is_left_alone_says_why(transformers: Any, dispatching: Any, route: Any) -> None:
    eager = transformers.BertModel(transformers.BertConfig(**small(attn_implementation="eager")))
    assert "attention is 'eager', expected 'sdpa'" in str(dispatching.optimize(eager))
    two = bert(transformers, num_attention_heads=2)
    assert "2 heads are not in the table" in str(dispatching.optimize(two))
    default = route("attention", (SDPA,), SHAPES)
    assert "own kernel is the choice everywhere" in str(default.optimize(bert(transformers)))
    assert dispatching.optimize(nn.Linear(2, 2)).swapped == 0


@torch.no_grad()
def test_bert_with_everything_swapped(transformers: Any, route: Any) -> None:
    """All three operators at once, with the pair of the intermediate layer fused."""
    shapes = [{"n": n, "k": k} for n in (32, 48) for k in (32, 48)]
    parts = [
        route("attention", (CAST,), SHAPES[:1]).generation.table,
        route("layer_norm", ("torch.native_layer_norm",), [{"n": H * D}]).generation.table,
        route("linear", ("mkldnn.linear_packed",), shapes).generation.table,
    ]
    rules: list[Rule] = []
    groups: list[Group] = []
    for part in parts:
        shift = len(rules)
        rules += part.rules
        for g in part.groups:
            cells = {align: tuple(c + shift for c in row) for align, row in g.cells.items()}
            groups.append(Group(g.op, g.form, g.traits, g.statics, g.edges, cells))
    runtime = Runtime("all", Generation(Table(tuple(rules), tuple(groups))))
    model = bert(transformers)
    wanted = model(tokens(), attention_mask=padding())
    keys = list(model.state_dict())
    report = runtime.optimize(model)
    assert list(model.state_dict()) == keys
    # 2 layers of 6 linears, the pooler, 2 layers of 2 norms, the embeddings' norm, the attention of 2 layers.
    assert report.swapped == 2 * 6 + 1 + 2 * 2 + 1 + 2, str(report)
    assert sum("gelu" in s.note for s in report.swaps) == 2, str(report)
    found = model(tokens(), attention_mask=padding())
    seen = padding().bool()
    assert_same(found.last_hidden_state[seen], wanted.last_hidden_state[seen])
    assert_same(found.pooler_output, wanted.pooler_output)
    ops = runtime.stats()["ops"]
    # The pooler reads the first token of each row of tokens: a strided view.
    assert [ops[op]["fallbacks"] for op in ("attention", "layer_norm", "linear")] == [{}, {}, {"strides": 1}]
    assert ops["linear"]["hits"] == {"bin": 12}


# -- what is not plain attention is the model's own ----------------------------------------------------


class Recorder:
    """Stands for transformers' function: what it was called with, and a result of its own."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def function(self) -> Callable[..., Any]:
        def sdpa(*given: Any, **named: Any) -> Any:
            self.calls.append((given, named))
            return "its own", "and more"

        return sdpa


class NewAttention(nn.Module):
    """An attention of a later day, which passes something that nobody knows."""

    def __init__(self, config: Any, **more: Any) -> None:
        super().__init__()
        self.config, self.more = config, more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from transformers import AttentionInterface

        attention = AttentionInterface()[self.config._attn_implementation]
        y: torch.Tensor = attention(self, x, x, x, None, is_causal=False, **self.more)[0]
        return y


@torch.no_grad()
def test_a_new_attention_is_marked_and_its_calls_are_counted(transformers: Any, route: Any) -> None:
    runtime, x = route("attention", (CAST,), SHAPES), heads(2, 5)
    config = transformers.BertConfig(**small(attn_implementation="sdpa"))
    model = nn.ModuleDict({"new": NewAttention(config, temperature=2.0), "plain": NewAttention(config)})
    wanted = model["new"](x)
    assert [(swap.path, swap.done) for swap in runtime.optimize(model).swaps] == [("new", True), ("plain", True)]
    assert torch.equal(model["new"](x), wanted) and counts(runtime) == {"argument": 1}
    assert_same(model["plain"](x), wanted)
    assert counts(runtime) == {"argument": 1, "bin": 1}


def marked(runtime: Runtime, **attributes: Any) -> nn.Module:
    module = nn.Identity()
    module.__dict__.update(attributes, **{models.MARK: models.Mark(runtime.server("attention"))})
    return module


UNKNOWN: dict[str, dict[str, Any]] = {
    "indices": {"indices": torch.zeros(2, 5, 3, dtype=torch.int32)},
    "sinks": {"s_aux": torch.zeros(H)},
    "a window": {"sliding_window": 3},
    "a window that is no number": {"sliding_window": (2, 2)},
    "a cap": {"softcap": 30.0},
    "a bias": {"position_bias": torch.zeros(1, H, 5, 5)},
    "a cache": {"cache": object()},
    "weights": {"output_attentions": True},
    "something of later": {"temperature": 2.0},
    "something false of later": {"normalize": False},
    "one known and one not": {"use_cache": True, "temperature": 2.0},
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_argument_that_nobody_here_knows_makes_the_call_the_models_own(route: Any, case: str) -> None:
    runtime, recorder = route("attention", (CAST,), SHAPES), Recorder()
    attend = models._attend_or(recorder.function())
    module, (q, k, v) = marked(runtime), (heads(2, 5) for _ in range(3))
    assert attend(module, q, k, v, None, scaling=0.5, **UNKNOWN[case]) == ("its own", "and more")
    ((given, named),) = recorder.calls
    assert given[:5] == (module, q, k, v, None) and given[5:] == (0.0, 0.5, None)
    assert named == UNKNOWN[case] and counts(runtime) == {"argument": 1}
    assert attend(module, q, k, v, None, 0.0, None, None, "an eighth") == ("its own", "and more")
    assert recorder.calls[1][0][8:] == ("an eighth",) and counts(runtime) == {"argument": 2}


KNOWN: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "None": {"indices": None, "s_aux": None, "sliding_window": None, "something of later": None},
    "a window that hides nothing": {"sliding_window": 5},
    "bookkeeping": {"position_ids": torch.arange(5), "use_cache": True, "output_attentions": False},
}


@pytest.mark.parametrize("case", KNOWN)
def test_arguments_that_leave_it_plain_attention_are_served(transformers: Any, route: Any, case: str) -> None:
    runtime, recorder = route("attention", (CAST,), SHAPES), Recorder()
    attend = models._attend_or(recorder.function())
    q, k, v = (heads(2, 5) for _ in range(3))
    y, weights = attend(marked(runtime), q, k, v, None, **KNOWN[case])
    plain = transformers.integrations.sdpa_attention.sdpa_attention_forward
    assert_same(y, plain(marked(runtime), q, k, v, None)[0])
    assert y.is_contiguous() and weights is None and recorder.calls == [] and counts(runtime) == {"bin": 1}


def test_what_a_later_transformers_reads_is_no_bookkeeping(route: Any) -> None:
    runtime = route("attention", (CAST,), SHAPES)

    def by_name(*_: Any, position_ids: Any = None, **_more: Any) -> Any:
        return position_ids

    def by_key(*_: Any, **named: Any) -> Any:
        return named.get("position_ids")

    for original in (by_name, by_key):
        attend = models._attend_or(original)
        assert attend(marked(runtime), *(heads(2, 5) for _ in range(3)), None, position_ids=7) == 7
    assert counts(runtime) == {"argument": 2}


@pytest.mark.parametrize("case", ["uneven heads", "more keys", "mask of two dims"])
def test_what_its_arguments_do_not_say_is_the_models_own(route: Any, case: str) -> None:
    runtime, recorder = route("attention", (CAST,), SHAPES), Recorder()
    q, k, mask = heads(2, 5), heads(2, 7 if case == "more keys" else 5, 2 if case == "uneven heads" else H), None
    if case == "mask of two dims":
        mask = torch.ones(5, 5, dtype=torch.bool)
    assert models._attend_or(recorder.function())(marked(runtime), q, k, k, mask) == ("its own", "and more")
    assert len(recorder.calls) == 1 and counts(runtime) == {"special": 1}


def test_a_table_without_the_shape_leaves_the_result_as_it_is(route: Any) -> None:
    runtime, recorder = route("attention", (CAST,), SHAPES), Recorder()
    q, k, v = (heads(2, 5, h=3) for _ in range(3))
    assert models._attend_or(recorder.function())(marked(runtime), q, k, v, None) == ("its own", "and more")
    assert counts(runtime) == {"unknown_shape": 1}


@torch.no_grad()
def test_sparse_indices_of_deepseek(transformers: Any, dispatching: Any) -> None:
    """For any attention that is not named sdpa or eager the model hands its selection on, and masks nothing."""
    architectures = pytest.importorskip("tests.dispatch.architectures")
    if ("causal", "deepseek_v32") not in architectures.ARCHITECTURES:
        pytest.skip("this transformers has no DeepSeek V3.2")
    model = architectures.tiny("causal", "deepseek_v32")
    ours = copy.deepcopy(model)
    assert any(swap.done for swap in dispatching.optimize(ours).swaps if swap.op == "attention")
    for length in (2, 24):
        ids = tokens(2, length)
        assert torch.allclose(ours(ids).logits, model(ids).logits, rtol=1e-2, atol=1e-2)
    assert sum(counts(dispatching).values()) == 4


# -- whose attention it is -----------------------------------------------------------------------------


@torch.no_grad()
def test_other_models_of_the_process_stay_plain(transformers: Any, route: Any) -> None:
    first, second = (Runtime(name, route("attention", (CAST,), SHAPES).generation) for name in ("first", "second"))
    one, two, plain = (bert(transformers) for _ in range(3))
    assert first.optimize(one).swapped == second.optimize(two).swapped == 2
    for model in (one, two, two, plain):
        model(tokens())
    assert counts(first) == {"bin": 2} and counts(second) == {"bin": 4}
    assert "asks the table 'first' already" in str(second.optimize(one))
    assert first.server("attention").restore(two) == []
    paths = [f"encoder.layer.{i}.attention.self" for i in range(2)]
    assert [swap.path for swap in first.server("attention").restore(one) if swap.done] == paths
    one(tokens())
    assert counts(first) == {"bin": 2} and second.optimize(one).swapped == 2


def test_a_function_of_somebody_else_is_not_replaced(
    transformers: Any, dispatching: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = transformers.AttentionInterface._global_mapping

    def theirs(*_: Any) -> Any: ...

    monkeypatch.setitem(registered, "sdpa", theirs)
    note = f"'sdpa' is registered as {__name__}.{theirs.__qualname__}, expected transformers' own"
    assert note in str(dispatching.optimize(bert(transformers))) and registered["sdpa"] is theirs


def test_a_function_of_another_form_is_not_replaced(
    transformers: Any, dispatching: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sdpa(module: Any, query: Any, key: Any, value: Any, mask: Any, scale: float = 1.0) -> Any: ...

    sdpa.__module__ = "transformers.integrations.sdpa_attention"
    sdpa.__qualname__ = "sdpa_attention_forward"
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "sdpa", sdpa)
    report = str(dispatching.optimize(bert(transformers)))
    assert "transformers' sdpa takes module, query, key, value, mask, scale, expected module, query" in report


def test_a_model_that_asks_no_registry_says_so(transformers: Any, dispatching: Any) -> None:
    config = transformers.XLNetConfig(d_model=H * D, n_head=H, d_inner=48, n_layer=1, vocab_size=60)
    note = "the model does not take its attention from the registry"
    swaps = dispatching.optimize(nn.ModuleDict({"inner": transformers.XLNetModel(config)})).swaps
    left = {s.path: s.note for s in swaps if s.op == "attention" and not s.done}
    assert left["inner"] == note and "takes no attention by name" in left["inner.layer.0.rel_attn"]
    assert not any(s.done for s in swaps)


# -- models that travel --------------------------------------------------------------------------------

WITHOUT_DKS = "import sys; sys.modules['dks'] = None"


@torch.no_grad()
def test_spawned_workers_and_saved_files_need_no_dks(transformers: Any, route: Any, tmp_path: Path) -> None:
    runtime = route("attention", (CAST,), SHAPES)
    model = bert(transformers).requires_grad_(False)  # no gradient crosses processes
    wanted = model(tokens()).last_hidden_state
    runtime.optimize(model)
    torch.save(model, tmp_path / "model.pt")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=exec, initargs=(WITHOUT_DKS,)) as worker:
        sent = worker.submit(partial(model, tokens())).result(timeout=300)
        loaded = worker.submit(partial(torch.load, tmp_path / "model.pt", weights_only=False)).result(timeout=300)
    assert_same(sent.last_hidden_state, wanted, 1e-5)
    assert_same(loaded(tokens()).last_hidden_state, wanted, 1e-5)
    assert counts(runtime) == {}, "a model that travelled is a plain one"


@torch.no_grad()
def test_a_copy_is_plain_and_can_be_optimized_again(transformers: Any, dispatching: Any) -> None:
    model = bert(transformers)
    wanted = model(tokens()).last_hidden_state
    dispatching.optimize(model)
    copied = copy.deepcopy(model)
    assert_same(copied(tokens()).last_hidden_state, wanted, 1e-5)
    assert counts(dispatching) == {}
    assert dispatching.optimize(copied).swapped == 2 and dispatching.optimize(model).swapped == 0
    assert_same(copied(tokens()).last_hidden_state, wanted)
    assert counts(dispatching) == {"bin": 2}


@torch.no_grad()
def test_save_pretrained_keeps_what_the_plain_model_would(
    transformers: Any, dispatching: Any, tmp_path: Path
) -> None:
    model = bert(transformers)
    model.save_pretrained(tmp_path / "plain")
    wanted = model(tokens()).last_hidden_state
    dispatching.optimize(model)
    model.save_pretrained(tmp_path / "ours")
    config = [(tmp_path / name / "config.json").read_text() for name in ("plain", "ours")]
    assert config[0] == config[1]
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    assert_same(loaded(tokens()).last_hidden_state, wanted, 1e-5)
    assert counts(dispatching) == {}


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_trace_holds_the_frameworks_operators(transformers: Any, dispatching: Any) -> None:
    model = bert(transformers, return_dict=False)
    dispatching.optimize(model)
    traced = torch.jit.trace(model, tokens(), check_trace=False)
    assert "scaled_dot_product_attention" in str(traced.inlined_graph) and "dks" not in str(traced.inlined_graph)
    assert_same(traced(tokens())[0], model(tokens())[0])


@torch.no_grad()
def test_one_compilation_for_any_number_of_reloads(transformers: Any, route: Any) -> None:
    torch._dynamo.reset()
    table = route("attention", (MATMUL, CAST), SHAPES).generation.table
    runtime = Runtime("reloaded", Generation(table), lambda _: Generation(table))
    model = bert(transformers)
    wanted = model(tokens()).last_hidden_state
    runtime.optimize(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for i in range(10):
        assert_same(compiled(tokens()).last_hidden_state, wanted)
        assert counts(runtime) == {"bin": 2 * (i + 1)}
        runtime.reload("anything")
    assert counter.frame_count == 1
    runtime.server("attention").restore(model)
    assert_same(compiled(tokens()).last_hidden_state, wanted, 1e-5)
    assert counts(runtime) == {"bin": 20}, "a graph follows what its model asks"
