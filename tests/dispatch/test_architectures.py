"""``optimize`` on every architecture of transformers that a tiny random model can be made of.

The table serves all that is found in the model, by kernels that compute in float32 alone: what differs by more than
rounding is another computation. A third of the architectures; all with DKS_SOAK=1.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dks.dispatch import pool
from dks.dispatch.generation import Generation
from dks.dispatch.kernel import Kernel
from dks.dispatch.problem import Precision, Problem
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import Group, Rule, Table

pytest.importorskip("transformers")
from transformers import AttentionInterface
from transformers import logging as transformers_logging

from tests.dispatch.architectures import ARCHITECTURES, FIRST, LAST, WINDOW, tiny

SOAK = os.environ.get("DKS_SOAK") == "1"
ALWAYS = {("causal", "gpt2"), ("causal", "llama"), ("causal", "mistral"), ("masked", "bert"), ("seq2seq", "t5")}
CASES = [case for i, case in enumerate(ARCHITECTURES) if SOAK or i % 3 == 0 or case in ALWAYS]
KERNELS: dict[str, tuple[str, ...]] = {
    "linear": ("mkldnn.linear_packed", "torch.addmm"),
    "layer_norm": ("torch.native_layer_norm",),
    "rms_norm": ("torch.rms_vector_norm",),
    "attention": ("test.attention",),
}
TOKENS, NEW = 11, 4
assert WINDOW < TOKENS


@pytest.fixture(autouse=True)
def _kernel_for_every_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """``test.attention``: with any mask, causality and heads, by nothing but products; so all of it is served."""

    def bind(problem: Problem, _params: Any) -> Callable[..., torch.Tensor]:
        groups = problem.dim("h") // problem.dim("hkv")

        def run(q: Any, k: Any, v: Any, mask: Any, scale: float | None) -> torch.Tensor:
            k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
            scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
            if problem.trait("causal") == "yes":
                scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
            if problem.trait("mask") == "bool":
                scores = scores.masked_fill(~mask, -torch.inf)
            elif problem.trait("mask") == "float":
                scores = scores + mask
            # A row that sees no key is zero, as the framework has it.
            y: torch.Tensor = scores.softmax(-1).nan_to_num(0.0) @ v
            return y

        return run

    kernel = Kernel("test.attention", "attention", {"float32": Precision.EXACT}, bind, rank=1)
    monkeypatch.setitem(pool.kernels(), kernel.id, kernel)


Shapes = dict[str, list[dict[str, int]]]


def shapes_of(model: nn.Module) -> Shapes:
    """What a table must hold to serve every layer of ``model``, beside its attention."""
    found: Shapes = {"linear": [], "layer_norm": [], "rms_norm": []}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            found["linear"].append({"n": weight.shape[0], "k": weight.shape[1]})
        elif isinstance(weight, torch.Tensor) and weight.dim() == 1:
            name = "layer_norm" if isinstance(module, nn.LayerNorm) else "rms_norm"
            found[name].append({"n": weight.shape[0]})
    return found


def attended(call: Callable[[], object]) -> list[dict[str, int]]:
    """The heads of every attention that ``call`` asks transformers' registry for."""
    plain = AttentionInterface()["sdpa"]
    heads = []

    def watched(module: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
        heads.append({"h": query.shape[1], "hkv": key.shape[1], "d": query.shape[3]})
        return plain(module, query, key, value, *rest, **named)

    AttentionInterface.register("sdpa", watched)
    try:
        call()
    finally:
        AttentionInterface.register("sdpa", plain)
    return heads


def serving_all(route: Any, shapes: Shapes) -> Runtime:
    """A runtime whose table serves all these shapes, at any number of rows that comes up here."""
    rules: list[Rule] = []
    groups: list[Group] = []
    for op, statics in shapes.items():
        distinct = [dict(pairs) for pairs in dict.fromkeys(tuple(s.items()) for s in statics if all(s.values()))]
        part = route(op, KERNELS[op], distinct).generation.table
        for g in part.groups:
            cells = {align: tuple(rule + len(rules) for rule in row) for align, row in g.cells.items()}
            edges = tuple((*few[:-1], 4096) for few in g.edges)
            groups.append(Group(g.op, g.form, g.traits, g.statics, edges, cells))
        rules += part.rules
    return Runtime("all", Generation(Table(tuple(rules), tuple(groups))))


def prompt(kind: str, *, padded: bool) -> dict[str, Any]:
    """Two sequences; padded, the second begins with three tokens that are not there. No cache is asked for: queries
    then lie in memory as keys do, which tables want."""
    ids = torch.randint(FIRST, LAST, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    decoder = {"decoder_input_ids": ids[:, :5]} if kind == "seq2seq" else {}
    cache = {} if kind == "masked" else {"use_cache": False}
    return {"input_ids": ids, "attention_mask": mask, **decoder, **cache}


def generated(model: Any, given: dict[str, Any], cache: str) -> torch.Tensor | type[Exception]:
    """The tokens that follow a prompt, greedily; or the kind of the error, as some models know no static cache."""
    asked = {name: given[name] for name in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    if "decoder_input_ids" in given:
        options["decoder_start_token_id"] = 1
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    try:
        tokens: torch.Tensor = model.generate(**asked, **options)
    except Exception as error:
        return type(error)
    return tokens


def same(found: Any, wanted: Any) -> bool:
    """Whether two outcomes are equal up to the rounding of float32."""
    if not isinstance(wanted, torch.Tensor) or not isinstance(found, torch.Tensor):
        return found is wanted
    largest = wanted.abs().max().item() if wanted.is_floating_point() else 0.0
    return torch.allclose(found, wanted, rtol=0.0, atol=1e-4 * largest, equal_nan=True)


@pytest.mark.parametrize(("kind", "name"), CASES)
@torch.no_grad()
def test_an_optimized_model_computes_what_the_plain_one_does(route: Any, kind: str, name: str) -> None:
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    warnings.simplefilter("ignore")
    try:
        plain = tiny(kind, name)
        heads = attended(lambda: plain(**prompt(kind, padded=True)))
    except Exception as error:
        if (kind, name) in ALWAYS:
            raise
        pytest.skip(f"no tiny model: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
    runtime = serving_all(route, shapes_of(plain) | {"attention": heads})
    ours = copy.deepcopy(plain)
    runtime.optimize(ours)
    for padded in (False, True):
        given = prompt(kind, padded=padded)
        wanted, found = (model(**given).logits for model in (plain, ours))
        assert same(found, wanted), f"logits, padded={padded}"
    counts = runtime.stats()["ops"]
    asked = sum(n for kinds in counts.get("attention", {}).values() for n in kinds.values())
    assert asked == 2 * len(heads), "each attention is counted, served or not"
    for cache in ("dynamic", "static") if kind != "masked" else ():
        given = prompt(kind, padded=True)
        wanted, found = (generated(model, given, cache) for model in (plain, ours))
        assert same(found, wanted), f"tokens with a {cache} cache"
    assert any(found["hits"] for found in runtime.stats()["ops"].values()), "nothing was served at all"
