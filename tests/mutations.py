"""Damage for tests, the same for the same seed; and a watch on what runs meanwhile."""

from __future__ import annotations

import copy
import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COUNT = 10_000 if os.environ.get("DKS_SOAK") == "1" else 1_000
"""Mutants of each kind: a tenth in CI."""

RAW = (
    *("NaN", "-Infinity", "1e999", "9223372036854775808", "-1", "0.5", "null", "true", "[]", "{}", '""'),
    *("1" * 5000, "[" * 100_000, '{"a":' * 50_000, '"' + "x" * 300_000 + '"', '"\\ud800"', '"\\u0000"'),
    *('"../../etc/passwd"', '"manifest.json"', "\"__import__('os').abort()\"", '"unknown"', "2", "1e-400"),
)
"""Values to put in another's place, as JSON text."""

_MARK = "@raw@"
_RUNS = ("exec", "import", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")
_seen: list[str] | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _seen is not None and (event in _RUNS or event == "ctypes.dlopen"):
        _seen.append(f"{event} {args!r}"[:200])


@contextmanager
def nothing_runs() -> Iterator[None]:
    """No code is run, imported or unpickled, no library loaded and no program started inside."""
    global _seen  # noqa: PLW0603 - an audit hook stays for the life of the process
    if not getattr(sys, "_dks_watched", False):
        sys.addaudithook(_hook)
        sys._dks_watched = True  # type: ignore[attr-defined]
    _seen = []
    try:
        yield
    finally:
        found, _seen = _seen, None
    assert found == []


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut off, cut out, put in twice, moved, or overwritten."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(found) + 1), rng.randint(1, 40)
        kind = rng.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and rng.random() < 0.3:
            del found[at:]
        elif kind == 2:
            del found[at : at + size]
        elif kind == 3:
            other = rng.randrange(len(data))
            found[at:at] = data[other : other + size]
        elif kind == 4:
            other = rng.randrange(len(data))
            found[at : at + size] = data[other : other + size]
        else:
            found[at : at + rng.randint(0, 8)] = rng.randbytes(rng.randint(1, 8))
    return bytes(found)


def distort(data: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The same structure with a value exchanged, left out or put elsewhere; ``_MARK`` stands for raw text."""
    found = copy.deepcopy(data)
    for _ in range(rng.randint(1, 2)):
        places = [
            (node, key)
            for node in _nodes(found)
            for key in (list(node) if isinstance(node, dict) else range(len(node)))
        ]
        if not places:
            break
        node, key = rng.choice(places)
        kind = rng.randrange(4)
        if kind == 0:
            del node[key]
        elif kind == 1:
            other, at = rng.choice(places)
            node[key] = copy.deepcopy(other[at]) if other is not node and at in _keys(other) else 7
        elif kind == 2 and isinstance(node, dict):
            node[rng.choice(("", "x", "../a.py", "evil.so", "__init__.py", "version"))] = node[key]
        else:
            node[key] = _MARK
    return found


def raw(data: dict[str, Any], rng: random.Random) -> bytes:
    """Its text, with a hostile value at each mark, and sometimes a key twice."""
    text = json.dumps(data, indent=2)
    while f'"{_MARK}"' in text:
        text = text.replace(f'"{_MARK}"', rng.choice(RAW), 1)
    if rng.random() < 0.05:
        text = text.replace("{", '{"version": 2, "version": 2,', 1)
    return text.encode("utf-8", "surrogatepass")


def _nodes(node: Any) -> Iterator[Any]:
    if isinstance(node, (dict, list)):
        yield node
        for child in node.values() if isinstance(node, dict) else node:
            yield from _nodes(child)


def _keys(node: Any) -> Any:
    return node if isinstance(node, dict) else range(len(node))
