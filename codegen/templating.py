"""The one Jinja environment that all templates share."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import jinja2

TEMPLATES = Path(__file__).parent / "templates"


@lru_cache
def environment() -> jinja2.Environment:
    """Templates of ``codegen/templates``: a name that is not given is an error, and nothing is escaped.

    Filters:
        literal, cstring, docstring, comment: see the functions of those names; the first is ``ascii``.
    """
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES, encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the output is source code; what is not ours goes through a filter of its own
    )
    made.filters["literal"] = ascii  # of Python
    made.filters["cstring"] = cstring
    made.filters["docstring"] = docstring
    made.filters["comment"] = comment
    return made


def cstring(text: str) -> str:
    """``text`` as a C or C++ string literal of its UTF-8 bytes, quotes included.

    Only printable ASCII stands as itself, so no text can end the literal, continue its line or reorder what
    a reader sees. A lone surrogate keeps its three bytes.
    """
    return '"' + "".join(_escaped(byte) for byte in text.encode("utf-8", "surrogatepass")) + '"'


def docstring(text: str) -> str:
    """``text`` inside a Python literal in triple double quotes: printable ASCII, which can't end it."""
    return ascii(text)[1:-1].replace("\\'", "'").replace('"', '\\"')


def comment(text: str) -> str:
    """``text`` inside a C comment of either kind: printable ASCII, which can't end it or continue its line."""
    return ascii(text)[1:-1].replace("\\", "/").replace("*/", "* /").replace("?", ".")


def _escaped(byte: int) -> str:
    # Octal, because a hexadecimal escape takes in the digits behind it; `?`, because two of them may start
    # a trigraph.
    if 0x20 <= byte < 0x7F and byte not in b'"\\?':
        return chr(byte)
    return f"\\{byte:03o}"
