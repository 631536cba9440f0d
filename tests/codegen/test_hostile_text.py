"""Two hundred hostile strings in each text field that reaches generated code: refused, or only inside literals."""

from __future__ import annotations

import dataclasses
import io
import json
import keyword
import re
import tokenize
from functools import lru_cache
from typing import Any

import pytest

from dks.codegen import select as selecting
from dks.codegen.cpp import render_header
from dks.codegen.lut import Lut
from dks.codegen.package import LOOKUP, check_package_name, render
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.codegen.templating import comment, docstring, environment
from dks.dispatch import pool
from dks.dispatch.environment import Environment
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement, _check_row
from dks.dispatch.sources import source_digest
from dks.dispatch.table import Group, Rule, Table
from dks.dispatch.tiles.unit import Unit
from tests.codegen.rows import ENVIRONMENT, row

PIECES = (
    *('"', "'", '"""', "'''", '\\"', "\\", "\\\\", "\n", "\r", "\r\n", "\\\n", "\0", "\x1b[2J", "\u2028", "\x0c"),
    *("*/", "/*", "//", "*/ int evil; /*", "??/", "??/\n", "??'", '??/"', "#include <x>", '")', '";', 'R"(', ')"'),
    *("{{ 7 * 7 }}", "{% raw %}", "{# x #}", "{{ ''.__class__ }}", "%s", "%n", "%(x)s", "{0}", "{x!r}", "{", "}"),
    *(
        "\u202e",
        "\u2066",
        "\u200b",
        "\ufeff",
        "\ud800",
        "\udfff",
        "é",
        "𝔘",
        "ａ",
        "$(id)",
        "`id`",
        "; rm",
        "../",
        "~",
    ),
    *("x" * 5000, "\t", " ", "", "none", "unknown", "#", "# coding: x", "\\N{DASH}", "\\x41", "\\u0041", "\\101"),
)
WRAPS = ("{}", "a{}", "{}\nimport os\nos.abort()\n#", '{}"""\nraise SystemExit\n"""')
STRINGS = list(dict.fromkeys(wrap.replace("{}", piece) for wrap in WRAPS for piece in PIECES))[:220]


@lru_cache
def digest(id: str) -> str:
    return source_digest(pool.kernels()[id])


def test_there_are_two_hundred() -> None:
    assert len(set(STRINGS)) >= 200


@pytest.fixture(autouse=True)
def _digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels' digests computed once: their sources stay as they are meanwhile."""
    monkeypatch.setattr(selecting, "source_digest", lambda kernel: digest(kernel.id))


@lru_cache(maxsize=8)
def python_shape(text: str) -> list[tuple[int, str]]:
    """Kinds of tokens, and the text of all that are no literals or comments."""
    quiet = (tokenize.STRING, tokenize.COMMENT)
    found = tokenize.generate_tokens(io.StringIO(text).readline)
    return [
        (token.type, "" if token.type in quiet else token.string) for token in found if token.type != tokenize.NL
    ]


_CPP = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.DOTALL)


@lru_cache(maxsize=8)
def cpp_shape(text: str) -> str:
    """What a C++ compiler sees of it: trigraphs (before C++17), continued lines, then no comments and literals."""
    text = text.replace("??/", "\\").replace("\\\n", "")
    return re.sub(r"\s+", " ", _CPP.sub(lambda match: match[0][0] * 2, text))


def json_shape(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: json_shape(value) for key, value in node.items()}
    return [json_shape(item) for item in node] if isinstance(node, list) else type(node).__name__


def shapes(files: dict[str, str]) -> dict[str, Any]:
    for file in ("__init__.py", "_table.py"):
        compile(files[file], file, "exec")
    return {
        **{file: python_shape(files[file]) for file in ("__init__.py", "_table.py")},
        "table.hpp": cpp_shape(files["table.hpp"]),
        "lut.json": json_shape(json.loads(files["lut.json"])),
    }


FIXED = (row("torch.linear", 100), row("torch.addmm", 50))


def all_rows(**change: Any) -> list[Measurement]:
    """Two candidates of one problem, the winner changed."""
    default, winner = FIXED
    return [default, dataclasses.replace(winner, **change)]


