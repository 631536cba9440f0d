"""A worker process seen from outside: started, asked, killed at its deadline, and gone without a trace.

A kernel that crashes, hangs, exits or eats all memory costs its own process, and is named.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from dks.dispatch.environment import Environment
from dks.dispatch.errors import BadInput
from dks.dispatch.modes import EAGER
from dks.dispatch.problem import Candidate, Problem
from dks.profiler.bench import Job
from dks.profiler.ending import end
from dks.profiler.findings import Finding, Round, rounds_from_json
from dks.profiler.worker import NOTE_BYTES

START_S = 120.0  # for a worker to import torch, on a loaded machine
END_S = 20.0  # for killed processes to go: the system takes their memory back first, which may be much
ENERGY_S = 30.0  # beyond the timeout, in which repeated calls are meant to say nothing
LOG = "_workers.log"
MARK = "DKS_WORKER"
"""Environment variable that marks a worker and all that it starts, to be found again wherever they went."""


class Lost(Exception):
    """The worker is gone.

    Attributes:
        candidate: id of the candidate that was running; empty if none was.
        status: crashed, timeout or out_of_memory.
        reason: signal, exit code or deadline, in words.
    """

    def __init__(self, candidate: str, status: str, reason: str) -> None:
        super().__init__(f"{candidate or 'no candidate'}: {status}: {reason}")
        self.candidate, self.status, self.reason = candidate, status, reason


class OutOfTime(Exception):
    """The sweep's time is up while a candidate is at work: nothing is known of it, and its process is gone."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What every worker of a sweep is told.

    Attributes:
        threads: intra-op threads; None is torch's own choice.
        seed: of inputs and order.
        cache: cold, warm or pipeline.
        timeout_s: longest silence: one candidate's check, or one window of rounds.
        folder: where workers' own output goes.
        device: cpu, cuda or cuda:N.
    """

    threads: int | None
    seed: int
    cache: str
    timeout_s: float
    folder: Path
    device: str = "cpu"


def environment_of(device: str) -> Environment:
    """``Environment.current`` of a device. A GPU's comes from a process that ends at once: asking PyTorch opens the
    GPU, and this process would then hold memory there, and be a neighbour to what it measures, for a whole sweep.

    Raises:
        ValueError: there is no such device here.
        BadInput: the process found nothing.
    """
    return Environment.current(device) if device == "cpu" else _described(device)


@lru_cache
def _described(device: str) -> Environment:
    words = [sys.executable, "-c", _DESCRIBE, device]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=START_S, check=False)
    except subprocess.TimeoutExpired:
        raise BadInput(f"device {device}: found no answer in {START_S:g} s, expected its description") from None
    try:
        found = json.loads(done.stdout)
    except ValueError:
        said = " ".join((done.stderr or f"exit code {done.returncode}").split())[-300:]
        raise BadInput(f"device {device}: found {said}, expected its description") from None
    if "error" in found:
        raise ValueError(found["error"])
    return Environment.from_dict(found)


_DESCRIBE = """
import json, sys
from dks.dispatch.environment import Environment
try:
    print(json.dumps(Environment.current(sys.argv[1]).to_dict()))
except ValueError as error:
    print(json.dumps({"error": str(error)}))
