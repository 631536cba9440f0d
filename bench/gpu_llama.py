"""``make bench-gpu-llama``: Llama 3's linears, rows from recorded traffic, against torch and torch.compile.

A row of the table is one average pass of the traffic: the time of each linear at each number of rows, as often as
it is called. Numbers of rows are drawn from the recorded ones, not from the sweep's bins.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch.nn.functional as F

from bench.gpu import MODES, OURS, Bench, Case, Gpu, each
from bench.gpu_peers import compiled, products, served_linear
from bench.gpu_run import is_built, package, row, run
from bench.report import ROOT, Row
from dks.profiler.problems import Histogram, read_histogram

MODELS = {
    "8b": ("h200_llama3_8b", ((4096, 4096, 64), (1024, 4096, 64), (14336, 4096, 64), (4096, 14336, 32))),
    "70b": ("h200_llama3_70b", ((8192, 8192, 160), (1024, 8192, 160), (28672, 8192, 160), (8192, 28672, 80))),
}
"""Package, and (n, k, calls of a pass) as in the sweep's config."""
TRAFFIC = ROOT / "configs" / "traffic" / "azure-llm-2023-passes.csv"
POINTS = 12
COMPILED = 4
"""Every so many points ``torch.compile`` takes part: it searches for some ten seconds at each."""
TORCH, COMPILE = "F.linear", "torch.compile max-autotune"


def points(histogram: Histogram, count: int = POINTS) -> list[tuple[int, float]]:
    """So many numbers of rows that stand for all, with their shares of the passes.

    Strata are equal in the mean of passes and rows, since a decoding step is frequent and a prompt long; each is
    represented by its middle.
    """
    passes = sum(weight for _, weight in histogram)
    mass = sum(value * weight for value, weight in histogram)
    done, strata = 0.0, [list[tuple[int, float]]() for _ in range(count)]
    for value, weight in sorted(histogram):
        share = (weight / passes + value * weight / mass) / 2
        strata[min(count - 1, int((done + share / 2) * count))].append((value, weight))
        done += share
    found = []
    for stratum in filter(None, strata):
        total = sum(weight for _, weight in stratum)
        sums = itertools.accumulate(weight for _, weight in stratum)
        middle = next(value for (value, _), so_far in zip(stratum, sums, strict=True) if so_far >= total / 2)
        found.append((middle, total / passes))
    return found


def there() -> list[str]:
    """The models whose packages are built; the first one where none is, whose absence is then said."""
    found = [model for model, (name, _) in MODELS.items() if is_built(name)]
    return found or list(MODELS)[:1]


def rows(bench: Bench, models: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of the table, of the models that are there where none is named."""
    models = models or there()
    histogram = read_histogram(TRAFFIC)
    cases = []
    for model in models:
        name, shapes = MODELS[model]
        for (n, k, calls), (i, (m, share)) in itertools.product(shapes, enumerate(points(histogram))):
            searched = i % COMPILED == COMPILED - 1
            cases.append(case(bench.gpu, package(name), model, (m, n, k), calls * share, searched=searched))
    cells = bench.measure(cases)
    for model, mode in itertools.product(models, MODES):
        of = [cell for cell in cells if cell.mode == mode and cell.name.startswith(f"{model} ")]
        words = f"Llama 3 {model} linears, by traffic, {mode}"
        if of:
            yield row(f"llama-{model}-torch-{mode}", words, TORCH, of, 1.10, "weighted")
            some = [cell for cell in of if COMPILE in cell.ns or COMPILE in cell.lost]
            if some:
                note = f"{len(some)} of {len(of)} cells: it searches some ten seconds at each"
                yield row(f"llama-{model}-compile-{mode}", words, COMPILE, some, 1.03, "weighted", note)


def case(
    gpu: Gpu, served: ModuleType, model: str, shape: tuple[int, int, int], weight: float, *, searched: bool
) -> Case:
    """One linear without a bias at one number of rows."""
    m, n, k = shape
    makers = {TORCH: each(lambda x, w: lambda: F.linear(x, w)), OURS: served_linear(served)}
    if searched:
        makers[COMPILE] = compiled(F.linear)
    return Case(f"{model} m={m} n={n} k={k}", products(gpu, m, n, k), makers, weight=weight)


if __name__ == "__main__":
    sys.exit(run("llama", __doc__, rows, [MODELS[model][0] for model in there()]))
