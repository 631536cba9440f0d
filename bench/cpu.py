"""``make bench-cpu``: the generated CPU kernels against torch, oneDNN and the machine's own roofs, on one thread.

Each cell is measured in two halves (``bench.cells``): the candidates of its error class are picked in the first and
judged in the second. Ratios are medians of interleaved pairs; a row over several cells has their geometric mean, or
the worst of them. Weights rotate through copies beyond the private cache, each candidate's its own.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.table import Table as RichTable

from bench import peers
from bench.cells import BEST, OURS, Call, Cell, CellBench, Extra, Limits, Result, geomean
from bench.report import Row, environment_lines, finite, write_result
from bench.roofs import PEAKS, Roofs
from dks.dispatch import command_line, pool
from dks.dispatch.environment import cpu_flags
from dks.dispatch.intervals import Interval, geometric_mean
from dks.dispatch.kernel import Inputs
from dks.dispatch.problem import Precision, Problem
from dks.dispatch.tiles import build, library
from dks.profiler.compiling import compile_for

SHAPES = ((768, 768), (3072, 768), (768, 3072))  # (n, k): BERT-base's
WIDE = (4096, 4096)
KV = (128, 512, 1024, 4096)
PEAK, READ = "peak", "read"
BYTES = {Precision.EXACT: 4, Precision.BF16: 2, Precision.INT8: 1}  # of a weight
LEAST, MOST = 10, 200  # judged rounds
PICKING = 0.4  # of a cell's time


@dataclass(frozen=True)
class Claim:
    """A row to print: cells, whom they are compared with, and what the ratio should reach.

    Attributes:
        side: ``ours``, the fastest generated candidate of each cell; ``chosen``, the fastest of all.
        worst: whether the row is the worst of the cells instead of their geometric mean.
        note: what is to be known of it on this machine.
    """

    id: str
    workload: str
    cells: tuple[Cell, ...]
    peer: str
    target: float
    side: str = "ours"
    worst: bool = False
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0, help="for measuring, after compiling [240]")
    parser.add_argument("--only", default="", help="only rows whose id begins so")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("\n".join(environment_lines()))
    try:
        roofs: Roofs | None = Roofs()
    except RuntimeError as error:
        print(f"roofs: not measured: {error}")
        roofs = None
    wanted = [claim for claim in claims(roofs) if claim.id.startswith(options.only)]
    cells = list(dict.fromkeys(cell for claim in wanted for cell in claim.cells))
    compile_for([(cell.problem, candidate) for cell in cells for candidate in cell.candidates()], print)
    library.look_in(build.locate)
    found = measure_all(cells, options.seconds)
    report([row_of(claim, found) for claim in wanted], roof_rows(roofs))


def linear(m: int, shape: tuple[int, int], dtype: str, precision: Precision, *against: str, **more: object) -> Cell:
    """A cell of y = x @ weight.T + bias."""
    traits = {"dtype": dtype, "bias": "yes", "epilogue": "none"}
    problem = Problem.of("linear", traits, {"m": m, "n": shape[0], "k": shape[1]})
    return Cell(problem, precision, against, **more)  # type: ignore[arg-type]


def claims(roofs: Roofs | None) -> Iterator[Claim]:
    """Every row, in order; cells of one weight follow each other."""
    yield from bf16_linears(roofs)
    yield from int8_linears()
    yield from one_row(roofs)
    yield from fp32_linears()
    yield from rms_norms()
    yield from decoding()


def bf16_linears(roofs: Roofs | None) -> Iterator[Claim]:
    torch_linear, packed = "torch.linear", "mkldnn.linear_packed_bf16"
    if pool.kernels()[packed].unavailable() is not None:  # oneDNN multiplies bf16 with AVX-512 alone
        packed = "mkldnn.linear_packed_float32"
    flags = cpu_flags()
    note = "" if flags & {"amx_bf16", "avx512_bf16"} else "no AVX512_BF16 or AMX here: multiplied as fp32"
    rows = (2, 4, 8, 16, 32, 64, 128)
    cells = {
        (m, shape): linear(m, shape, "bfloat16", Precision.BF16, torch_linear, packed)
        for shape in SHAPES
        for m in rows
    }
    every, few = tuple(cells.values()), tuple(cell for (m, _), cell in cells.items() if m <= 16)
    yield Claim("bf16-linear", "bf16 linear, M 2 to 128", every, torch_linear, 2.2, note=note)
    yield Claim("bf16-linear-few-rows", "bf16 linear, M 2 to 16", few, torch_linear, 3.5, note=note)
    yield Claim("bf16-linear-packed", "bf16 linear, M 2 to 128", every, packed, 1.5, note=note)
    yield from shares_of_peak(roofs)
    tiny = tuple(linear(m, (64, 64), "bfloat16", Precision.BF16, torch_linear) for m in rows[1:])
    yield Claim("bf16-linear-tiny", "bf16 linear 64x64, M 4 to 128", tiny, torch_linear, 12.0, note=note)


def shares_of_peak(roofs: Roofs | None) -> Iterator[Claim]:
    """bf16 linears from the cache beside as many multiply-adds in registers."""
    peaks = roofs.peaks if roofs else ()
    if "amx_bf16" not in peaks:
        why = "not measurable here: no AMX bf16" if roofs else "not measurable here: no roofs"
        yield Claim("bf16-linear-of-amx-peak", "bf16 linear, M 64 and 128, in cache", (), PEAK, 0.5, note=why)
    if not roofs:
        return
    name = "amx_bf16" if "amx_bf16" in peaks else "fma_fp32"
    cells = tuple(
        linear(
            m, shape, "bfloat16", Precision.BF16,
            extras={PEAK: alone(partial(roofs.multiply_adds, name, m * shape[0] * shape[1]))}, warm=True,
        )
        for shape in SHAPES
        for m in (64, 128)
    )  # fmt: skip
    id = "bf16-linear-of-amx-peak" if name == "amx_bf16" else "bf16-linear-of-fp32-peak"
    note = f"share of the {name} peak"
    yield Claim(id, "bf16 linear, M 64 and 128, in cache", cells, PEAK, 0.5, note=note)


def int8_linears() -> Iterator[Claim]:
    note = "" if "avx512_vnni" in cpu_flags() else "no AVX512_VNNI here"
    if "amx_int8" not in cpu_flags():
        note = ", ".join(filter(None, (note, "no AMX here")))
    cells = tuple(
        linear(m, shape, "float32", Precision.INT8, BEST)
        for shape in (*SHAPES, WIDE)
        for m in (1, 2, 4, 8, 16, 32, 64, 128)
    )
    workload = "int8 linear, fp32 activations, M 1 to 128"
    yield Claim("int8-linear", workload, cells, BEST, 1.4, note=note)
    yield Claim("int8-linear-worst", workload, cells, BEST, 0.98, worst=True, note=note)


def one_row(roofs: Roofs | None) -> Iterator[Claim]:
    """M = 1 beside a plain read of as many bytes as the weight has."""
    for precision, dtype in (
        (Precision.EXACT, "float32"),
        (Precision.BF16, "bfloat16"),
        (Precision.INT8, "float32"),
    ):
        size = WIDE[0] * WIDE[1] * BYTES[precision]
        extras = {READ: alone(partial(roofs.read, size))} if roofs else {}
        cell = linear(1, WIDE, dtype, precision, extras=extras)
        words = f"{precision.value} weights 4096x4096, M 1"
        note = "share of the read bandwidth" if roofs else "not measurable here: no roofs"
        yield Claim(f"one-row-of-bandwidth-{precision.value}", words, (cell,), READ, 0.9, note=note)


def fp32_linears() -> Iterator[Claim]:
    cells = tuple(
        linear(m, shape, "float32", Precision.EXACT, BEST)
        for shape in SHAPES
        for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    )
    for side, words in (("ours", "generated"), ("chosen", "all candidates")):
        workload = f"fp32 linear, M 1 to 512, {words}"
        yield Claim(f"fp32-linear-{side}", workload, cells, BEST, 1.05, side)
        yield Claim(f"fp32-linear-{side}-worst", workload, cells, BEST, 0.98, side, worst=True)


def rms_norms() -> Iterator[Claim]:
    for dtype, precision, target in (
        ("float32", Precision.EXACT, 7.0),
        ("bfloat16", Precision.BF16, 9.0),
    ):
        traits = {"dtype": dtype, "affine": "yes", "residual": "no"}
        problem = Problem.of("rms_norm", traits, {"m": 512, "n": 4096})
        cell = Cell(problem, precision, ("torch.rms_norm",), {"F.layer_norm": peers.layer_norm})
        words = f"rms_norm 512x4096 {dtype}"
        yield Claim(f"rms-norm-{dtype}", words, (cell,), "torch.rms_norm", target)
        yield Claim(f"rms-norm-{dtype}-layer-norm", words, (cell,), "F.layer_norm", 1.1)


def decoding() -> Iterator[Claim]:
    gather, contiguous = "torch.paged_gather_sdpa", "SDPA, contiguous"
    cells = tuple(
        Cell(
            Problem.of(
                "paged_attention",
                {"dtype": "bfloat16"},
                {"b": b, "kv": kv, "h": 12, "hkv": 12, "d": 64, "page": 16},
            ),
            Precision.BF16,
            (gather,),
            {contiguous: peers.contiguous_attention},
            make_inputs=peers.full_length,
        )
        for b in (1, 8)
        for kv in KV
    )
    words = "paged decode, bf16, 12 heads of 64, KV 128 to 4096, B 1 and 8"
    yield Claim("paged-decode", words, cells, gather, 2.0)
    yield Claim("paged-decode-contiguous", words, cells, contiguous, 1.0)


def alone(make: Callable[[], Call]) -> Extra:
    """A peer that has no use for the problem's inputs."""

    def extra(_inputs: Inputs) -> Call:
        return make()

    return extra


