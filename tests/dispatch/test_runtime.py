"""The runtime: plans, explanations and counts over tables made by hand; and what serving imports."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from dks.dispatch import pool
from dks.dispatch.generation import Generation
from dks.dispatch.runtime import Report, Runtime, Swap
from dks.dispatch.table import Group, Rule, Table

N, K = 6, 8
LINEAR = (("bias", "yes"), ("dtype", "float32"), ("epilogue", "none"))
STATICS = (("n", N), ("k", K))
RULES = (Rule("torch.linear", 4), Rule("mkldnn.linear_packed", 4), Rule("torch.addmm", 16))


def group(cells: dict[int, tuple[int, ...]], form: str = "prepared", **traits: str) -> Group:
    named = tuple(sorted((dict(LINEAR) | traits).items()))
    return Group("linear", form, named, STATICS, ((1, 8, 64),), cells)


# Bins (1, 8, 64): unmeasured where nothing was chosen, and aligned winners of their own.
CELLS = {16: (1, 2, -1), 4: (1, 0, -1)}


def made(cells: dict[int, tuple[int, ...]] = CELLS, **options: Any) -> Runtime:
    return Runtime("t", Generation(Table(RULES, (group(cells),)), **options))


def linear(runtime: Runtime) -> Any:
    torch.manual_seed(0)
    return runtime.server("linear").prepare(torch.randn(N, K), torch.randn(N))


def counts(runtime: Runtime) -> dict[str, int]:
    ops = runtime.stats()["ops"].get("linear", {"hits": {}, "fallbacks": {}})
    return {**ops["hits"], **ops["fallbacks"]}


@pytest.mark.parametrize(
    ("m", "align", "candidate", "match"),
    [
        (1, 64, "mkldnn.linear_packed", "exact"),
        (8, 64, "torch.addmm", "exact"),
        (5, 16, "torch.addmm", "bin"),
        (5, 8, "torch.linear", "bin"),
        (5, 4, "torch.linear", "bin"),
        (1, 2, "torch.linear", "default"),
        (0, 64, "torch.linear", "default"),
        (20, 64, "torch.linear", "default"),
        (129, 64, "torch.linear", "default"),
    ],
)
def test_explain_each_match_and_miss(m: int, align: int, candidate: str, match: str) -> None:
    choice = made().explain("linear", m=m, n=N, k=K, align=align)
    assert (choice.candidate, choice.match) == (candidate, match)
    assert choice.reason and choice.reason in " ".join(str(choice).split()) and f"({match} match)" in str(choice)


def test_explain_names_the_miss() -> None:
    runtime = made()
    asked = {"n": N, "k": K}
    assert "a dim is zero" in runtime.explain("linear", m=0, **asked).reason
    assert "past 2 times the last measured size" in runtime.explain("linear", m=129, **asked).reason
    assert "not measured" in runtime.explain("linear", m=20, **asked).reason
    assert "less aligned" in runtime.explain("linear", m=1, align=2, **asked).reason
    held = runtime.explain("linear", m=1, n=7, k=7).reason
    assert "no entry for linear[bias=yes,dtype=float32,epilogue=none]" in held and "{'n': 6, 'k': 8}" in held
    assert "the table holds nothing" in runtime.explain("layer_norm", m=1, n=7).reason


def test_explain_past_the_last_edge_is_nearest() -> None:
    choice = made({4: (0, 0, 1)}).explain("linear", m=128, n=N, k=K)
    assert (choice.candidate, choice.match) == ("mkldnn.linear_packed", "nearest")


def test_explain_where_nothing_of_that_alignment_was_measured() -> None:
    choice = made({16: (1, 1, 1)}).explain("linear", m=8, n=N, k=K, align=4)
    assert (choice.candidate, choice.match) == ("mkldnn.linear_packed", "nearest")
    assert made({16: (2, 2, 2)}).explain("linear", m=8, n=N, k=K, align=4).match == "default"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"m": 1, "n": 1}, "found no k, expected all of m, n, k"),
        ({}, "found no m, n, k"),
        ({"m": 1, "n": 1, "k": 1, "h": 2}, "found h, expected names among"),
        ({"m": 1.5, "n": 1, "k": 1}, "found m=1.5, expected a whole number"),
        ({"m": True, "n": 1, "k": 1}, "found m=True, expected a whole number"),
        ({"m": "1", "n": 1, "k": 1}, "expected a whole number"),
        ({"m": 1, "n": 1, "k": 1, "dtype": "int3"}, "found dtype=int3, expected float32 or bfloat16"),
        ({"m": 1, "n": 1, "k": 1, "epilogue": "tanh"}, "found epilogue=tanh"),
        ({"m": 1, "n": 1, "k": 1, "form": "raw"}, "found form=raw, expected prepared or direct"),
        ({"m": 1, "n": 0, "k": 1}, "dim n: found 0"),
        ({"m": 1, "n": 1, "k": 1, "align": 3}, "found align=3, expected a power of two"),
        ({"m": 1, "n": 1, "k": 1, "align": 0}, "found align=0"),
    ],
)
def test_explain_refuses_questions_with_their_reason(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        made().explain("linear", **asked)


def test_unknown_operators_are_named() -> None:
    for call in (lambda: made().explain("conv", m=1), lambda: made().server("conv")):
        with pytest.raises(
            KeyError, match="expected one of attention, cross_entropy, layer_norm, linear, paged_attention"
        ):
            call()


def test_explain_fills_in_what_the_table_holds() -> None:
    """A trait that is left out is the table's, where that holds one; else the operator's first."""
    silu = group({4: (1, 1, 1)}, form="direct", bias="no", epilogue="silu")
    runtime = Runtime("t", Generation(Table(RULES, (silu,))))
    assert runtime.explain("linear", m=1, n=N, k=K).candidate == "mkldnn.linear_packed"
    assert runtime.explain("linear", m=1, n=N, k=K, epilogue="none").match == "default"
    assert runtime.explain("linear", m=1, n=N, k=K, form="prepared").match == "default"
    assert "(direct)" in runtime.explain("attention", b=1, q=1, kv=1, h=1, hkv=1, d=8).reason
    assert "(prepared)" in runtime.explain("layer_norm", m=1, n=1).reason


def test_explain_shows_the_evidence() -> None:
    names = [rule.candidate for rule in made().generation.table.rules]
    evidence = [
        {"candidate": name, "reason": f"rule {i} was measured", "ratio": [1.5, 1.4, 1.6]}
        for i, name in enumerate(names)
    ]
    choice = made(evidence=json.dumps({"rules": evidence})).explain("linear", m=8, n=N, k=K)
    assert choice.reason == "rule 2 was measured" and choice.rule == evidence[2]
    assert "1.500x [1.400, 1.600] to the default" in str(choice)


def test_each_outcome_is_counted_and_says_what_explain_says() -> None:
    runtime = made()
    layer = linear(runtime)
    for m in (1, 8, 5, 20, 129, 0):
        given = torch.randn(m, K)
        assert torch.allclose(layer(given), torch.nn.functional.linear(given, layer.weight, layer.bias), atol=1e-5)
    # Rows of 6 floats are 24 bytes apart: no output row but the first is 16-byte aligned.
    assert counts(runtime) == {"exact": 2, "bin": 1, "unmeasured": 1, "out_of_range": 1, "zero_sized": 1}
    stats = runtime.stats()
    assert stats["table"] == "serving" and stats["lookup"]["linear"] == "compiled" and stats["failed"] == {}
    assert set(stats["ops"]["linear"]["hits"]) == {"exact", "bin"}


def test_a_refused_table_serves_by_the_framework_and_counts_it() -> None:
    runtime = made(refused="threads: 2 != 4")
    layer = linear(runtime)
    given = torch.randn(8, K)
    assert torch.equal(layer(given), torch.nn.functional.linear(given, layer.weight, layer.bias))
    runtime.server("linear").call(given, layer.weight, layer.bias)
    assert counts(runtime) == {"refused": 2}
    assert runtime.stats()["table"] == "refused: threads: 2 != 4"
    choice = runtime.explain("linear", m=8, n=N, k=K)
    assert choice.match == "default" and "threads: 2 != 4" in choice.reason
    assert not layer.binding.dispatch.kernels, "nothing is packed for a table that does not serve"


def test_dead_rules_leave_the_others() -> None:
    runtime = made(dead={"torch.addmm": "its source changed"})
    layer = linear(runtime)
    layer(torch.randn(1, K))
    assert counts(runtime) == {"exact": 1}
    assert "its source changed" in runtime.explain("linear", m=8, n=N, k=K).reason
    assert set(layer.binding.dispatch.kernels) == {"torch.linear", "mkldnn.linear_packed"}


def test_plans_are_cached_and_rules_of_one_candidate_share_a_form() -> None:
    runtime = made({4: (1, 0, 1)})
    traits, statics = dict(LINEAR), dict(STATICS)
    plan = runtime.generation.plan("linear", "prepared", traits, statics)
    assert runtime.generation.plan("linear", "prepared", dict(reversed(traits.items())), statics) is plan
    assert plan.form_bytes() == N * K * 4 and plan.changes_anything
    assert runtime.generation.plan("linear", "direct", traits, statics).blocked == "unknown_shape"
    two = Table((Rule("torch.addmm", 4), Rule("torch.addmm", 8)), (group({8: (1, 1, 1), 4: (0, 0, 0)}),))
    layer = linear(Runtime("t", Generation(two)))
    assert list(layer.binding.dispatch.kernels) == ["torch.addmm"]
    assert layer.binding.dispatch.plan.form_bytes() == N * K * 4


def test_a_table_of_defaults_changes_nothing() -> None:
    runtime = made({4: (0, 0, 0)})
    assert not runtime.generation.plan("linear", "prepared", dict(LINEAR), dict(STATICS)).changes_anything
    assert runtime.optimize(nn.Sequential(nn.Linear(K, N))).swapped == 0


def test_reports_say_what_is_alike_once() -> None:
    swaps = [Swap("a.b", "linear", True, "packed"), Swap("c", "linear", False, "has hooks")]
    report = Report((*swaps, Swap("a.d", "linear", True, "packed")))
    assert report.swapped == 2
    assert str(report).splitlines() == [
        "2 of 3 modules dispatch",
        "  + a.b and 1 more  linear: packed",
        "  - c  linear: has hooks",
    ]
    assert str(Report(())) == "0 of 0 modules dispatch"


def test_every_operator_has_a_server_that_survives_an_empty_model_and_table() -> None:
    runtime = Runtime("t", Generation())
    for op in pool.operators():
        assert runtime.server(op).swap(nn.Module()) == []
    assert runtime.optimize(nn.Module()).swaps == () and runtime.stats()["ops"] == {}


HEAVY = (
    "pandas",
    "pyarrow",
    "jinja2",
    "click",
    "rich",
    "yaml",
    "pydantic",
    "transformers",
    "prometheus_client",
    "triton",
    "dks.profiler",
    "dks.codegen",
)


def test_serving_imports_nothing_heavy() -> None:
    """numpy is torch's own affair."""
    code = (
        "import sys, torch; before = set(sys.modules); import dks.dispatch.runtime, dks.dispatch.pool; "
        "import dks.dispatch.loader; dks.dispatch.pool.kernels(); "
        f"print([m for m in set(sys.modules) - before if m in {HEAVY!r} or m == 'numpy'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
