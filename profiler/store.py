"""A run directory: one sweep at a time, nothing acknowledged is ever lost, nothing of two machines is mixed.

What is measured goes to ``_journal`` first, record by record, and from there into one Parquet file a problem and
mode.
Both may hold the same rounds for a while (a kill between the two); a round's number makes it count once.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dks.dispatch import pool
from dks.dispatch.environment import Environment
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import JOURNAL, Measurement, is_ours, read_rows, sync_folder, write_rows
from dks.dispatch.modes import EAGER
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.sources import source_digest
from dks.dispatch.toolchain import holds, toolchain
from dks.profiler import journal
from dks.profiler.findings import (
    Contest,
    Finding,
    Findings,
    Header,
    Round,
    rounds_to_json,
    to_rows,
)
from dks.profiler.held import Held

STRUCK = ("crashed", "timeout", "out_of_memory")
"""Statuses that cost a process."""

RUN_FILE = "_run.json"
LOCK_FILE = "_lock"
PLAN_FILE = "_plan.json"


@contextmanager
def opened(
    folder: Path, config: str, environment: Environment, settings: Mapping[str, Any], *, fresh: bool = False
) -> Iterator[Store]:
    """Hold a run directory for this process.

    Args:
        config: name of the sweep config.
        settings: what else measurements depend on; another value begins a new session.
        fresh: forget what a sweep wrote there.

    Raises:
        BadInput: it is in use, can't be written, is no run directory, belongs to another config, or is
            damaged: what is damaged is then set aside, so that the next run goes on with the rest.
        OSError: the disk refuses.
    """
    with _locked(folder):
        _refuse_strangers(folder)
        if fresh:
            _forget(folder)
        notes = _claim(folder, config, environment, settings)
        store = Store(folder, environment, str(settings["cache"]), notes)
        try:
            yield store
        finally:
            store.close()


class Store(Held):
    """What a run directory holds, in memory and on disk.

    Attributes:
        notes: what a user should know about what was found, one sentence each.
    """

    def __init__(self, folder: Path, environment: Environment, cache: str, notes: Sequence[str] = ()) -> None:
        super().__init__()
        self.folder, self.notes = folder, list(notes)
        self._environment = json.dumps(environment.to_dict(), sort_keys=True)
        self._cache = cache
        self._digests = {id: source_digest(kernel) for id, kernel in pool.kernels().items()}
        self._toolchains = {id: toolchain(kernel) for id, kernel in pool.kernels().items()}
        self._load()
        if self._drop_changed_kernels():
            # Before anything new is measured: a kill must not leave new findings beside old times.
            journal.replace(folder / JOURNAL, self._dump())
        self._writer = journal.Writer(folder / JOURNAL)

    def findings(self, contest: Contest) -> Findings:
        """What is known of a contest; change it through the methods below only."""
        return self.known.setdefault(contest, Findings())

    def contests(self) -> list[Contest]:
        """Every contest that something is known of."""
        return list(self.known)

    def role(self, contest: Contest) -> str:
        """The role a problem had when it was last written; empty if it never was."""
        return self.headers.get(contest, ("", 0.0))[0]

    def struck(self, candidate: Candidate, mode: str) -> list[str]:
        """Contests in which a candidate crashed, hung or ran out of memory; and, of any mode but eager, those in
        which it failed: what can't be captured is not so for its size."""
        return [
            contest.id
            for contest, findings in self.known.items()
            if (finding := findings.found.get(candidate.id)) is not None
            and (finding.status in STRUCK or (mode != EAGER and (contest.mode, finding.status) == (mode, "failed")))
        ]

    def split_problems(self) -> list[Problem]:
        """Representatives that an earlier session added where a bin was too wide, each once."""
        return list(dict.fromkeys(c.problem for c, (role, _) in self.headers.items() if role == "split"))

    def next_process(self) -> int:
        """A process number that no sample has."""
        used = [each.process for findings in self.known.values() for each in findings.rounds]
        return max(used, default=-1) + 1

    def attempt(self, contest: Contest, candidate: str) -> None:
        """Note, before a candidate is tried, that it is. Raises OSError."""
        self._writer.append({"do": "attempt", **_named(contest), "candidate": candidate})
        self.attempts[contest, candidate] = self.attempts.get((contest, candidate), 0) + 1

    def withdraw(self, contest: Contest, candidate: str) -> None:
        """Take an attempt back that the sweep itself broke off. Raises OSError."""
        self._writer.append({"do": "withdraw", **_named(contest), "candidate": candidate})
        self.drop_attempt((contest, candidate))

    def found(self, contest: Contest, candidate: str, finding: Finding) -> None:
        """Keep a finding; it is on the disk when this returns. Raises OSError."""
        self.found_all(contest, {candidate: finding})

    def found_all(self, contest: Contest, findings: Mapping[str, Finding]) -> None:
        """Keep findings of several candidates, as one does. Raises OSError."""
        records = []
        for candidate, finding in findings.items():
            kernel = Candidate.parse(candidate).kernel
            finding.digest, finding.toolchain = self._digests[kernel], self._toolchains[kernel]
            record = {"do": "found", **_named(contest), "candidate": candidate}
            records.append({**record, "finding": dataclasses.asdict(finding)})
        self._writer.append(*records)
        self.findings(contest).found.update(findings)
        for candidate in findings:
            self.attempts.pop((contest, candidate), None)
        self.dirty.add(contest)

    def add(self, contest: Contest, rounds: Sequence[Round]) -> None:
        """Keep rounds; they are on the disk when this returns. Raises OSError."""
        self._writer.append({"do": "rounds", **_named(contest), "rounds": rounds_to_json(rounds)})
        self.findings(contest).add(rounds)
        self.dirty.add(contest)

    def plan(self, headers: Mapping[Contest, tuple[str, float]]) -> None:
        """Note role and weight of all that the sweep is to measure, for whoever looks meanwhile. Raises OSError."""
        entries = [{**_named(c), "role": role, "weight": weight} for c, (role, weight) in headers.items()]
        _write(self.folder / PLAN_FILE, {"contests": entries})

    def rows(
        self, contest: Contest, role: str, weight: float, candidates: Sequence[Candidate]
    ) -> list[Measurement]:
        """The rows of a contest, as they will be in Parquet."""
        header = Header(contest.problem, role, weight, self._cache, self._environment, contest.mode)
        return to_rows(header, self.findings(contest), candidates)

    def compact(self, contest: Contest, role: str, weight: float, candidates: Sequence[Candidate]) -> None:
        """Put what the journal holds of a contest into its Parquet file, whole or not at all. Raises OSError."""
        # A file that holds all of a run is no contest's own: the sweep sets it aside.
        changed = self.headers.get(contest) != (role, weight) or not self.path(contest).is_file()
        if not self.known.get(contest, Findings()).found or not (changed or contest in self.dirty):
            return
        write_rows(self.path(contest), self.rows(contest, role, weight, candidates))
        self.headers[contest] = (role, weight)
        self.dirty.discard(contest)

    def retire_journal(self) -> None:
        """Empty the journal once Parquet has all of it; attempts that never ended stay. Raises OSError."""
        if self.dirty:
            return
        self._writer.close()
        records = [
            {"do": "attempt", **_named(contest), "candidate": candidate}
            for (contest, candidate), count in self.attempts.items()
            for _ in range(count)
        ]
        journal.replace(self.folder / JOURNAL, records)
        self._writer = journal.Writer(self.folder / JOURNAL)

    def set_aside(self, wanted: set[Contest]) -> list[str]:
        """Rename the files of contests outside ``wanted``, so that no table takes them; returns their new names,
        which begin with ``_stale-``."""
        names = {self.path(contest).name for contest in wanted}
        stale = [p for p in sorted(self.folder.glob("*.parquet")) if p.name not in names and p.name[0] != "_"]
        return [path.rename(path.with_name(f"_stale-{path.name}")).name for path in stale if is_ours(path)]

    def give_up(self, wanted: set[Contest]) -> None:
        """Leave out of the journal what it holds of contests outside ``wanted``. Raises OSError."""
        if self.dirty - wanted:
            self.dirty &= wanted
            self.retire_journal()

    def path(self, contest: Contest) -> Path:
        """The contest's Parquet file."""
        return self.folder / f"{contest.slug}.parquet"

    def close(self) -> None:
        """Give the journal back."""
        self._writer.close()

    def _load(self) -> None:
        quarantined = []
        for path in sorted(self.folder.glob("*.parquet")):
            if path.name[0] in "_.":
                continue
            try:
                rows = read_rows(path)
            except BadInput as error:
                if not named_by_us(path):
                    continue
                path.rename(path.with_name(f"_quarantine-{path.name}"))
                quarantined.append(str(error).split("; ")[0])
                continue
            self.take(rows)
        quarantined += self._load_journal()
        if quarantined:
            raise BadInput(
                f"{quarantined[0]}{f' (and {len(quarantined) - 1} more)' if quarantined[1:] else ''}; the damaged "
                f"part is kept as {self.folder}/_quarantine-*, the rest is intact; run again to measure it"
            )

    def _load_journal(self) -> list[str]:
        path = self.folder / JOURNAL
        held = journal.read(path)
        if held.damaged:
            aside = path.with_name(f"_quarantine-journal-{len(list(self.folder.glob('_quarantine-*')))}")
            aside.write_bytes(path.read_bytes())
            journal.replace(path, held.records)
            lines = ", ".join(map(str, held.damaged[:5]))
            return [f"{path}: found lines that differ from their digest ({lines}), expected them as written"]
        if held.torn:
            self.notes.append(f"{path}: an unfinished record of {held.torn} bytes was dropped: never acknowledged")
        try:
            for record in held.records:
                self.apply(record)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"{path}: found a record of another version ({error}), expected this one's; use --fresh to drop "
                "what is there, or measure into another -o RUN_DIR"
            ) from None
        return []

    def _dump(self) -> Iterator[Mapping[str, Any]]:
        """Records that make what Parquet does not hold, whatever it holds."""
        for (contest, candidate), count in self.attempts.items():
            for _ in range(count):
                yield {"do": "attempt", **_named(contest), "candidate": candidate}
        for contest in sorted(self.dirty & self.known.keys(), key=lambda each: each.id):
            yield {"do": "reset", **_named(contest)}
            for name, finding in self.known[contest].found.items():
                fields = dataclasses.asdict(finding)
                yield {"do": "found", **_named(contest), "candidate": name, "finding": fields}
            yield {"do": "rounds", **_named(contest), "rounds": rounds_to_json(self.known[contest].rounds)}

    def _drop_changed_kernels(self) -> bool:
        """Forget, one by one, what was measured of a kernel whose source is another one now, or would be compiled
        by other tools; whether any was."""
        dropped: dict[tuple[str, str], int] = {}
        gone = [contest for contest in self.known if contest.problem.op not in pool.operators()]
        for contest in gone:
            del self.known[contest]
            self.dirty.discard(contest)
        for contest, findings in self.known.items():
            default = pool.operator(contest.problem.op).default
            for name, finding in list(findings.found.items()):
                kernel = Candidate.parse(name).kernel
                if why := self._changed(kernel, finding):
                    findings.forget(name, default)
                    dropped[kernel, why] = dropped.get((kernel, why), 0) + 1
                    self.dirty.add(contest)
        for (kernel, why), count in sorted(dropped.items()):
            self.notes.append(f"new session: {kernel}: {why}; its {count} results are measured again")
        return bool(dropped)

    def _changed(self, kernel: str, finding: Finding) -> str:
        """What is other now than when a kernel was measured, in words; empty where nothing is."""
        if finding.digest != self._digests.get(kernel):
            return "its source changed"
        if not holds(finding.toolchain, now := self._toolchains[kernel]):
            return f"measured with {finding.toolchain or 'no compiler'}, found {now}"
        if finding.status == "ok" and not finding.declines_rows and "rows" not in finding.errors:
            return "its errors are those of whole outputs, and say nothing of single rows"
        return ""


