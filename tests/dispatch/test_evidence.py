"""The one schema: what is written reads back, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dks.dispatch import evidence
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import (
    SCHEMA,
    Measurement,
    bind,
    is_ours,
    judged_by_rows,
    read_rows,
    read_run,
    write_rows,
)
from tests.codegen.rows import problem, row


@pytest.fixture
def rows() -> list[Measurement]:
    return [row("torch.linear", 10), row("torch.addmm", [], status="failed", reason="said so")]


def write_bound(path: Path, table: pa.Table) -> None:
    """Parquet of anything with the digest that our own files have."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    path.write_bytes(bind(sink.getvalue().to_pybytes()))


def test_rows_read_back_as_written(tmp_path: Path, rows: list[Measurement]) -> None:
    path = tmp_path / "a.parquet"
    write_rows(path, rows)
    assert read_rows(path) == rows
    write_rows(tmp_path / "b.parquet", [row("torch.linear", 5, problem(99))])
    (tmp_path / "_run.json").write_text("not a measurement")
    assert len(read_run(tmp_path)) == len(pd.read_parquet(tmp_path)) == 3


def test_the_schema_is_what_the_class_documents() -> None:
    documented = " ".join((Measurement.__doc__ or "").split())
    for field in dataclasses.fields(Measurement):
        assert f"{field.name}:" in documented or f"{field.name}," in documented, field.name
    assert SCHEMA.names == [field.name for field in dataclasses.fields(Measurement)]


def test_truncation_at_every_byte_is_refused(tmp_path: Path, rows: list[Measurement]) -> None:
    path = tmp_path / "a.parquet"
    write_rows(path, rows)
    whole = path.read_bytes()
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(BadInput, match=r"a\.parquet"):
            read_rows(path)
        assert not is_ours(path)


def test_every_flipped_byte_is_found(tmp_path: Path, rows: list[Measurement]) -> None:
    path = tmp_path / "a.parquet"
    write_rows(path, rows)
    whole = path.read_bytes()
    rng = random.Random(11)
    for at in [*range(8), *range(8, len(whole) - 60, 17), *range(len(whole) - 60, len(whole))]:
        data = bytearray(whole)
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(BadInput, match=r"a\.parquet"):
            read_rows(path)


def test_mutated_files_crash_nothing(tmp_path: Path, rows: list[Measurement]) -> None:
    path = tmp_path / "a.parquet"
    write_rows(path, rows)
    whole = path.read_bytes()
    rng = random.Random(11)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        if data != whole:
            with pytest.raises(BadInput):
                read_rows(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"problem": "linear[](m=0,n=1,k=1)@64"}, "2\\^40"),
        ({"problem": "linear[](m=9223372036854775808,n=1,k=1)@64"}, "2\\^40"),
        ({"problem": 'x"; drop'}, "problem"),
        ({"candidate": "torch.linear*/"}, "kernel"),
        ({"op": "attention"}, "op"),
        ({"status": "fine"}, "status"),
        ({"weight": float("nan")}, "weight"),
        ({"weight": -1.0}, "weight"),
        ({"samples_ns": [5, 0]}, "samples_ns"),
        ({"rounds": [1, 1], "samples_ns": [5, 5], "processes": [0, 0], "disturbed": [False] * 2}, "rounds"),
        ({"processes": []}, "processes"),
        ({"role": "spare"}, "role"),
        ({"cache": "tepid"}, "cache"),
        ({"error": float("inf")}, "error"),
        ({"error": None}, "error"),
        ({"environment": "{}"}, "environment"),
        ({"environment": "[1]"}, "environment"),
        ({"environment": "{"}, "environment"),
    ],
)
def test_values_no_sweep_writes_are_refused_by_file_and_row(
    tmp_path: Path, rows: list[Measurement], change: dict[str, object], expected: str
) -> None:
    path = tmp_path / "a.parquet"
    write_rows(path, [rows[0], dataclasses.replace(rows[0], **change)])  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=f"row 1: .*{expected}"):
        read_rows(path)


def test_other_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(BadInput, match="without a dks schema version"):
        read_rows(path)
    write_bound(path, pa.table({"x": [1]}).replace_schema_metadata({b"dks.schema": b"3"}))
    with pytest.raises(BadInput, match="other columns"):
        read_rows(path)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    write_rows(path, [row("torch.linear", 10)])
    monkeypatch.setattr(evidence, "MAX_FILE_BYTES", 100)
    with pytest.raises(BadInput, match="expected at most 100"):
        read_rows(path)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, rows: list[Measurement], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    write_rows(path, rows)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evidence.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_rows(path, rows[:1])
    assert read_rows(path) == rows
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


SINCE = {"mode": 3, "error_rows": 4, "declines_rows": 4, "toolchain": 4}


def write_version(version: int, path: Path, rows: list[Measurement]) -> None:
    """As an older version wrote it."""
    names = [name for name in SCHEMA.names if SINCE.get(name, 2) <= version]
    schema = pa.schema([SCHEMA.field(name) for name in names], metadata={b"dks.schema": b"%d" % version})
    write_bound(path, pa.table({name: [getattr(row, name) for row in rows] for name in names}, schema=schema))


@pytest.mark.parametrize("version", [2, 3])
def test_files_of_older_versions_read_and_say_nothing_of_rows(
    version: int, tmp_path: Path, rows: list[Measurement]
) -> None:
    path = tmp_path / "a.parquet"
    write_version(version, path, rows)
    read = read_rows(path)
    assert read == [dataclasses.replace(row, error_rows=None, toolchain="unknown") for row in rows]
    assert {row.mode for row in read} == {"eager"} and not any(map(judged_by_rows, read))
    assert all(map(judged_by_rows, rows)) and is_ours(path)


def test_each_version_has_its_own_columns_and_modes_have_names(tmp_path: Path, rows: list[Measurement]) -> None:
    path = tmp_path / "a.parquet"
    whole = pa.table({name: [getattr(row, name) for row in rows] for name in SCHEMA.names}, schema=SCHEMA)
    for version, table in ((b"2", whole), (b"3", whole), (b"4", whole.drop_columns(["toolchain"]))):
        write_bound(path, table.replace_schema_metadata({b"dks.schema": version}))
        with pytest.raises(BadInput, match=r"other columns than expected: .*toolchain: string"):
            read_rows(path)
    write_rows(path, [dataclasses.replace(rows[0], mode="graph")])
    assert read_rows(path)[0].mode == "graph"
    write_rows(path, [dataclasses.replace(rows[0], mode="lazy")])
    with pytest.raises(BadInput, match="mode: found 'lazy', expected one of eager, graph"):
        read_rows(path)
