"""Execution modes: names of forms, and which plan a call takes while its stream is captured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from dks.dispatch import modes, pool, prepared
from dks.dispatch.generation import Generation
from dks.dispatch.kernel import Kernel
from dks.dispatch.modes import EAGER, GRAPH, MODES, current, eager_form, form_in, mode_of
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import Group, Rule, Table

TRAITS = {"bias": "yes", "dtype": "float32", "epilogue": "none"}
RULES = (Rule("torch.linear", 4), Rule("torch.addmm", 4))


def table(*forms: str) -> Table:
    """A group for each form; its rule's number is the form's place."""
    return Table(
        RULES,
        tuple(
            Group("linear", form, tuple(TRAITS.items()), (("n", 8), ("k", 8)), ((16,),), {4: (rule,)})
            for rule, form in enumerate(forms)
        ),
    )


@pytest.mark.parametrize("form", ["direct", "prepared"])
def test_forms_have_a_name_in_each_mode_that_reads_back(form: str) -> None:
    assert form_in(EAGER, form) == form and form_in(GRAPH, form) == f"{form}_graph"
    for mode in MODES:
        assert (mode_of(form_in(mode, form)), eager_form(form_in(mode, form))) == (mode, form)


def test_the_mode_is_that_of_the_current_stream() -> None:
    for capturing, mode in ((True, GRAPH), (False, EAGER)):
        asked = SimpleNamespace(is_initialized=lambda: True, is_current_stream_capturing=lambda now=capturing: now)
        assert current(asked) == mode
    assert current(SimpleNamespace(is_initialized=lambda: False)) == EAGER


@pytest.mark.parametrize(
    ("forms", "mode", "rule"),
    [
        (("direct", "direct_graph"), EAGER, 0),
        (("direct", "direct_graph"), GRAPH, 1),
        (("direct",), GRAPH, 0),
        (("direct", "prepared_graph"), GRAPH, 0),
    ],
)
def test_a_call_in_a_graph_takes_the_graphs_plan_and_else_the_eager_one(
    forms: tuple[str, ...], mode: str, rule: int
) -> None:
    plan = modes.plan(Generation(table(*forms)), "linear", "direct", TRAITS, {"n": 8, "k": 8}, mode)
    assert plan.find is not None and plan.find(4, 16) >> 2 == rule
    assert set(plan.candidates) == {rule}


def test_eager_calls_never_take_a_graphs_plan() -> None:
    plan = modes.plan(Generation(table("direct_graph")), "linear", "direct", TRAITS, {"n": 8, "k": 8}, EAGER)
    assert plan.blocked == "unknown_shape"


def test_a_refused_table_is_refused_in_every_mode() -> None:
    refused = Generation(table("direct", "direct_graph"), refused="another device")
    for mode in MODES:
        assert modes.plan(refused, "linear", "direct", TRAITS, {"n": 8, "k": 8}, mode).blocked == "refused"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the kernels that run."""
    found: list[str] = []
    for id in ("torch.addmm", "torch.linear_inplace"):
        kernel = pool.kernels()[id]

        def bind(*args: object, kernel: Kernel = kernel) -> object:
            run = kernel.bind(*args)
            return lambda *given: (found.append(kernel.id), run(*given))[1]

        monkeypatch.setitem(pool.kernels(), kernel.id, dataclasses.replace(kernel, bind=bind))
    return found


def capture(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    monkeypatch.setattr(modes, "current", lambda: GRAPH if on else EAGER)


@pytest.mark.parametrize("form", ["prepared", "direct"])
def test_what_a_graph_captures_is_served_by_the_graphs_choice(
    form: str, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Eager calls go to addmm, those in a graph to the in-place linear: neither is what the framework would do.
    rules = (Rule("torch.addmm", 4), Rule("torch.linear_inplace", 4))
    runtime = Runtime("t", Generation(Table(rules, table(form, f"{form}_graph").groups)))
    assert runtime.generation.modes == MODES
    x, weight, bias = torch.randn(3, 8), torch.randn(8, 8), torch.randn(8)
    server = runtime.server("linear")
    serve = server.prepare(weight, bias) if form == "prepared" else lambda x: server.call(x, weight, bias)
    expected = torch.nn.functional.linear(x, weight, bias)
    for on in (False, True, True, False):
        capture(monkeypatch, on)
        with torch.no_grad():
            torch.testing.assert_close(serve(x), expected)
    wanted = ["torch.addmm", "torch.linear_inplace", "torch.linear_inplace", "torch.addmm"]
    assert called == wanted
    assert sum(runtime.stats()["ops"]["linear"]["hits"].values()) == 4


def test_a_weight_form_that_two_modes_share_is_packed_once(called: list[str]) -> None:
    rules = (Rule("torch.addmm", 4), Rule("torch.addmm", 4))
    runtime = Runtime("t", Generation(Table(rules, table("prepared", "prepared_graph").groups)))
    layer = runtime.server("linear").prepare(torch.randn(8, 8), torch.randn(8))
    eager, graph = layer.binding, layer.binding.graph
    assert graph is not None and graph.graph is None
    assert eager.dispatch.kernels["torch.addmm"] is graph.dispatch.kernels["torch.addmm"]
    assert not called


def test_optimize_swaps_what_gains_in_graphs_alone() -> None:
    rules = (Rule("torch.linear", 4), Rule("torch.addmm", 4))
    runtime = Runtime("t", Generation(Table(rules, table("prepared", "prepared_graph").groups)))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with torch.no_grad():
        (swap, *_) = runtime.optimize(model).swaps
    assert swap.done, swap


def test_cublas_is_there_before_a_graph_whose_choices_no_warm_up_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    @contextmanager
    def at(device: str) -> Iterator[None]:
        made.append(device)
        yield

    weight = SimpleNamespace(is_cuda=True, device="cuda:1")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", at)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: made.append("handle"))
    prepared._wait_for(weight, captured=False)  # type: ignore[arg-type]
    assert not made
    prepared._wait_for(weight, captured=True)  # type: ignore[arg-type]
    assert made == ["cuda:1", "handle"]
