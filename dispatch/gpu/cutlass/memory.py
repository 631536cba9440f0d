"""Running what takes much memory, as many at once as there is room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

_RESERVE = 0.1  # of what is available: for what else runs
_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Job:
    """Something to run.

    Attributes:
        name: in messages.
        need: bytes of memory that it takes at most.
        run: does it; returns why it failed, or an empty text.
    """

    name: str
    need: int
    run: Callable[[], str]


def available() -> int:
    """Bytes that may be used now: what the system has left, or this process's control group; less a reserve."""
    fields = (line.split() for line in _MEMINFO.read_text(encoding="ascii").splitlines())
    free = [int(field[1]) * 1024 for field in fields if field[0] == "MemAvailable:"]
    try:
        limit = (_GROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            free.append(int(limit) - int((_GROUP / "memory.current").read_text(encoding="ascii")))
    except OSError:  # no control groups of this version
        pass
    return max(int(min(free) * (1 - _RESERVE)), 0)


def run_within(
    jobs: Sequence[Job], limit: int, workers: int, told: Callable[[int, int], None] = lambda *_: None
) -> list[str]:
    """Run all jobs, never more at once than ``limit`` bytes and ``workers`` allow.

    The largest that fits goes first. What alone is above the limit does not run.

    Args:
        told: how many of how many have ended, each time that one does.

    Returns:
        Why each failed, or an empty text, in the order of the jobs.
    """
    said = {
        i: f"{job.name}: needs {_gigabytes(job.need)} of memory, {_gigabytes(limit)} may be used"
        for i, job in enumerate(jobs)
        if job.need > limit
    }
    waiting = sorted((i for i in range(len(jobs)) if i not in said), key=lambda i: -jobs[i].need)
    running: dict[Future[str], int] = {}
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        while waiting or running:
            room = limit - sum(jobs[i].need for i in running.values())
            fits = (
                next((i for i in waiting if jobs[i].need <= room), None) if len(running) < max(workers, 1) else None
            )
            if fits is not None:
                waiting.remove(fits)
                running[pool.submit(jobs[fits].run)] = fits
                continue
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                said[running.pop(ended)] = ended.result()
                told(len(said), len(jobs))
    return [said[i] for i in range(len(jobs))]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
