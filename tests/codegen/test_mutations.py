"""Untrusted files, mutated by the thousand (ten thousand with DKS_SOAK=1): refused in words, and nothing runs."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dks.codegen import package as packaging
from dks.codegen.package import build
from dks.codegen.select import select
from dks.dispatch import evidence
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement, bind, read_rows, write_rows
from dks.dispatch.manifest import (
    EVIDENCE,
    MANIFEST,
    TABLE,
    Manifest,
    damaged,
    dead_kernels,
    examine,
    intact,
    misfits,
    parse_manifest,
    read_manifest,
    seal,
    table_hash,
)
from dks.dispatch.plain import parse_evidence, parse_table
from dks.dispatch.table import Table
from tests.codegen.rows import row
from tests.codegen.test_package import made_lut, made_rows
from tests.mutations import COUNT, RAW, damage, distort, nothing_runs, raw

VERSION = str(evidence.SCHEMA_VERSION).encode()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package without the compiled lookup."""
    monkeypatch.setattr(packaging, "compile_into", lambda _: "not here")
    return build(made_lut(), made_rows(), tmp_path, "mutated").folder


def outcome(read: Any, *args: Any) -> Any:
    """What it returns; None where it raises the one error there may be."""
    try:
        return read(*args)
    except BadInput as error:
        assert str(error).isprintable(), error
        return None


def test_mutated_parquet_is_never_accepted(tmp_path: Path) -> None:
    """Half of them with a digest of their own, as who forges one would give them: then Arrow reads them."""
    rows = [row("torch.linear", 10), row("torch.addmm", [], status="failed", reason="said so")]
    path = tmp_path / "a.parquet"
    write_rows(path, rows)
    whole, rng, forged = path.read_bytes(), random.Random(19), 0
    inner = whole.replace(evidence._parts(whole)[0][-32:], b"", 1)
    assert bind(inner) == whole
    path.write_bytes(whole[:-1])
    assert outcome(read_rows, path) is None and read_rows_of(path, whole) == rows
    with nothing_runs():
        for index in range(COUNT):
            data = damage(inner, rng) if index % 2 else damage(whole, rng)
            found = outcome(read_rows_of, path, bind(data) if index % 2 else data)
            if index % 2 == 0:
                assert found is None or data == whole, index
            elif found is not None:
                assert all(isinstance(found_row, Measurement) for found_row in found)
                forged += 1
    assert forged, "some with a digest of their own get past Arrow, or this reads nothing"


def read_rows_of(path: Path, data: bytes) -> list[Measurement]:
    path.write_bytes(data)
    return read_rows(path)


def columns() -> dict[str, pa.Array]:
    table = pa.Table.from_pylist([vars_of(row("torch.linear", 10))], schema=evidence.SCHEMA)
    return {name: table.column(name).combine_chunks() for name in table.column_names}


def vars_of(one: Measurement) -> dict[str, Any]:
    return {name: getattr(one, name) for name in evidence.SCHEMA.names}


class Pickled(pa.ExtensionType):  # type: ignore[misc]
    """What Arrow once unpickled when it read a schema."""

    def __init__(self) -> None:
        super().__init__(pa.string(), "arrow.py_extension_type")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"cposix\nsystem\n(S'touch unpickled'\ntR."

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Pickled:
        return cls()


def test_extension_types_and_pickled_metadata_are_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    version = {b"dks.schema": VERSION}
    held = columns()
    held["reason"] = pa.ExtensionArray.from_storage(Pickled(), held["reason"])
    extended = pa.table(held).replace_schema_metadata(version)
    pandas = pa.table(columns(), schema=evidence.SCHEMA.with_metadata({**version, b"pandas": b"cposix\nsystem\n."}))
    with nothing_runs():
        for table, said in ((extended, "other columns"), (pandas, "found metadata b'pandas'")):
            sink = io.BytesIO()
            pq.write_table(table, sink)
            with pytest.raises(BadInput, match=said):
                read_rows_of(tmp_path / "a.parquet", bind(sink.getvalue()))
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def many_rows() -> pa.Table:
    one = pa.table(columns(), schema=evidence.SCHEMA)
    return one.take(pa.array([0] * 100_001))


