"""Replaying recorded runs: fewer seconds, the same choices, and no device."""

from __future__ import annotations

from pathlib import Path

import pytest

from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement, read_run
from dks.profiler.config import load
from dks.profiler.replay import replay
from dks.profiler.sweep import run_sweep
from dks.profiler.timing import StoppingRule
from tests.profiler.fakes import FakeMachine

CONFIG = """
version: 1
name: record
operators:
  linear:
    bins: {m: {scheme: explicit, edges: [8, 64]}}
    problems:
      - {dims: {n: 32, k: 32}, traits: {dtype: float32, epilogue: gelu}}
measure: {racing: RACING, min_rounds: 30, max_rounds: 30, processes: 2, held_out: no}
"""


def record(folder: Path, racing: str) -> list[Measurement]:
    config = folder / "record.yaml"
    config.write_text(CONFIG.replace("RACING", racing))
    run_sweep(load(config), folder / "run", start=FakeMachine(noise=0.03).start)
    return read_run(folder / "run")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Measurement]:
    """Every candidate to the end."""
    return record(tmp_path_factory.mktemp("replay"), "no")


def test_racing_takes_fewer_seconds_and_chooses_as_the_record_says(rows: list[Measurement]) -> None:
    found = replay(rows, StoppingRule(10, 30, 99.0, 0.01))
    assert found.problems == 2 and found.cells >= 4
    assert found.saved.value > 1.5 and found.saved.low > 1
    assert found.kernel_s[0] < found.kernel_s[1] <= 1.001 * sum(sum(row.samples_ns) for row in rows) / 1e9
    assert 0 <= found.regret.value <= found.worst < 0.01
    again = replay(reversed(rows), StoppingRule(10, 30, 99.0, 0.01))
    assert again.kernel_s == pytest.approx(found.kernel_s)


def test_a_rule_that_looks_once_regrets(rows: list[Measurement]) -> None:
    careless = replay(rows, StoppingRule(2, 2, 99.0, 1.0))
    careful = replay(rows, StoppingRule(30, 30, 99.0, 1e-6))
    assert careless.kernel_s[1] < careful.kernel_s[1] / 5
    assert careless.same < careless.cells or careless.worst >= careful.worst


def test_a_run_that_was_raced_already_has_nothing_to_replay(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="racing: false"):
        replay(record(tmp_path, "yes"), StoppingRule())
