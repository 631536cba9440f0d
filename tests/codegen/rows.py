"""Measurements made up for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import median

from dks.dispatch import pool
from dks.dispatch.environment import Environment
from dks.dispatch.evidence import Measurement
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.sources import source_digest
from dks.dispatch.toolchain import toolchain

ENVIRONMENT = Environment(
    device="cpu",
    arch="TestVendor 1 2 3",
    isa="avx2",
    driver="none",
    torch="2.13.0+cpu",
    libraries="mkl-2024.2+onednn-3.12.0",
    threads="2",
    capability="AVX2",
    switches="",
)


def problem(m: int = 8, align: int = 64, dtype: str = "float32", epilogue: str = "none") -> Problem:
    """A linear problem of a weight 64 x 32."""
    traits = {"dtype": dtype, "bias": "yes", "epilogue": epilogue}
    return Problem.of("linear", traits, {"m": m, "n": 64, "k": 32}, align)


PROBLEM = problem()


def row(
    candidate: str, us: float | Sequence[float], of: Problem = PROBLEM, *, error: float = 1e-7, **more: object
) -> Measurement:
    """A row of ``candidate`` that took ``us`` microseconds: each time, or in each round."""
    times = [us] * 20 if isinstance(us, (int, float)) else list(us)
    samples = [round(t * 1000) for t in times]
    kernel = pool.kernels().get(Candidate.parse(candidate).kernel)
    fields: dict[str, object] = {
        "op": of.op,
        "problem": of.id,
        "role": "bin",
        "candidate": candidate,
        "precision": "exact",
        "weight": 1.0,
        "status": "ok",
        "reason": "",
        "samples_ns": samples,
        "rounds": list(range(len(samples))),
        "processes": [i % 2 for i in range(len(samples))],
        "disturbed": [False] * len(samples),
        "median_ns": median(samples) if samples else None,
        "median_low_ns": None,
        "median_high_ns": None,
        "p99_ns": None,
        "ratio": None,
        "ratio_low": None,
        "ratio_high": None,
        "error": error,
        "error_normal": error,
        "error_outliers": error,
        "error_rows": error,
        "stable": True,
        "form_bytes": kernel.form_bytes(of) if kernel else 0,
        "peak_bytes": None,
        "peak_note": "a made-up row",
        "energy_j": None,
        "energy_note": "a made-up row",
        "cache": "cold",
        "kernel_digest": source_digest(kernel) if kernel else "",
        "environment": json.dumps(ENVIRONMENT.to_dict(), sort_keys=True),
        "measured_at": "2026-01-01T00:00:00+00:00",
        "toolchain": toolchain(kernel) if kernel else "",
    }
    return Measurement(**{**fields, **more})  # type: ignore[arg-type]
