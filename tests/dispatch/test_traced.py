"""``torch.compile`` and ``torch.export``: graphs hold the table's operators, and ask the table when they run."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from dks.dispatch import traced
from dks.dispatch.generation import Generation
from dks.dispatch.ops.attention.traced import ATTENTION
from dks.dispatch.ops.cross_entropy.traced import CROSS_ENTROPY
from dks.dispatch.ops.layer_norm.traced import LAYER_NORM
from dks.dispatch.ops.linear.traced import LINEAR
from dks.dispatch.ops.paged_attention.traced import PAGED_ATTENTION
from dks.dispatch.ops.rms_norm.traced import ADD_RMS_NORM, RMS_NORM
from dks.dispatch.ops.rotary.traced import ROTARY
from dks.dispatch.ops.silu_and_mul.traced import SILU_AND_MUL
from dks.dispatch.ops.softmax.traced import SOFTMAX
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import Group, Rule, Table

NAME = "traced_here"
H, D, N, WIDE, S = 2, 8, 16, 32, 4  # heads, their size, both; the inner size; tokens a sequence
HEADS = {"h": H, "hkv": H, "d": D}
PACKED = "mkldnn.linear_packed"
ROUTES: dict[str, tuple[tuple[str, ...], list[dict[str, int]]]] = {
    "linear": ((PACKED, "torch.addmm", "torch.linear"), [{"n": n, "k": k} for n in (N, WIDE) for k in (N, WIDE)]),
    "layer_norm": (("torch.layer_norm_wide_affine", "torch.native_layer_norm"), [{"n": N}]),
    "rms_norm": (("torch.rms_vector_norm",), [{"n": N}]),
    "softmax": (("torch.softmax",), [{}]),
    "attention": (("torch.matmul_attention", "torch.sdpa"), [HEADS]),
    "paged_attention": (("torch.paged_loop_sdpa",), [HEADS | {"page": 4}]),
    "silu_and_mul": (("torch.silu_and_mul",), [{"n": N}]),
    "rotary": (("torch.rotary",), [HEADS]),
    "cross_entropy": (("torch.cross_entropy",), [{"n": N}]),
}


def table(route: Any) -> Table:
    """One table of all operators, for batches up to 128 and more."""
    rules: list[Rule] = []
    groups: list[Group] = []
    for op, (candidates, shapes) in ROUTES.items():
        part = route(op, candidates, shapes).generation.table
        for g in part.groups:
            cells = {align: tuple(rule + len(rules) for rule in row) for align, row in g.cells.items()}
            edges = tuple((*few[:-1], 128) for few in g.edges)
            groups.append(Group(g.op, g.form, g.traits, g.statics, edges, cells))
        rules += part.rules
    return Table(tuple(rules), tuple(groups))


@pytest.fixture
def runtime(route: Any) -> Runtime:
    torch._dynamo.reset()
    return Runtime(NAME, Generation(table(route)))


def hits(runtime: Runtime) -> dict[str, int]:
    """Calls that the table served, by operator."""
    return {op: sum(found["hits"].values()) for op, found in runtime.stats()["ops"].items() if found["hits"]}


def fallbacks(runtime: Runtime) -> dict[str, int]:
    seen: dict[str, int] = {}
    for found in runtime.stats()["ops"].values():
        for reason, n in found["fallbacks"].items():
            seen[reason] = seen.get(reason, 0) + n
    return seen


class Block(nn.Module):
    """A small transformer's block, all of whose operators ask a table by name: linears with every kind of
    epilogue, both norms, attention, and a softmax over the features."""

    def __init__(self, runtime: Any) -> None:
        super().__init__()
        linear, torch_linear = runtime.server("linear").prepare, nn.Linear(N, 3 * N)
        self.attend, self.softmax = runtime.server("attention").call, runtime.server("softmax").call
        self.inputs = nn.ModuleList(linear(nn.Linear(N, N).weight, torch_linear.bias[:N]) for _ in range(3))
        self.norm = runtime.server("layer_norm").prepare(torch.rand(N) + 0.5, torch.randn(N))
        self.rms = runtime.server("rms_norm").prepare(torch.rand(N) + 0.5, 1e-6)
        self.up = linear(torch.randn(WIDE, N), torch.randn(WIDE), "gelu")
        self.down = linear(torch.randn(N, WIDE), torch.randn(N), "add")
        self.plain = runtime.server("linear").call
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], H, D).transpose(1, 2) for layer in self.inputs)
        y = self.norm(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))
        y, total = self.rms(y, x)
        y = self.rms(self.down(self.up(y), total))
        return self.softmax(self.plain(y, self.inputs[0].weight, None, "silu"))


CALLS = {"linear": 6, "layer_norm": 1, "rms_norm": 2, "softmax": 1, "attention": 1}
OPERATORS = {LINEAR, LAYER_NORM, RMS_NORM, ADD_RMS_NORM, SOFTMAX, ATTENTION}


def tokens(b: int) -> torch.Tensor:
    return torch.randn(b, S, N, generator=torch.Generator().manual_seed(b))


def operators(graph: torch.fx.GraphModule) -> set[Any]:
    return {node.target for node in graph.graph.nodes if node.op == "call_function"}


def test_one_graph_serves_every_batch(runtime: Runtime) -> None:
    model = Block(runtime)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batches = [*range(2, 26), 7, 2]
    for i, b in enumerate(batches):
        x = tokens(b)
        if i == 0:
            torch._dynamo.mark_dynamic(x, 0)
        found = compiled(x)
        assert hits(runtime) == {op: n * (2 * i + 1) for op, n in CALLS.items()}, "all are served in the graph"
        wanted = model(x)
        assert torch.equal(found, wanted), b
    assert counter.frame_count == 1, "one compilation for all batches"
    assert operators(counter.graphs[0]) >= OPERATORS and fallbacks(runtime) == {}


def test_inductor(runtime: Runtime) -> None:
    model = Block(runtime)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for b in (3, 8):
        assert torch.allclose(compiled(tokens(b)), model(tokens(b)), atol=1e-6)
    assert hits(runtime) == {op: 4 * n for op, n in CALLS.items()} and fallbacks(runtime) == {}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down, self.norm = nn.Linear(N, WIDE), nn.GELU(), nn.Linear(WIDE, N), nn.LayerNorm(N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.down(self.act(self.up(x))))


def test_optimize_then_compile(runtime: Runtime) -> None:
    model = Mlp().eval()
    x = tokens(3)
    with torch.no_grad():
        wanted = model(x)
        assert runtime.optimize(model).swapped == 3
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), wanted, atol=1e-5)
        assert hits(runtime) == {"linear": 2, "layer_norm": 1}


def test_packed_weights_serve_and_changes_are_noticed(route: Any) -> None:
    torch._dynamo.reset()
    runtime = route("linear", (PACKED,), [{"n": WIDE, "k": N}])  # which no call without preparation can use
    layer = runtime.server("linear").prepare(torch.randn(WIDE, N))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = tokens(2)
    assert torch.equal(compiled(x), layer(x))
    with torch.no_grad():
        layer.weight.mul_(2)
        assert torch.allclose(compiled(x), F.linear(x, layer.weight), atol=1e-5)
        assert fallbacks(runtime) == {"weight_changed": 1}
        layer.refresh()
        assert torch.allclose(compiled(x), F.linear(x, layer.weight), atol=1e-5)
        layer.load_state_dict({"weight": torch.randn(WIDE, N)})
        assert torch.allclose(compiled(x), F.linear(x, layer.weight), atol=1e-5)
    assert hits(runtime) == {"linear": 4}


def test_tables_do_not_mix(runtime: Runtime, route: Any) -> None:
    other = Runtime("other_table", Generation(table(route)))
    layer, call = runtime.server("linear").prepare(torch.randn(WIDE, N)), other.server("linear").call
    x = tokens(2)

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return layer(x), call(x, layer.weight)

    torch.compile(both, backend="aot_eager", fullgraph=True)(x)
    assert hits(runtime) == hits(other) == {"linear": 1}


def test_a_layer_is_found_by_its_very_parameters(runtime: Runtime) -> None:
    weight, bias = nn.Parameter(torch.randn(WIDE, N), False), nn.Parameter(torch.randn(WIDE), False)
    prepare = runtime.server("linear").prepare
    relu, plain = prepare(weight, bias, "relu"), prepare(weight, bias)
    ask = (NAME, "linear")
    assert traced.layer_for(*ask, weight, bias, "relu") is relu
    assert traced.layer_for(*ask, weight, bias, "none") is plain
    assert traced.layer_for(*ask, weight.detach(), bias.detach(), "none") is plain
    assert traced.layer_for(*ask, weight, None, "none") is None
    assert traced.layer_for(*ask, weight[:4], bias, "none") is None
    assert traced.layer_for("another", "linear", weight, bias, "none") is None
    plain.weight = nn.Parameter(torch.randn(WIDE, N))
    assert traced.layer_for(*ask, weight, bias, "none") is None, "it has other parameters by now"
    del relu
    assert traced.layer_for(*ask, weight, bias, "relu") is None


@pytest.mark.parametrize("case", ["gradient", "autocast", "double", "meta", "dropout", "odd residual"])
def test_what_no_table_holds_is_traced_as_the_frameworks(runtime: Runtime, case: str) -> None:
    linear, attend = runtime.server("linear").call, runtime.server("attention").call
    weight = torch.randn(WIDE, N, requires_grad=case == "gradient")
    x, residual = tokens(2), torch.randn(WIDE)
    if case == "double":
        x, weight = x.double(), weight.double()
    elif case == "meta":
        x, weight = x.to("meta"), weight.to("meta")

    def ours(x: torch.Tensor) -> torch.Tensor:
        if case == "odd residual":
            return linear(x, weight, residual=residual)
        if case == "dropout":
            return attend(x[None], x[None], x[None], dropout_p=0.5)
        return linear(x, weight)

    counter = CompileCounterWithBackend("aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
        found = torch.compile(ours, backend=counter, fullgraph=True)(x)
        torch.manual_seed(0)
        wanted = ours(x)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype and found.device == wanted.device
    assert not OPERATORS & operators(counter.graphs[0])
    assert fallbacks(runtime)["compiling"] == 1 and hits(runtime) == {}
    if case == "gradient":
        found.sum().backward()
        assert weight.grad is not None


def test_grad_mode_and_autocast_are_guarded(runtime: Runtime) -> None:
    """One compiled function, called in every state: each gets its own graph."""
    weight = nn.Parameter(torch.randn(WIDE, N))
    compiled = torch.compile(runtime.server("linear").call, backend="aot_eager", fullgraph=True)
    x = tokens(2)
    for _ in range(2):
        with torch.no_grad():
            assert not compiled(x, weight).requires_grad
        with torch.inference_mode():
            assert compiled(x, weight).is_inference()
        assert compiled(x, weight).requires_grad
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert compiled(x, weight).dtype == torch.bfloat16
    assert hits(runtime) == {"linear": 4} and fallbacks(runtime) == {"compiling": 2}


def test_transforms(runtime: Runtime) -> None:
    weight, x = torch.randn(WIDE, N), tokens(3)
    call = runtime.server("linear").call

    def loss(x: torch.Tensor) -> torch.Tensor:
        return call(x, weight).pow(2).sum()

    wanted = torch.func.vmap(torch.func.grad(loss))(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(torch.func.vmap(torch.func.grad(loss)), backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), wanted, atol=1e-3)
        y = torch.func.vmap(lambda x: LINEAR(x, weight, None, "none", None, False, NAME))(x)
    assert torch.allclose(y, F.linear(x, weight), atol=1e-5)
    tangent = torch.func.jvp(lambda x: LINEAR(x, weight, None, "none", None, False, NAME), (x,), (x,))[1]
    assert torch.allclose(tangent, F.linear(x, weight), atol=1e-5)


def test_wrong_calls_fail_as_the_framework_does(runtime: Runtime) -> None:
    compiled = torch.compile(runtime.server("linear").call, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="built-in function linear"):
        compiled(tokens(2), torch.randn(WIDE, N + 1))


def test_a_page_that_is_not_there_is_found_when_the_graph_runs(runtime: Runtime) -> None:
    compiled = torch.compile(runtime.server("paged_attention").call, backend="aot_eager", fullgraph=True)
    q, k, v, block_table, lengths = paged()
    wanted = runtime.server("paged_attention").call(q, k, v, block_table, lengths)
    assert torch.equal(compiled(q, k, v, block_table, lengths), wanted)
    assert hits(runtime) == {"paged_attention": 2}
    with pytest.raises(ValueError, match="found page 10"):
        compiled(q, k, v, block_table + 9, lengths)


class Head(nn.Module):
    """A gate, a rotation and the loss of what comes of them."""

    def __init__(self, runtime: Any, reduction: str = "mean") -> None:
        super().__init__()
        ops = ("silu_and_mul", "rotary", "cross_entropy")
        self.gate, self.turn, self.lose = (runtime.server(op).call for op in ops)
        self.reduction = reduction

    def forward(self, x: torch.Tensor, cache: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads = self.gate(x).view(-1, H, D)
        q, k = self.turn(heads, heads + 1, *cache.chunk(2, -1), at)
        y = (q + k).flatten(1)
        return y, self.lose(y, at.masked_fill(at == 3, -100), reduction=self.reduction)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_one_graph_serves_gates_rotations_and_losses_of_every_batch(runtime: Runtime, reduction: str) -> None:
    head, counter = Head(runtime, reduction), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(head, backend=counter, fullgraph=True)
    for i, b in enumerate((5, 9, 2)):
        given = torch.randn(b, 2 * N), torch.randn(N, D), torch.arange(b)
        if i == 0:
            torch._dynamo.mark_dynamic(given[0], 0)
            torch._dynamo.mark_dynamic(given[2], 0)
        found = compiled(*given)
        assert hits(runtime) == dict.fromkeys(("silu_and_mul", "rotary", "cross_entropy"), 2 * i + 1)
        assert all(torch.equal(y, w) for y, w in zip(found, head(*given), strict=True)), b
    assert counter.frame_count == 1 and fallbacks(runtime) == {}
    assert operators(counter.graphs[0]) >= {SILU_AND_MUL, ROTARY, CROSS_ENTROPY}


def test_values_that_are_not_there_are_found_when_the_graph_runs(runtime: Runtime) -> None:
    compiled = torch.compile(Head(runtime), backend="aot_eager", fullgraph=True)
    x, cache = torch.randn(4, 2 * N), torch.randn(2 * N, D)
    assert compiled(x, cache, torch.arange(4))[1].isfinite()
    with pytest.raises(ValueError, match=f"rotary: found position {2 * N}, expected 0 to"):
        compiled(x, cache, torch.arange(4) + 2 * N - 3)
    with pytest.raises(IndexError, match="Target 16 is out of bounds"):
        compiled(x, cache, torch.arange(4) + N - 3)


def paged() -> tuple[torch.Tensor, ...]:
    k, v = torch.randn(2, 3, 4, H, D)
    table = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)
    return torch.randn(2, H, D), k, v, table, torch.tensor([7, 3])


SAMPLES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "linear": (LINEAR, (tokens(2), torch.randn(WIDE, N), None, "none", None, False, NAME)),
    "linear gelu": (LINEAR, (tokens(2)[0], torch.randn(WIDE, N), torch.randn(WIDE), "gelu", None, True, NAME)),
    "linear add": (LINEAR, (tokens(2), torch.randn(N, N), torch.randn(N), "none", tokens(2), False, NAME)),
    "linear of none": (LINEAR, (tokens(2)[:0], torch.randn(WIDE, N), None, "relu", None, False, NAME)),
    "linear strided": (
        LINEAR,
        (tokens(4).transpose(0, 1), torch.randn(N, WIDE).t(), None, "none", None, False, NAME),
    ),
    "linear gradient": (LINEAR, (tokens(2), torch.randn(N, N).requires_grad_(), None, "none", None, False, NAME)),
    "layer_norm": (LAYER_NORM, (tokens(2), [N], torch.rand(N), torch.rand(N), 1e-5, False, NAME)),
    "layer_norm bare": (LAYER_NORM, (tokens(2).transpose(0, 1), [N], None, None, 1e-5, True, NAME)),
    "rms_norm": (RMS_NORM, (tokens(2), [N], torch.rand(N), None, False, NAME)),
    "rms_norm add": (ADD_RMS_NORM, (tokens(2), tokens(2), [N], None, 1e-6, True, NAME)),
    "softmax": (SOFTMAX, (tokens(2), -1, NAME)),
    "softmax of another dim": (SOFTMAX, (tokens(2).transpose(0, 2), 1, NAME)),
    "attention": (ATTENTION, (*torch.randn(3, 2, H, S, D), None, True, None, False, NAME)),
    "attention one": (ATTENTION, (*torch.randn(3, 1, H, 1, D), None, False, 0.5, False, NAME)),
    "attention masked": (
        ATTENTION,
        (*torch.randn(3, 2, S, H, D).transpose(2, 3), torch.rand(2, 1, S, S) > 0.3, False, 0.1, False, NAME),
    ),
    "attention groups": (
        ATTENTION,
        (torch.randn(2, 2 * H, 3, D), *torch.randn(2, 2, H, S, D), None, False, None, True, NAME),
    ),
    "paged_attention": (PAGED_ATTENTION, (*paged(), None, NAME)),
    "silu_and_mul": (SILU_AND_MUL, (tokens(2), NAME)),
    "silu_and_mul strided": (SILU_AND_MUL, (tokens(2).transpose(0, 2), NAME)),
    "rotary": (ROTARY, (*torch.randn(2, 3, H, D), *torch.randn(2, 7, D // 2), torch.tensor([5, 0, 5]), NAME)),
    "rotary of a projection": (
        ROTARY,
        (*torch.randn(3, 3 * H, D).chunk(3, 1)[:2], *torch.randn(7, D).chunk(2, -1), torch.tensor([5, 0, 5]), NAME),
    ),
    "cross_entropy": (CROSS_ENTROPY, (tokens(2)[0], torch.tensor([3, -100, 0, 15]), -100, NAME)),
    "cross_entropy strided": (CROSS_ENTROPY, (torch.randn(N, 3).t(), torch.tensor([3, 5, 0]), 3, NAME)),
    "no such table": (SOFTMAX, (tokens(2), -1, "never_imported")),
}


@pytest.mark.filterwarnings("ignore:never_imported")
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(runtime: Runtime, sample: str) -> None:
    op, args = SAMPLES[sample]
    torch.library.opcheck(op, args)
    y = op(*args)
    for t in y if isinstance(y, tuple) else (y,):
        held = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor) and a.numel()}
        assert t.untyped_storage().data_ptr() not in held


def test_a_graph_run_where_autograd_records_gives_gradients(runtime: Runtime) -> None:
    weight = torch.randn(N, N, requires_grad=True)
    found = LINEAR(tokens(2), weight, None, "none", tokens(2), False, NAME)
    wanted = F.linear(tokens(2), weight) + tokens(2)
    assert torch.equal(found, wanted)
    assert torch.equal(*(torch.autograd.grad(y.pow(2).sum(), weight)[0] for y in (found, wanted)))


ELSEWHERE = """
import sys, warnings, torch
import dks.dispatch.graphs
program = torch.export.load(sys.argv[1]).module()
x, wanted = torch.load(sys.argv[2])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert torch.allclose(program(x), wanted, atol=1e-5)
told = [str(w.message) for w in caught if "traced_here" in str(w.message)]
assert len(told) == 1 and "no imported package of that name" in told[0], told
from dks.dispatch.generation import Generation
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import Group, Rule, Table
runtime = Runtime("traced_here", Generation(eval(open(sys.argv[3]).read())))
with torch.no_grad():
    assert torch.allclose(program(x), wanted, atol=1e-5)
