"""The journal: what was acknowledged comes back, and what was damaged is found."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from dks.profiler import journal
from dks.profiler.journal import Writer, read

RECORDS = [{"kind": "rounds", "n": i, "text": "x" * (i % 7)} for i in range(12)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "_journal"
    writer = Writer(path)
    for record in RECORDS:
        writer.append(record)
    writer.close()
    return path


def test_records_come_back_in_order(path: Path, tmp_path: Path) -> None:
    assert read(path).records == RECORDS
    assert read(tmp_path / "none").records == []


def test_truncated_at_every_byte_it_gives_every_complete_record(path: Path) -> None:
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        found = read(path)
        complete = whole[:size].count(b"\n")
        assert found.records == RECORDS[:complete] and not found.damaged
        assert found.torn == size - (whole[:size].rfind(b"\n") + 1)


def test_a_torn_tail_is_cut_off_and_the_journal_goes_on(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])
    writer = Writer(path)
    writer.append({"n": "next"})
    assert read(path).records == [*RECORDS[:-1], {"n": "next"}]


def test_every_flipped_byte_is_found(path: Path) -> None:
    whole = path.read_bytes()
    rng = random.Random(3)
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        found = read(path)
        assert found.damaged or found.torn, at
        assert all(record in RECORDS for record in found.records), at
        # The line itself, its neighbour where a newline was hit, and with an extra line all that follow.
        assert len(found.records) >= whole[:at].count(b"\n")


@pytest.mark.parametrize("change", ["lost", "doubled", "moved"])
def test_a_line_out_of_place_is_found(path: Path, change: str) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    if change == "lost":
        del lines[4]
    elif change == "doubled":
        lines.insert(4, lines[4])
    else:
        lines[4], lines[5] = lines[5], lines[4]
    path.write_bytes(b"".join(lines))
    assert read(path).damaged


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_a_full_disk_acknowledges_nothing_and_harms_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    writer = Writer(path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    class Torn:
        """Writes half of what it is given, then fails, as a full disk does."""

        def __init__(self, file: Any) -> None:
            self.file, self.calls = file, 0

        def write(self, data: bytes) -> int:
            self.calls += 1
            if self.calls > 1:
                full()
            return int(self.file.write(data[: len(data) // 2]))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    whole = writer._file
    if failing == "fsync":
        monkeypatch.setattr(journal.os, "fsync", full)
    else:
        writer._file = Torn(whole)  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space"):
        writer.append({"n": "lost"})
    assert read(path).records == RECORDS and not read(path).torn
    monkeypatch.undo()
    writer._file = whole
    writer.append({"n": "kept"})
    assert read(path).records == [*RECORDS, {"n": "kept"}]


def test_every_append_waits_for_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(journal.os, "fsync", synced.append)
    writer = Writer(path)
    synced.clear()
    writer.append({"n": 1})
    assert synced == [writer._file.fileno()]


def test_replacing_is_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input"):
        journal.replace(path, [])
    monkeypatch.undo()
    assert read(path).records == RECORDS
    journal.replace(path, RECORDS[3:])
    assert read(path).records == RECORDS[3:]
