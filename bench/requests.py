"""Requests of an embedding service: the docstrings of Python's standard library, in batches of 1 to 32."""

from __future__ import annotations

import ast
import inspect
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

LARGEST_BATCH = 32


@dataclass(frozen=True)
class Request:
    """One batch of texts that arrives together."""

    texts: tuple[str, ...]


def docstrings() -> list[str]:
    """Every docstring of the standard library's own modules, in the order of its files. Nothing is imported."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    found.append(inspect.cleandoc(text))
    return found


def requests(count: int, seed: int) -> list[Request]:
    """``count`` requests whose batch sizes spread evenly, in ratio, from 1 to 32; texts drawn at random."""
    rng = random.Random(seed)
    texts = docstrings()
    sizes = [round(LARGEST_BATCH ** (i / max(count - 1, 1))) for i in range(count)]
    return [Request(tuple(rng.sample(texts, size))) for size in sizes]
