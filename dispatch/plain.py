"""Untrusted text read as data: strict JSON, and the table of a generated package. Nothing in it is run."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from typing import Any

from dks.dispatch.errors import BadInput
from dks.dispatch.problem import Candidate
from dks.dispatch.table import Group, Rule, Table

MAX_TEXT = 16 * 2**20
"""Most bytes of a file that is parsed: a table of a thousand shapes takes one mebibyte."""

MAX_DIGITS = 20  # every whole number of ours fits 64 bits


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """An object in JSON as the standard has it (RFC 8259): no NaN, no key twice, no text that is not Unicode.

    Args:
        what: the subject of messages, such as the file's path.

    Raises:
        BadInput: it is no such object, or its size, depth or numbers are none of ours.
    """
    if len(data) > MAX_TEXT:
        raise BadInput(f"{what}: found {len(data)} bytes, expected at most {MAX_TEXT}")
    try:
        found = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_once,
            parse_constant=_refuse,
            parse_int=_whole,
        )
        # Infinities, as 1e999 makes them, and halves of a surrogate pair are refused by the way back.
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{what}: found text that is not JSON ({in_words(error)}), expected an object") from None
    if not isinstance(found, dict):
        raise BadInput(f"{what}: found {type(found).__name__}, expected an object in JSON")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"found {name}")


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def in_words(error: BaseException) -> str:
    """An error's kind and first line, printable: what it quotes may be anything, and this goes to a terminal."""
    first = (str(error) or "no message").splitlines()[0][:200]
    return f"{type(error).__name__}: {ascii(first)[1:-1]}"


def parse_table(data: bytes, what: str) -> Table:
    """The table in the text of a ``_table.py``: one assignment of literals to ``TABLE``.

    It is read, not run, and no compiled form of it is looked for: what comes back is what these bytes say.

    Raises:
        BadInput: it holds anything else, or a table that could send a call to the wrong kernel.
    """
    if len(data) > MAX_TEXT:
        raise BadInput(f"{what}: found {len(data)} bytes, expected at most {MAX_TEXT}")
    try:
        table = _value(_assigned(ast.parse(data)))
        if not isinstance(table, Table):
            raise ValueError(f"TABLE is {type(table).__name__}")
    # Python's parser gives up on what is nested too deeply with either of the last two.
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise BadInput(
            f"{what}: found no table ({in_words(error)}), expected that of dks-codegen; build the package again"
        ) from None
    return table


def _assigned(module: ast.Module) -> ast.expr:
    """What TABLE is, in a module of a docstring, the one import and the one assignment."""
    match module.body:
        case [
            ast.Expr(ast.Constant(str())),
            ast.ImportFrom("dks.dispatch.table", _, 0),
            ast.Assign([ast.Name("TABLE")], value),
        ]:
            return value
    raise ValueError("other statements than the assignment of TABLE")


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Call(ast.Name(name), args, keywords) if name in _MADE:
            return _MADE[name]([_value(arg) for arg in args], {str(k.arg): _value(k.value) for k in keywords})
        case ast.Tuple(items):
            return tuple(_value(item) for item in items)
        case ast.Dict(keys, values):
            return {_value(k): _value(v) for k, v in zip(keys, values, strict=True) if k is not None}
        case ast.Constant(str() as text):
            return text
        case ast.Constant(value) if type(value) is int:
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(1)):  # a cell without a rule
            return -1
    raise ValueError(f"found {type(node).__name__} in line {node.lineno}")


def _rule(args: list[Any], more: Mapping[str, Any]) -> Rule:
    candidate, align = args
    if more or not isinstance(candidate, str) or not isinstance(align, int):
        raise ValueError(f"found a rule of {candidate!r} and {align!r}")
    Candidate.parse(candidate)
    return Rule(candidate, align)


def _group(args: list[Any], more: Mapping[str, Any]) -> Group:
    group = Group(*args, **more)
    fields = (
        _all(str, (group.op, group.form)),
        _pairs(group.traits, str),
        _pairs(group.statics, int),
        isinstance(group.edges, tuple) and all(_all(int, edges) for edges in group.edges),
        isinstance(group.cells, dict) and _all(int, tuple(group.cells)),
        isinstance(group.cells, dict) and all(_all(int, cells) for cells in group.cells.values()),
    )
    if not all(fields):
        raise ValueError("found a group with fields of other types")
    return group


def _all(kind: type, items: object) -> bool:
    return isinstance(items, tuple) and all(type(item) is kind for item in items)


def _pairs(items: object, kind: type) -> bool:
    return isinstance(items, tuple) and all(
        isinstance(item, tuple) and len(item) == 2 and type(item[0]) is str and type(item[1]) is kind
        for item in items
    )


def _table(args: list[Any], more: Mapping[str, Any]) -> Table:
    if args or set(more) != {"rules", "groups"}:
        raise ValueError("found a table of something else than rules and groups")
    if not _all(Rule, more["rules"]) or not _all(Group, more["groups"]):
        raise ValueError("found something else among the rules or groups")
    return Table(**more)


_MADE: Mapping[str, Callable[[list[Any], Mapping[str, Any]], Any]] = {
    "Rule": _rule,
    "Group": _group,
    "Table": _table,
}


def parse_evidence(data: bytes, what: str, rules: int) -> list[Mapping[str, Any]]:
    """The evidence of each rule, from the text of a ``lut.json``.

    Args:
        rules: how many rules the table has.

    Raises:
        BadInput: it is no Lut, or one of another table.
    """
    found = parse_json(data, what).get("rules")
    if not isinstance(found, list) or not all(isinstance(rule, dict) for rule in found) or len(found) != rules:
        raise BadInput(f"{what}: found no evidence of {rules} rules, expected it as dks-codegen writes it")
    return found
