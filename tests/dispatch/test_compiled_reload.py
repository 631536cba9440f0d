"""A compiled graph outlives every reload: compiled once, it asks the table that serves when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from dks.dispatch.generation import Generation
from dks.dispatch.runtime import Runtime
from tests.dispatch.test_traced import NAME, ROUTES, WIDE, D, H, Mlp, N, S, paged, table, tokens

OUTCOMES = {
    "full": {"exact", "bin"},
    "another": {"exact", "bin"},
    "empty": {"unknown_shape"},
    "refused": {"refused"},
}


@pytest.fixture
def runtime(route: Any) -> Runtime:
    """Its ``reload`` takes a name in OUTCOMES."""
    torch._dynamo.reset()

    def opened(path: Path) -> Generation:
        if path.name == "refused":
            return Generation(refused="a test", origin=path.name)
        return Generation() if path.name == "empty" else Generation(table(route), origin=path.name)

    return Runtime(NAME, opened(Path("full")), opened)


class Calls(nn.Module):
    """Every operator, asked by name."""

    calls = 10

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.call = {op: runtime.server(op).call for op in ROUTES}
        self.weight, self.caches = torch.randn(N), paged()[1:3]

    def forward(self, x: torch.Tensor, b: torch.Tensor, heads: torch.Tensor, pages: torch.Tensor) -> Any:
        """x (b, N), b: the numbers up to b, heads (b, H, S, D), pages (b, 2)."""
        y = self.call["linear"](x, torch.ones(WIDE, N))[:, :N].contiguous()
        y = self.call["layer_norm"](y, (N,), self.weight, self.weight)
        y = self.call["rms_norm"](self.call["rms_norm"](y, (N,), self.weight, 1e-6), (N,), self.weight, 1e-6, y)[0]
        y = self.call["softmax"](y) + self.call["silu_and_mul"](torch.cat((y, y), -1))
        q, k = self.call["rotary"](y.view(-1, H, D), y.view(-1, H, D), *torch.ones(2, N, D // 2), b)
        paged = self.call["paged_attention"](q, *self.caches, pages, b % 2 + 5)
        return self.call["attention"](heads, heads, heads), paged + k, self.call["cross_entropy"](y, b)


class Layers(nn.Module):
    """Prepared layers of every kind."""

    calls = 4

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        linear, layer_norm, rms_norm = (runtime.server(op).prepare for op in ("linear", "layer_norm", "rms_norm"))
        self.up, self.down = linear(torch.randn(WIDE, N), None, "gelu"), linear(torch.randn(N, WIDE), None, "add")
        self.norm, self.rms = layer_norm(torch.randn(N), torch.randn(N)), rms_norm(torch.randn(N), 1e-6)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        y, total = self.rms(self.norm(x), x)
        return self.down(self.up(y), total)


class Optimized(nn.Module):
    """What ``optimize`` swapped: linears, one with its activation, and norms, one of another class than torch's."""

    calls = 5

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        pair = nn.Sequential(nn.Linear(N, N), nn.GELU())
        self.model = nn.Sequential(Mlp(), pair, Llama()).eval().requires_grad_(False)
        assert runtime.optimize(self.model).swapped == self.calls

    def forward(self, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class Llama(nn.Module):
    """A norm as Llama has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(N)), 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


KINDS = (Calls, Layers, Optimized)


def arguments(b: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(b, N), torch.arange(b), torch.randn(b, H, S, D), torch.arange(2 * b).view(b, 2) % 3


def outcomes(runtime: Runtime) -> dict[str, int]:
    seen: dict[str, int] = {}
    for found in runtime.stats()["ops"].values():
        for outcome, n in (*found["hits"].items(), *found["fallbacks"].items()):
            seen[outcome] = seen.get(outcome, 0) + n
    return seen


def new(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: n - before.get(name, 0) for name, n in after.items() if n > before.get(name, 0)}


@pytest.mark.parametrize("kind", KINDS)
def test_one_compilation_for_all_reloads(runtime: Runtime, kind: Any) -> None:
    plain = kind(runtime)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(plain, backend=counter, fullgraph=True, dynamic=True)
    layers = list(runtime.layers)
    with torch.no_grad():
        compiled(*arguments(7))
        for i, name in enumerate(("another", "empty", "back", "refused", "full", "back", "empty", "another") * 2):
            serving = name
            if name == "back":
                serving = runtime.held[1].origin or "empty"
                serving = "refused" if runtime.held[1].refused else serving
                runtime.rollback()
            else:
                runtime.reload(name)
            if i % 5 == 4:
                for layer in layers:
                    layer.refresh()
            before = outcomes(runtime)
            given = arguments(7 + i % 4)
            found = compiled(*given)
            counted = new(before, outcomes(runtime))
            assert set(counted) <= OUTCOMES[serving] and sum(counted.values()) == kind.calls, (i, name, counted)
            torch.testing.assert_close(found, plain(*given), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1, "one compilation"


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_reads_nothing_of_the_generation(runtime: Runtime, kind: Any) -> None:
    """A guard on anything of it would hold a graph to the table that served when it was made."""
    plain = kind(runtime)
    generation = runtime.generation
    given = arguments(7)

    def backend(traced: torch.fx.GraphModule, _: Any) -> Any:
        runtime.generation = generation  # what runs asks it
        return traced

    compiled = torch.compile(plain, backend=backend, fullgraph=True)
    runtime.generation = None  # type: ignore[assignment]
    with torch.no_grad():
        compiled(*given)
    assert sum(outcomes(runtime).values()) == kind.calls and not {"compiling"} & set(outcomes(runtime))


def test_a_table_for_another_device_is_no_reason_to_compile_again(runtime: Runtime) -> None:
    layer = runtime.server("linear").prepare(torch.randn(WIDE, N))
    model = nn.Sequential(layer, nn.Tanh())
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        wanted = compiled(tokens(3))
        for device in ("cuda", "cpu", "cuda"):
            runtime._serve(Generation(device=device))
            assert torch.allclose(compiled(tokens(3)), wanted, atol=1e-5)
    assert counter.frame_count == 1
    assert outcomes(runtime) == {"bin": 1, "device": 2, "unbound": 1}


def test_parts_that_the_framework_computes_are_compiled_once(runtime: Runtime) -> None:
    """What no table holds is in the graph as the framework's operator, whatever serves."""
    weight = torch.randn(WIDE, N, requires_grad=True)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(runtime.server("linear").prepare(weight), backend=counter, fullgraph=True)
    for name in ("another", "empty", "refused") * 4:
        assert compiled(tokens(3)).requires_grad
        runtime.reload(name)
    assert counter.frame_count == 1
    assert outcomes(runtime) == {"compiling": 1}
