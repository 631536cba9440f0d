"""The demo's tables: latency, ratios with intervals, distance to the oracle, and what falls short."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table as RichTable

from bench.contest import Contestant
from bench.report import Row, write_result
from bench.requests import Request
from dks.dispatch.intervals import Interval, geomean_ratio, ratio_of_means

BUCKETS = ((1, 1), (2, 4), (5, 8), (9, 16), (17, 32))
COSINE = {"dks-exact": 0.9999, "dks-bf16": 0.999}
ORACLE_GAP = 0.05
COLUMNS = (
    "row",
    "mean",
    "p50",
    "p99",
    "mean vs fp32 [95 % CI]",
    "mean vs its static",
    "per request vs its static",
    "to oracle",
    "min cosine",
    "hits",
)
"""``mean vs``: ratio of mean latencies, where long requests count most; ``per request``: geometric mean of the
pairs' ratios, where each request counts alike."""


def report(
    console: Console, contestants: Sequence[Contestant], served: Sequence[Request], order: Sequence[int]
) -> None:
    """Print the table and its short-comings, and write runs/demo/result.json."""
    by_id = {contestant.id: contestant for contestant in contestants}
    table = RichTable(title=f"all-MiniLM-L6-v2, {len(order)} requests of 1 to 32 texts, latency in ms")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "row" else "right")
    rows, notes = [], []
    for contestant in contestants:
        row, cells = summarize(contestant, by_id)
        rows.append(row)
        table.add_row(*cells)
        notes += shortcomings(contestant, row)
    console.print(table)
    buckets, bucket_rows, bucket_notes = by_batch_size(by_id, served, order)
    console.print(buckets)
    notes += bucket_notes
    for note in notes:
        console.print(f"[bold]falls short:[/bold] {note}", highlight=False)
    if not notes:
        console.print("every target of this table is met", highlight=False)
    console.print(f"written: {write_result('demo', [*rows, *bucket_rows], notes)}", highlight=False)


def summarize(contestant: Contestant, by_id: Mapping[str, Contestant]) -> tuple[Row, list[str]]:
    ordered = sorted(contestant.times)
    mean, p50, p99 = (
        sum(ordered) / len(ordered) / 1e6,
        ordered[len(ordered) // 2] / 1e6,
        ordered[-(-99 * len(ordered) // 100) - 1] / 1e6,
    )
    own = ratio(by_id, contestant.peer, contestant)
    fp32 = ratio(by_id, "static-fp32", contestant)
    each = ratio(by_id, contestant.peer, contestant, geomean_ratio)
    gap = ratio(by_id, contestant.oracle, contestant, geomean_ratio)
    oracle_gap = None if gap is None else round(1 / gap.value - 1, 4)
    hits = hit_rate(contestant)
    extra: dict[str, object] = {
        "mean_ms": round(mean, 3),
        "p50_ms": round(p50, 3),
        "p99_ms": round(p99, 3),
        "cosine_min": round(contestant.cosine, 7),
        "hit_rate": hits,
        "oracle_gap": oracle_gap,
        "vs_static_fp32": _ends(fp32),
        "per_request": _ends(each),
    }
    workload = "all-MiniLM-L6-v2, docstrings in batches of 1 to 32, mean latency"
    row = Row(contestant.id, workload, contestant.peer or "itself", own, contestant.target, extra)
    cells = [
        contestant.label,
        f"{mean:.1f}",
        f"{p50:.1f}",
        f"{p99:.1f}",
        "1" if fp32 is None else str(fp32),
        "-" if own is None else str(own),
        "-" if each is None else str(each),
        "-"
        if gap is None or oracle_gap is None
        else f"{oracle_gap:+.1%} [{1 / gap.high - 1:+.1%}, {1 / gap.low - 1:+.1%}]",
        f"{contestant.cosine:.6f}",
        "-" if hits is None else f"{hits:.1%}",
    ]
    return row, cells


def ratio(
    by_id: Mapping[str, Contestant],
    peer: str | None,
    ours: Contestant,
    of: Callable[[Sequence[float], Sequence[float]], Interval] = ratio_of_means,
) -> Interval | None:
    """Time of ``peer`` over that of ``ours``, from pairs; None for itself or a peer that failed."""
    if peer is None or peer == ours.id or peer not in by_id:
        return None
    return of(by_id[peer].times, ours.times)


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [round(x, 4) for x in (interval.value, interval.low, interval.high)]


def hit_rate(contestant: Contestant) -> float | None:
    """Share of dispatched calls that found a rule."""
    if contestant.stats is None:
        return None
    ops = contestant.stats()["ops"].values()
    hits = sum(sum(op["hits"].values()) for op in ops)
    rest = sum(sum(op["fallbacks"].values()) for op in ops)
    return round(hits / (hits + rest), 4) if hits + rest else None


def shortcomings(contestant: Contestant, row: Row) -> list[str]:
    """What this row promised and did not show, in words."""
    notes = []
    gap, least = row.extra["oracle_gap"], COSINE.get(contestant.id)
    if row.target is not None and row.ratio is not None and row.ratio.value < row.target:
        notes.append(f"{contestant.label}: mean latency {row.ratio} of {row.peer}, expected {row.target}")
    if isinstance(gap, float) and gap > ORACLE_GAP:
        notes.append(f"{contestant.label}: {gap:.1%} behind the oracle, expected at most {ORACLE_GAP:.0%}")
    if least is not None and contestant.cosine < least:
        notes.append(f"{contestant.label}: smallest cosine {contestant.cosine:.6f}, expected {least}")
    return notes


def by_batch_size(
    by_id: Mapping[str, Contestant], served: Sequence[Request], order: Sequence[int]
) -> tuple[RichTable, list[Row], list[str]]:
    """Ratios by batch size, each request alike: DKS exact may not lose to static fp32 at any."""
    table = RichTable(title="by batch size: ratio to static fp32 [95 % CI]")
    ours = [by_id[id] for id in ("static-bf16", "compiled", "dks-exact", "dks-bf16") if id in by_id]
    for column in ("texts", "requests", "static fp32 ms", *(contestant.label for contestant in ours)):
        table.add_column(column, justify="right")
    rows, notes = [], []
    static = by_id["static-fp32"].times
    for low, high in BUCKETS:
        picked = [i for i, index in enumerate(order) if low <= len(served[index].texts) <= high]
        if not picked:
            continue
        peer = [static[i] for i in picked]
        cells = [
            f"{low}-{high}" if low < high else str(low),
            str(len(picked)),
            f"{sum(peer) / len(peer) / 1e6:.1f}",
        ]
        for contestant in ours:
            interval = geomean_ratio(peer, [contestant.times[i] for i in picked])
            cells.append(str(interval))
            rows.append(
                Row(
                    f"{contestant.id}-batch-{low}-{high}",
                    f"batches of {low} to {high}",
                    "static-fp32",
                    interval,
                )
            )
            if contestant.id == "dks-exact" and interval.high < 1.0:
                notes.append(f"DKS exact is slower than static fp32 at batches of {low} to {high}: {interval}")
        table.add_row(*cells)
    return table, rows, notes