def long_text() -> pa.Table:
    held = {name: column.take(pa.array([0] * 9000)) for name, column in columns().items()}
    held["reason"] = pa.DictionaryArray.from_arrays(pa.array([0] * 9000, pa.int32()), ["x" * 60_000]).cast(
        pa.string()
    )
    return pa.table(held, schema=evidence.SCHEMA)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (lambda: pa.table({"x": pa.nulls(10**8, pa.int8())}), "columns|rows"),
        (lambda: pa.table({f"c{i}": pa.array([1], pa.int8()) for i in range(12_000)}), "footer of|columns"),
        (many_rows, "found 100001 rows, expected at most 100000"),
        (long_text, "found rows of [0-9]+ bytes, expected at most"),
    ],
)
def test_sizes_are_refused_before_they_are_allocated(tmp_path: Path, table: Any, said: str) -> None:
    sink, before = io.BytesIO(), 0
    pq.write_table(table().replace_schema_metadata({b"dks.schema": VERSION}), sink)
    data = bind(sink.getvalue())
    pool = pa.default_memory_pool()
    before = pool.max_memory()
    with pytest.raises(BadInput, match=said):
        read_rows_of(tmp_path / "a.parquet", data)
    assert pool.max_memory() - before < 2**28


def test_mutated_luts_are_refused_and_never_run(folder: Path) -> None:
    """The file in a package by its digest; the reader of evidence by its form, whatever the digest says."""
    text, rng = (folder / EVIDENCE).read_bytes(), random.Random(20)
    data, rules = json.loads(text), len(made_lut().rules)
    assert len(parse_evidence(text, EVIDENCE, rules)) == rules
    outcome(parse_evidence, b"", EVIDENCE, rules)
    manifest = read_manifest(folder)
    with nothing_runs():
        for index in range(COUNT):
            mutant = damage(text, rng) if index % 2 else raw(distort(data, rng), rng)
            found = outcome(parse_evidence, mutant, EVIDENCE, rules)
            assert found is None or [type(rule) for rule in found] == [dict] * rules
            if index % 10 == 0 and mutant != text:
                (folder / EVIDENCE).write_bytes(mutant)
                assert damaged(folder, manifest) == ["lut.json: changed since it was built"]


def test_mutated_tables_are_refused_or_are_tables(folder: Path) -> None:
    """Even if the manifest were made to fit: what is read is data."""
    text, rng, tables = (folder / TABLE).read_bytes(), random.Random(21), 0
    assert parse_table(text, TABLE) == made_lut().table()
    outcome(parse_table, b"", TABLE)
    manifest = read_manifest(folder)
    calls = [
        f"{call}, ".encode() for call in ("__import__('os').abort()", "open('/x', 'w')", "(lambda: 1)()", "exec")
    ]
    with nothing_runs():
        for index in range(COUNT):
            mutant = damage(text, rng)
            if index % 3 == 0:
                at = rng.choice([i for i, byte in enumerate(text) if byte in b"(,="]) + 1
                mutant = text[:at] + rng.choice((*calls, *(r.encode() for r in RAW[:11]))) + text[at:]
            found = outcome(parse_table, mutant, TABLE)
            assert found is None or isinstance(found, Table)
            tables += found is not None
            if index % 10 == 0 and mutant != text:
                (folder / TABLE).write_bytes(mutant)
                assert damaged(folder, manifest) == ["_table.py: changed since it was built"]
    assert tables, "a changed number is a table too"


