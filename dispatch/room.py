"""How many compilers may run at once: as many as CPUs and memory that this process may use have room for.

Affinity, CPU quota and memory limit of every control group that the process is in (both versions, up to the root),
and what the system has left. One count for all builds of a process, whatever they compile.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dks.dispatch.errors import BadInput

LIMIT = "DKS_COMPILE_GB"
"""Environment variable: gigabytes that compilers may take together. For machines whose memory grows as it is used,
as virtual ones may: what such a one says that it has left is what it has been given so far."""

CXX_BYTES = 400 << 20
"""What one C++ compiler takes at most for code of ours, with room to spare."""
TRITON_BYTES = 600 << 20
"""The same of one process that compiles Triton programs."""

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_RESERVE = 0.1  # of what is available: for what else runs


def cpus() -> int:
    """CPUs that this process may keep busy: its affinity, and whole CPUs of the tightest quota above it."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_quota(*_words(group / "cpu.max", 2)) for group in _groups("")]
    for group in _groups("cpu"):
        quotas.append(_quota(*_words(group / "cpu.cfs_quota_us", 1), *_words(group / "cpu.cfs_period_us", 1)))
    return max(1, min([allowed, *(int(each) for each in quotas if each is not None)]))


def memory() -> int:
    """Bytes that may be used now: what the system has left, or the tightest control group; less a reserve.

    Raises:
        BadInput: ``DKS_COMPILE_GB`` is no number.
    """
    if said := os.environ.get(LIMIT, "").strip():
        return int(_gigabytes(said) * (1 << 30))
    free = [value * 1024 for value in [_field(_PROC / "meminfo", "MemAvailable:")] if value is not None]
    for group in _groups(""):
        free += _left(group / "memory.max", group / "memory.current", group / "memory.stat", "inactive_file")
    for group in _groups("memory"):
        limit, used = group / "memory.limit_in_bytes", group / "memory.usage_in_bytes"
        free += _left(limit, used, group / "memory.stat", "total_inactive_file")
    return max(int(min(free, default=_UNKNOWN) * (1 - _RESERVE)), 0)


def _gigabytes(said: str) -> float:
    with suppress(ValueError):
        if 0 <= (number := float(said)) < math.inf:
            return number
    raise BadInput(f"{LIMIT}: found {said!r}, expected gigabytes for compilers, such as 8 or 1.5; or unset it")


_UNKNOWN = 4 << 30  # where the system says nothing of its memory


def at_once(need: int) -> int:
    """How many that take so many bytes each may run at once, were nothing else compiled now; at least one."""
    return max(1, min(cpus(), memory() // need))


@contextmanager
def taken(need: int) -> Iterator[None]:
    """Wait until a CPU and so many bytes are free, and hold them. One alone always runs: ``need`` is an estimate.

    Not to be used by what holds some already: it could wait for itself.
    """
    with _changed:
        _changed.wait_for(lambda: _fits(need))
        _running.append(need)
    try:
        yield
    finally:
        with _changed:
            if need in _running:  # not in a child that was forked meanwhile
                _running.remove(need)
            _changed.notify_all()


_changed = threading.Condition()
_running: list[int] = []
_whole = 0  # bytes there were before the first of those that run began


def _fits(need: int) -> bool:
    """What has begun will take more than it has so far, so that what is left now is not all free."""
    global _whole  # noqa: PLW0603 - one count for the process
    left = memory()
    if not _running:
        _whole = left
        return True
    return len(_running) < cpus() and need <= min(left, _whole - sum(_running))


def _after_fork() -> None:
    """The child runs none of its parent's compilers, and a thread that held the lock is not there to release it."""
    global _changed, _running
    _changed, _running = threading.Condition(), []


os.register_at_fork(after_in_child=_after_fork)


def _groups(controller: str) -> list[Path]:
    """Folders of this process's control groups, from its own to the root.

    Args:
        controller: of version 1, such as ``memory``; empty is version 2. A container may see its own group as the
            root, under a name that only its host knows: folders that are not there say nothing.
    """
    found = []
    for line in _lines(_PROC / "self" / "cgroup"):
        _, names, path = ([*line.split(":", 2), "", "", ""])[:3]
        if controller not in names.split(","):
            continue
        places = {names, controller} if controller else {"", "unified"}
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for place in sorted(places):
            found += [_GROUPS.joinpath(place, *parts[:count]) for count in range(len(parts), -1, -1)]
    return found


def _quota(quota: str, period: str) -> float | None:
    """CPUs; None where there is no limit."""
    with suppress(ValueError):  # "max", or no such file
        if int(quota) > 0 and int(period) > 0:
            return int(quota) / int(period)
    return None


def _left(limit: Path, used: Path, details: Path, cache: str) -> list[int]:
    """Bytes below a limit, where there is one. Files that were read count as used, and are dropped when needed."""
    with suppress(ValueError):  # "max", or no such file
        return [int(*_words(limit, 1)) - max(0, int(*_words(used, 1)) - (_field(details, cache) or 0))]
    return []


def _words(path: Path, count: int) -> list[str]:
    """So many words of a file; empty ones where there are none."""
    return [*" ".join(_lines(path)).split(), *[""] * count][:count]


def _field(path: Path, name: str) -> int | None:
    for line in _lines(path):
        words = line.split()
        if len(words) > 1 and words[0] == name and words[1].isdecimal():
            return int(words[1])
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