def _named(contest: Contest) -> dict[str, str]:
    """A contest in a record of the journal."""
    return {"problem": contest.problem.id, "mode": contest.mode}


def named_by_us(path: Path) -> bool:
    """Whether a file has the name of a problem's."""
    return path.name.split(".")[0] in pool.operators()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run directory for this process. The kernel drops the lock with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise BadInput(f"{folder}: can't be written ({error.strerror}); choose another -o RUN_DIR") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"{folder}: found another sweep at work in it, expected to be alone; "
                "wait for it, or choose another -o RUN_DIR"
            ) from None
        yield


def _refuse_strangers(folder: Path) -> None:
    """Refuse a directory that holds anything and is no run directory."""
    strangers = [p.name for p in folder.iterdir() if not p.name.startswith("_")]
    if strangers and not (folder / RUN_FILE).exists():
        (folder / LOCK_FILE).unlink()
        raise BadInput(
            f"{folder}: found {strangers[0]!r} in it and no {RUN_FILE}, expected a run directory or an "
            "empty one; choose another -o RUN_DIR"
        )


def _claim(folder: Path, config: str, environment: Environment, settings: Mapping[str, Any]) -> list[str]:
    """Make ``folder`` the run directory of this config, in a session of this environment and these settings.

    Returns:
        what a user should know.
    """
    path = folder / RUN_FILE
    ours = {"environment": environment.to_dict(), "settings": dict(settings)}
    if not path.exists():
        _write(path, {"config": config, **ours})
        return []
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        theirs = Environment.from_dict(held["environment"])
        other, earlier = held["config"], dict(held["settings"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        said = f"found no {error} in it" if isinstance(error, KeyError) else f"found {error}"
        raise BadInput(
            f"{path}: {said}, expected the description of a run by this version; use --fresh to drop what is "
            "there, or measure into another -o RUN_DIR"
        ) from None
    if other != config:
        raise BadInput(
            f"{folder}: found results of config {other!r}, expected {config!r}: they would end in one "
            "table; use --fresh to drop them, or another -o RUN_DIR"
        )
    changed = theirs.diff(environment)
    changed += [f"{k}: {earlier.get(k)} != {v}" for k, v in settings.items() if earlier.get(k) != v]
    if not changed:
        return []
    aside = folder / f"_session-{len(list(folder.glob('_session-*')))}"
    aside.mkdir()
    moved = [each for each in folder.iterdir() if each.suffix == ".parquet" or each.name == JOURNAL]
    for each in moved:
        each.rename(aside / each.name)
    path.rename(aside / RUN_FILE)
    _write(path, {"config": config, **ours})
    return [f"new session: {'; '.join(changed)}; the {len(moved)} files of the earlier one are in {aside}"]


def _write(path: Path, data: Mapping[str, Any]) -> None:
    partial = path.with_name(f"_partial-{path.name}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def _forget(folder: Path) -> None:
    """Drop what a sweep wrote here, and nothing else."""
    for path in folder.iterdir():
        ours = path.suffix == ".parquet" and is_ours(path)
        if ours or path.name in (RUN_FILE, PLAN_FILE, JOURNAL) or path.name.startswith("_partial-"):
            path.unlink()
