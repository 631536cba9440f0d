"""The closed set of outcomes: whatever ``dispatch`` counts is in it, and nothing in it is never counted."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from dks.dispatch.reasons import HITS, LISTED, REASONS
from dks.dispatch.runtime import MATCH_NAMES, MISS_NAMES

DISPATCH = Path(__file__).parents[2] / "dispatch"
SERVING = ("*.py", "ops/*/serve.py", "ops/*/layers.py", "ops/*/models.py")
FILES = [path for places in SERVING for path in DISPATCH.glob(places) if path.name != "reasons.py"]


def texts(node: ast.expr | None) -> Iterator[str]:
    """The texts that an expression may be."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.IfExp():
            yield from (*texts(node.body), *texts(node.orelse))
        case ast.BoolOp():
            for value in node.values:
                yield from texts(value)


def outcomes(tree: ast.AST) -> Iterator[str]:
    """What a module objects with, counts, or blocks a plan with."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) if name.endswith("objection"):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Return):
                        yield from texts(inner.value)
            case ast.Call(func=ast.Attribute(attr="add" | "counter"), args=[_, last]):
                yield from texts(last)
            case ast.Call(func=ast.Attribute(attr="count"), args=[last]):
                yield from texts(last)
            case ast.Call(func=ast.Attribute(attr="_note"), args=[_, _, last]):
                yield from texts(last)
            case ast.Assign(targets=[ast.Name(id="reason")]):
                yield from texts(node.value)
            case ast.keyword(arg="blocked"):
                yield from texts(node.value)


def test_every_outcome_that_is_counted_is_in_the_set() -> None:
    used = {text for path in FILES for text in outcomes(ast.parse(path.read_text()))}
    assert len(used) > 15, "the walk finds them"
    assert used | {*MATCH_NAMES, *MISS_NAMES} <= {*HITS, *REASONS}


def test_every_outcome_of_the_set_can_be_counted() -> None:
    sources = "\n".join(path.read_text() for path in (*FILES, *DISPATCH.glob("cpp/*.cpp")))
    named = {name for name in (*HITS, *REASONS) if f'"{name}"' in sources}
    assert named | {*MATCH_NAMES, *MISS_NAMES} == {*HITS, *REASONS}


def test_each_is_said_once_in_a_sentence() -> None:
    assert tuple(HITS) == MATCH_NAMES and not set(HITS) & set(REASONS)
    said = [*HITS.values(), *REASONS.values()]
    assert len(set(said)) == len(said)
    assert all(len(text.split()) > 2 and not text.endswith(".") for text in said)
    assert set(LISTED) <= {*HITS, *REASONS}


def test_the_docs_have_the_set_as_it_is() -> None:
    text = (DISPATCH.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `") and not line.startswith("| `dks_")]
    assert rows == [f"| `{name}` | {said} |" for name, said in (*HITS.items(), *REASONS.items())]
