"""Generated kernels with more threads than cores, many callers, one core, no threads, and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dks.dispatch.kernel import Kernel, Launch, Output
from dks.dispatch.problem import Problem
from dks.dispatch.tiles import build
from tests.tiles.generated import CASES, assert_right, inputs_for, problem_for, same, with_threads

ROOT = Path(__file__).parent.parent.parent


def bound(kernel: Kernel, dtype: str, threads: int) -> tuple[Problem, Launch, tuple[object, ...], Output]:
    problem = problem_for(kernel, dtype)
    inputs, wanted = inputs_for(problem)
    return problem, kernel.bind(problem, with_threads(kernel, threads), *inputs.static), inputs.dynamic, wanted


@pytest.mark.parametrize(("kernel", "dtype"), CASES)
def test_more_threads_than_cores(kernel: Kernel, dtype: str) -> None:
    problem, run, dynamic, wanted = bound(kernel, dtype, 8)
    first = run(*dynamic)
    assert_right(first, wanted, kernel, problem)
    assert all(same(run(*dynamic), first) for _ in range(20))


@pytest.mark.parametrize(("kernel", "dtype"), CASES)
@pytest.mark.parametrize("threads", [1, 2])
def test_one_bound_kernel_called_by_several_threads_at_once(kernel: Kernel, dtype: str, threads: int) -> None:
    _, run, dynamic, _ = bound(kernel, dtype, threads)
    first = run(*dynamic)
    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda _: all(same(run(*dynamic), first) for _ in range(50)), range(4)))
    assert found == [True] * 4


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
@pytest.mark.parametrize(("kernel", "dtype"), CASES)
def test_all_threads_on_one_core(kernel: Kernel, dtype: str) -> None:
    problem, run, dynamic, wanted = bound(kernel, dtype, 4)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        for _ in range(3):
            assert_right(run(*dynamic), wanted, kernel, problem)
    finally:
        os.sched_setaffinity(0, cores)


EVERY = """
import ctypes, os, signal, sys, threading
from dks.dispatch.tiles import build, library
from tests.tiles.generated import CASES, assert_right, inputs_for, problem_for, same, with_threads

library.look_in(build.locate)
made = []
for case in CASES:
    kernel, dtype = case.values
    problem = problem_for(kernel, dtype)
    inputs, wanted = inputs_for(problem)
    run = kernel.bind(problem, with_threads(kernel, 3), *inputs.static)
    made.append((run, inputs.dynamic, wanted, kernel, problem))

def all_are_right():
    for run, dynamic, wanted, kernel, problem in made:
        assert_right(run(*dynamic), wanted, kernel, problem)

def teams():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Threads"))
"""


def in_a_process(script: str, **environment: str) -> None:
    """With every kernel compiled before."""
    units = [
        kernel.unit(problem_for(kernel, dtype), kernel.params[0]) for kernel, dtype in (c.values for c in CASES)
    ]
    if not units:
        pytest.skip("no generated kernel runs on this machine")
    assert build.build(units) == {}
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", EVERY + textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr[-2000:]


def test_a_team_of_one_where_three_were_asked_for() -> None:
    in_a_process("all_are_right(); print('done')", OMP_THREAD_LIMIT="1", OMP_NUM_THREADS="1")


def test_inside_somebody_s_parallel_region() -> None:
    """Where OpenMP gives a nested team one thread."""
    in_a_process("""
        openmp, found = ctypes.CDLL(None), []
        body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

        @body
        def each(_):
            try:
                all_are_right()
                found.append(openmp.omp_get_num_threads())
            except BaseException as error:
                found.append(error)

        openmp.GOMP_parallel(each, None, 2, 0)
        assert found == [2, 2], found
        print("done")
    """)


def test_a_forked_child_serves_on_one_thread() -> None:
    """OpenMP's threads are not there after a fork, and waiting for them would never end."""
    in_a_process("""
        all_are_right()
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            before = teams()
            try:
                all_are_right()
                assert teams() == before, "threads were started"
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        all_are_right()
        print("done")
    """)
