"""The way back: what serving missed is exported, swept as it is written, and served by evidence of its own."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dks.codegen.cli import main as codegen
from dks.dispatch.environment import Environment
from dks.dispatch.evidence import write_rows
from dks.dispatch.loader import import_package
from dks.dispatch.problem import Problem
from dks.profiler.cli import main as profile
from tests.codegen.rows import row
from tests.commands import run

TRAITS = {"dtype": "float32", "mask": "none", "causal": "no", "layout": "bshd"}
QUICK = "held_out: false, split: null, min_rounds: 6, max_rounds: 6, seconds: 0.05, processes: 1, max_processes: 1"
CALLS = (((2, 16, 16, 2), 5), ((2, 40, 40, 2), 3), ((2, 30, 16, 2), 4), ((1, 8, 8, 4), 7))
"""(b, q, kv, h), and how often: measured, past the last edge, nearest to it, and heads that the table lacks."""


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A run directory with one problem, as if measured here."""
    folder = tmp_path / "first"
    folder.mkdir()
    dims = {"b": 2, "q": 16, "kv": 16, "h": 2, "hkv": 2, "d": 32}
    problem = Problem.of("attention", TRAITS, dims)
    here = json.dumps(Environment.current().to_dict(), sort_keys=True)
    times = {"torch.sdpa": 50, "torch.matmul_attention": 90}
    write_rows(folder / "one.parquet", [row(id, us, problem, environment=here) for id, us in times.items()])
    return folder


def built(out: Path, name: str, *runs: Path) -> ModuleType:
    done = run(codegen, "build", *runs, "-o", out, "--name", name)
    assert done.returncode == 0, done.stderr
    return import_package(out / name)


def call(package: ModuleType) -> dict[str, dict[str, int]]:
    for (b, q, kv, h), times in CALLS:
        for _ in range(times):
            query, keys = torch.randn(b, q, h, 32).transpose(1, 2), torch.randn(b, kv, h, 32).transpose(1, 2)
            package.attention(query, keys, keys)
    found: dict[str, dict[str, int]] = package.stats()["ops"]["attention"]
    return found


def test_missed_calls_become_hits(first: Path, tmp_path: Path) -> None:
    package = built(tmp_path, "narrow", first)
    assert call(package) == {
        "hits": {"exact": 5, "nearest": 4},
        "fallbacks": {"out_of_range": 3, "unknown_shape": 7},
    }
    config = tmp_path / "misses.yaml"
    assert package.export_misses(config) == 3
    text = config.read_text()
    assert text.count("held_out: false, split: null") == 1
    config.write_text(text.replace("held_out: false, split: null", QUICK))  # a test has no minutes to measure

    done = run(profile, "run", config, "-o", tmp_path / "second")
    assert done.returncode == 0, done.stderr
    package = built(tmp_path, "wide", first, tmp_path / "second")
    assert call(package) == {"hits": {"exact": 19}, "fallbacks": {}}
    rules = json.loads((tmp_path / "wide" / "lut.json").read_text())["rules"]
    weights = {tuple(dim for _, dim in Problem.parse(rule["problem"]).dims[:4]): rule["weight"] for rule in rules}
    assert weights == {(2, 16, 16, 2): 1.0} | {shape: float(times) for shape, times in CALLS[1:]}
