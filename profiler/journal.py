"""An append-only journal: every acknowledged record survives kill -9, a torn write and a full disk.

One record is one line: sixteen hex digits of a SHA-256, a blank, JSON. The digest covers the record's number in
the file too, so that a line that was lost, doubled or moved is found as surely as one that was changed. A
Parquet file can't do this: a writer that is killed while it is open loses all of its rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dks.dispatch.evidence import sync_folder

Record = Mapping[str, Any]


@dataclass
class Journal:
    """What a journal file holds.

    Attributes:
        records: the good ones, in order.
        torn: bytes of an unfinished last line: a record that was never acknowledged.
        damaged: numbers (from 1) of lines that differ from their digest, or stand in another's place.
    """

    records: list[Record] = field(default_factory=list)
    torn: int = 0
    damaged: list[int] = field(default_factory=list)


def read(path: Path) -> Journal:
    """All that can be read of ``path``; a missing file is an empty journal.

    A truncated file gives every record that is whole. Raises OSError where the disk refuses.
    """
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return Journal()


def parse(data: bytes) -> Journal:
    """The same of a journal's bytes, or of its first ones."""
    *lines, rest = data.split(b"\n")
    found = Journal(torn=len(rest))
    for number, line in enumerate(lines, 1):
        record = _parse(number, line)
        if record is None:
            found.damaged.append(number)
        else:
            found.records.append(record)
    return found


def _parse(number: int, line: bytes) -> Record | None:
    if line[16:17] != b" " or line[:16] != _digest(number, line[17:]):
        return None
    record: Record = json.loads(line[17:])
    return record


def _digest(number: int, text: bytes) -> bytes:
    return hashlib.sha256(b"%d %s" % (number, text)).hexdigest()[:16].encode()


def _line(number: int, record: Record) -> bytes:
    text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    return _digest(number, text) + b" " + text + b"\n"


class Writer:
    """Appends records to a journal; ``append`` returns once the record is on the disk.

    A torn last line is cut off when the file is opened. After any failed write the file ends where the last
    acknowledged record ended, or, where the disk refuses that too, in a torn line.

    Raises:
        OSError: the file can't be written.
    """

    def __init__(self, path: Path) -> None:
        held = read(path)
        self._file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        if held.torn:
            self._file.truncate(self._file.seek(-held.torn, os.SEEK_END))
        self._end = self._file.seek(0, os.SEEK_END)
        self._number = len(held.records) + len(held.damaged)
        sync_folder(path.parent)

    def append(self, *records: Record) -> None:
        """Write records and wait for the disk, once. Raises OSError, and then nothing was acknowledged."""
        lines = b"".join(_line(number, record) for number, record in enumerate(records, self._number + 1))
        try:
            written = 0
            while written < len(lines):
                written += self._file.write(lines[written:]) or 0
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(self._file.seek(self._end))
            raise
        self._end += len(lines)
        self._number += len(records)

    def close(self) -> None:
        """Give the file back; what was acknowledged stays."""
        self._file.close()


def replace(path: Path, records: Iterable[Record]) -> None:
    """Put a journal of these records in place of ``path``, whole or not at all. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.writelines(_line(number, record) for number, record in enumerate(records, 1))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)