print({op: sum(found["hits"].values()) for op, found in runtime.stats()["ops"].items()})
"""


def test_exported_programs_ask_the_table_wherever_they_run(runtime: Runtime, tmp_path: Path) -> None:
    model = Block(runtime)
    dynamic = ({0: torch.export.Dim("b", min=2, max=64)},)
    for strict in (True, False):
        program = torch.export.export(model, (tokens(3),), dynamic_shapes=dynamic, strict=strict)
        assert operators(program.graph_module) >= OPERATORS, f"strict={strict}"
    before = hits(runtime)
    kept = io.BytesIO()
    torch.export.save(program, kept)
    kept.seek(0)
    for run in (program.module(), torch.export.load(kept).module()):
        for b in (2, 31):
            assert torch.allclose(run(tokens(b)), model(tokens(b)), atol=1e-5)
    # Of a program in the process that made it the layers are found; of a loaded one the direct form serves.
    assert {op: n - before.get(op, 0) for op, n in hits(runtime).items()} == {op: 8 * n for op, n in CALLS.items()}
    (tmp_path / "program.pt2").write_bytes(kept.getvalue())
    torch.save((tokens(5), model(tokens(5))), tmp_path / "given.pt")
    (tmp_path / "table.txt").write_text(repr(runtime.generation.table))
    done = elsewhere(ELSEWHERE, *(tmp_path / name for name in ("program.pt2", "given.pt", "table.txt")))
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout.splitlines()[-1]) == CALLS


ALONE = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
x, wanted = torch.load(sys.argv[2])
assert torch.allclose(program(x), wanted, atol=1e-5)
assert not [name for name in sys.modules if name.partition(".")[0] == "dks"]
"""


