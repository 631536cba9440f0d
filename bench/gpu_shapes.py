"""The shapes of configs/h200-gemm.yaml, drawn from a fixed seed.

python -m bench.gpu_shapes > configs/h200-gemm.yaml
"""

from __future__ import annotations

import math
import random

SEED, COUNT, LEAST, MOST = 2026, 200, 64, 16384
EVEN = 16
"""n and k are multiples of it but in every fourth shape, which is left as it was drawn: most of those can't be
read 16 bytes at once."""

HEAD = """\
# 200 matrix products on an H200: y (m, n) = x (m, k) @ weight (n, k)^T in bfloat16, each of m, n and k drawn from
# 64 to 16384 on a logarithmic scale; n and k multiples of 16 in three of four, any number in the fourth.
# Written by: python -m bench.gpu_shapes > configs/h200-gemm.yaml
version: 1
name: h200_gemm
device: cuda
operators:
  linear:
    problems:
"""
ENTRY = (
    "      - {{dims: {{n: {n}, k: {k}}}, traits: {{dtype: bfloat16, bias: no}}, sizes: [{{dims: {{m: {m}}}}}]}}\n"
)
TAIL = """\
measure: {modes: [eager, graph], max_rounds: 40, seconds: 0.1, processes: 2, max_processes: 2, split: null}
"""


def shapes(count: int = COUNT, seed: int = SEED) -> list[tuple[int, int, int]]:
    """(m, n, k), each once; those of one n and k beside each other."""
    rng = random.Random(seed)
    found: set[tuple[int, int, int]] = set()
    while len(found) < count:
        m, n, k = (round(math.exp(rng.uniform(math.log(LEAST), math.log(MOST)))) for _ in range(3))
        if len(found) % 4:
            n, k = (-(-size // EVEN) * EVEN for size in (n, k))
        found.add((m, n, k))
    return sorted(found, key=lambda shape: (*shape[1:], shape[0]))


def config() -> str:
    """The sweep config."""
    return HEAD + "".join(ENTRY.format(m=m, n=n, k=k) for m, n, k in shapes()) + TAIL


if __name__ == "__main__":
    print(config(), end="")
