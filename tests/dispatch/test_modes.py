"""Execution modes: names of forms, and which plan a call takes while its stream is captured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dks.dispatch import modes
from dks.dispatch.generation import Generation
from dks.dispatch.modes import EAGER, GRAPH, MODES, current, eager_form, form_in, mode_of
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
        assert current(SimpleNamespace(is_current_stream_capturing=lambda now=capturing: now)) == mode


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
