"""How many threads a generated kernel is tried with, and how they share the work."""

from __future__ import annotations

import os

import torch

from dks.dispatch.kernel import Params


def counts(cores: int) -> tuple[int, ...]:
    """Powers of two up to ``cores``, and all of them or half: where a core is two, torch uses half."""
    return tuple(sorted({2**i for i in range(cores.bit_length())} | {cores, max(1, cores // 2)}))


COUNTS = counts(os.cpu_count() or 1)
"""Numbers of threads that are tried: few serve a small problem best."""

LEAST_WORK = 2**18  # multiply-adds a thread, some 5 us: less does not pay for waking it


def uses(*, by_rows: bool) -> tuple[Params, ...]:
    """Every way to use threads in a linear: ``t`` of them share output channels, or, if asked for, rows (``r``)."""
    return tuple((("t", t), ("r", r)) for t in COUNTS for r in ((0, 1) if by_rows and t > 1 else (0,)))


def without(params: Params) -> Params:
    """The parameters that decide the code: all but the threads'."""
    return tuple((name, value) for name, value in params if name not in ("t", "r"))


def objection(params: Params, work: int, parts: int) -> str | None:
    """Why ``t`` threads are not meant for ``work`` multiply-adds here, or None.

    Args:
        parts: what the threads share out, as a whole number of pieces.
    """
    threads = dict(params)["t"]
    if threads > torch.get_num_threads():
        return f"{threads} threads, torch has {torch.get_num_threads()}"
    if threads > parts:
        return f"less than a part of the work, of which there are {parts}, for each of {threads} threads"
    if threads > 1 and work // threads < LEAST_WORK:
        return f"less than {LEAST_WORK} multiply-adds for each of {threads} threads"
    return None
