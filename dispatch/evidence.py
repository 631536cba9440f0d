"""What passes from the profiler to the code generator: one row a measurement, in Parquet, with one schema.

Needs pyarrow (the extras ``profile`` and ``codegen``); serving code never imports this module. A run
directory holds one Parquet file a problem and opens whole with ``pandas.read_parquet(RUN_DIR)``; files whose
names begin with ``_`` are not part of it.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dks.dispatch.environment import Environment
from dks.dispatch.errors import BadInput
from dks.dispatch.problem import Candidate, Problem

SCHEMA_VERSION = 1
MAX_FILE_BYTES = 64 * 2**20  # a problem's rows take kilobytes; anything near this is not ours

STATUSES = ("ok", "wrong_result", "failed", "unsupported", "unavailable")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One candidate on one problem. Times are nanoseconds of wall time of a single call.

    Attributes:
        op: the operator's name.
        problem: ``Problem.id``.
        candidate: ``Candidate.id``.
        precision: class that the kernel declares for this dtype.
        weight: share of traffic, times how often a model calls it.
        status: ok; wrong_result; failed (raised); unsupported (its declaration rules the problem out);
            unavailable (this machine can't run it).
        reason: why the status is not ok; empty if it is.
        samples_ns: one a round, in order: samples with the same index, of the candidates of one problem,
            were taken together. A candidate that trails far behind stops early.
        median_ns, median_low_ns, median_high_ns: median and its 95 % interval; null if not timed.
        p99_ns: 99th percentile of the samples (nearest rank); null if not timed.
        ratio, ratio_low, ratio_high: median of default / this over rounds, 95 % interval; above 1 is faster.
        error: ||y - ref|| / ||ref|| against float64, the larger of the two below.
        error_normal: the same on unit-normal activations.
        error_outliers: the same on activations with outlier features.
        form_bytes: bytes of the packed weight form beyond the caller's weight.
        energy_j: joules a call; null where no counter exists.
        energy_note: why energy_j is null.
        cache: state of caches while timing: ``cold_weights`` rotates weights beyond the private cache and
            leaves activations as the last call left them.
        kernel_digest: digest of the kernel's source.
        environment: JSON of ``Environment``.
        measured_at: ISO 8601 UTC, for people; nothing is computed from it.
    """

    op: str
    problem: str
    candidate: str
    precision: str
    weight: float
    status: str
    reason: str
    samples_ns: list[int]
    median_ns: float | None
    median_low_ns: float | None
    median_high_ns: float | None
    p99_ns: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    error: float | None
    error_normal: float | None
    error_outliers: float | None
    form_bytes: int
    energy_j: float | None
    energy_note: str
    cache: str
    kernel_digest: str
    environment: str
    measured_at: str


def _arrow_type(annotation: str) -> pa.DataType:
    if annotation == "list[int]":
        return pa.list_(pa.int64())
    return {"str": pa.string(), "float": pa.float64(), "int": pa.int64()}[annotation.removesuffix(" | None")]


SCHEMA = pa.schema(
    [pa.field(f.name, _arrow_type(str(f.type)), nullable="None" in str(f.type)) for f in fields(Measurement)]
)
_VERSION_KEY = b"dks.schema"
_PLAN_KEY = b"dks.plan"


