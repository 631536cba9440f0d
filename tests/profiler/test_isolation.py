"""Worker processes and kernels that crash, hang, exit and eat memory: each costs its own process, no more."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dks.dispatch import pool
from dks.dispatch.problem import Candidate, Problem
from dks.profiler import isolation
from dks.profiler.bench import Job
from dks.profiler.isolation import MARK, Lost, OutOfTime, Process, Setting
from dks.profiler.timing import StoppingRule

PROBLEM = Problem.of("linear", {"dtype": "float32", "bias": "yes", "epilogue": "none"}, {"m": 8, "n": 64, "k": 64})
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _fault_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv(pool.MORE_KERNELS, "tests.profiler.fault_kernels")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{ROOT}")
    monkeypatch.setenv("DKS_TEST_ONCE", str(tmp_path / "once"))
    pool.kernels.cache_clear()
    yield
    monkeypatch.undo()
    pool.kernels.cache_clear()


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(threads=1, seed=0, cache="cold", timeout_s=20.0, folder=tmp_path)


def left_of(worker: Process) -> list[int]:
    """Processes that a worker started, wherever they are; other workers of this machine are none of them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == worker._mark and process.status() != "zombie":
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def job(*names: str, process: int = 0) -> Job:
    return Job(PROBLEM, ("torch.linear", *names), StoppingRule(6, 6, 1.0), process)


def test_healthy_candidates_share_one_warm_process(setting: Setting) -> None:
    process = Process(3, setting)
    try:
        for name in ("torch.linear", "torch.addmm", "fault.good"):
            finding, poisoned = process.check(PROBLEM, Candidate.parse(name))
            assert (finding.status, poisoned) == ("ok", False), finding
            assert finding.errors["normal"] < 1e-5
        rounds = [
            r for found in process.time(job("torch.addmm", "fault.good")) if isinstance(found, list) for r in found
        ]
        assert len(rounds) == 6 and {r.process for r in rounds} == {0}
        assert all(ns > 0 for r in rounds for ns in r.ns.values())
        assert process.busy_s > 0
    finally:
        process.close()
    assert not left_of(process)


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("segfault", "crashed", "SIGSEGV"),
        ("abort", "crashed", "SIGABRT"),
        ("exit", "crashed", "exit code 0"),
        ("killed", "out_of_memory", "signal 9"),
    ],
)
def test_a_dying_kernel_is_named_with_its_reason(setting: Setting, name: str, status: str, reason: str) -> None:
    process = Process(0, setting)
    with pytest.raises(Lost) as lost:
        process.check(PROBLEM, Candidate.parse(f"fault.{name}"))
    assert (lost.value.candidate, lost.value.status) == (f"fault.{name}", status)
    assert reason in lost.value.reason
    assert not left_of(process)


@pytest.mark.parametrize("name", ["fault.hang_with_children", "fault.hang_in_bind"])
def test_a_hanging_kernel_is_killed_at_its_deadline_with_all_that_it_started(setting: Setting, name: str) -> None:
    process = Process(0, Setting(1, 0, "cold", 3.0, setting.folder))
    with pytest.raises(Lost) as lost:
        process.check(PROBLEM, Candidate.parse(name))
    assert (lost.value.candidate, lost.value.status) == (name, "timeout")
    assert "nothing came for 3 s" in lost.value.reason
    assert not left_of(process)


def test_what_will_not_go_is_left_behind_with_a_warning(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(7, setting)
    with monkeypatch.context() as patch:
        patch.setattr(isolation, "end", lambda *_: ["process 12 (stuck) in state D"])
        with pytest.warns(RuntimeWarning, match=r"worker process 7: found process 12 \(stuck\) in state D"):
            process.close()
    assert left_of(process), "it was not waited for"
    assert isolation.end(process._child.pid, f"{MARK}={process._mark}", 60.0) == []
    process._child.wait()
    assert not left_of(process)


def test_memory_that_is_not_there_is_a_status_and_harms_nobody(setting: Setting) -> None:
    process = Process(0, setting)
    finding, _ = process.check(PROBLEM, Candidate.parse("fault.memory"))
    assert finding.status == "out_of_memory"
    assert process.check(PROBLEM, Candidate.parse("torch.linear"))[0].status == "ok"
    process.close()


def test_an_error_that_stays_with_the_device_is_a_crash_with_its_name(setting: Setting) -> None:
    """The process lives and answers; it is no use to anybody else."""
    process = Process(0, setting)
    rule = StoppingRule(3000, 3000, 60.0, racing=False)
    try:
        finding, poisoned = process.check(PROBLEM, Candidate.parse("fault.device"))
        assert (finding.status, poisoned) == ("crashed", True)
        assert finding.reason.startswith("CUDA error: an illegal memory access was encountered")
        *_, last = process.time(Job(PROBLEM, ("torch.linear", "fault.late_device"), rule, 0))
    finally:
        process.close()
    assert isinstance(last, tuple) and (last[0], last[1].status) == ("fault.late_device", "crashed")
    assert last[1].reason == "while it was timed: CUDA error: an illegal memory access was encountered"


def test_a_crash_while_timing_names_the_candidate_in_flight(setting: Setting) -> None:
    process = Process(0, setting)
    rule = StoppingRule(3000, 3000, 60.0, racing=False)
    names = ("torch.linear", "torch.addmm", "fault.late_segfault")
    with pytest.raises(Lost) as lost:
        for _ in process.time(Job(PROBLEM, names, rule, 0)):
            pass
    assert lost.value.candidate == "fault.late_segfault" and "SIGSEGV" in lost.value.reason
    assert not left_of(process)


def test_a_worker_dies_with_the_process_that_started_it(setting: Setting) -> None:
    child = os.fork()
    if child == 0:
        process = Process(0, setting)
        (setting.folder / "pid").write_text(str(process._child.pid))
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    worker = int((setting.folder / "pid").read_text())
    for _ in range(100):
        if not psutil.pid_exists(worker) or psutil.Process(worker).status() == "zombie":
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")


def test_at_the_hard_stop_a_process_is_gone_and_nobody_is_blamed(setting: Setting) -> None:
    process = Process(0, setting)
    process.hard_stop = time.monotonic() + 1.0
    with pytest.raises(OutOfTime):
        process.check(PROBLEM, Candidate.parse("fault.hang"))
    assert not left_of(process)


def test_what_raises_only_when_it_is_timed_is_a_status_of_its_own(setting: Setting) -> None:
    process = Process(0, setting)
    found = dict(each for each in process.time(job("fault.memory")) if isinstance(each, tuple))
    assert found["fault.memory"].status == "out_of_memory"
    assert process.check(PROBLEM, Candidate.parse("torch.linear"))[0].status == "ok", "the process lives on"
    process.close()
