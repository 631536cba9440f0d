"""``make bench-cpu``: its halves are separate, its peers answer what they should, its rows say what was run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

from bench import cpu, peers, report
from bench.cells import BEST, Cell, CellBench, Contestant, Limits, Result, geomean, pick
from bench.roofs import Roofs
from dks.dispatch import pool
from dks.dispatch.intervals import Interval
from dks.dispatch.kernel import relative_error
from dks.dispatch.problem import Precision, Problem

FEW = Limits(0.0, 6, 6)
TINY = (32, 32)


def made(judged: Mapping[str, list[int]], cell: Cell | None = None) -> Result:
    """A cell as if measured: the first half is the judged one backwards."""
    first = {name: ns[::-1] for name, ns in judged.items()}
    return Result(cell or cpu.linear(1, TINY, "float32", Precision.EXACT, BEST), pick(first), first, judged, {})


def test_a_cell_picks_in_one_half_and_judges_in_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which each call lasts as long as its number: no two samples are equal."""
    ticks = iter(range(10**6))

    def time(self: Contestant) -> int:
        return 1000 + next(ticks)

    monkeypatch.setattr(Contestant, "time", time)
    cell = cpu.linear(2, TINY, "float32", Precision.EXACT, BEST, "torch.linear")
    found = CellBench(seed=1).measure(cell, FEW, Limits(0.0, 7, 7))
    first, judged = ({t for ns in half.values() for t in ns} for half in (found.first, found.judged))
    assert max(first) < min(judged), "a sample of the first half was judged"
    assert found.lost == {}
    assert {len(ns) for ns in found.first.values()} == {8}  # two to see who is near, and six
    assert {len(ns) for ns in found.judged.values()} == {7}
    assert {*found.picked.values(), "torch.linear"} == set(found.judged)
    assert found.picked["chosen"] == min(found.first, key=lambda name: median(found.first[name]))


def test_the_luckiest_of_the_first_half_is_judged_by_the_second() -> None:
    picked = pick({"tile.a": [10, 10], "tile.b": [20, 20], "torch.linear": [15, 15]})
    assert picked == {"ours": "tile.a", "chosen": "tile.a", BEST: "torch.linear"}
    judged = {"tile.a": [30] * 6, "torch.linear": [15] * 6}
    cell = cpu.linear(1, TINY, "float32", Precision.EXACT, BEST)
    result = Result(cell, picked, {"tile.a": [10, 10], "torch.linear": [15, 15]}, judged, {})
    ratio = result.ratio(BEST, "ours")
    assert ratio is not None and ratio.value == 0.5


def test_only_the_class_takes_part_and_what_is_wrong_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(*_: object) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: torch.zeros((*x.shape[:-1], TINY[0]))

    kernels = dict(pool.kernels())
    kernels["torch.addmm"] = replace(kernels["torch.addmm"], bind=bind)
    monkeypatch.setattr(pool, "kernels", lambda: kernels)
    cell = cpu.linear(2, TINY, "float32", Precision.EXACT, BEST)
    found = CellBench(seed=1).measure(cell, FEW, FEW)
    assert "error" in found.lost["torch.addmm"] and "torch.addmm" not in found.first
    classes = {kernels[name.partition("/")[0]].precision["float32"] for name in found.first}
    assert classes == {Precision.EXACT}


def test_a_row_over_cells_and_its_worst() -> None:
    cells = [cpu.linear(m, TINY, "float32", Precision.EXACT, BEST) for m in (1, 2, 4)]
    found = {
        cells[0]: made({"tile.a": [10] * 8, "torch.linear": [40] * 8}, cells[0]),
        cells[1]: made({"tile.a": [10] * 8, "torch.linear": [5] * 8}, cells[1]),
        cells[2]: made({"torch.linear": [5] * 8}, cells[2]),
    }

    def row(side: str = "ours", worst: bool = False) -> dict[str, object]:
        return cpu.row_of(cpu.Claim("x", "words", tuple(cells), BEST, 1.4, side, worst), found).to_json()

    ours = row()
    assert ours["ratio"] == pytest.approx(math.sqrt(4 * 0.5), rel=1e-3)
    assert ours["worst"] == 0.5 and "m=2" in str(ours["worst_cell"])
    assert ours["chosen_ratio"] == 2.0  # where ours is slower, torch's own was chosen
    assert ours["note"] == "no tile.* kernel of linear in class exact ran in 1 of 3 cells"
    assert row(worst=True)["ratio"] == 0.5 and row(worst=True)["ours_us"] == 0.01
    assert row("chosen")["ratio"] == pytest.approx(4 ** (1 / 3), rel=1e-3)


