"""A contest: several ways to serve the same requests, interleaved in one process."""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

Batch = Mapping[str, torch.Tensor]


@dataclass
class Contestant:
    """One row of the table: a way to run the model."""

    id: str
    label: str
    dtype: str  # of the activations
    run: Callable[[Batch], torch.Tensor]
    peer: str | None = None
    target: float | None = None
    oracle: str | None = None
    stats: Callable[[], Mapping[str, Any]] | None = None
    times: list[float] = field(default_factory=list)  # ns, one a served request, in the order of `served`
    cosine: float = 1.0


def warm_up(contestants: list[Contestant], batches: Sequence[Batch], console: Console) -> None:
    """Two calls of every row, the compiled one on every shape, so that nothing is compiled later.

    A row that fails is dropped, and the scoreboard says that it is missing.
    """
    for contestant in list(contestants):
        start = time.perf_counter()
        try:
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for batch in batches if contestant.id == "compiled" else batches[:3]:
                    contestant.run(batch)
                    contestant.run(batch)
        except Exception as error:
            console.print(f"{contestant.label}: not measured: {type(error).__name__}: {str(error)[:200]}")
            contestants.remove(contestant)
        else:
            console.print(f"{contestant.label}: warmed up in {time.perf_counter() - start:.1f} s", highlight=False)


def serve(contestants: Sequence[Contestant], batches: Sequence[Batch], seconds: float, seed: int) -> list[int]:
    """Serve all requests with all rows, pass after pass, until the time is up; returns the requests' order.

    Within a request the rows run in random order, right after each other, so that a pair of samples saw the
    same machine. Two passes are finished whatever the time.
    """
    rng = random.Random(seed)
    start = time.monotonic()
    order: list[int] = []
    passes = 0
    with torch.inference_mode():
        while passes < 2 or time.monotonic() - start < seconds:
            indices = list(range(len(batches)))
            rng.shuffle(indices)
            for index in track(indices, description=f"pass {passes + 1}", disable=not sys.stdout.isatty()):
                order.append(index)
                serve_one(contestants, batches[index], rng)
            passes += 1
            print(f"pass {passes}: {len(order)} requests, {time.monotonic() - start:.0f} s", flush=True)
    return order


def serve_one(contestants: Sequence[Contestant], batch: Batch, rng: random.Random) -> None:
    embeddings = {}
    for contestant in rng.sample(contestants, len(contestants)):
        before = time.perf_counter_ns()
        embeddings[contestant.id] = contestant.run(batch)
        contestant.times.append(time.perf_counter_ns() - before)
    reference = embeddings["static-fp32"]
    for contestant in contestants:
        cosine = (embeddings[contestant.id].double() * reference.double()).sum(dim=-1).min()
        contestant.cosine = min(contestant.cosine, float(cosine))
