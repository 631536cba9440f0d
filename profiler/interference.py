"""What disturbs a window of timing: others on our cores, steal, a changed clock, throttling.

A window is some rounds, 1 ms to some 100 ms long. Jiffies of 10 ms are too coarse for most windows, so a short one
is judged by what the kernel counts in nanoseconds (how long our threads stood ready without a core), and
the jiffies of the whole machine are judged over ``SPAN_NS`` of successive windows.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple, Protocol

LOST_SHARE = 0.05
"""Of a window: more than that without a core marks it. Leads below 5 % count as ties, so less cannot turn a choice;
nine of ten windows of 10 ms on a quiet machine stay below 0.5 %, and one busy neighbour takes 60 % and more."""

LOST_NS = 100_000
"""Less than that is a wake-up or a kernel thread passing by, however short the window."""

REUSE_NS = 1_000_000
"""Windows that follow each other closer than this share a reading: the later one then includes the pause."""

OTHERS_SHARE = 0.05
"""Of all cores: more than that in other processes marks. Two steps of the 10 ms counter on two cores."""

STEAL_SHARE = 0.05
"""Of all cores: more than that taken by the hypervisor marks."""

SPAN_NS = 200_000_000
"""Time over which the machine's jiffies are judged: on two cores one step of the counter is then 2.5 %."""

GAP_NS = 20_000_000
"""A longer pause between windows ends a span: what ran in the pause (a compiler, a writer) disturbed no window."""

CLOCK_SHARE = 0.05
"""A clock this far from its usual rate marks. The reading itself wavers by 2 to 3 %."""

CLOCK_MEMORY = 9
"""Readings whose median is the usual rate; after half as many windows a lasting change is the new usual."""

MAX_COUNTERS = 32
"""Thermal counters read at most: each costs some microseconds a window, and a package throttles as a whole."""

Clock = Callable[[], int]
"""Nanoseconds."""


class Source(Protocol):
    """One thing that can disturb a window."""

    @property
    def name(self) -> str:
        """What it watches, in a word or two."""
        ...

    def unavailable(self) -> str | None:
        """Why it cannot be read here; None where it can."""
        ...

    def start(self) -> None:
        """Read before a window."""
        ...

    def stop(self) -> list[str]:
        """Read after it: what disturbed it, in words with figures."""
        ...


class Watch:
    """Watches windows of timing, in the process and on the thread that times.

    Args:
        sources: what to watch, the most exact last: it is read nearest to the window. Those unavailable here
            are left out, and ``unavailable()`` says why. If None ``default_sources()``; a process that computes
            with several threads passes their number to it.
    """

    def __init__(self, sources: Sequence[Source] | None = None) -> None:
        chosen = default_sources() if sources is None else sources
        found = [(source, source.unavailable()) for source in chosen]
        self._sources = [source for source, why in found if why is None]
        self._unavailable = {source.name: why for source, why in found if why is not None}

    def unavailable(self) -> dict[str, str]:
        """Why, by name of the source, for those that cannot be read here."""
        return dict(self._unavailable)

    def start(self) -> None:
        """Begin a window."""
        for source in self._sources:
            source.start()

    def stop(self) -> list[str]:
        """End the window: what disturbed it, in words with figures; empty if nothing did."""
        return [words for source in reversed(self._sources) for words in source.stop()]


def default_sources(threads: int = 1) -> list[Source]:
    """Every source, for a process that computes with so many threads."""
    return [throttling(), quota(), ClockRate(), Machine(), Cores(threads)]


