"""Processes that are ended with all that they started, however that tried to get away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dks.profiler import ending
from dks.profiler.ending import end

MARK = "DKS_TEST_MARK=one of this test"
BELOW = "import os, sys, time; open(sys.argv[1], 'a').write(f'{os.getpid()} '); time.sleep(600)"

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(script, how many numbers it and its children will note) -> a process in a group of its own."""
    every: list[subprocess.Popen[bytes]] = []

    def begin(script: str, notes: int) -> subprocess.Popen[bytes]:
        name, _, value = MARK.partition("=")
        words = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "noted"), BELOW]
        every.append(subprocess.Popen(words, start_new_session=True, env={**os.environ, name: value}))
        while len(noted(tmp_path)) < notes:
            assert every[-1].poll() is None
            time.sleep(0.01)
        return every[-1]

    yield begin
    for pid in [*(each.pid for each in every), *noted(tmp_path)]:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    for each in every:
        each.wait()


def noted(folder: Path) -> list[int]:
    path = folder / "noted"
    return [int(word) for word in path.read_text().split(" ")[:-1]] if path.exists() else []


def alive(pid: int) -> bool:
    seen = ending._look(pid)
    return seen is not None and seen.state not in "ZX"


STARTS = {
    "in its group": "subprocess.Popen([sys.executable, '-c', sys.argv[2], sys.argv[1]])",
    "in a session of its own": (
        "subprocess.Popen([sys.executable, '-c', sys.argv[2], sys.argv[1]], start_new_session=True)"
    ),
    "without its environment": (
        "subprocess.Popen([sys.executable, '-c', sys.argv[2], sys.argv[1]], start_new_session=True, env={})"
    ),
    "without its parent": (
        "os.fork() or "
        "(os.setsid(), subprocess.Popen([sys.executable, '-c', sys.argv[2], sys.argv[1]]), os._exit(0))"
    ),
}


@pytest.mark.parametrize("where", STARTS)
def test_what_it_started_is_gone_when_it_returns(start: Start, tmp_path: Path, where: str) -> None:
    child = start(f"import os, subprocess, sys, time\n{STARTS[where]}\ntime.sleep(600)", 1)
    assert alive(child.pid) and all(map(alive, noted(tmp_path)))
    assert end(child.pid, MARK, 60.0) == []
    assert not alive(child.pid) and not any(map(alive, noted(tmp_path)))
    assert child.wait() == -signal.SIGKILL, "it is left to be waited for"


def test_one_that_moves_on_while_it_is_looked_for_is_found(start: Start, tmp_path: Path) -> None:
    """A chain of processes, each of which starts the next and ends."""
    script = """
    import os, sys, time
    if os.fork() == 0:
        while os.fork() == 0:
            os.setsid()
            open(sys.argv[1], 'a').write(f'{os.getpid()} ')
            time.sleep(0.05)
        os._exit(0)
    time.sleep(600)
    """
    child = start(script, 3)
    assert end(child.pid, MARK, 60.0) == []
    count = len(noted(tmp_path))
    time.sleep(0.3)
    assert len(noted(tmp_path)) == count, "it goes on"


def test_what_has_ended_already_leaves_what_it_started(start: Start, tmp_path: Path) -> None:
    child = start(f"import os, subprocess, sys, time\n{STARTS['in a session of its own']}\ntime.sleep(600)", 1)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert all(map(alive, noted(tmp_path)))
    assert end(child.pid, MARK, 60.0) == []
    assert not any(map(alive, noted(tmp_path)))


def test_what_will_not_go_is_named_and_not_waited_for(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    child = start("import os, sys, time; open(sys.argv[1], 'a').write(f'{os.getpid()} '); time.sleep(600)", 1)
    kill = os.kill
    with monkeypatch.context() as patch:  # as in a driver that never comes back
        patch.setattr(os, "kill", lambda pid, number: None if pid == child.pid else kill(pid, number))
        (line,) = end(child.pid, MARK, 0.05)
    assert f"process {child.pid} ({sys.executable} -c" in line and "in state" in line
    assert end(child.pid, MARK, 60.0) == []


def test_nobody_else_is_touched(start: Start, tmp_path: Path) -> None:
    other = start("import os, sys, time; open(sys.argv[1], 'a').write(f'{os.getpid()} '); time.sleep(600)", 1)
    child = start("import os, sys, time; open(sys.argv[1], 'a').write(f'{os.getpid()} '); time.sleep(600)", 2)
    assert end(child.pid, "DKS_TEST_MARK=another", 60.0) == []
    assert alive(other.pid) and not alive(child.pid)
