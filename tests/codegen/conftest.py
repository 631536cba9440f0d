"""What a build of a package compiles, once a session; tests of compiling ask dks.dispatch.native.build itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dks.codegen import package as packaging
from dks.dispatch.native import build


def kept_fast_path(folder: Path) -> str:
    """Does what ``compile_into`` does, with the binary of this session: the same sources give the same bytes."""
    binary, why = build.cached()
    if binary is not None:
        shutil.copy(binary, folder)
    return why


@pytest.fixture(autouse=True)
def _compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaging, "compile_into", kept_fast_path)
