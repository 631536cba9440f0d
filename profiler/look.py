"""Looking at a run directory at any time, while a sweep is at work in it or after one was killed.

It only reads: it takes no lock, mends nothing, and needs no permission to write."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from dks.dispatch import pool
from dks.dispatch.errors import BadInput, unreadable
from dks.dispatch.evidence import JOURNAL, Measurement, read_rows, run_files
from dks.dispatch.problem import Candidate, Problem
from dks.profiler import journal
from dks.profiler.findings import Contest, Header, to_rows
from dks.profiler.held import Held
from dks.profiler.store import LOCK_FILE, PLAN_FILE, RUN_FILE, named_by_us

STOPPED = "its sweep was stopped before its end, or is at work elsewhere; dks-profile run goes on from here"

_TRIES = 20
_LOCKS = Path("/proc/locks")


@dataclass
class Look:
    """What a run directory held at one moment.

    Attributes:
        rows: all that was acknowledged.
        state: why it is not finished, in a sentence; empty if it is.
        unfinished: contests of which the journal knows more than Parquet; their rows may still change.
        notes: what else a user should know, one sentence each.
        damaged: what can't be read, one sentence each; the rest is in ``rows``.
    """

    rows: list[Measurement] = field(default_factory=list)
    state: str = ""
    unfinished: set[Contest] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def look(folder: Path) -> Look:
    """All that sweeps have acknowledged in a run directory.

    Raises:
        BadInput: there is no such directory, it may not be read, or nothing is in it.
    """
    for _ in range(_TRIES):
        found = _look(folder)
        if found is not None:
            break
    else:
        raise BadInput(f"{folder}: found other files each time it was read, expected it to last; look again")
    if not found.rows:
        if found.damaged:
            raise BadInput(found.damaged[0])
        raise BadInput(
            f"{folder}: found no measurements{f' yet: {found.state}' if found.state else ''}, expected those of a "
            f"sweep; run: dks-profile run CONFIG -o {shlex.quote(str(folder))}"
        )
    return found


def _look(folder: Path) -> Look | None:
    """None where the files changed under it: a sweep ended, or began anew.

    The journal only grows until all of it is in Parquet, and a new file then takes its place. So Parquet first and
    then the journal miss nothing, as long as it is the same file before and after.
    """
    paths = run_files(folder)
    place = folder / JOURNAL
    log = _opened(place)
    try:
        held, found, kept = Held(), Look(), dict[Contest, list[Measurement]]()
        for path in paths:
            try:
                rows = read_rows(path)
            except BadInput as error:
                if not path.exists() and not path.is_symlink():
                    return None
                if named_by_us(path):
                    found.damaged.append(str(error))
                continue
            kept |= held.take(rows)
        if not _same(log, place):
            return None
        data = b"" if log is None else log.read()
    finally:
        if log is not None:
            log.close()
    _apply(held, data, place, found)
    found.unfinished = held.dirty
    found.state = _state(folder, bool(held.dirty))
    headers = _Headers(folder, held) if held.dirty else None
    for contest in sorted(held.known, key=lambda each: each.slug):
        if headers is not None and contest in held.dirty:
            found.rows += headers.rows(contest, found)
        else:
            found.rows += kept.get(contest, [])
    found.notes += [f"begun and not ended: {candidate} on {contest.id}" for contest, candidate in held.attempts]
    if aside := sorted(path.name for path in folder.glob("_quarantine-*")):
        found.notes.append(f"set aside as damaged by an earlier sweep, and not read: {', '.join(aside)}")
    return found


def _apply(held: Held, data: bytes, path: Path, found: Look) -> None:
    read = journal.parse(data)
    if read.torn:
        found.notes.append(
            f"{path}: {read.torn} bytes at its end are no whole record, and not read: being written, or torn when "
            "the sweep was killed; it was never acknowledged"
        )
    if read.damaged:
        lines = ", ".join(map(str, read.damaged[:5]))
        found.damaged.append(
            f"{path}: found lines that differ from their digest ({lines}), expected them as written; the rest is "
            "intact; dks-profile run sets them aside and measures what is lost"
        )
    try:
        for record in read.records:
            held.apply(record)
    except (KeyError, TypeError, ValueError) as error:
        found.damaged.append(
            f"{path}: found a record of another version ({error}), expected this one's; run again with --fresh"
        )


class _Headers:
    """What a row has beside its finding, for contests that have no Parquet file, or an older one."""

    def __init__(self, folder: Path, held: Held) -> None:
        run, plan = _read_json(folder / RUN_FILE), _read_json(folder / PLAN_FILE)
        try:
            self._environment = json.dumps(run["environment"], sort_keys=True)
            self._cache = str(run["settings"]["cache"])
            self._known = held.known
            self._headers = {
                Contest(Problem.parse(each["problem"]), each["mode"]): (str(each["role"]), float(each["weight"]))
                for each in plan.get("contests", ())
            } | held.headers
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"{folder}: found a journal and no description of its run that reads ({error!r}), expected "
                f"{RUN_FILE} and {PLAN_FILE} as dks-profile run writes them"
            ) from None

    def rows(self, contest: Contest, found: Look) -> list[Measurement]:
        """Its rows; those of kernels that this version does not know are left out, and said."""
        findings = self._known[contest]
        candidates = [Candidate.parse(name) for name in findings.found]
        able = [c for c in candidates if c.kernel in pool.kernels() and contest.problem.op in pool.operators()]
        if len(able) < len(candidates):
            found.notes.append(
                f"{len(candidates) - len(able)} candidates unknown here are left out of {contest.id}"
            )
        if not able:
            return []
        role, weight = self._headers.get(contest, ("bin", 0.0))
        header = Header(contest.problem, role, weight, self._cache, self._environment, contest.mode)
        return to_rows(header, findings, able)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        said = unreadable(path, error) if isinstance(error, OSError) else f"{path}: found {error}, expected JSON"
        raise BadInput(said) from None
    return data if isinstance(data, dict) else {}


def _opened(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadInput(unreadable(path, error)) from None


def _same(file: BinaryIO | None, path: Path) -> bool:
    """Whether an open file, or none, is what lies there now. While it is open, no other file has its number."""
    if file is None:
        return not path.exists()
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _state(folder: Path, more: bool) -> str:
    at_work = _holder(folder / LOCK_FILE)
    if at_work:
        return f"a sweep is at work in it (process {at_work})"
    if more:
        return STOPPED
    return ""


def _holder(lock: Path) -> str:
    """The process that holds a lock, as the system lists them; empty if none is seen. Taking it to find out could
    turn away a sweep that begins just now."""
    try:
        status, lines = lock.stat(), _LOCKS.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return ""
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in lines:  # such as: 1: FLOCK  ADVISORY  WRITE 32218 fe:00:2196886 0 EOF
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5] == place:
            return words[4]
    return ""