class Cores:
    """Whether our own threads had a core whenever they wanted one. Exact to the microsecond.

    Two things are told apart. The scheduler counts how long each thread stood ready while others ran
    (``schedstat``). And a thread that neither slept nor waited, but ran for less than the time that passed,
    was stopped from outside: by the hypervisor or by interrupts, which a thread's clock leaves out. The second is
    seen on the calling thread alone; ``Machine`` sees it on the others.

    More threads than cores wait for each other, which says nothing about others: unavailable then.

    Args:
        threads: that compute at once.
        tasks: folder of this process's threads.
        wall: monotonic time.
        ran: processor time of the calling thread.
        slept: how often the calling thread gave up its core by itself.
        caller: id of the calling thread.
        cores: that this process may use; asked of the kernel if None.
    """

    name = "waiting for a core"

    def __init__(
        self,
        threads: int = 1,
        tasks: Path = Path("/proc/self/task"),
        *,
        wall: Clock = time.perf_counter_ns,
        ran: Clock = time.thread_time_ns,
        slept: Callable[[], int] = lambda: resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw,
        caller: Callable[[], int] = threading.get_native_id,
        cores: int | None = None,
    ) -> None:
        self._threads, self._tasks, self._allowed = threads, tasks, cores
        self._wall, self._ran, self._slept, self._caller = wall, ran, slept, caller
        self._files: dict[str, _File] = {}
        self._folder: _File | None = None
        self._listed = 0
        self._before: _Lost | None = None

    def unavailable(self) -> str | None:
        """Why it cannot be read here; None where it can."""
        cores = self._allowed or _allowed_cores()
        if self._threads > cores:
            return f"{self._threads} threads on {cores} cores wait for each other"
        return _unreadable(self._tasks / str(self._caller()) / "schedstat")

    def start(self) -> None:
        """Read before a window."""
        # What was read when the last window ended holds still if that was just now: half the cost.
        if self._before is None or self._wall() - self._before.wall > REUSE_NS:
            waited = self._waits()
            self._before = _Lost(waited, self._slept(), self._ran(), self._wall())

    def stop(self) -> list[str]:
        """Read after it: what disturbed it, in words with figures."""
        # In this order a core lost between two readings makes the loss smaller, so it is no false alarm.
        wall, ran, slept = self._wall(), self._ran(), self._slept()
        before, now = self._before, _Lost(self._waits(), slept, ran, wall)
        self._before = now
        if before is None:
            return []
        passed = wall - before.wall
        allowed = max(LOST_SHARE * passed, LOST_NS)
        found = []
        waited = {task: ns - before.waited.get(task, 0) for task, ns in now.waited.items()}
        total = sum(ns for ns in waited.values() if ns > 0)
        if total > allowed:
            found.append(f"our threads waited {total / 1e6:.1f} ms for a core in {passed / 1e6:.1f} ms")
        if slept == before.slept:
            lost = passed - (ran - before.ran) - waited.get(str(self._caller()), 0)
            if lost > allowed:
                found.append(f"steal or interrupts took {_percent(lost / passed)} of the calling thread's time")
        return found

    def _waits(self) -> dict[str, int]:
        """Nanoseconds that each thread has waited for a core since it began."""
        links = self._links()
        if links != self._listed or links < 3:
            self._list(links)
        try:
            return {task: int(file.read().split()[1]) for task, file in self._files.items()}
        except OSError:  # a thread ended, and another began
            self._list(links)
        found = {}
        for task, file in self._files.items():
            with contextlib.suppress(OSError):
                found[task] = int(file.read().split()[1])
        return found

    def _links(self) -> int:
        """Two more than the number of threads; a few file systems, not the kernel's own, always say 1."""
        if self._folder is None:
            self._folder = _File(self._tasks)
        return self._folder.links()

    def _list(self, links: int) -> None:
        self._listed = links
        with os.scandir(self._tasks) as entries:
            tasks = {entry.name for entry in entries}
        self._files = {task: file for task, file in self._files.items() if task in tasks}
        for task in tasks - self._files.keys():
            with contextlib.suppress(OSError):  # the thread ended since it was listed
                self._files[task] = _File(self._tasks / task / "schedstat")


class _Lost(NamedTuple):
    """What ``Cores`` reads: ns waited by each thread; how often the caller slept, and ns it ran; the time in ns."""

    waited: dict[str, int]
    slept: int
    ran: int
    wall: int


