"""Metrics of many workers: sums over forked and spawned processes, nothing lost or counted twice."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prometheus_client.values as client
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from dks.dispatch import metrics_shared
from dks.dispatch.metrics import Collector, serve_metrics
from dks.dispatch.metrics_shared import FOLDER, Sharing
from tests.dispatch.test_metrics import made, parsed, scrape, served

WORKERS = """
import atexit, multiprocessing, os
import prometheus_client
from dks.dispatch import metrics_shared
from dks.dispatch.generation import Generation
from dks.dispatch.metrics import Collector
from dks.dispatch.runtime import Runtime

metrics_shared.EVERY = 600.0  # nothing is written but at the ends
runtime = Runtime("a", Generation())

def count(n):
    for _ in range(n):
        runtime.counters.add("linear", "exact")

def work(n):
    Collector(runtime)
    count(n)

def forked(function, *args):
    pid = os.fork()
    if not pid:
        function(*args)
        atexit._run_exitfuncs()  # as where a worker of gunicorn ends; taking torch down takes seconds
        os._exit(0)
    os.waitpid(pid, 0)

def nested():
    count(1 << 4)
    forked(count, 1 << 5)

if __name__ == "__main__":
    count(1)                    # before anything is shared, and before a fork
    forked(work, 1 << 1)        # shares by itself
    work(1 << 2)
    forked(count, 1 << 3)
    forked(nested)
    forked(lambda: None)        # serves nothing
    for method, n in (("fork", 1 << 6), ("spawn", 1 << 7)):
        process = multiprocessing.get_context(method).Process(target=work, args=(n,))
        process.start()
        process.join()
    count(1 << 8)
"""


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder.parent / "workers.py"
    file.write_text(script)
    # Python 3.12 warns of every fork beside threads.
    given = {**os.environ, FOLDER: str(folder), "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    return subprocess.run([sys.executable, file], env=given, capture_output=True, text=True, check=False)


def of_all(folder: Path) -> dict[tuple[str, ...], float]:
    """What the standard way of a scrape shows."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    return parsed(generate_latest(registry).decode())


EXACT = ("dks_dispatch_calls_total", "a", "linear", "table", "exact")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "shared"
    path.mkdir()
    return path


def test_forked_and_spawned_workers_are_added_up_exactly(folder: Path) -> None:
    done = run(WORKERS, folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    samples = of_all(folder)
    assert bin(int(samples[EXACT])) == bin((1 << 9) - 1), "each bit is one worker's"
    counters = list(folder.glob("counter_*.db"))
    assert len(counters) == 7, "a process that served nothing writes nothing"


@pytest.fixture
def shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Sharing]]:
    """This process in multiprocess mode; the result is what it writes with, from its first collector on."""
    monkeypatch.setenv(FOLDER, str(folder))
    monkeypatch.setattr(client, "ValueClass", client.MultiProcessValue())  # type: ignore[no-untyped-call]
    monkeypatch.setattr(metrics_shared, "_sharing", None)
    monkeypatch.setattr(metrics_shared, "EVERY", 0.05)

    def current() -> Sharing:
        assert metrics_shared._sharing is not None
        return metrics_shared._sharing

    yield current
    if metrics_shared._sharing is not None:
        metrics_shared._sharing.close()
        metrics_shared.atexit.unregister(metrics_shared._sharing.close)


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_every_metric_has_the_names_that_one_process_shows(shared: Any, folder: Path) -> None:
    runtime = made(dead={"mkldnn.linear_packed": "its source changed"}, hash="0123")
    served(runtime, 8, 8, 5, 500)
    one = parsed(_alone(runtime))
    registry = CollectorRegistry()
    registry.register(Collector(runtime))
    assert parsed(generate_latest(registry).decode()) == one
    assert of_all(folder) == one, "and the standard way of a scrape shows them too"


def _alone(runtime: Any) -> str:
    collector = Collector.__new__(Collector)
    collector._runtimes, collector._is_shared = {runtime.name: runtime}, False
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


def test_a_thread_writes_what_is_new_and_a_scrape_waits_for_none(shared: Any, folder: Path) -> None:
    runtime = made()
    server, thread = serve_metrics(runtime, port=0)
    try:
        served(runtime, 8)
        wait_for(lambda: of_all(folder).get(EXACT) == 1)
        served(runtime, 8, 8)
        assert scrape(server.server_port)[EXACT] == 3
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_collectors_and_reloaded_packages_count_each_call_once(shared: Any, folder: Path) -> None:
    first, other = made("a"), made("b")
    Collector(first), Collector(first, other)
    served(first, 8)
    second = made("a")  # imported anew under its name
    served(second, 8, 8)
    Collector(second)
    served(other, 8)
    shared().write()
    samples = of_all(folder)
    assert {labels[1]: n for labels, n in samples.items() if labels[2:] == EXACT[2:]} == {"a": 3, "b": 1}


