"""What it costs those who dispatch when the table under them is swapped: p99 of a call, and the time of a rollback.

Windows with and without swaps take turns, in pairs whose order is drawn anew: a neighbour on the machine disturbs
both alike.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.report import Row
from dks.dispatch.generation import Generation
from dks.dispatch.intervals import Interval, paired_ratio
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import Group, Rule, Table

THREADS, PAIRS, WINDOW_S = 64, 12, 1.0
PAUSE_S = 2e-3  # between two swaps
N, K, ROWS, LAYERS = 64, 32, 8, 8
CHOSEN = ("torch.addmm", "mkldnn.linear_packed")
RELOADS = 10  # every so many swaps one is a reload, the others go back


@dataclass(frozen=True)
class Contention:
    """What threads saw that called without a pause.

    Attributes:
        calls: how many there were, of all threads.
        per_second: of those in windows without swaps.
        steady, swapping: p99 of a call in nanoseconds, one a window.
        swaps: how long each took, in seconds.
    """

    calls: int
    per_second: float
    steady: list[float]
    swapping: list[float]
    swaps: list[float]

    @property
    def ratio(self) -> Interval:
        """p99 during swaps to that without, by pairs of windows."""
        return paired_ratio(self.swapping, self.steady)


def contend(
    calls: list[Callable[[], object]],
    swap: Callable[[], object],
    pairs: int = PAIRS,
    window_s: float = WINDOW_S,
    pause_s: float = PAUSE_S,
) -> Contention:
    """Run each of ``calls`` again and again in a thread of its own, and ``swap`` in half of the windows.

    This thread wakes up as often in the others: to wake up asks the interpreter's lock of whoever holds it, which
    is felt in a p99 and has nothing to do with swaps.

    Raises:
        Exception: whatever a call raised.
    """
    windows = 2 * pairs
    window, over = -1, False
    took: list[list[list[int]]] = [[[] for _ in range(windows)] for _ in calls]
    faults: list[BaseException] = []

    def work(call: Callable[[], object], mine: list[list[int]]) -> None:
        clock = time.perf_counter_ns
        try:
            while not over:
                start = clock()
                call()
                if window >= 0:
                    mine[window].append(clock() - start)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(calls, took, strict=True)]
    for thread in threads:
        thread.start()
    swaps: list[float] = []
    swapping: list[int] = []
    try:
        for pair in range(pairs):
            swapped = random.random() < 0.5
            for i in (2 * pair, 2 * pair + 1):
                window = i
                end = time.perf_counter() + window_s
                if (i % 2 == 0) == swapped:
                    swapping.append(i)
                while (start := time.perf_counter()) < end:
                    if i in swapping:
                        swap()
                        swaps.append(time.perf_counter() - start)
                    time.sleep(pause_s)
    finally:
        over = True
        for thread in threads:
            thread.join()
    if faults:
        raise faults[0]
    held = [[ns for mine in took for ns in mine[i]] for i in range(windows)]
    p99 = [statistics.quantiles(each, n=100)[98] for each in held]
    steady = [i for i in range(windows) if i not in swapping]
    return Contention(
        sum(map(len, held)),
        sum(len(held[i]) for i in steady) / (pairs * window_s),
        [p99[i] for i in steady],
        [p99[i] for i in swapping],
        swaps,
    )


def generation(path: Path) -> Generation:
    """A table made by hand that sends every call to the candidate that the path is named after."""
    traits = (("bias", "no"), ("dtype", "float32"), ("epilogue", "none"))
    statics, edges = (("n", N), ("k", K)), ((1, 8, 64),)
    groups = tuple(Group("linear", form, traits, statics, edges, {4: (0, 0, 0)}) for form in ("prepared", "direct"))
    return Generation(Table((Rule(path.name, 4),), groups), hash=path.name)


def measure(threads: int = THREADS, pairs: int = PAIRS, window_s: float = WINDOW_S) -> Contention:
    """Prepared layers called by ``threads`` threads while their table is swapped."""
    runtime = Runtime("swaps", generation(Path(CHOSEN[0])), generation)
    layers = [runtime.server("linear").prepare(torch.randn(N, K)) for _ in range(LAYERS)]
    runtime.reload(CHOSEN[1])
    done = 0

    def swap() -> None:
        nonlocal done
        done += 1
        if done % RELOADS:
            runtime.rollback()
        else:
            runtime.reload(CHOSEN[done // RELOADS % 2])

    def caller(i: int) -> Callable[[], object]:
        layer, x = layers[i % LAYERS], torch.randn(ROWS, K)
        return lambda: layer(x)

    return contend([caller(i) for i in range(threads)], swap, pairs, window_s)


def going_back(layers: int = 200, times: int = 1000) -> list[float]:
    """Seconds that ``rollback`` takes with so many living layers, nobody calling."""
    runtime = Runtime("swaps", generation(Path(CHOSEN[0])), generation)
    held = [runtime.server("linear").prepare(torch.randn(N, K)) for _ in range(layers)]
    runtime.reload(CHOSEN[1])
    took = []
    for _ in range(times):
        start = time.perf_counter()
        runtime.rollback()
        took.append(time.perf_counter() - start)
    assert len(held) == layers
    return took


def rows() -> list[Row]:
    """What the benchmark of the dispatcher adds to its result."""
    found, took = measure(), going_back()
    workload = (
        f"prepare_linear(({N}, {K})) on ({ROWS}, {K}), {THREADS} threads, a swap every {PAUSE_S * 1e3:.0f} ms"
    )
    ratio = paired_ratio(found.steady, found.swapping)
    figures: dict[str, object] = {
        "ours_ns": round(statistics.median(found.swapping)),
        "peer_ns": round(statistics.median(found.steady)),
        "swaps": len(found.swaps),
        "rollback_median_us": round(statistics.median(took) * 1e6, 2),
        "rollback_slowest_us": round(max(took) * 1e6, 2),
    }
    back = "rollback with 200 layers: median"
    return [
        Row("p99 of a call: swaps, against none", workload, "the same without swaps", ratio, 0.5, figures),
        Row(back, "nobody calling", "-", None, None, {"ours_ns": round(statistics.median(took) * 1e9)}),
    ]