def write_rows(path: Path, rows: Sequence[Measurement], plan: str) -> None:
    """Write one problem's rows atomically: the file is there whole, on disk, or not at all.

    Args:
        plan: digest of what was asked; ``read_plan`` gives it back to a resuming sweep.

    Raises:
        OSError: the disk is full or refuses; ``path`` is then as it was.
    """
    columns = {f.name: [getattr(row, f.name) for row in rows] for f in fields(Measurement)}
    metadata = {_VERSION_KEY: str(SCHEMA_VERSION).encode(), _PLAN_KEY: plan.encode()}
    table = pa.table(columns, schema=SCHEMA.with_metadata(metadata))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix="_partial-")
    try:
        with os.fdopen(handle, "wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_plan(path: Path) -> str | None:
    """The plan digest a file was written for; None where the file is not one of ours or is damaged."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except Exception:  # as in read_rows
        return None
    return metadata.get(_PLAN_KEY, b"").decode(errors="replace") or None


def read_rows(path: Path) -> list[Measurement]:
    """All rows of one file, checked field by field.

    Raises:
        BadInput: not Parquet, truncated, of another schema version, or with values no sweep can write.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BadInput(f"{path}: found {path.stat().st_size} bytes, expected at most {MAX_FILE_BYTES}")
        # The schema comes first: an unknown file is refused before its data is read.
        schema = pq.read_schema(path)
        _check_schema(path, schema)
        table = pq.read_table(path)
        table.validate(full=True)
    except BadInput:
        raise
    except Exception as error:  # a damaged file makes the reader raise whatever it meets
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(
            f"{path}: found a file that does not read as Parquet ({first}), expected one that dks-profile "
            "wrote; delete it and run dks-profile again, which measures only what is missing"
        ) from None
    rows = []
    for index, record in enumerate(table.to_pylist()):
        try:
            row = Measurement(**record)
            _check_row(row)
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(f"{path}: row {index}: {error}; delete the file and measure again") from None
        rows.append(row)
    return rows


def read_run(folder: Path) -> list[Measurement]:
    """All rows of a run directory, in the order of file names.

    Raises:
        BadInput: no such directory, nothing in it, or a file that ``read_rows`` refuses.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: found no such directory, expected a RUN_DIR of dks-profile run")
    paths = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith(("_", ".")))
    if not paths:
        raise BadInput(
            f"{folder}: found no measurements, expected the Parquet files of a sweep; "
            f"run: dks-profile run CONFIG -o {folder}"
        )
    return [row for path in paths for row in read_rows(path)]


def _check_schema(path: Path, schema: pa.Schema) -> None:
    version = (schema.metadata or {}).get(_VERSION_KEY)
    if version is None:
        raise BadInput(f"{path}: found Parquet without a dks schema version, expected measurements")
    if version.decode(errors="replace") != str(SCHEMA_VERSION):
        raise BadInput(
            f"{path}: found schema version {version.decode(errors='replace')[:20]}, expected {SCHEMA_VERSION}; "
            "measure again with this version of dks-profile, or use the version that wrote it"
        )
    if not schema.equals(SCHEMA, check_metadata=False):
        odd = set(map(str, schema)) ^ set(map(str, SCHEMA))
        raise BadInput(f"{path}: found other columns than expected: {', '.join(sorted(odd)[:6])}")


def _check_row(row: Measurement) -> None:
    problem = Problem.parse(row.problem)
    Candidate.parse(row.candidate)
    if problem.op != row.op:
        raise ValueError(f"op: found {row.op!r}, expected that of {row.problem}")
    if row.status not in STATUSES:
        raise ValueError(f"status: found {row.status!r}, expected one of {', '.join(STATUSES)}")
    if not (math.isfinite(row.weight) and row.weight >= 0):
        raise ValueError(f"weight: found {row.weight}, expected a finite number >= 0")
    if any(sample <= 0 for sample in row.samples_ns):
        raise ValueError("samples_ns: found a time of zero or less, expected positive times")
    if row.status == "ok" and (row.error is None or not math.isfinite(row.error) or row.error < 0):
        raise ValueError(f"error: found {row.error}, expected a finite number >= 0 where the status is ok")
    Environment.from_dict(_environment(row.environment))


def _environment(text: str) -> Mapping[str, str]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        raise ValueError("environment: found text that is not JSON") from None
    if not isinstance(data, dict):
        raise ValueError(f"environment: found {type(data).__name__}, expected an object")
    return data


def environment_of(row: Measurement) -> Environment:
    """The environment a row was measured in."""
    return Environment.from_dict(_environment(row.environment))
