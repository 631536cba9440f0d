"""How many compilers may run at once, on machines made of files: quotas and limits of nested control groups."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dks.dispatch import room
from dks.dispatch.compiler import run_compiler
from dks.dispatch.errors import BadInput

GB = 10**9
MEMINFO = "MemTotal:       9000 kB\nMemAvailable: {} kB\nBuffers: 5 kB\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 64 CPUs and 10 GB, in no control group; files are put below it."""
    monkeypatch.setattr(room, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(room, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.delenv(room.LIMIT, raising=False)
    put(tmp_path, {"proc/meminfo": MEMINFO.format(10 * GB // 1024)})
    return tmp_path


def put(folder: Path, files: Mapping[str, object]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")


def test_without_control_groups_it_is_affinity_and_what_is_left(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert room.cpus() == 64 and room.memory() == pytest.approx(9 * GB, rel=1e-6)
    assert room.at_once(GB) == 9, "memory has room for no more"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 17})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert room.cpus() == 2 == room.at_once(GB)
    assert room.at_once(100 * GB) == 1, "one may always be tried"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"proc/self/cgroup": "0::/", "cgroup/cpu.max": "max 100000"}, 64),
        ({"proc/self/cgroup": "0::/", "cgroup/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "0::/", "cgroup/cpu.max": "150000 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "cgroup/cpu.max": "20000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a/b", "cgroup/a/cpu.max": "400000 100000", "cgroup/a/b/cpu.max": "max 1"}, 4),
        ({"proc/self/cgroup": "0::/a/b", "cgroup/a/cpu.max": "4 1", "cgroup/a/b/cpu.max": "2 1"}, 2),
        ({"proc/self/cgroup": "0::/only/known/to/the/host", "cgroup/cpu.max": "5 1"}, 5),
        ({"proc/self/cgroup": "0::/../outside", "cgroup/cpu.max": "5 1"}, 5),
        ({"proc/self/cgroup": "0::/other/a", "cgroup/a/cpu.max": "4 1"}, 64),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/a/b\n0::/",
                "cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "600000",
                "cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
                "cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1",
                "cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000",
            },
            6,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/docker/0a1b",
                "cgroup/cpu/cpu.cfs_quota_us": "7",
                "cgroup/cpu/cpu.cfs_period_us": "1",
            },
            7,
        ),
        ({"proc/self/cgroup": "2:cpu:/\n0::/x", "cgroup/unified/x/cpu.max": "9 1"}, 9),
        ({"proc/self/cgroup": "what is this", "cgroup/cpu.max": "nor this"}, 64),
    ],
)
def test_the_tightest_quota_up_to_the_root_counts(machine: Path, files: dict[str, str], cpus: int) -> None:
    put(machine, files)
    assert room.cpus() == cpus


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"proc/self/cgroup": "0::/", "cgroup/memory.max": "max", "cgroup/memory.current": "5"}, 10 * GB),
        ({"proc/self/cgroup": "0::/", "cgroup/memory.max": 3 * GB, "cgroup/memory.current": GB}, 2 * GB),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "cgroup/a/memory.max": 6 * GB,
                "cgroup/a/memory.current": 5 * GB,
                "cgroup/a/b/memory.max": 3 * GB,
                "cgroup/a/b/memory.current": GB,
            },
            GB,
        ),
        (
            {
                "proc/self/cgroup": "0::/",
                "cgroup/memory.max": 6 * GB,
                "cgroup/memory.current": 5 * GB,
                "cgroup/memory.stat": f"anon 7\ninactive_file {3 * GB}",
            },
            4 * GB,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/a",
                "cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
                "cgroup/memory/memory.usage_in_bytes": GB,
                "cgroup/memory/a/memory.limit_in_bytes": 4 * GB,
                "cgroup/memory/a/memory.usage_in_bytes": 2 * GB,
                "cgroup/memory/a/memory.stat": f"total_inactive_file {GB}",
            },
            3 * GB,
        ),
        ({"proc/self/cgroup": "0::/", "cgroup/memory.max": GB, "cgroup/memory.current": 2 * GB}, 0),
    ],
)
def test_the_least_that_is_left_counts(machine: Path, files: dict[str, object], left: int) -> None:
    put(machine, files)
    assert room.memory() == pytest.approx(0.9 * max(left, 0), rel=1e-6)


def test_a_limit_that_the_user_names_is_the_limit(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(room.LIMIT, "100")
    assert room.memory() == 100 << 30
    monkeypatch.setenv(room.LIMIT, " 1.5 ")
    assert room.memory() == 3 << 29


@pytest.mark.parametrize("said", ["8 GB", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_is_said_so(machine: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv(room.LIMIT, said)
    with pytest.raises(BadInput, match=f"DKS_COMPILE_GB: found '{said}', expected gigabytes"):
        room.memory()


def test_a_machine_that_says_nothing_still_compiles(machine: Path) -> None:
    (machine / "proc" / "meminfo").unlink()
    assert room.at_once(100 << 20) >= 1


def test_threads_of_all_builds_share_one_count(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    gate, lock = threading.Barrier(3), threading.Lock()
    now = [0]
    seen: list[int] = []

    def job(_: int) -> None:
        with room.taken(GB):
            with lock:
                now[0] += 1
                seen.append(now[0])
            gate.wait(60)  # passes only when three are in at once
            with lock:
                now[0] -= 1

    with ThreadPoolExecutor(8) as one, ThreadPoolExecutor(8) as other:
        for future in [*(one.submit(job, i) for i in range(6)), *(other.submit(job, i) for i in range(6))]:
            future.result(60)
    assert max(seen) == 3 and len(seen) == 12


def test_what_has_begun_holds_what_it_will_take(machine: Path) -> None:
    """9 GB are free and nothing has been touched yet: two of 4 GB run, a third does not."""
    third = threading.Event()

    def waits() -> None:
        with room.taken(4 * GB):
            third.set()

    with room.taken(4 * GB):
        with room.taken(4 * GB):
            thread = threading.Thread(target=waits)
            thread.start()
            assert not third.wait(0.2)
        assert third.wait(60), "when one has ended"
        thread.join()
    with room.taken(100 * GB):
        pass  # alone it runs: what it takes is an estimate


def test_a_forked_child_waits_for_none_of_its_parent(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with room.taken(GB):
        if (child := os.fork()) == 0:
            with room.taken(GB):
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert room._running == [GB], "the parent's count is its own"


def test_every_compiler_waits_for_room(machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through what all builds call. Each says when it begins and ends; two CPUs are allowed."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    log = tmp_path / "log"
    script = f"echo + >> '{log}'; sleep 0.05; echo - >> '{log}'"
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda _: run_compiler(["sh", "-c", script], tmp_path), range(12)))
    at_once = [0]
    for sign in log.read_text().split():
        at_once.append(at_once[-1] + (1 if sign == "+" else -1))
    assert max(at_once) == 2
