"""Who may import whom: dispatch nothing of ours, profiler and codegen only dispatch, nobody a bare folder."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY = {"dispatch": {"dispatch"}, "profiler": {"profiler", "dispatch"}, "codegen": {"codegen", "dispatch"}}
FILES = [
    pytest.param(folder, path, id=str(path.relative_to(ROOT)))
    for folder in MAY
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it; relative ones are refused."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_there_is_something_to_check() -> None:
    assert {param.values[0] for param in FILES} == set(MAY)


@pytest.mark.parametrize(("folder", "path"), FILES)
def test_imports_stay_in_their_layer(folder: str, path: Path) -> None:
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in MAY, f"{path}: bare import of {name} makes a second copy"
        assert parts[0] not in ("tests", "bench"), f"{path}: imports {name}"
        if parts[0] == "dks":
            assert parts[1] in MAY[folder], f"{path}: {folder} may not import {name}"


@pytest.mark.parametrize(("folder", "path"), [p for p in FILES if "ops" in p.values[1].parts])
def test_kernels_stand_on_torch_alone(folder: str, path: Path) -> None:
    """Kernels of one operator know nothing of another's, and of no library but torch."""
    op = path.relative_to(ROOT / folder / "ops").parts[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[:3] == ["dks", "dispatch", "ops"] and path.parent.name != "ops":
            assert parts[3] == op, f"{path}: imports {name}"
        # Attention registers with transformers where a model of its has been loaded.
        elif parts[0] not in ("dks", "torch", "transformers", "__future__"):
            assert parts[0] in sys.stdlib_module_names, f"{path}: imports {name}"