def generated(rows: list[Measurement]) -> dict[str, Any]:
    for one in rows:
        _check_row(one)
    lut = select(rows, Policy())
    return rendered(lut.to_json(), lut)


SEEN: dict[str, dict[str, Any]] = {}


def rendered(evidence: str, lut: Lut) -> dict[str, Any]:
    """The shapes of what a Lut is rendered to; of the same Lut, what they were."""
    if evidence not in SEEN:
        SEEN[evidence] = shapes(render(lut, "hostile"))
    return SEEN[evidence]


TEXTS = [
    field.name for field in dataclasses.fields(Measurement) if field.type == "str" and field.name != "environment"
]


@pytest.mark.parametrize("name", TEXTS)
def test_text_of_a_measurement_is_refused_or_harmless(name: str) -> None:
    harmless, seen = generated(all_rows()), 0
    for text in STRINGS:
        try:
            found = generated(all_rows(**{name: text}))
        except (BadInput, ValueError) as error:  # of _check_row, which read_rows makes a BadInput of
            assert not isinstance(error, UnicodeError) and str(error).isprintable(), (text, error)
            continue
        assert found == harmless, text
        seen += 1
    assert seen or name not in ("reason", "peak_note", "energy_note", "measured_at"), "free text is taken as it is"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Environment)])
def test_text_of_the_environment_is_refused_or_harmless(name: str) -> None:
    """Where it is read, and where it is rendered as if it had been read."""
    lut, taken = select(all_rows(), Policy()), 0
    harmless = shapes(render(lut, "hostile"))
    for text in STRINGS:
        try:
            taken += Environment.from_dict({**ENVIRONMENT.to_dict(), name: text}) is not None
        except ValueError as error:
            assert str(error).isprintable()
        odd = dataclasses.replace(lut, environment=dataclasses.replace(ENVIRONMENT, **{name: text}))
        assert shapes(render(odd, "hostile")) == harmless, text
    assert 0 < taken < len(STRINGS)


def test_a_package_s_name_is_refused_or_an_identifier() -> None:
    for text in STRINGS:
        try:
            check_package_name(text)
        except BadInput as error:
            assert str(error).isprintable()
        else:
            assert text.isidentifier() and not keyword.iskeyword(text)
            assert len(python_shape(f"{text} = 1")) == len(python_shape("x = 1"))


def test_a_policy_s_objective_is_refused() -> None:
    for text in STRINGS:
        with pytest.raises(BadInput) as error:
            Policy(objective=text)
        assert str(error.value).isprintable()


def test_text_of_a_table_is_refused_or_harmless_in_cpp() -> None:
    lookup = LOOKUP.read_text(encoding="utf-8")

    def header(candidate: str = "a", **names: str) -> str:
        given = {"op": "linear", "form": "direct", "trait": "dtype", "value": "float32", "dim": "n", **names}
        traits, statics = ((given["trait"], given["value"]),), ((given["dim"], 4),)
        group = Group(given["op"], given["form"], traits, statics, ((1,),), {64: (0,)})
        return cpp_shape(render_header("hostile", Table((Rule(candidate, 4),), (group,)), lookup))

    harmless = header()
    for text in STRINGS[::2]:
        assert header(text) == harmless, text
    for name in ("op", "form", "trait", "value", "dim"):
        for text in STRINGS:
            try:
                found = header(**{name: text})
            except ValueError as error:
                assert str(error).isprintable()
            else:
                assert re.fullmatch(r"[a-z0-9][a-z0-9_.]*", text) and found.count("namespace") > 1


def test_text_of_a_unit_is_harmless_in_c() -> None:
    template = environment().get_template("kernels.h.j2")

    def header(text: str) -> str:
        return cpp_shape(template.render(abi="", units=[Unit("dks_x", text, "softmax", "x.hpp", text)]))

    for text in STRINGS:
        assert header(text) == header("dks::X<1>"), text


def test_filters_keep_readable_text_as_it_is() -> None:
    assert docstring("GenuineIntel 6 85 7") == comment("GenuineIntel 6 85 7") == "GenuineIntel 6 85 7"
    for text in STRINGS:
        assert eval(f'"""{docstring(text)} """') == f"{text} ", text