def test_a_dead_workers_counts_stay_and_its_states_go(shared: Any, folder: Path) -> None:
    runtime = made(refused="threads: 2 != 4")
    Collector(runtime)
    served(runtime, 8)
    shared().close()
    assert of_all(folder)["dks_dispatch_refused", "a"] == 1
    mark_process_dead(os.getpid(), str(folder))  # type: ignore[no-untyped-call]
    samples = of_all(folder)
    assert ("dks_dispatch_refused", "a") not in samples
    assert samples["dks_dispatch_calls_total", "a", "linear", "framework", "refused"] == 1


def test_what_is_no_longer_so_is_zero(shared: Any, folder: Path) -> None:
    runtime = made()
    runtime.declined["torch.linear"] = "no"
    Collector(runtime)
    declined = ("dks_dispatch_candidates", "a", "declined", "torch.linear")
    assert of_all(folder)[declined] == 1
    runtime.declined.clear()
    shared().write()
    assert of_all(folder)[declined] == 0


def test_a_full_disk_is_one_warning_and_loses_nothing(
    shared: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    runtime = made()
    with monkeypatch.context() as disk:
        disk.setattr(os, "posix_fallocate", full)
        with pytest.warns(RuntimeWarning, match="No space left on device.*serving goes on") as said:
            Collector(runtime)
            for _ in range(3):
                served(runtime, 8)
                shared().write()
        assert len(said) == 1
        assert of_all(folder) == {} and not list(folder.iterdir()), "no file that a scrape trips over"
    served(runtime, 8)
    shared().write()
    assert of_all(folder)[EXACT] == 4


def test_room_is_asked_for_before_the_client_maps_it(shared: Any, folder: Path) -> None:
    Collector(made())
    for i in range(300):  # until a file is beyond its first size
        shared().add([made(f"a{i}")])
        for path in folder.iterdir():
            assert path.stat().st_blocks * 512 >= path.stat().st_size > 0, "no hole"
        if any(path.stat().st_size > metrics_shared.FIRST_BYTES for path in folder.iterdir()):
            break
    else:
        pytest.fail("no file grew")


@pytest.mark.parametrize("why", ["absent", "a file"])
def test_a_folder_that_is_none_is_one_warning(
    why: str, shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "none"
    if why == "a file":
        path.touch()
    monkeypatch.setenv(FOLDER, str(path))
    runtime = made()
    with pytest.warns(RuntimeWarning, match="expected a folder that this process may write to"):
        Collector(runtime)
    served(runtime, 8)
    shared().write()
    assert runtime.counters.snapshot() == {"linear": {"exact": 1}}


def test_a_sink_that_hangs_holds_up_neither_calls_nor_forks_nor_the_end(
    shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_shared, "PATIENCE", 0.1)
    monkeypatch.setattr(metrics_shared, "FORK_PATIENCE", 0.1)
    runtime, held, release = made(), threading.Event(), threading.Event()
    Collector(runtime)

    def hang(*_: object) -> None:
        held.set()
        release.wait(60)

    monkeypatch.setattr(metrics_shared, "_make_room", hang)
    served(runtime, 8)
    try:
        assert held.wait(30)
        served(runtime, 8, 5)
        pid = os.fork()
        if not pid:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        shared().close()
        assert runtime.counters.snapshot() == {"linear": {"bin": 1, "exact": 2}}
    finally:
        release.set()
        shared()._thread.join(30)


def test_the_switch_that_comes_too_late_is_said(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv(FOLDER, str(folder))
    with pytest.warns(RuntimeWarning, match="set after prometheus_client was imported"):
        Collector(made())
    assert not list(folder.iterdir())


@pytest.mark.parametrize("place", ["", "missing", None])
def test_without_the_folder_a_scrape_shows_this_process_alone(
    shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str | None
) -> None:
    """Empty, gone or never made, and unset later: other metrics of the registry are shown all the same."""
    monkeypatch.chdir(tmp_path)
    runtime = made()
    served(runtime, 8, 8)
    if place is not None:
        monkeypatch.setenv(FOLDER, place and str(tmp_path / place))
    with pytest.warns(RuntimeWarning, match="a scrape shows this process alone|metrics can't be written") as said:
        collector = Collector(runtime)
        if place is None:
            monkeypatch.delenv(FOLDER)
        registry = CollectorRegistry()
        registry.register(collector)
        scraped = [parsed(generate_latest(registry).decode()) for _ in range(3)]
    assert scraped == [parsed(_alone(runtime))] * 3
    assert len(said) == 1, [str(each.message) for each in said]
    assert not list(tmp_path.glob("*.db")), "nothing is written to the working directory"
