"""Metrics of many workers: prometheus_client's multiprocess mode, which ``PROMETHEUS_MULTIPROC_DIR`` turns on.

Each process writes its own counts to files in that folder, and whoever is scraped adds up the files. Counts are
made in C++ and may not wait for a file, so a thread moves what is new into prometheus_client's counters once a
second, at exit, and before this process is scraped. What goes wrong there is warned of once, and tried again; calls
never notice.

A forked child begins with what its parent counted, which is the parent's to report (``Runtime.inherited``), and
writes its first file when it has served a call.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Mapping
from multiprocessing import util
from pathlib import Path
from typing import Literal

from prometheus_client import Counter, Gauge, values
from prometheus_client.multiprocess import MultiProcessCollector

from dks.dispatch.metrics_read import FAMILIES, Family, Labels, Values, inherited, read
from dks.dispatch.runtime import Runtime

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
EVERY = 1.0  # seconds between two writes
PATIENCE = 5.0  # seconds that an exit waits for the last one
FORK_PATIENCE = 1.0  # seconds that a fork waits for one under way
MODE: Literal["livemax"] = "livemax"  # of gauges: the largest of the living workers

FIRST_BYTES = 1 << 16  # of a file of prometheus_client's
SERIES_BYTES = 1024  # more than one takes there, beside its labels


def wanted() -> bool:
    """Whether this process is one of many that are scraped together."""
    if FOLDER not in os.environ:
        return False
    if not os.environ[FOLDER]:  # prometheus_client would take the working directory
        why = "found it empty, expected a folder, or that it is not set"
    elif not getattr(values.ValueClass, "_multiprocess", False):
        why = "found it set after prometheus_client was imported, expected before"
    else:
        return True
    warnings.warn(f"{FOLDER}: {why}: a scrape shows this process alone", RuntimeWarning, stacklevel=3)
    return False


class Sharing:
    """What one process writes of its tables. There is one of it, as there is one set of files."""

    def __init__(self) -> None:
        self._runtimes: dict[str, Runtime] = {}
        self._metrics = {family: _make(family) for family in FAMILIES}
        self._pid = os.getpid()
        self._is_quiet = False  # forked, and has not served yet
        self._written: dict[tuple[Family, Labels], float] = {}
        self._series: set[tuple[Family, Labels]] = set()  # made so far, here or before a fork
        self._roomy: set[tuple[Family, Labels]] = set()  # those that the files of this process have room for
        self._has_warned = False
        self._lock = threading.RLock()  # of a thread, so that a fork lets go of what it took alone
        self._begin()
        atexit.register(self.close)
        self._close_with_multiprocessing()
        util.register_after_fork(self, Sharing._close_with_multiprocessing)

    def _begin(self) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._end,), name="dks-metrics", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self.warn(str(error))

    def _close_with_multiprocessing(self) -> None:
        # Its children end without ``atexit``.
        util.Finalize(None, self.close, exitpriority=-100)

    def add(self, runtimes: Iterable[Runtime]) -> None:
        """Write of these as well, from now on; a newer one takes the place of another of its name."""
        self.write()
        with self._lock:
            for runtime in runtimes:
                if self._runtimes.get(runtime.name) is not runtime:
                    self._runtimes[runtime.name] = runtime
                    self._take_over(runtime)
        self.write()

    def _take_over(self, runtime: Runtime) -> None:
        for family, own in inherited(runtime).items():
            for key in [key for key in self._written if key[0] is family and key[1][0] == runtime.name]:
                del self._written[key]
            self._written |= {(family, labels): n for labels, n in own.items() if n}

    def _run(self, end: threading.Event) -> None:
        while not end.wait(EVERY):
            self.write()
        self.write()

    def close(self) -> None:
        """Write for the last time. Gives up where that takes ``PATIENCE`` seconds: what is scraped may not be what
        keeps a process from ending."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(PATIENCE)
        else:  # it never began, for want of threads
            self.write()

    def write(self) -> None:
        """Move what is new into the files. Never raises."""
        try:
            with self._lock:
                self._write()
        except Exception as error:  # a disk, or prometheus_client: neither may be what stops a server
            self.warn(f"{type(error).__name__}: {error}")

    def warn(self, why: str) -> None:
        """Say once that the folder can't be used. Never raises."""
        if self._has_warned:
            return
        self._has_warned = True
        text = (
            f"metrics can't be written to {FOLDER}={os.environ.get(FOLDER)}: {why}; expected a folder that this "
            "process may write to, with room left; serving goes on, and what is counted meanwhile is written once "
            "that is so"
        )
        try:
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        except RuntimeWarning:  # a filter makes errors of warnings: in this thread nobody would see it
            print(text, file=sys.stderr)

    def _write(self) -> None:
        if self._pid != os.getpid():
            self._pid, self._is_quiet = os.getpid(), True
            self._written, self._roomy = {}, set()
            for runtime in self._runtimes.values():
                self._take_over(runtime)
        new = self._news()
        if self._is_quiet and not any(_grows(key) and n > self._written.get(key, 0) for key, n in new.items()):
            return
        self._is_quiet = False
        # A fork's first write makes all of its parent's series again, as zeros.
        if missing := (self._series | new.keys()) - self._roomy:
            _make_room(missing)
            self._roomy |= missing
        for key, value in new.items():
            family, labels = key
            self._series.add(key)
            series = self._metrics[family].labels(*labels)
            if isinstance(series, Counter):
                series.inc(value - self._written.get(key, 0))
            else:
                series.set(value)
            self._written[key] = value

    def _news(self) -> dict[tuple[Family, Labels], float]:
        """Every value that differs from what was written; 0 for a gauge that is not there any more."""
        now = {(f, labels): n for f, own in read(self._runtimes.values()).items() for labels, n in own.items()}
        gone = {key: 0.0 for key in self._written if key not in now and not _grows(key)}
        return {key: n for key, n in (now | gone).items() if n != self._written.get(key)}


