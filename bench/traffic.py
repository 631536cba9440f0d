"""Rows of x in the forward passes of a language model's server, from recorded requests: a histogram for sweeps.

    python -m bench.traffic CONV.csv CODE.csv > configs/traffic/azure-llm-2023-passes.csv

Each trace is served by a server of its own: a request's prompt is a pass of its own as it arrives, and from then
on it takes one row in each decoding step, of a fixed length, until all that it generated is out. Between passes of
one size and calls of a linear with as many rows there is no difference, so that a bin's weight is how often a
linear meets it. Prompts are rounded up to multiples of 16, as their rows hardly repeat.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

STEP = 0.025
"""Seconds of a decoding step: reading 8 billion parameters of two bytes takes 3 ms at 5 TB/s, 70 billion 30."""

Request = tuple[float, int, int]
"""Seconds of its arrival, tokens of its prompt, tokens that it generates."""


def passes(requests: Iterable[Request], step: float = STEP) -> Mapping[int, int]:
    """How many passes have so many rows."""
    found, change = Counter[int](), Counter[int]()
    for arrival, prompt, generated in requests:
        found[-(-prompt // 16) * 16] += 1
        first = int(arrival / step)
        change[first] += 1
        change[first + max(1, generated)] -= 1
    active = 0
    for here, after in itertools.pairwise(sorted(change)):
        active += change[here]
        if active:
            found[active] += after - here
    return found


def read(path: Path) -> list[Request]:
    """A trace of the Azure Public Dataset: TIMESTAMP, ContextTokens, GeneratedTokens."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    return [
        ((time - times[0]).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for time, row in zip(times, rows, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("traces", nargs="+", type=Path)
    total = Counter[int]()
    for path in parser.parse_args().traces:
        total.update(passes(read(path)))
    print("value,weight")
    for rows, count in sorted(total.items()):
        print(f"{rows},{count}")


if __name__ == "__main__":
    main()
