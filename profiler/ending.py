"""Ending a process and all that it started, and waiting until they are gone. Reads ``/proc`` (Linux)."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_PAUSE_S = 0.005


@dataclass(frozen=True, slots=True)
class Seen:
    """A process at one moment. A number alone may be another process's a moment later.

    Attributes:
        pid, parent, group: numbers.
        state: a letter as in ps; D can't be interrupted.
        born: when it started, in ticks of the system.
    """

    pid: int
    parent: int
    group: int
    state: str
    born: int

    @property
    def key(self) -> tuple[int, int]:
        """What no other process ever has."""
        return self.pid, self.born


def end(root: int, mark: str, within_s: float) -> list[str]:
    """Kill a process, its group, all below it and all that carry a mark; return when they are gone.

    It looks again until it finds none: what is killed may have started another one just before. What it started may
    have left its group and lost its parent; its mark says whose it is then, and what cleared its environment is
    known by its parent.

    Args:
        root: a child of this process that leads its group and was not waited for: its number is its own.
        mark: ``NAME=value`` in the environment of all that it started.
        within_s: how long to wait.

    Returns:
        One line for each that would not go: its number, command and state.
    """
    with suppress(ProcessLookupError):
        os.kill(root, signal.SIGSTOP)  # it starts nothing more while those below it are looked up
    ours: set[tuple[int, int]] = set()
    until = time.monotonic() + within_s
    while left := _alive(root, mark.encode(), ours):
        for each in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(each.pid, signal.SIGKILL)
        if time.monotonic() >= until:
            return [f"process {each.pid} ({_command(each.pid)}) in state {each.state}" for each in left]
        time.sleep(_PAUSE_S)
    return []


def _alive(root: int, mark: bytes, ours: set[tuple[int, int]]) -> list[Seen]:
    """Those that have not ended; ``ours`` keeps all that were ever found, since a killed one soon shows no mark."""
    every = [
        seen for path in _PROC.iterdir() if path.name.isdecimal() and (seen := _look(int(path.name))) is not None
    ]
    for each in every:
        if root in (each.pid, each.group) or _carries(each.pid, mark):
            ours.add(each.key)
    parents = {pid for pid, _ in ours}
    while below := {each.key for each in every if each.parent in parents} - ours:
        ours |= below
        parents |= {pid for pid, _ in below}
    return [each for each in every if each.key in ours and not _ended(each) and each.pid != os.getpid()]


def _ended(each: Seen) -> bool:
    """A zombie runs nothing and holds nothing; only its parent, whoever that is, can clear it away. One with other
    threads has lost the first of them only."""
    try:
        return each.state in "ZX" and len([*(_PROC / str(each.pid) / "task").iterdir()]) <= 1
    except OSError:
        return True


def _look(pid: int) -> Seen | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has just ended
        return None
    fields = text.rpartition(")")[2].split()  # its name comes before, and may hold anything
    return Seen(pid, int(fields[1]), int(fields[2]), fields[0], int(fields[19]))


def _carries(pid: int, mark: bytes) -> bool:
    try:
        return mark in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is somebody else's
        return False


def _command(pid: int) -> str:
    try:
        words = (_PROC / str(pid) / "cmdline").read_text("utf-8", "replace").split("\0")
    except OSError:
        words = []
    return " ".join(filter(None, words))[:200] or "no command"
