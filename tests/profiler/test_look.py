"""Looking at a run directory while a sweep is at work in it, and after one was killed: nothing is written."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import dks.profiler
from dks.dispatch.environment import Environment
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import JOURNAL, Measurement, read_run, write_rows
from dks.dispatch.problem import Candidate, Problem
from dks.profiler import journal
from dks.profiler import look as looking
from dks.profiler.cli import main
from dks.profiler.findings import Contest, Finding, Round
from dks.profiler.look import Look, look
from dks.profiler.store import LOCK_FILE, Store, opened
from tests.commands import run

TRAITS = {"dtype": "float32", "bias": "yes", "epilogue": "none"}
ONE, TWO, HELD_OUT = (Contest(Problem.of("linear", TRAITS, {"m": m, "n": 32, "k": 32})) for m in (1, 8, 5))
PLAN = {ONE: ("bin", 3.0), TWO: ("bin", 1.0), HELD_OUT: ("held_out", 1.0)}
NAMES = ("torch.linear", "torch.addmm")


@contextmanager
def sweeping(folder: Path) -> Iterator[Store]:
    settings = {"cache": "warm", "seed": 0, "neighbours": ""}
    with opened(folder, "looked", Environment.current(), settings) as store:
        store.plan(PLAN)
        yield store


def measure(store: Store, contest: Contest, first: int = 0) -> None:
    if not first:
        for name in NAMES:
            store.found(contest, name, Finding(errors={"normal": 1e-7, "outliers": 2e-7, "rows": 2e-7}))
    rounds = [Round(n, 0, {"torch.linear": 2000, "torch.addmm": 1000}) for n in range(first, first + 6)]
    store.add(contest, rounds)


def finish(store: Store, contest: Contest) -> None:
    store.compact(contest, *PLAN[contest], [Candidate.parse(name) for name in NAMES])


def files(folder: Path) -> Mapping[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.fixture
def journal_only(tmp_path: Path) -> Path:
    """What kill -9 leaves of a sweep that had not come to its end."""
    folder = tmp_path / "run"
    with sweeping(folder) as store:
        measure(store, ONE)
        measure(store, HELD_OUT)
        store.attempt(TWO, "torch.addmm")
    return folder


def ordered(rows: list[Measurement]) -> list[Measurement]:
    return sorted(rows, key=lambda row: (row.problem, row.candidate))


def untouched(folder: Path) -> Look:
    before = files(folder)
    found = look(folder)
    assert files(folder) == before
    return found


def test_a_journal_alone_is_read_as_it_will_be_in_parquet(journal_only: Path) -> None:
    found = untouched(journal_only)
    assert "stopped before its end" in found.state and found.unfinished == {ONE, HELD_OUT} and not found.damaged
    assert found.notes == [f"begun and not ended: torch.addmm on {TWO.id}"]
    assert {(row.problem, row.role, row.weight) for row in found.rows} == {
        (ONE.problem.id, "bin", 3.0),
        (HELD_OUT.problem.id, "held_out", 1.0),
    }
    assert {row.candidate: row.ratio for row in found.rows} == {"torch.linear": 1.0, "torch.addmm": 2.0}
    with sweeping(journal_only) as store:
        finish(store, ONE)
        finish(store, HELD_OUT)
        store.retire_journal()
    done = untouched(journal_only)
    assert (done.state, done.unfinished) == ("", set())
    assert ordered(done.rows) == ordered(found.rows) == ordered(read_run(journal_only))


def test_what_parquet_and_journal_both_hold_counts_once(journal_only: Path) -> None:
    with sweeping(journal_only) as store:
        finish(store, ONE)
        finish(store, HELD_OUT)
        store.retire_journal()
        measure(store, ONE, 6)
        finish(store, ONE)  # and the journal still has it
        measure(store, ONE, 12)
    found = untouched(journal_only)
    assert found.unfinished == {ONE}
    rounds = {row.problem: row.rounds for row in found.rows}
    assert rounds == {ONE.problem.id: list(range(18)), HELD_OUT.problem.id: list(range(6))}


def test_parquet_without_a_journal_is_finished(journal_only: Path) -> None:
    with sweeping(journal_only) as store:
        finish(store, ONE)
    (journal_only / JOURNAL).unlink()
    found = untouched(journal_only)
    assert (found.state, found.unfinished) == ("", set()) and {row.problem for row in found.rows} == {
        ONE.problem.id
    }


def test_all_of_a_run_in_one_file_is_read_whole(journal_only: Path) -> None:
    """As ``luts/`` keeps them."""
    with sweeping(journal_only) as store:
        finish(store, ONE)
        finish(store, HELD_OUT)
        store.retire_journal()
    rows = read_run(journal_only)
    for path in journal_only.glob("*.parquet"):
        path.unlink()
    write_rows(journal_only / "all.parquet", rows)
    assert ordered(untouched(journal_only).rows) == ordered(rows)
    with sweeping(journal_only) as store:
        assert {each.number for each in store.findings(HELD_OUT).rounds} == set(range(6))
        finish(store, ONE)
        finish(store, HELD_OUT)
        assert store.set_aside({ONE, HELD_OUT}) == ["_stale-all.parquet"]
    assert ordered(untouched(journal_only).rows) == ordered(rows)


def test_show_and_pandas_mark_what_is_unfinished(journal_only: Path) -> None:
    with sweeping(journal_only) as store:
        finish(store, ONE)
        finish(store, HELD_OUT)
        store.retire_journal()
        measure(store, TWO)
    shown = run(main, "show", journal_only)
    assert shown.returncode == 0 and "3 problems, 6 candidates" in shown.stdout
    assert "unfinished: its sweep was stopped" in shown.stdout
    lines = [line for line in shown.stdout.splitlines() if "dtype=float32" in line]
    assert {"m=8," in line: "unfinished" in line for line in lines} == {True: True, False: False}, lines
    frame = dks.profiler.read(journal_only)
    assert dict(zip(frame.problem, frame.unfinished, strict=True)) == {
        ONE.problem.id: False,
        TWO.problem.id: True,
        HELD_OUT.problem.id: False,
    }
    assert "stopped" in frame.attrs["state"] and (frame.median_ns > 0).all()
    with sweeping(journal_only) as store:
        finish(store, TWO)
        store.retire_journal()
    assert "unfinished" not in run(main, "show", journal_only).stdout
    assert not dks.profiler.read(str(journal_only)).unfinished.any()


def test_a_torn_record_is_said_and_left(journal_only: Path) -> None:
    whole = look(journal_only)
    path = journal_only / JOURNAL
    data = path.read_bytes()
    for size in range(data.rindex(b"\n", 0, -1) + 2, len(data)):  # inside the last record
        path.write_bytes(data[:size])
        found = untouched(journal_only)
        assert found.rows == whole.rows and "no whole record" in found.notes[0], size
    path.write_bytes(data[: data.index(b"\n") // 2])
    with pytest.raises(BadInput, match="no measurements"):
        look(journal_only)
    assert run(main, "show", journal_only).returncode == 2


def test_damage_is_said_and_the_rest_is_shown(journal_only: Path) -> None:
    with sweeping(journal_only) as store:
        finish(store, ONE)
        finish(store, HELD_OUT)
        store.retire_journal()
        measure(store, TWO)
        path = store.path(ONE)
    (journal_only / "_quarantine-earlier.parquet").write_bytes(b"damaged once")
    for damaged in (path, journal_only / JOURNAL):
        data = bytearray(damaged.read_bytes())
        data[40] ^= 1
        damaged.write_bytes(data)
    found = untouched(journal_only)
    assert len(found.damaged) == 2 and {row.problem for row in found.rows} == {TWO.problem.id, HELD_OUT.problem.id}
    assert any("_quarantine-earlier.parquet" in note for note in found.notes)
    shown = run(main, "show", journal_only)
    assert shown.returncode == 2 and "torch.addmm" in shown.stdout and "digest" in shown.stderr
    with pytest.warns(RuntimeWarning, match="digest"):
        assert len(dks.profiler.read(journal_only)) == len(found.rows)


def sweep_on(folder: Path, answer: Any) -> None:
    with sweeping(folder) as store:
        measure(store, ONE)
        answer.send("begun")
        number = 6
        while True:
            measure(store, ONE, number)
            if number % 60 == 0:  # as a sweep ends
                finish(store, ONE)
                store.retire_journal()
            answer.send(number + 5)
            number += 6


def test_a_sweep_at_work_is_seen_without_disturbing_it(tmp_path: Path) -> None:
    """What it has said to be kept is there each time, however it moves its files meanwhile."""
    folder = tmp_path / "run"
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=sweep_on, args=(folder, theirs))
    process.start()
    try:
        assert ours.poll(60) and ours.recv() == "begun"
        last, looks = 5, 0
        while looks < 25:
            while ours.poll():
                last = ours.recv()
            (default,) = [row for row in look(folder).rows if row.candidate == "torch.linear"]
            assert default.rounds == list(range(len(default.rounds))) and default.rounds[-1] >= last
            looks += 1
        state = look(folder).state
        assert state in (f"a sweep is at work in it (process {process.pid})", looking.STOPPED)
        with pytest.raises(BadInput, match="another sweep at work"), sweeping(folder):
            pass
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert "at work in it (" not in look(folder).state


def test_the_holder_of_a_lock_is_read_from_the_system_s_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / LOCK_FILE
    lock.write_text("")
    status = lock.stat()
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    monkeypatch.setattr(looking, "_LOCKS", tmp_path / "locks")
    assert looking._holder(lock) == ""
    (tmp_path / "locks").write_text(
        f"1: POSIX  ADVISORY  READ 7 {place} 0 EOF\n2: FLOCK ADVISORY WRITE 8 00:00:1 0 EOF\n"
    )
    assert looking._holder(lock) == ""
    (tmp_path / "locks").write_text(f"1: -> FLOCK\n2: FLOCK  ADVISORY  WRITE 4711 {place} 0 EOF\n")
    assert looking._holder(lock) == "4711" and looking._holder(tmp_path / "none") == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize("open_to_read", [True, False])
def test_another_user_looks_without_permission_to_write(open_to_read: bool) -> None:
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    place.chmod(0o755)
    before = os.umask(0o022 if open_to_read else 0o077)
    try:
        with sweeping(place / "run") as store:
            measure(store, ONE)
            finish(store, ONE)
            measure(store, TWO)
    finally:
        os.umask(before)
    if not open_to_read:
        (place / "run").chmod(0o755)

    def child(answer: Any) -> None:
        os.setgroups([])
        os.setgid(54321)
        os.setuid(54321)
        answer.send(run(main, "show", place / "run"))

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=child, args=(theirs,))
    with warnings.catch_warnings():
        process.start()
    assert ours.poll(60)
    shown = ours.recv()
    process.join()
    if open_to_read:
        assert shown.returncode == 0 and "unfinished: " in shown.stdout and "2 problems" in shown.stdout, shown
    else:
        assert shown.returncode == 2 and "Permission denied" in shown.stderr and "chmod" in shown.stderr, shown


def test_a_journal_of_another_version_is_said_by_show_and_refused_by_a_sweep(tmp_path: Path) -> None:
    record = {"do": "found", "problem": "softmax[dtype=float32](m=1,n=8)@64", "candidate": "torch.softmax"}
    journal.replace(tmp_path / JOURNAL, [{**record, "finding": {"of_later": 1}}])
    with pytest.raises(BadInput, match="another version"):
        look(tmp_path)
    with pytest.raises(BadInput, match=r"another version.*expected this one's; use --fresh"):
        Store(tmp_path, Environment.current("cpu"), "warm")


def test_a_link_that_leads_nowhere_is_damage_and_no_sweep_at_work(tmp_path: Path) -> None:
    (tmp_path / "softmax.parquet").symlink_to("nowhere")
    with pytest.raises(BadInput, match=r"softmax.parquet: can't be read \(No such file"):
        look(tmp_path)