def _grows(key: tuple[Family, Labels]) -> bool:
    return key[0].kind == "counter"


def _make(family: Family) -> Counter | Gauge:
    if family.kind == "counter":
        return Counter(family.name, family.text, family.labels, registry=None)
    return Gauge(family.sample, family.text, family.labels, registry=None, multiprocess_mode=MODE)


def _make_room(series: Iterable[tuple[Family, Labels]]) -> None:
    """Have the disk give the room now. The files are mapped: a write to a page of them that a full disk has no room
    for kills the process.

    Raises:
        OSError: there is none, or the folder can't be written to.
    """
    needed: dict[str, int] = {}
    for family, labels in series:
        kind = "counter" if family.kind == "counter" else f"gauge_{MODE}"
        needed[kind] = needed.get(kind, 0) + SERIES_BYTES + len(family.text) + 6 * sum(map(len, labels))
    for kind, more in needed.items():
        path = Path(os.environ[FOLDER]) / f"{kind}_{os.getpid()}.db"
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            size = max(os.fstat(file).st_size, FIRST_BYTES)
            used = int.from_bytes(os.pread(file, 4, 0), sys.byteorder)
            while used + more > size:  # as prometheus_client lets it grow
                size *= 2
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            if not os.fstat(file).st_size:  # no scrape could read it
                path.unlink(missing_ok=True)
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that can't promise room
                raise
        finally:
            os.close(file)


_sharing: Sharing | None = None
_making = threading.Lock()


def share(runtimes: Iterable[Runtime]) -> None:
    """Let this process write what it counts of these, until it ends."""
    global _sharing  # noqa: PLW0603 - one a process, as the files are
    with _making:
        if _sharing is None:
            _sharing = Sharing()
    _sharing.add(runtimes)


def read_all(runtimes: Iterable[Runtime]) -> Values:
    """The values of tables over all workers: counters added up, also those of workers that have ended. Without the
    folder it is those of this process: what else the registry has is shown all the same."""
    if _sharing is not None:
        _sharing.write()
    runtimes = list(runtimes)
    if not Path(os.environ.get(FOLDER) or os.devnull).is_dir():
        if _sharing is not None:
            _sharing.warn("it is no folder, and a scrape shows this process alone")
        return read(runtimes)
    wanted = {runtime.name for runtime in runtimes}
    families = {family.sample: family for family in FAMILIES}
    found: Mapping[Family, dict[Labels, float]] = {family: {} for family in FAMILIES}
    for metric in MultiProcessCollector(None).collect():  # type: ignore[no-untyped-call]
        for sample in metric.samples:
            family = families.get(sample.name)
            if family is not None and sample.labels.get("table") in wanted:
                found[family][tuple(sample.labels[name] for name in family.labels)] = sample.value
    return found


# No thread may be inside prometheus_client's lock while the process forks: the child would wait for it for good.


def _before_fork() -> None:
    if _sharing is not None:
        _sharing._lock.acquire(timeout=FORK_PATIENCE)


def _after_fork_in_parent() -> None:
    if _sharing is not None:
        try:
            _sharing._lock.release()
        except RuntimeError:  # it was not to be had in time
            return


def _after_fork_in_child() -> None:
    global _making  # noqa: PLW0603 - a thread that is not there any more may hold it
    _making = threading.Lock()
    if _sharing is not None:
        _sharing._lock = threading.RLock()
        _sharing._begin()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