"""


class Process:
    """One worker process, alone in its process group.

    ``hard_stop`` is when it is killed whatever it does, as of ``time.monotonic``; its methods then raise OutOfTime.

    Args:
        number: unique in the run directory; stored with every sample.

    Raises:
        BadInput: it does not come up; the message has the end of its log.
    """

    def __init__(self, number: int, setting: Setting) -> None:
        self.number = number
        self.busy_s = 0.0
        self.hard_stop: float | None = None
        self._closed = False
        self._setting = setting
        self._buffer = b""
        self._mark = uuid.uuid4().hex
        self._memory = os.memfd_create("dks-in-flight")
        os.ftruncate(self._memory, NOTE_BYTES)
        self._note = mmap.mmap(self._memory, NOTE_BYTES)
        self._answers, theirs = os.pipe()
        with (setting.folder / LOG).open("ab") as log:
            # A limit on memory makes an allocation fail inside the worker, before the machine runs out.
            # Not beside a GPU: its driver reserves addresses by the hundred gigabytes.
            limit = psutil.virtual_memory().available if setting.device == "cpu" else 0
            words = ["-m", "dks.profiler.worker", str(theirs), str(self._memory), str(os.getpid()), str(limit)]
            self._child = subprocess.Popen(
                [sys.executable, *words],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(theirs, self._memory),
                start_new_session=True,
                env={**os.environ, MARK: self._mark},
            )
        os.close(theirs)
        try:
            setup = {name: getattr(setting, name) for name in ("threads", "seed", "cache", "device")}
            list(self._ask({"do": "begin", **setup}, START_S))
            self.busy_s = 0.0  # starting is what isolation costs
        except Lost as lost:
            self.close()
            raise BadInput(
                f"worker process: found {lost.reason} before it could measure, expected it to start; "
                f"its last words: {_tail(setting.folder / LOG)}"
            ) from None

    def check(self, problem: Problem, candidate: Candidate, mode: str = EAGER) -> tuple[Finding, bool]:
        """What is found of a candidate, and whether it left the process unfit. Raises Lost."""
        (answer,) = self._ask({"do": "check", "problem": problem.id, "candidate": candidate.id, "mode": mode})
        return Finding(**answer["finding"]), answer["poisoned"]

    def search(self, problem: Problem, candidate: Candidate) -> list[Candidate]:
        """The candidates that a kernel's search finds for a problem. Raises Lost."""
        (answer,) = self._ask({"do": "search", "problem": problem.id, "candidate": candidate.id})
        return [Candidate.parse(id) for id in answer["found"]]

    def joules(self, problem: Problem, name: str, mode: str = EAGER) -> tuple[float | None, str]:
        """Joules of a call, and why not if there are none. Raises Lost."""
        request = {"do": "joules", "problem": problem.id, "candidate": name, "mode": mode}
        (answer,) = self._ask(request, self._setting.timeout_s + ENERGY_S)
        return answer["joules"], answer["note"]

    def time(self, job: Job) -> Iterator[list[Round] | tuple[str, Finding]]:
        """As ``Bench.time``; the worker waits until the caller comes back for more. Raises Lost."""
        for answer in self._ask({"do": "time", "job": job.to_json()}):
            if "rounds" in answer:
                yield rounds_from_json(answer["rounds"])
                self._send({"do": "go"})
            elif "finding" in answer:
                yield answer["name"], Finding(**answer["finding"])

    def close(self) -> None:
        """Kill the worker and all that it started, wherever they went, and wait until they are gone.

        A warning names what won't go, as a process that hangs in a driver may not: it is left behind.
        """
        if self._closed:
            return
        self._closed = True
        left = end(self._child.pid, f"{MARK}={self._mark}", END_S)
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=0.0 if left else None)
        if left:
            text = (
                f"worker process {self.number}: found {'; '.join(left)} {END_S:g} s after it was killed, "
                "expected it gone; it may disturb what is measured next: end it, or restart the machine"
            )
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        for file in (self._child.stdin, self._note):
            with suppress(OSError):
                file.close()  # type: ignore[union-attr]
        for number in (self._answers, self._memory):
            with suppress(OSError):
                os.close(number)

    def _ask(self, request: Mapping[str, Any], timeout_s: float | None = None) -> Iterator[dict[str, Any]]:
        self._send(request)
        while True:
            started = time.monotonic()
            answer = json.loads(self._line(timeout_s or self._setting.timeout_s))
            self.busy_s += time.monotonic() - started
            yield answer
            if answer.get("done"):
                return

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        except OSError:
            raise self._lost() from None

    def _line(self, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        if self.hard_stop is not None:
            deadline = min(deadline, max(self.hard_stop, time.monotonic()))
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                candidate = self._in_flight()
                self.close()
                if self.hard_stop is not None and time.monotonic() >= self.hard_stop:
                    raise OutOfTime
                raise Lost(candidate, "timeout", f"nothing came for {timeout_s:g} s; its process group was killed")
            data = os.read(self._answers, 1 << 20)
            if not data:
                raise self._lost()
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def _in_flight(self) -> str:
        return self._note[:].split(b"\0", 1)[0].decode(errors="replace")

    def _lost(self) -> Lost:
        candidate = self._in_flight()
        ended = self._ends(5.0)  # its descriptors close a moment before it can be waited for
        self.close()
        code = self._child.returncode
        if not ended or code is None:
            return Lost(candidate, "crashed", "the process closed its answers; it was killed")
        if code == -signal.SIGKILL:
            return Lost(candidate, "out_of_memory", "killed by signal 9, as the system does when memory runs out")
        if code < 0:
            return Lost(candidate, "crashed", f"killed by signal {-code} ({signal.Signals(-code).name})")
        return Lost(candidate, "crashed", f"the process ended with exit code {code}")

    def _ends(self, within_s: float) -> bool:
        """Whether the worker ends by itself. It is not waited for: its number stays its own until ``close``."""
        until = time.monotonic() + within_s
        while os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() >= until:
                return False
            time.sleep(0.01)
        return True


def _tail(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[-300:].strip() or "none"
    except OSError:
        return "none"