def measure_all(cells: Sequence[Cell], seconds: float) -> Mapping[Cell, Result]:
    """Measure them one after the other; what is left of the time is shared by the cells that are left."""
    bench = CellBench(seed=1)
    found = {}
    end = time.monotonic() + seconds
    set_up = 0.0  # of the cell before: drawing, packing and checking
    for done, cell in enumerate(cells):
        start = time.monotonic()
        share = max(0.0, (end - start) / (len(cells) - done) - set_up)
        first, judged = Limits(PICKING * share, 4, MOST), Limits((1 - PICKING) * share, LEAST, MOST)
        result = found[cell] = bench.measure(cell, first, judged)
        set_up = max(0.0, time.monotonic() - start - sum(map(_seconds, (result.first, result.judged))))
        print(f"[{done + 1}/{len(cells)}] {cell}: {_in_words(result)}", flush=True)
    return found


def _seconds(ns: Mapping[str, Sequence[int]]) -> float:
    return sum(map(sum, ns.values())) / 1e9


def _in_words(result: Result) -> str:
    """Everybody who was judged with his time, the picked ones by their names."""
    roles: dict[str, list[str]] = {}
    for role, name in result.picked.items():
        roles.setdefault(name, []).append(role)
    shown = []
    for name in sorted(result.judged, key=result.us):
        role = f" ({', '.join(roles[name])})" if name in roles else ""
        shown.append(f"{name}{role} {result.us(name):.1f} us")
    text = ", ".join(shown)
    return "; ".join([text or "nobody ran", *(f"{name} left out: {why}" for name, why in result.lost.items())])