@pytest.mark.parametrize("table", ["default", "empty"])
def test_a_decomposed_program_needs_pytorch_alone(runtime: Runtime, tmp_path: Path, table: str) -> None:
    model = Block(runtime)
    dynamic = ({0: torch.export.Dim("b", min=2, max=64)},)
    program = torch.export.export(model, (tokens(3),), dynamic_shapes=dynamic)
    plain = program.run_decompositions(None if table == "default" else {})
    assert operators(program.graph_module) >= OPERATORS, "the program itself asks the table as before"
    assert not any("dks" in str(target) for target in operators(plain.graph_module))
    for b in (2, 31):
        assert torch.allclose(plain.module()(tokens(b)), model(tokens(b)), atol=1e-5)
    if table == "default":
        torch.export.save(plain, tmp_path / "program.pt2")
        torch.save((tokens(5), model(tokens(5))), tmp_path / "given.pt")
        done = elsewhere(ALONE, tmp_path / "program.pt2", tmp_path / "given.pt")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sample", [name for name in SAMPLES if name not in ("no such table", "linear gradient")])
def test_every_operator_decomposes(runtime: Runtime, sample: str) -> None:
    op, args = SAMPLES[sample]

    class Call(nn.Module):
        def forward(self, *tensors: torch.Tensor) -> Any:
            left = iter(tensors)
            return op(*(next(left) if isinstance(a, torch.Tensor) else a for a in args))

    tensors = tuple(a for a in args if isinstance(a, torch.Tensor))
    plain = torch.export.export(Call(), tensors).run_decompositions()
    assert not any("dks" in str(target) for target in operators(plain.graph_module))
    found, wanted = plain.module()(*tensors), op(*args)
    for f, w in zip(*((y if isinstance(y, tuple) else (y,)) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-5)
        assert f.stride() == w.stride() or not f.numel()


def test_loading_without_dks_says_what_to_import(runtime: Runtime, tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Block(runtime), (tokens(3),)), tmp_path / "program.pt2")
    done = elsewhere("import sys, torch; torch.export.load(sys.argv[1])", tmp_path / "program.pt2")
    assert done.returncode == 1 and "import_dks_dispatch_graphs" in done.stderr
    done = elsewhere(
        "import sys, torch, dks.dispatch.graphs; torch.export.load(sys.argv[1])", tmp_path / "program.pt2"
    )
    assert done.returncode == 0, done.stderr


def elsewhere(script: str, *files: Path) -> subprocess.CompletedProcess[str]:
    """A script run in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, files)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