@pytest.mark.parametrize(
    "text",
    [
        b"TABLE = Table((), ())",
        b'"""x"""\nfrom os import path\nTABLE = Table((), ())',
        b'"""x"""\nfrom dks.dispatch.table import Table\nTABLE = Table((), ())\nprint(1)',
        b'"""x"""\nfrom dks.dispatch.table import Table\nTABLE = Table((' + b"-" * 100_000 + b"1,), ())",
        b'"""x"""\nfrom dks.dispatch.table import Table\nTABLE = Table(' + b"(" * 100_000,
        b'"""x"""\nfrom dks.dispatch.table import Table\nTABLE = ' + b"1+" * 100_000 + b"1",
        b'"""x"""\nfrom dks.dispatch.table import Table\nTABLE = Table(rules=(Rule("a", 4, "b"),), groups=())',
        b'"""x"""\nfrom dks.dispatch.table import Table\nTABLE = Table(rules=(Rule("a b", 4),), groups=())',
        b'"""x"""\nfrom dks.dispatch.table import Table\nTABLE = Table(**{"rules": ()})',
        b'"""x"""\nfrom dks.dispatch.table import Table\nTABLE = Table(rules=(), groups=(1,))',
        b'"""x"""\nfrom dks.dispatch.table import Table\nTABLE = Table(rules=(True,), groups=())',
        b"\xff\xfe",
        b"\0",
        b"x" * (17 * 2**20),
    ],
)
def test_what_is_no_table_is_refused(text: bytes) -> None:
    with pytest.raises(BadInput, match=r"_table\.py: found"):
        parse_table(text, TABLE)


def test_the_table_s_grammar_is_what_the_template_writes(folder: Path) -> None:
    kinds = {type(node).__name__ for node in ast.walk(ast.parse((folder / TABLE).read_bytes()))}
    assert {"Call", "Tuple", "Dict", "Constant"} <= kinds


def test_mutated_manifests_are_refused(folder: Path) -> None:
    """A third of them sealed again: then each field is judged by itself, and files and fields must still fit."""
    text, rng, accepted = (folder / MANIFEST).read_bytes(), random.Random(22), 0
    data, own = json.loads(text), read_manifest(folder)
    assert outcome(parse_manifest, b"") is None and parse_manifest(text) == own
    misfits(own), dead_kernels(own)
    with nothing_runs():
        for index in range(COUNT):
            if index % 3 == 0:
                mutant = seal(distort(data, rng)).encode()
                found = outcome(parse_manifest, mutant)
                if found is not None:
                    accepted += 1
                    judge(folder, found, own)
            else:
                mutant = damage(text, rng) if index % 3 == 1 else raw(distort(data, rng), rng)
                assert outcome(parse_manifest, mutant) is None or mutant == text, mutant
    assert accepted, "a note that is sealed again is one of ours"


def judge(folder: Path, found: Manifest, own: Manifest) -> None:
    """What follows from a manifest that reads: nothing else serves than did before."""
    assert isinstance(misfits(found), list) and len(table_hash(found)) == 64
    assert (found.digest == own.digest) == (found == own)
    if any(own.files.get(name) != digest for name, digest in found.files.items()):
        assert damaged(folder, found) != [], "a digest of something else is found"
    if found.environment != own.environment:
        assert found.environment.diff(own.environment) != []


def test_a_mutated_manifest_on_disk_is_refused_at_load(folder: Path) -> None:
    text, rng = (folder / MANIFEST).read_bytes(), random.Random(23)
    for _ in range(50):
        (folder / MANIFEST).write_bytes(damage(text, rng))
        manifest, found = examine(folder)
        assert found and (manifest is None or (folder / MANIFEST).read_bytes() == text)
    (folder / MANIFEST).write_bytes(text)
    assert intact(folder)[1] == []


def test_forged_rows_select_or_are_refused(tmp_path: Path) -> None:
    """Problems and candidates that read, but that no operator or kernel declares."""
    for change in (
        {"problem": "linear[](m=8)@64"},
        {"problem": "linear[bias=yes,dtype=float64,epilogue=none](m=8,n=64,k=32)@64"},
        {"problem": "linear[bias=yes,dtype=float32,epilogue=none](k=8,n=64,m=32)@64"},
        {"candidate": "torch.linear/x1"},
        {"candidate": "torch.layer_norm", "kernel_digest": ""},
    ):
        with pytest.raises(BadInput, match="found"):
            select([dataclasses.replace(row("torch.linear", 10), **change)], made_lut().policy)