def test_nobody_on_our_side_is_said_and_no_error() -> None:
    cell = cpu.linear(1, TINY, "float32", Precision.EXACT, "torch.linear")
    row = cpu.row_of(
        cpu.Claim("x", "words", (cell,), "torch.linear", 2.0), {cell: made({"torch.linear": [5] * 8}, cell)}
    )
    assert row.ratio is None and "no tile.* kernel of linear in class exact" in str(row.extra["note"])
    empty = cpu.row_of(cpu.Claim("y", "words", (), cpu.PEAK, 0.5, note="not measurable here"), {})
    assert empty.ratio is None and empty.extra["note"] == "not measurable here"


def test_the_interval_of_a_geometric_mean() -> None:
    one = geomean([Interval(2.0, 1.8, 2.2, 10)])
    assert (one.value, one.low, one.high) == pytest.approx((2.0, 1.8, 2.2))
    four = geomean([Interval(2.0, 1.8, 2.2, 10)] * 4)
    assert math.log(four.value / four.low) == pytest.approx(math.log(2.0 / 1.8) / 2)
    assert geomean([Interval(2.0, -math.inf, math.inf, 3)]).low == -math.inf


def test_the_result_file_of_a_tiny_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    cell = cpu.linear(2, TINY, "float32", Precision.EXACT, BEST, "torch.linear")
    result = CellBench(seed=1).measure(cell, FEW, FEW)
    rows = [cpu.row_of(cpu.Claim("a", "words", (cell,), "torch.linear", 1.05), {cell: result})]
    cpu.report(rows, cpu.roof_rows(None))
    written = json.loads((tmp_path / "runs" / "cpu" / "result.json").read_text())
    assert {"command", "environment", "commit", "rows"} <= written.keys()
    first = written["rows"][0]
    assert first["id"] == "a" and first["target"] == 1.05 and first["pairs"] == 6
    assert first["ci_low"] <= first["ratio"] <= first["ci_high"]
    assert first["ratio"] == first["cells"][0]["ratio"]
    roofs = [row for row in written["rows"] if row["id"].startswith("roof-")]
    assert roofs and all(row["ratio"] is None and row["value"] is None for row in roofs)
    assert "torch.linear" in capsys.readouterr().out


@pytest.mark.parametrize("kv", [17, 48])
def test_the_contiguous_peer_attends_to_the_same_keys(kv: int) -> None:
    dims = {"b": 2, "kv": kv, "h": 4, "hkv": 2, "d": 16, "page": 16}
    problem = Problem.of("paged_attention", {"dtype": "float32"}, dims)
    inputs = peers.full_length(problem, torch.Generator().manual_seed(0), "normal")
    answer = peers.contiguous_attention(inputs)()
    assert isinstance(answer, torch.Tensor)
    assert relative_error(answer, pool.operator("paged_attention").reference(problem, inputs)) < 1e-5


def test_roofs_are_of_this_machine() -> None:
    try:
        roofs = Roofs()
    except RuntimeError as error:
        pytest.skip(str(error))
    assert roofs.multiply_adds("fma_fp32", 1000)() == 0
    assert 1e9 < roofs.peak("fma_fp32") < 1e12
    assert 1e8 < roofs.bandwidth(2**22) < 1e12
    with pytest.raises(ValueError, match="found 100 bytes, expected a multiple of 512"):
        roofs.read(100)
