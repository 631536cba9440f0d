"""The worker process: kernels run here and nowhere else. ``isolation`` starts it and outlives it.

Requests come as JSON lines on standard input; answers go as JSON lines to a descriptor of their own, since a
kernel may print. The candidate about to run is noted in shared memory, where it survives a crash.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from dks.dispatch import native, pool
from dks.dispatch.gpu import library as gpu_library
from dks.dispatch.gpu import measuring
from dks.dispatch.gpu.cublaslt import library as cublaslt_library
from dks.dispatch.gpu.cutlass import library as cutlass_library
from dks.dispatch.native import build as native_build
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.tiles import build, library
from dks.profiler.bench import Bench, Job
from dks.profiler.device import open_device
from dks.profiler.findings import rounds_to_json

NOTE_BYTES = 256  # of shared memory: the id of the candidate in flight
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Worker:
    """Answers requests until its input ends."""

    def __init__(self, answers: int, note: int) -> None:
        self._answers = os.fdopen(answers, "w", buffering=1)
        self._note = mmap.mmap(note, NOTE_BYTES)
        self._bench: Bench | None = None

    def in_flight(self, name: str) -> None:
        """Note the candidate about to run."""
        self._note[: len(name) + 1] = name.encode() + b"\0"

    def serve(self) -> None:
        """Answer every request with lines, the last of which has ``done``."""
        for line in sys.stdin:
            for answer in self._answer(json.loads(line)):
                self._say(answer)

    def _say(self, answer: Mapping[str, Any]) -> None:
        self._answers.write(json.dumps(answer, separators=(",", ":")) + "\n")

    def _answer(self, request: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        if request["do"] == "begin":
            if request["threads"] is not None:
                torch.set_num_threads(request["threads"])
            device = open_device(request["device"])
            if device.torch.type == "cuda":
                capability = measuring.capability(request["device"])
                gpu_library.look_in(measuring.locate(capability))
                cutlass_library.look_in(measuring.locate_cutlass(capability))
                cublaslt_library.look_in(measuring.locate_cublaslt)
            self._bench = Bench(request["seed"], request["cache"], self.in_flight, device)
            yield {"done": True}
            return
        assert self._bench is not None, "begin comes first"
        if request["do"] == "search":
            candidate = Candidate.parse(request["candidate"])
            self.in_flight(candidate.id)
            yield {"done": True, "found": _searched(Problem.parse(request["problem"]), candidate)}
            self.in_flight("")
        elif request["do"] == "check":
            candidate = Candidate.parse(request["candidate"])
            self.in_flight(candidate.id)
            finding, poisoned = self._bench.check(Problem.parse(request["problem"]), candidate, request["mode"])
            self.in_flight("")
            yield {"done": True, "finding": asdict(finding), "poisoned": poisoned}
        elif request["do"] == "joules":
            self.in_flight(request["candidate"])
            problem = Problem.parse(request["problem"])
            joules, why = self._bench.joules(problem, request["candidate"], request["mode"])
            self.in_flight("")
            yield {"done": True, "joules": joules, "note": why}
        else:
            yield from self._time(Job.from_json(request["job"]))

    def _time(self, job: Job) -> Iterator[Mapping[str, Any]]:
        assert self._bench is not None
        for found in self._bench.time(job):
            if isinstance(found, list):
                yield {"rounds": rounds_to_json(found)}
                # The next kernel starts when these are on the disk: writing them would disturb it.
                sys.stdin.readline()
            else:
                yield {"name": found[0], "finding": asdict(found[1])}
        yield {"done": True}


def _searched(problem: Problem, candidate: Candidate) -> list[str]:
    """The candidates that a kernel's search finds; none where it can't."""
    kernel = pool.kernels()[candidate.kernel]
    try:
        if kernel.search is None or kernel.unavailable() or kernel.objection(problem):
            return []
        return [Candidate(kernel.id, params).id for params in kernel.search(problem)]
    except Exception as error:  # a kernel may raise anything
        print(f"{kernel.id}: its search found nothing for {problem.id}: {error}", file=sys.stderr)
        return []


def main() -> None:
    """Serve, and die with the process that started this one."""
    answers, note, parent, data_limit = map(int, sys.argv[1:])
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what loses its parent stays below this process, where it is found and ended
    if os.getppid() != parent:  # it died before the line above
        return
    if data_limit:
        resource.setrlimit(resource.RLIMIT_DATA, (data_limit, data_limit))
    os.dup2(2, 1)
    library.look_in(build.locate)
    fast, _ = native_build.cached()
    if fast is not None:  # kernels are launched as a package launches them
        native.install(fast)
    Worker(answers, note).serve()


if __name__ == "__main__":
    main()