def row_of(claim: Claim, found: Mapping[Cell, Result]) -> Row:
    """The row of a claim. Cells in which a side was not measured are not in its figure; the note says so."""
    results = [found[cell] for cell in claim.cells]
    pairs = with_ratio(results, claim.peer, claim.side)
    notes = [claim.note] if claim.note else []
    if len(pairs) < len(results):
        notes.append(missing(claim, results))
    extra: dict[str, object] = {"side": claim.side, "cells": [cell_json(claim, result) for result in results]}
    shown: Interval | None = None
    if pairs:
        worst, lowest = min(pairs, key=lambda pair: pair[1].value)
        of = [worst] if claim.worst else [result for result, _ in pairs]
        shown = lowest if claim.worst else geomean([ratio for _, ratio in pairs])
        extra["worst"] = finite(lowest.value)
        extra["worst_cell"] = str(worst.cell)
        extra["peer_us"] = finite(geometric_mean([result.us(claim.peer) for result in of]))
        extra["ours_us"] = finite(geometric_mean([result.us(claim.side) for result in of]))
        if claim.side == "ours" and any(result.picked["chosen"] != result.picked["ours"] for result in of):
            extra["chosen_ratio"] = finite(geomean([r for _, r in with_ratio(of, claim.peer, "chosen")]).value)
    extra["note"] = "; ".join(notes)
    return Row(claim.id, claim.workload, claim.peer, shown, claim.target, extra)


