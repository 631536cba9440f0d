"""What a program says of itself before anything is compiled."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dks.dispatch.gpu import program
from dks.dispatch.gpu.program import Argument, Program

ADD = Program(
    symbol="dks_test_add",
    source="add.py",
    function="add",
    arguments=(Argument("x", "*bf16", 1), Argument("rows", "i32"), Argument("stride", "i32", 2)),
    constants=(("BLOCK", 128),),
    align=16,
    warps=4,
    stages=1,
    grid=((("rows", 128), ("", 3)), (), ()),
)


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(program, "SOURCES", tmp_path)
    program.source_of.cache_clear()
    (tmp_path / "add.py").write_text("from dks.dispatch.gpu.kernels.shared import cast\n")
    (tmp_path / "shared.py").write_text("def cast(): ...\n")
    return tmp_path


def test_alignment_in_bytes_becomes_divisors_of_arguments() -> None:
    assert ADD.divisible() == {0: 16, 2: 8}
    assert dataclasses.replace(ADD, align=2).divisible() == {0: 2}
    assert dataclasses.replace(ADD, align=1).divisible() == {}


def test_blocks_cover_their_sizes_and_stay_resident_if_told() -> None:
    assert ADD.blocks({"rows": 129}, 132) == (6, 1, 1)
    assert dataclasses.replace(ADD, resident=2).blocks({"rows": 128 * 1000}, 132) == (264, 1, 1)
    assert dataclasses.replace(ADD, resident=2).blocks({"rows": 1}, 132) == (3, 1, 1)


def test_a_digest_changes_with_all_that_decides_the_code(sources: Path) -> None:
    changed = {
        "symbol": "other",
        "function": "other",
        "arguments": ADD.arguments[:2],
        "constants": (("BLOCK", 64),),
        "align": 8,
        "warps": 8,
        "stages": 2,
        "grid": ((), (), ()),
        "resident": 1,
    }
    digests = {
        ADD.digest(),
        *(dataclasses.replace(ADD, **{name: value}).digest() for name, value in changed.items()),
    }
    assert len(digests) == 1 + len(changed)
    (sources / "shared.py").write_text("def cast(): pass\n")
    program.source_of.cache_clear()
    assert ADD.digest() not in digests
    program.source_of.cache_clear()
