"""A YAML file as plain data that knows its lines, and the one exception for all that is wrong with it."""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import yaml

from dks.dispatch.errors import BadInput

MAX_BYTES = 1 << 20  # of a config or a histogram; thousands of times what one needs
MAX_DEPTH = 16  # the form has 7 levels; a deeper file is an attack on the parser's stack
MAX_EVENTS = 10_000  # keys, values and brackets; PyYAML takes about a second for so many
MAX_FAULTS = 20  # shown at once

Where = tuple[str | int, ...]
"""A place in a document: keys and list positions from the top."""

_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]{0,29})\Z")
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+\Z")
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_.*-]{1,60}\Z")
_TAG = "tag:yaml.org,2002:"


class ConfigError(BadInput, ValueError):
    """All that is wrong with a config; for each fault ``FILE:LINE: subject: found X, expected Y[; step]``."""


class Document:
    """One YAML file.

    Mappings become dicts with text keys, sequences tuples, scalars None, bool, int, float or str.

    Attributes:
        path: as the user gave it.
        data: the whole file.
    """

    def __init__(self, path: Path) -> None:
        """Read ``path``.

        Raises:
            ConfigError: it can't be read, is no plain YAML, or repeats a key.
        """
        self.path = path
        self._lines: dict[Where, int] = {}
        self._faults: list[tuple[int, str]] = []
        self.data: Any = None
        root = self._parse()
        self.check()
        self.data = None if root is None else self._value(root, ())
        self.check()

    def fault(self, where: Where, text: str) -> None:
        """Note what is wrong at ``where``; ``text`` is "found X, expected Y[; next step]"."""
        known = next((where[:n] for n in range(len(where), 0, -1) if where[:n] in self._lines), ())
        self._note(self._lines.get(known, 1), _subject(where), text)

    def check(self) -> None:
        """Raise ConfigError if anything has been noted so far, in the order of lines."""
        if not self._faults:
            return
        texts = list(dict.fromkeys(text for _, text in sorted(self._faults, key=lambda fault: fault[0])))
        more = len(texts) - MAX_FAULTS
        raise ConfigError("\n".join(texts[:MAX_FAULTS] + ([f"... and {more} more"] if more > 0 else [])))

    def _note(self, line: int, subject: str, text: str) -> None:
        path = str(self.path) if str(self.path).isprintable() else repr(str(self.path))
        self._faults.append((line, f"{path}:{line}: {subject}: {text}"))

    def _parse(self) -> yaml.Node | None:
        try:
            text = read_text(self.path)
        except ValueError as error:
            self._note(1, "file", str(error) + _neighbours(self.path))
            return None
        try:
            if self._is_plain(text):
                node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
                return node
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            self._note(line, "YAML", f"found a syntax error ({error.problem}), expected a YAML mapping")
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self._note(line, "YAML", f"found the character {error.character:#x}, expected printable text")
        except (ValueError, OverflowError):  # from PyYAML's own int() and chr(), on directives and escapes
            self._note(1, "YAML", "found a number or an escape that is out of range, expected a YAML mapping")
        return None

    def _is_plain(self, text: str) -> bool:
        """Refuse, before anything recurses or is built, what a config has no use for."""
        depth = 0
        for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            odd = None
            if depth > MAX_DEPTH:
                odd = f"found more than {MAX_DEPTH} levels, expected at most 7"
            elif count > MAX_EVENTS:
                odd = f"found more than {MAX_EVENTS} values, expected at most that"
            elif getattr(event, "anchor", None):  # aliases carry it too
                odd = "found an anchor or alias, expected plain values; write the value out"
            elif getattr(event, "tag", None):
                odd = f"found the tag {shown(event.tag)}, expected plain values"
            if odd:
                self._note(event.start_mark.line + 1, "YAML", odd)
                return False
        return True

    def _value(self, node: yaml.Node, where: Where) -> object:
        self._lines.setdefault(where, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, where)
        if isinstance(node, yaml.SequenceNode):
            return tuple(self._value(item, (*where, i)) for i, item in enumerate(node.value))
        return self._scalar(node, where)

    def _mapping(self, node: yaml.MappingNode, where: Where) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or not key.value.isprintable():
                self._note(line, _subject(where), "found a key that is no plain text, expected a name")
                continue
            place = (*where, key.value)
            if key.value in found:
                first = self._lines[place]
                self._note(line, _subject(place), f"found it twice (first in line {first}), expected it once")
                continue
            self._lines[place] = line
            found[key.value] = self._value(value, place)
        return found

    def _scalar(self, node: yaml.Node, where: Where) -> object:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() in ("yes", "true", "on")
        # YAML 1.1 reads 010 as 8 and 1:30 as 90, and 1e-2 as text: none of these is what its writer means.
        if kind == "int" and _WHOLE.match(text):
            return int(text.replace("_", ""))
        if kind == "float" or (kind == "str" and node.style is None and _EXPONENT.match(text)):
            try:
                return float(text.replace("_", ""))
            except ValueError:
                kind = "int"
        if kind == "int":
            self.fault(where, f"found {shown(text)}, expected a decimal number of at most 30 digits")
            return None
        if not text.isprintable():
            self.fault(where, f"found {shown(text)}, expected one line of printable text")
        return str(text)


def read_text(path: Path) -> str:
    """The text of a regular file of at most MAX_BYTES, in UTF-8.

    Raises:
        ValueError: it is none; the message is "found X, expected Y".
    """
    if "\0" in str(path):
        raise ValueError("found a NUL in the name, expected a file")
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
            raise ValueError(f"found {kind}, expected a file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ValueError("found no such file, expected a file") from None
    except OSError as error:
        raise ValueError(f"found {error.strerror or error}, expected a readable file") from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"found more than {MAX_BYTES >> 20} MiB, expected at most that")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"found a byte that is no UTF-8 in line {line}, expected UTF-8 text") from None


def shown(value: object) -> str:
    """``value`` as a message shows it: one line, harmless, short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def unknown(name: str, allowed: Collection[str], step: str = "") -> str:
    """The text of a fault about a name; the next step is ``step`` or the nearest name that is allowed."""
    near = difflib.get_close_matches(name[:60], allowed, n=1)
    step = step or (f"did you mean {near[0]!r}?" if near else "")
    return f"found {shown(name)}, expected {one_of(allowed)}" + (f"; {step}" if step else "")


def one_of(names: Iterable[str]) -> str:
    """The names as a message lists them, cut after 12."""
    listed = list(names)
    return "one of " + ", ".join(listed[:12]) + (", ..." if len(listed) > 12 else "")


def _subject(where: Where) -> str:
    text = ""
    for part in where:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += "." + (part if _PLAIN_KEY.match(part) else shown(part))
    return text.removeprefix(".") or "config"


def _neighbours(path: Path) -> str:
    try:
        names = [other.name for other in path.parent.iterdir() if other.suffix in (".yaml", ".yml")]
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near and near[0] != path.name else ""