class Machine:
    """Load by others, and steal, on the whole machine: what the exact counters of our own threads miss.

    Others on cores that we leave free still take memory bandwidth and turbo. Their time is what the cores were
    not idle, less our own. It is judged once every ``SPAN_NS`` of successive windows, because the kernel counts in
    10 ms and because this file grows dear on large machines; the verdict then stands for the windows until
    the next. A window on its own that is shorter is not judged.

    Args:
        stat: the kernel's counters of processor time.
        cores: of the machine.
        wall: monotonic time.
        ran: processor time of this process, all threads.
        tick: nanoseconds of one step of the counters.
    """

    name = "load by others and steal"

    def __init__(
        self,
        stat: Path = Path("/proc/stat"),
        *,
        cores: int | None = None,
        wall: Clock = time.perf_counter_ns,
        ran: Clock = time.process_time_ns,
        tick: int | None = None,
    ) -> None:
        self._path, self._wall, self._ran = stat, wall, ran
        self._cores = cores or os.cpu_count() or 1
        self._tick = tick or 10**9 // os.sysconf("SC_CLK_TCK")
        self._file: _File | None = None
        self._from: tuple[int, int, int, int] | None = None
        self._stopped = 0
        self._verdict: list[str] = []

    def unavailable(self) -> str | None:
        """Why it cannot be read here; None where it can."""
        return _unreadable(self._path)

    def start(self) -> None:
        """Read before a window."""
        if self._from is None or self._wall() - self._stopped > GAP_NS:
            self._from, self._verdict = self._reading(), []

    def stop(self) -> list[str]:
        """Read after it: what disturbed it, in words with figures."""
        self._stopped = self._wall()
        if self._from is not None and self._stopped - self._from[0] >= SPAN_NS:
            now = self._reading()
            self._verdict = self._judge(self._from, now)
            self._from = now
        return list(self._verdict)

    def _judge(self, before: tuple[int, int, int, int], now: tuple[int, int, int, int]) -> list[str]:
        passed, own, idle, steal = (b - a for a, b in zip(before, now, strict=True))
        whole = self._cores * passed
        others = (whole - idle - steal - own) / whole
        span = f"of the machine's time in the last {passed / 1e6:.0f} ms"
        found = [f"others ran for {_percent(others)} {span}"] if others > OTHERS_SHARE else []
        if steal / whole > STEAL_SHARE:
            found.append(f"steal took {_percent(steal / whole)} {span}")
        return found

    def _reading(self) -> tuple[int, int, int, int]:
        """Nanoseconds: time, ours of all threads, idle of all cores, steal."""
        if self._file is None:
            self._file = _File(self._path)
        # The first line: cpu user nice system idle iowait irq softirq steal ...
        _, _, _, _, idle, iowait, _, _, steal, *_ = self._file.read().split()
        return self._wall(), self._ran(), (int(idle) + int(iowait)) * self._tick, int(steal) * self._tick


class ClockRate:
    """The clock of the core that the calling thread is on; that one is busy before and after every window.

    A window that ends with a clock far from the median of the last readings is marked, whether it fell or
    rose. Kernels that change the clock themselves (wide vectors do) must be warm before the first window.
    Unavailable on most virtual machines, which are told a constant.

    Args:
        cpus: the kernel's folder of cores.
        core: number of the core that the calling thread is on; asked of the C library if None.
    """

    name = "clock rate"

    def __init__(self, cpus: Path = Path("/sys/devices/system/cpu"), core: Callable[[], int] | None = None) -> None:
        self._cpus = cpus
        self._core = core or _current_core()
        self._files: dict[int, _File] = {}
        self._seen: deque[float] = deque(maxlen=CLOCK_MEMORY)

    def unavailable(self) -> str | None:
        """Why it cannot be read here; None where it can."""
        if self._core is None:
            return "the C library does not say which core a thread is on"
        return _unreadable(self._path(self._core()))

    def start(self) -> None:
        """Read before a window."""
        if not self._seen and (mhz := self._mhz()) is not None:
            self._seen.append(mhz)

    def stop(self) -> list[str]:
        """Read after it: what disturbed it, in words with figures."""
        now = self._mhz()
        if now is None or not self._seen:
            return []
        usual = median(self._seen)
        self._seen.append(now)
        if abs(now - usual) <= CLOCK_SHARE * usual:
            return []
        return [f"frequency {'fell' if now < usual else 'rose'} from {usual:.0f} to {now:.0f} MHz"]

    def _path(self, core: int) -> Path:
        return self._cpus / f"cpu{core}" / "cpufreq" / "scaling_cur_freq"

    def _mhz(self) -> float | None:
        assert self._core is not None  # else unavailable
        core = self._core()
        try:
            if core not in self._files:
                self._files[core] = _File(self._path(core))
            return int(self._files[core].read()) / 1000
        except (OSError, ValueError):  # a core gone offline, or one that says <unknown>
            return None