def with_ratio(results: Sequence[Result], peer: str, side: str) -> list[tuple[Result, Interval]]:
    """The cells in which both were measured, with peer's time / side's."""
    ratios = [(result, result.ratio(peer, side)) for result in results]
    return [(result, ratio) for result, ratio in ratios if ratio is not None]


def cell_json(claim: Claim, result: Result) -> dict[str, object]:
    """One cell of a row, as the result file holds it."""
    ratio = result.ratio(claim.peer, claim.side)
    return {
        "problem": result.cell.problem.id,
        "peer": result.picked.get(claim.peer, claim.peer),
        "ours": result.picked.get("ours"),
        "chosen": result.picked.get("chosen"),
        "ratio": ratio and finite(ratio.value),
        "ci_low": ratio and finite(ratio.low),
        "ci_high": ratio and finite(ratio.high),
        "pairs": ratio and ratio.n,
        "peer_us": finite(result.us(claim.peer)),
        "ours_us": finite(result.us("ours")),
        "chosen_us": finite(result.us("chosen")),
        "left_out": dict(result.lost),
    }


def missing(claim: Claim, results: Sequence[Result]) -> str:
    """Which cells have no ratio, and why."""
    without = [result for result in results if result.ratio(claim.peer, claim.side) is None]
    where = f"in {len(without)} of {len(results)} cells"
    if all(result.ns(claim.side) is not None for result in without):
        return f"{claim.peer} did not run {where}"
    cell = without[0].cell
    what = f"{OURS}* kernel" if claim.side == "ours" else "kernel"
    return f"no {what} of {cell.problem.op} in class {cell.precision.value} ran {where}"


def roof_rows(roofs: Roofs | None) -> list[Row]:
    """What one core does at most, as rows without a ratio."""
    rows = []
    for name in PEAKS:
        here = roofs is not None and name in roofs.peaks
        value = 2e-9 * roofs.peak(name) if roofs is not None and here else None
        rows.append(_roof(name, "peak in registers, one core", value, "GFLOP/s"))
    for size in (2**24, 2**26):
        value = roofs.bandwidth(size) / 1e9 if roofs else None
        rows.append(_roof(f"read-{size // 2**20}-mib", f"sum of {size // 2**20} MiB, one core", value, "GB/s"))
    return rows


def _roof(name: str, workload: str, value: float | None, unit: str) -> Row:
    extra: dict[str, object] = {"value": None if value is None else finite(value), "unit": unit}
    return Row(f"roof-{name}", workload, "", None, None, extra)


def report(rows: Sequence[Row], roofs: Sequence[Row]) -> None:
    """Print the table and write runs/cpu/result.json."""
    table = RichTable(title="generated CPU kernels, one thread")
    for column in ("row", "workload", "peer"):
        table.add_column(column)
    for column in ("peer us", "ours us", "ratio [95 % CI]", "worst", "target", "met", "chosen"):
        table.add_column(column, justify="right")
    table.add_column("note")
    for row in rows:
        table.add_row(*_shown(row))
    table.add_section()
    for roof in roofs:
        value = roof.extra["value"]
        shown = "not here" if value is None else f"{value:.1f} {roof.extra['unit']}"
        table.add_row(roof.id, roof.workload, "", "", "", shown)
    command_line.print_table(table)
    print("us: geometric means over cells; chosen: the ratio of the fastest of all candidates, where it is another")
    print(f"written: {write_result('cpu', [*rows, *roofs])}")


def _shown(row: Row) -> tuple[str, ...]:
    def figure(name: str, digits: int) -> str:
        value = row.extra.get(name)
        return f"{value:.{digits}f}" if isinstance(value, float) and not math.isnan(value) else ""

    ratio: Interval | None = row.ratio
    met = "" if ratio is None or row.target is None else "yes" if ratio.value >= row.target else "no"
    return (
        row.id, row.workload, row.peer, figure("peer_us", 1), figure("ours_us", 1), str(ratio or "not measured"),
        figure("worst", 3), str(row.target), met, figure("chosen_ratio", 3), str(row.extra["note"]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
