"""What passes from the profiler to the code generator: one row a measurement, in Parquet, with one schema.

Needs pyarrow (the extras ``profile`` and ``codegen``); serving code never imports this module. A run
directory holds one Parquet file a problem and opens whole with ``pandas.read_parquet(RUN_DIR)``; files whose
names begin with ``_`` are not part of it.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import secrets
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dks.dispatch.environment import UNKNOWN, Environment
from dks.dispatch.errors import BadInput, unreadable
from dks.dispatch.intervals import Interval, block_ratio
from dks.dispatch.modes import EAGER, MODES
from dks.dispatch.plain import in_words, parse_json
from dks.dispatch.problem import Candidate, Precision, Problem

SCHEMA_VERSION = 4
MAX_FILE_BYTES = 64 * 2**20  # a problem's rows take kilobytes; anything near this is not ours
MAX_FOOTER_BYTES = 2**20  # so many columns, at some 100 bytes each, are refused before they are parsed
MAX_ROWS = 100_000  # candidates of one problem
MAX_BYTES = 256 * 2**20  # of all values, unpacked

STATUSES = (
    "ok",
    "wrong_result",
    "failed",
    "crashed",
    "timeout",
    "out_of_memory",
    "excluded",
    "unsupported",
    "unsuited",
    "unavailable",
    "not_compiled",
)
ROLES = ("bin", "split", "held_out")
PRECISIONS = (*(precision.value for precision in Precision), "none")
CACHES = ("cold", "warm", "pipeline")
FEWEST_CLEAN = 6  # undisturbed pairs that give a ratio an interval; with fewer, the disturbed ones count too


@dataclass(frozen=True, slots=True)
class Measurement:
    """One candidate on one problem. Times are nanoseconds of wall time of a single call.

    Attributes:
        op: the operator's name.
        problem: ``Problem.id``.
        role: bin (a bin's representative, as the config has it); split (one that the sweep added, where a bin
            was too wide); held_out (a size inside a bin that no rule is made from: it says what the table is
            worth between its representatives).
        candidate: ``Candidate.id``.
        precision: class that the kernel declares for this dtype; ``none`` where it does not take it.
        weight: share of traffic, times how often a model calls it; of a held-out shape, that of its bin.
        status: ok; wrong_result; failed (raised); crashed (its process died); timeout (killed at its deadline);
            out_of_memory; excluded (a repeat offender, not tried any more); unsupported (its declaration rules
            the problem out); unsuited (its tile is not meant for the problem, though it would be right);
            unavailable (this machine can't run it); not_compiled (its generated code has no compiled form).
        reason: why the status is not ok; empty if it is.
        samples_ns: one a round that the candidate took part in.
        rounds: number of each sample's round: samples of one problem with the same number were taken together.
        processes: number of the process that took each sample; each began with fresh memory.
        disturbed: whether interference was noticed while each sample was taken.
        median_ns, median_low_ns, median_high_ns: median of the undisturbed samples and its 95 % interval; null
            if not timed.
        p99_ns: 99th percentile of all samples (nearest rank); null if not timed.
        ratio, ratio_low, ratio_high: default / this as ``ratio`` gives it; above 1 is faster.
        error: ||y - ref|| / ||ref|| of the worst row against float64, the largest of the three below.
        error_normal: the same on unit-normal activations.
        error_outliers: the same on activations with outlier features.
        stable: whether the same call gave the same bits each time; null if it was not timed.
        form_bytes: bytes of the packed weight form beyond the caller's weight.
        peak_bytes: growth of resident memory at its peak during one call; null if not measured.
        peak_note: why peak_bytes is null.
        energy_j: joules a call; null where no counter exists.
        energy_note: why energy_j is null.
        cache: state of caches while timing: cold (weights and activations rotate through buffers beyond the
            private cache), warm (the same buffers each time), pipeline (the model's neighbouring operators run
            around the candidate, and the whole is timed).
        kernel_digest: digest of the kernel's source.
        environment: JSON of ``Environment``.
        measured_at: ISO 8601 UTC, for people; nothing is computed from it.
        mode: how the call was executed, eager or graph; see ``dks.dispatch.modes``. Rows of the two modes share no
            rounds. Files of schema version 2 do not have it, and all of their rows are eager.
        error_rows: ``error`` on rows of very different sizes; null if such a call was declined. Files before schema
            version 4 do not have it, and their errors are those of whole outputs: see ``judged_by_rows``.
        declines_rows: whether the kernel declined rows of very different sizes, so that the framework serves them.
        toolchain: what compiled the kernel, as ``toolchain`` says it; empty where nothing is compiled. Files of
            earlier schema versions than 4 do not have it: unknown.
    """

    op: str
    problem: str
    role: str
    candidate: str
    precision: str
    weight: float
    status: str
    reason: str
    samples_ns: list[int]
    rounds: list[int]
    processes: list[int]
    disturbed: list[bool]
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
    stable: bool | None
    form_bytes: int
    peak_bytes: int | None
    peak_note: str
    energy_j: float | None
    energy_note: str
    cache: str
    kernel_digest: str
    environment: str
    measured_at: str
    mode: str = EAGER
    error_rows: float | None = None
    declines_rows: bool = False
    toolchain: str = UNKNOWN


def judged_by_rows(row: Measurement) -> bool:
    """Whether errors are those of the worst row. Before schema version 4 they were of whole outputs, in which a
    large row hides what is wrong with the others."""
    return row.declines_rows or row.error_rows is not None


def clean_samples(row: Measurement) -> list[int]:
    """The undisturbed samples; all of them where fewer than six are."""
    clean = [ns for ns, disturbed in zip(row.samples_ns, row.disturbed, strict=True) if not disturbed]
    return clean if len(clean) >= FEWEST_CLEAN else row.samples_ns


def paired(peer: Measurement, ours: Measurement) -> list[list[tuple[int, int]]]:
    """(peer's, ours) nanoseconds of the rounds both took part in, one list a process, in the order of rounds.

    Rounds under interference are left out in each process that has six others.
    """
    theirs = dict(zip(peer.rounds, peer.samples_ns, strict=True))
    shared: dict[int, list[tuple[int, int, bool]]] = {}
    for number, ns, process, disturbed in sorted(_samples(ours)):
        if number in theirs:
            shared.setdefault(process, []).append((theirs[number], ns, disturbed))
    found = []
    for rounds in shared.values():
        clean = [pair for *pair, disturbed in rounds if not disturbed]
        kept = clean if len(clean) >= FEWEST_CLEAN else [pair for *pair, _ in rounds]
        found.append([(slow, fast) for slow, fast in kept])
    return found


def _samples(row: Measurement) -> Iterable[tuple[int, int, int, bool]]:
    return zip(row.rounds, row.samples_ns, row.processes, row.disturbed, strict=True)


def ratio(peer: Measurement, ours: Measurement) -> Interval:
    """Peer's time / ours over the rounds both took part in, by ``intervals.block_ratio``; above 1 is faster."""
    return block_ratio(paired(peer, ours))


def _arrow_type(annotation: str) -> pa.DataType:
    one = {"str": pa.string(), "float": pa.float64(), "int": pa.int64(), "bool": pa.bool_()}
    if annotation.startswith("list["):
        return pa.list_(one[annotation[5:-1]])
    return one[annotation.removesuffix(" | None")]


SCHEMA = pa.schema(
    [pa.field(f.name, _arrow_type(str(f.type)), nullable="None" in str(f.type)) for f in fields(Measurement)]
)
_SINCE = {"mode": 3, "error_rows": 4, "declines_rows": 4, "toolchain": 4}
"""Columns that came after schema version 2, and the version that has them first."""
_COLUMNS = {
    str(version): pa.schema([field for field in SCHEMA if _SINCE.get(field.name, 2) <= version])
    for version in range(2, SCHEMA_VERSION + 1)
}
"""Of every version that reads."""
_VERSION_KEY = b"dks.schema"
_VERSION = re.compile(rb"dks\.schema\x18.([0-9]+)")  # as the footer has it: Thrift's compact protocol
_METADATA = frozenset({_VERSION_KEY, b"ARROW:schema"})
_TEXTS = [f.name for f in fields(Measurement) if f.type == "str"]
_DIGEST_BYTES = 32


def write_rows(path: Path, rows: Sequence[Measurement]) -> None:
    """Write one problem's rows atomically: the file is there whole, on disk, or not at all.

    Raises:
        OSError: the disk is full or refuses; ``path`` is then as it was.
    """
    columns = {f.name: [getattr(row, f.name) for row in rows] for f in fields(Measurement)}
    table = pa.table(columns, schema=SCHEMA.with_metadata({_VERSION_KEY: str(SCHEMA_VERSION).encode()}))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = bind(sink.getvalue().to_pybytes())
    partial = path.with_name(f"_partial-{secrets.token_hex(8)}")
    try:
        with partial.open("xb") as file:  # whoever the umask lets read may read it
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def bind(parquet: bytes) -> bytes:
    """A Parquet file with a digest of all of its bytes, where no reader looks; ``read_rows`` takes no other."""
    pages, footer = _parts(parquet)
    return pages + _digest(pages, footer) + footer


def _parts(data: bytes) -> tuple[bytes, bytes]:
    """What comes before the footer, and the footer with its length and magic (Parquet format, File format).

    Between the two, where no reader looks, a file of ours has a digest of both: Arrow's own validation accepts
    many a file with a flipped bit.
    """
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return data[: max(0, start)], data[max(0, start) :]


def _digest(pages: bytes, footer: bytes) -> bytes:
    return hashlib.sha256(pages + footer).digest()


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable: a rename alone may be lost with the power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_ours(path: Path) -> bool:
    """Whether a file says of itself that a sweep wrote it; a damaged one does not."""
    try:
        return _VERSION_KEY in (pq.read_schema(path).metadata or {})
    except Exception:  # as in read_rows
        return False


def read_rows(path: Path) -> list[Measurement]:
    """All rows of one file, checked field by field.

    Raises:
        BadInput: not Parquet, truncated, of another schema version, larger than a sweep can make it, or with
            values no sweep can write.
    """
    try:
        data = _read(path)
        # The digest comes first: Arrow sees no file that a stray bit has been through.
        _check_digest(path, data)
        metadata = pq.read_metadata(pa.BufferReader(data))
        _check_size(path, metadata)
        _check_schema(path, metadata.metadata or {}, metadata.schema.to_arrow_schema())
        texts = [name for name in _TEXTS if name in metadata.schema.names]
        table = pq.ParquetFile(pa.BufferReader(data), metadata=metadata, read_dictionary=texts).read()
        table.validate(full=True)
        _check_expanded(path, table, texts)
    except BadInput:
        raise
    except Exception as error:  # a damaged file makes the reader raise whatever it meets
        raise BadInput(
            f"{path}: found a file that does not read as Parquet ({in_words(error)}), expected one that "
            "dks-profile wrote; delete it and run dks-profile again, which measures only what is missing"
        ) from None
    rows = []
    for index, record in enumerate(table.to_pylist()):
        try:
            row = Measurement(**record)
            _check_row(row)
        except (BadInput, ValueError, TypeError, KeyError) as error:
            raise BadInput(f"{path}: row {index}: {error}; delete the file and measure again") from None
        rows.append(row)
    return rows


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadInput(unreadable(path, error)) from None
    if len(data) > MAX_FILE_BYTES:
        raise BadInput(f"{path}: found more than {MAX_FILE_BYTES} bytes, expected at most {MAX_FILE_BYTES}")
    return data


def _check_digest(path: Path, data: bytes) -> None:
    """That a file is whole; where it is not, why: another version's file is no damaged one."""
    pages, footer = _parts(data)
    if len(footer) > MAX_FOOTER_BYTES:
        raise BadInput(f"{path}: found a footer of {len(footer)} bytes, expected at most {MAX_FOOTER_BYTES}")
    if not (data[:4] == data[-4:] == b"PAR1" and 12 <= len(footer) < len(data)):
        raise ValueError("no Parquet footer")
    if pages[-_DIGEST_BYTES:] == _digest(pages[:-_DIGEST_BYTES], footer):
        return
    if _VERSION_KEY not in footer:
        raise BadInput(f"{path}: found Parquet without a dks schema version, expected measurements")
    version = _VERSION.search(footer)
    if version and version[1].decode() not in _COLUMNS:
        raise _other_version(path, version[1])
    raise BadInput(
        f"{path}: found bytes that differ from their digest, expected them as they were written; delete "
        "the file and run dks-profile again, which measures only what is missing"
    )


def _check_size(path: Path, metadata: pq.FileMetaData) -> None:
    """By what the footer says, before anything is allocated for it.

    Single columns' metadata is not asked: Arrow ends the process where a forged one contradicts its schema.
    """
    groups = [metadata.row_group(index) for index in range(min(metadata.num_row_groups, MAX_ROWS))]
    for found, most, what in (
        (metadata.num_columns, len(SCHEMA), "columns"),
        (max((group.num_columns for group in groups), default=0), len(SCHEMA), "columns in a row group"),
        (max(metadata.num_rows, sum(group.num_rows for group in groups)), MAX_ROWS, "rows"),
        (sum(group.total_byte_size for group in groups), MAX_BYTES, "bytes"),
    ):
        if not 0 <= found <= most:
            raise BadInput(f"{path}: found {found} {what}, expected at most {most}")


def _check_expanded(path: Path, table: pa.Table, texts: Sequence[str]) -> None:
    """That rows are no larger than files, before they become Python's: what is stored once may stand in each."""
    size = table.nbytes
    for name in texts:
        for chunk in table.column(name).chunks:
            lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
            size += pc.sum(lengths.cast(pa.int64())).as_py() or 0
    if size > MAX_BYTES:
        raise BadInput(f"{path}: found rows of {size} bytes, expected at most {MAX_BYTES}")


def read_run(folder: Path) -> list[Measurement]:
    """All rows of a run directory, in the order of file names.

    Raises:
        BadInput: no such directory, nothing in it, or a file that ``read_rows`` refuses.
    """
    paths = run_files(folder)
    _refuse_unfinished(folder)
    if not paths:
        raise BadInput(
            f"{folder}: found no measurements, expected the Parquet files of a sweep; "
            f"run: dks-profile run CONFIG -o {shlex.quote(str(folder))}"
        )
    return [row for path in paths for row in read_rows(path)]


def run_files(folder: Path) -> list[Path]:
    """The Parquet files of a run directory, in the order of their names.

    Raises:
        BadInput: there is no such directory, or it can't be read.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{folder}: found no such directory, expected a RUN_DIR of dks-profile run") from None
    except OSError as error:
        raise BadInput(unreadable(folder, error)) from None
    return [folder / name for name in names if name.endswith(".parquet") and not name.startswith(("_", "."))]


JOURNAL = "_journal"
"""What a sweep has acknowledged and not yet put into Parquet, in a run directory."""


_MEASURED = (b'"do":"found"', b'"do":"rounds"', b'"do":"reset"')


def _refuse_unfinished(folder: Path) -> None:
    """Refuse a directory whose journal knows more than its Parquet files: a sweep is at work, or was killed."""
    try:
        text = (folder / JOURNAL).read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise BadInput(unreadable(folder / JOURNAL, error)) from None
    if any(kind in line for line in text.splitlines() for kind in _MEASURED):
        raise BadInput(
            f"{folder}: found measurements in its journal that are not in Parquet yet, expected a sweep that came "
            "to its end; run dks-profile run again, which keeps them and goes on, or look at them: dks-profile show"
        )


def _other_version(path: Path, version: bytes) -> BadInput:
    return BadInput(
        f"{path}: found schema version {ascii(version[:20])[2:-1]}, expected {' or '.join(_COLUMNS)}; "
        "measure again with this version of dks-profile, or use the version that wrote it"
    )


def _check_schema(path: Path, metadata: Mapping[bytes, bytes], schema: pa.Schema) -> None:
    """That a file has our columns and nothing beside them: no extension types, nobody's metadata."""
    version = metadata.get(_VERSION_KEY)
    if version is None:
        raise BadInput(f"{path}: found Parquet without a dks schema version, expected measurements")
    columns = _COLUMNS.get(version.decode("latin-1"))
    if columns is None:
        raise _other_version(path, version)
    if odd := sorted(set(metadata) - _METADATA):
        raise BadInput(f"{path}: found metadata {odd[0][:40]!r}, expected none but dks.schema")
    if not schema.equals(columns, check_metadata=False):
        theirs, ours = list(schema), list(columns)
        names = [str(f) for f in theirs if f not in ours] + [str(f) for f in ours if f not in theirs]
        raise BadInput(f"{path}: found other columns than expected: {ascii(', '.join(sorted(names)[:6]))[1:400]}")


def _check_row(row: Measurement) -> None:
    problem = Problem.parse(row.problem)
    Candidate.parse(row.candidate)
    if problem.op != row.op:
        raise ValueError(f"op: found {row.op!r}, expected that of {row.problem}")
    if row.status not in STATUSES:
        raise ValueError(f"status: found {row.status!r}, expected one of {', '.join(STATUSES)}")
    if not (math.isfinite(row.weight) and row.weight >= 0):
        raise ValueError(f"weight: found {row.weight}, expected a finite number >= 0")
    for name, allowed in (("role", ROLES), ("cache", CACHES), ("precision", PRECISIONS), ("mode", MODES)):
        if getattr(row, name) not in allowed:
            raise ValueError(f"{name}: found {getattr(row, name)!r}, expected one of {', '.join(allowed)}")
    for name in ("median_ns", "median_low_ns", "median_high_ns", "p99_ns", "energy_j", "form_bytes"):
        value, least = getattr(row, name), 0 if name in ("energy_j", "form_bytes") else 1e-9
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ValueError(f"{name}: found {value}, expected a finite number above zero")
    if any(sample <= 0 for sample in row.samples_ns):
        raise ValueError("samples_ns: found a time of zero or less, expected positive times")
    for name in ("rounds", "processes", "disturbed"):
        if len(getattr(row, name)) != len(row.samples_ns):
            raise ValueError(f"{name}: found {len(getattr(row, name))}, expected one for each sample")
    if len(set(row.rounds)) != len(row.rounds):
        raise ValueError("rounds: found a round twice, expected each once")
    if row.status == "ok" and (row.error is None or not math.isfinite(row.error) or row.error < 0):
        raise ValueError(f"error: found {row.error}, expected a finite number >= 0 where the status is ok")
    environment_of(row)


@lru_cache
def _environment(text: str) -> Environment:
    return Environment.from_dict(parse_json(text.encode(), "environment"))


def environment_of(row: Measurement) -> Environment:
    """The environment a row was measured in."""
    return _environment(row.environment)