class Counts:
    """Counters that only grow where something stopped us: any growth marks.

    Args:
        name: what is watched.
        files: one counter each, the first number after ``label`` in it.
        label: bytes before the number.
        words: ``{}`` is how often.
        missing: why there is nothing to watch, where ``files`` is empty.
    """

    def __init__(self, name: str, files: Sequence[Path], label: bytes, words: str, missing: str) -> None:
        self.name = name
        self._paths, self._words, self._missing = list(files), words, missing
        self._number = re.compile(re.escape(label) + rb"\s*(\d+)")
        self._files: list[_File] = []
        self._before = 0

    def unavailable(self) -> str | None:
        """Why it cannot be read here; None where it can."""
        whys = [_unreadable(path) for path in self._paths]
        return next((why for why in whys if why), None) if whys else self._missing

    def start(self) -> None:
        """Read before a window."""
        self._before = self._sum()

    def stop(self) -> list[str]:
        """Read after it: what disturbed it, in words with figures."""
        times = self._sum() - self._before
        return [self._words.format(times)] if times > 0 else []

    def _sum(self) -> int:
        if not self._files:
            self._files = [_File(path) for path in self._paths]
        return sum(self._count(file) for file in self._files)

    def _count(self, file: _File) -> int:
        try:
            match = self._number.search(file.read())
        except OSError:  # a core gone offline takes its counters along
            return 0
        return int(match[1]) if match else 0


def throttling(cpus: Path = Path("/sys/devices/system/cpu"), allowed: Sequence[int] | None = None) -> Counts:
    """Throttling for heat or power: of the cores that this process may use, and of their packages once each."""
    cores = _allowed_list() if allowed is None else list(allowed)
    by_package: dict[str, Path] = {}
    own = []
    for core in cores:
        folder = cpus / f"cpu{core}"
        if (counter := folder / "thermal_throttle" / "package_throttle_count").exists():
            by_package.setdefault(_text(folder / "topology" / "physical_package_id"), counter)
        if (counter := folder / "thermal_throttle" / "core_throttle_count").exists():
            own.append(counter)
    evenly = own[:: -(-len(own) // MAX_COUNTERS) or 1]
    missing = f"no thermal_throttle under {cpus}: this processor, or this virtual machine, does not count it"
    return Counts("throttling", [*by_package.values(), *evenly], b"", "throttled {} times", missing)


def quota(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Counts:
    """Stops by the CPU quota of a container: of the control group of this process and of those above it."""
    files = []
    for line in _text(membership).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = groups / controllers if controllers else groups
        inside = root / group.lstrip("/")
        above = [inside, *inside.parents]
        for folder in above[: above.index(root) + 1]:
            limit = _text(folder / "cpu.max") or _text(folder / "cpu.cfs_quota_us")
            if limit and not limit.startswith(("max", "-1")) and "nr_throttled" in _text(folder / "cpu.stat"):
                files.append(folder / "cpu.stat")
    missing = f"no control group of this process under {groups} has a CPU quota"
    return Counts("CPU quota", files, b"nr_throttled", "the CPU quota stopped us {} times", missing)


class _File:
    """A file or folder of the kernel's, kept open: another look costs one call, a tenth of opening it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> bytes:
        return os.pread(self._fd, 1024, 0)

    def links(self) -> int:
        return os.fstat(self._fd).st_nlink

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


def _unreadable(path: Path) -> str | None:
    try:
        _File(path).read()
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _allowed_list() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _allowed_cores() -> int:
    return len(_allowed_list())


def _current_core() -> Callable[[], int] | None:
    ask: Callable[[], int] | None = getattr(ctypes.CDLL(None), "sched_getcpu", None)
    return ask


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
