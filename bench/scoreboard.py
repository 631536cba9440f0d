"""The demo's tables: latency, ratios with intervals, distance to the oracle, and what falls short."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from bench.contest import Contestant
from bench.report import Row, finite, write_result
from bench.requests import LARGEST_BATCH, Request
from dks.dispatch.intervals import Interval, geomean_ratio, ratio_of_means

BUCKETS = ((1, 1), (2, 4), (5, 8), (9, 16), (17, 32))
COSINE = {"dks-exact": 0.9999, "dks-bf16": 0.999}
ORACLE_GAP = 0.05
EXPECTED = ("static-fp32", "static-bf16", "compiled", "dks-exact", "dks-bf16", "oracle-exact", "oracle-bf16")
COLUMNS = (
    *("row", "mean", "p50", "p99", "vs fp32, mean", "vs fp32, each", "vs its static, mean", "vs its static, each"),
    *("to oracle, mean and each", "min cosine", "hits"),
)


def report(
    console: Console, contestants: Sequence[Contestant], served: Sequence[Request], order: Sequence[int]
) -> bool:
    """Print the tables and what falls short, write runs/demo/result.json; returns whether all was measured."""
    by_id = {contestant.id: Scored(contestant, order) for contestant in contestants}
    table = RichTable(
        title=f"all-MiniLM-L6-v2, {len(served)} requests of 1 to {LARGEST_BATCH} texts, served "
        f"{len(order) // len(served)} times each; latency in ms",
        caption="Ratios and intervals compare each request's median over the passes. mean: ratio of mean "
        "latencies, where long requests count most; each: geometric mean over requests.",
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "row" else "right")
    rows = []
    notes = [f"{id} was not measured: see above" for id in EXPECTED if id not in by_id]
    for scored in by_id.values():
        row, cells = summarize(scored, by_id)
        rows.append(row)
        table.add_row(*cells)
        notes += shortcomings(scored, row)
    console.print(table)
    if "static-fp32" in by_id:
        buckets, bucket_rows, bucket_notes = by_batch_size(by_id, served)
        console.print(buckets)
        rows += bucket_rows
        notes += bucket_notes
    for note in notes:
        console.print(f"[bold]falls short:[/bold] {escape(note)}", highlight=False)
    if not notes:
        console.print("every target of this table is met", highlight=False)
    console.print(f"written: {write_result('demo', rows, notes)}", highlight=False)
    return all(id in by_id for id in EXPECTED)


class Scored:
    """A contestant with its times by request: what a neighbour did to one pass does not count."""

    def __init__(self, contestant: Contestant, order: Sequence[int]) -> None:
        self.contestant = contestant
        by_request: dict[int, list[float]] = defaultdict(list)
        for index, ns in zip(order, contestant.times, strict=True):
            by_request[index].append(ns)
        self.medians = [median(by_request[index]) for index in sorted(by_request)]


def summarize(scored: Scored, by_id: Mapping[str, Scored]) -> tuple[Row, list[str]]:
    """One row of the table and of the result."""
    contestant = scored.contestant
    ordered = sorted(contestant.times)
    mean, p50, p99 = (
        sum(ordered) / len(ordered) / 1e6,
        ordered[len(ordered) // 2] / 1e6,
        ordered[-(-99 * len(ordered) // 100) - 1] / 1e6,
    )
    own, each = (ratio(by_id, contestant.peer, scored, of) for of in (ratio_of_means, geomean_ratio))
    fp32, fp32_each = (ratio(by_id, "static-fp32", scored, of) for of in (ratio_of_means, geomean_ratio))
    gap, gap_each = (_gap(ratio(by_id, contestant.oracle, scored, of)) for of in (ratio_of_means, geomean_ratio))
    hits = hit_rate(contestant)
    extra: dict[str, object] = {
        "mean_ms": round(mean, 3),
        "p50_ms": round(p50, 3),
        "p99_ms": round(p99, 3),
        "samples": len(ordered),
        "dtype": contestant.dtype,
        "cosine_min": round(contestant.cosine, 7),
        "hit_rate": hits,
        "oracle_gap": gap and round(gap.value, 4),
        "oracle_gap_each": gap_each and round(gap_each.value, 4),
        "each": _ends(each),
        "vs_static_fp32": _ends(fp32),
        "vs_static_fp32_each": _ends(fp32_each),
    }
    workload = f"all-MiniLM-L6-v2, docstrings in batches of 1 to {LARGEST_BATCH}, mean latency"
    row = Row(contestant.id, workload, contestant.peer or "itself", own, contestant.target, extra)
    cells = [
        f"{contestant.label} ({contestant.dtype})",
        *(f"{figure:.1f}" for figure in (mean, p50, p99)),
        *("-" if interval is None else str(interval) for interval in (fp32, fp32_each, own, each)),
        "-" if gap is None or gap_each is None else f"{gap.value:+.1%}, {gap_each.value:+.1%}",
        f"{contestant.cosine:.6f}",
        "-" if hits is None else f"{hits:.1%}",
    ]
    return row, cells


def ratio(
    by_id: Mapping[str, Scored],
    peer: str | None,
    ours: Scored,
    of: Callable[[Sequence[float], Sequence[float]], Interval],
) -> Interval | None:
    """Time of ``peer`` over that of ``ours``, from pairs; None for itself or a peer that failed."""
    if peer is None or peer == ours.contestant.id or peer not in by_id:
        return None
    return of(by_id[peer].medians, ours.medians)


def _gap(of_oracle: Interval | None) -> Interval | None:
    """How much longer than the oracle: 0.05 is 5 % behind."""
    if of_oracle is None:
        return None
    value, low, high = (1 / x - 1 for x in (of_oracle.value, of_oracle.high, of_oracle.low))
    return Interval(value, low, high, of_oracle.n)


def _ends(interval: Interval | None) -> list[float | None] | None:
    return None if interval is None else [finite(x) for x in (interval.value, interval.low, interval.high)]


def hit_rate(contestant: Contestant) -> float | None:
    """Share of dispatched calls that found a rule, in this run."""
    if contestant.stats is None:
        return None
    ops = contestant.stats()["ops"].values()
    hits = sum(sum(op["hits"].values()) for op in ops)
    rest = sum(sum(op["fallbacks"].values()) for op in ops)
    return round(hits / (hits + rest), 4) if hits + rest else None


def shortcomings(scored: Scored, row: Row) -> list[str]:
    """What this row promised and did not show, in words."""
    notes = []
    contestant = scored.contestant
    gap, least = row.extra["oracle_gap"], COSINE.get(contestant.id)
    if row.target is not None and (row.ratio is None or row.ratio.value < row.target):
        notes.append(f"{contestant.label}: mean latency {row.ratio} of {row.peer}, expected {row.target}")
    if contestant.oracle is not None and not (isinstance(gap, float) and gap <= ORACLE_GAP):
        notes.append(f"{contestant.label}: {gap} behind the oracle in the mean, expected at most {ORACLE_GAP}")
    if least is not None and not contestant.cosine >= least:
        notes.append(f"{contestant.label}: smallest cosine {contestant.cosine:.6f}, expected {least}")
    return notes


def by_batch_size(by_id: Mapping[str, Scored], served: Sequence[Request]) -> tuple[RichTable, list[Row], list[str]]:
    """Ratios by batch size, each request alike: DKS exact may not lose to static fp32 at any."""
    table = RichTable(title="by batch size: geometric mean of each request's ratio to static fp32")
    ours = [by_id[id] for id in ("static-bf16", "compiled", "dks-exact", "dks-bf16") if id in by_id]
    for column in ("texts", "requests", "static fp32 ms", *(scored.contestant.label for scored in ours)):
        table.add_column(column, justify="right")
    rows, notes = [], []
    static = by_id["static-fp32"].medians
    for low, high in BUCKETS:
        picked = [i for i, request in enumerate(served) if low <= len(request.texts) <= high]
        if not picked:
            continue
        peer = [static[i] for i in picked]
        name = f"{low} to {high}" if low < high else str(low)
        cells = [name, str(len(picked)), f"{sum(peer) / len(peer) / 1e6:.1f}"]
        for scored in ours:
            interval = geomean_ratio(peer, [scored.medians[i] for i in picked])
            cells.append(f"{interval.value:.3f}")
            id = scored.contestant.id
            rows.append(Row(f"{id}-batch-{low}-{high}", f"batches of {name}", "static-fp32", interval))
            if id == "dks-exact" and interval.value < 1.0:
                notes.append(f"DKS exact is slower than static fp32 at batches of {name}: {interval.value:.3f}")
        table.add_row(*cells)
    return table, rows, notes
