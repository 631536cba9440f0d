"""Compiling Triton programs ahead of time: in processes of their own, in parallel, once for each content.

Needs Triton, but neither a GPU nor a driver. Never while serving.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from dks.dispatch import room, trust
from dks.dispatch.errors import BadInput
from dks.dispatch.gpu import cubin as cubins
from dks.dispatch.gpu import program as programs
from dks.dispatch.gpu.cubin import Cubin
from dks.dispatch.gpu.limits import ARCHS, lacks
from dks.dispatch.gpu.program import Program
from dks.dispatch.gpu.workplace import work_folder
from dks.dispatch.tiles import build as tiles
from dks.dispatch.tiles.library import Missing

WORKER = Path(__file__).parent / "worker.py"
TIMEOUT = 300.0
"""Seconds that a program may take."""

Task = tuple[Program, int]
Progress = Callable[[int, int, Program, int, str], object]
"""Told how many are done, of how many, which program and architecture was the last, and why that one failed."""


def build(
    wanted: Iterable[Program],
    archs: Iterable[int] = ARCHS,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[tuple[str, int], str]:
    """Compile programs for architectures, where the cache has them not, as many at once as there is room for.

    Args:
        workers: how many processes at most; as many as there is room for where None.

    Returns:
        Why it failed, by symbol and architecture, of each program that has no compiled form now.
    """
    archs = tuple(archs)
    return build_tasks([(program, arch) for program in wanted for arch in archs], workers, progress)


def build_tasks(
    tasks: Iterable[Task], workers: int | None = None, progress: Progress | None = None
) -> dict[tuple[str, int], str]:
    """The same for pairs of program and architecture."""
    todo = list(dict.fromkeys(tasks))
    if why := tiles.distrust() or _no_triton():
        return {(program.symbol, arch): why for program, arch in todo}
    total = len(todo)
    failed = {(program.symbol, arch): lack for program, arch in todo if (lack := lacks(program, arch)) is not None}
    todo = [task for task in todo if (task[0].symbol, task[1]) not in failed and not is_built(*task)]
    if not todo:
        return failed
    count = min(workers or room.at_once(room.TRITON_BYTES), len(todo))
    try:
        trust.make_folder(tiles.cache())
        with (
            work_folder(tiles.cache()) as (folder, held),
            _Workers(folder, held) as all_,
            ThreadPoolExecutor(count) as pool,
        ):
            running = {pool.submit(_build_one, all_, *task): task for task in todo}
            try:
                for done, future in enumerate(as_completed(running), total - len(todo) + 1):
                    (program, arch), why = running[future], future.result()
                    if why:
                        failed[program.symbol, arch] = why
                    if progress is not None:
                        progress(done, total, program, arch, why)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # else what has not begun would still be compiled
                raise
    except OSError as error:
        why = f"{tiles.cache()}: {error.strerror or error}; set {tiles.CACHE} to a folder that can be written"
        failed |= {(program.symbol, arch): why for program, arch in todo if not is_built(program, arch)}
    return failed


def is_built(program: Program, arch: int) -> bool:
    """Whether the cache has it, and undamaged: what is not is built again."""
    try:
        _kept(program, arch)
    except BadInput:
        return False
    return True


def _kept(program: Program, arch: int) -> Cubin:
    path = _path(program, arch, ".json")
    found = cubins.read(path)
    if (found.symbol, found.program, found.arch) != (program.symbol, program.digest(), arch):
        raise BadInput(f"{path}: found {found.symbol} for sm_{found.arch}, expected {program.symbol}; delete it")
    return found


def load(program: Program, arch: int) -> Cubin:
    """The compiled form of a program, from the cache.

    Raises:
        Missing: ``build`` has not made it, with the reason; or others may write to the folder.
    """
    if why := tiles.distrust() or _no_triton():
        raise Missing(why)
    path = _path(program, arch, ".json")
    if path.is_file():
        try:
            return _kept(program, arch)
        except BadInput as error:
            raise Missing(str(error)) from None
    failed = path.with_suffix(".txt")
    if failed.is_file():
        raise Missing(failed.read_text(encoding="utf-8"))
    raise Missing(f"{program.symbol}: is not compiled for sm_{arch} in {tiles.cache()}")


def ptx(program: Program, arch: int) -> str:
    """The compiler's last form that people can read, of a program that was built."""
    return _path(program, arch, ".ptx").read_text(encoding="utf-8")


@lru_cache
def version() -> str:
    """Triton's version, or an empty text where there is none. It is not imported."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def described() -> str:
    """Triton with its version, as evidence has it; or why there is none."""
    return _no_triton() or f"triton {version()}"


def _no_triton() -> str:
    return "" if version() else "no Triton here: install dks[gpu], or triton>=3.6"


def _build_one(workers: _Workers, program: Program, arch: int) -> str:
    """Why it failed, or an empty text."""
    path = _path(program, arch, ".json")
    out = workers.folder / path.name
    request = {
        "source": program.source,
        "function": program.function,
        "arguments": [(each.name, each.type) for each in program.arguments],
        "constants": program.constants,
        "divisible": [(program.arguments[i].name, divisor) for i, divisor in program.divisible().items()],
        "arch": arch,
        "warps": program.warps,
        "stages": program.stages,
        "out": str(out),
    }
    with room.taken(room.TRITON_BYTES):
        answer = workers.ask(request)
    why = str(answer.pop("why"))
    if not why:
        try:
            made = _cubin(program, arch, answer, out.with_suffix(".cubin").read_bytes())
            trust.tighten(out.with_suffix(".ptx"))
            out.with_suffix(".ptx").replace(path.with_suffix(".ptx"))
            cubins.write(made, path)
            out.with_suffix(".cubin").unlink()
            path.with_suffix(".txt").unlink(missing_ok=True)
        except (ValueError, TypeError, KeyError) as error:
            why = f"the compiler made what can't be launched: {error}"
    if why:
        why = f"{program.symbol} does not compile for sm_{arch}: {_short(why, workers.folder)}"
        trust.put(path.with_suffix(".txt"), why.encode())
    return why


def _cubin(program: Program, arch: int, answer: dict[str, Any], elf: bytes) -> Cubin:
    made = Cubin(
        symbol=program.symbol,
        program=program.digest(),
        arch=arch,
        triton=version(),
        arguments=program.arguments,
        align=program.align,
        grid=program.grid,
        resident=program.resident,
        elf=elf,
        **answer,
    )
    cubins.check(made)
    return made


def _short(why: str, folder: Path) -> str:
    """The last lines of what a compiler says: the first ones are its own stack and our whole program."""
    lines = [line.strip() for line in why.replace(str(folder), "").splitlines() if line.strip()]
    said = lines if len(lines) <= 12 else [lines[0], "...", *lines[-10:]]
    return "\n".join(line[:300] for line in said) or "no reason was given"


def _path(program: Program, arch: int, suffix: str) -> Path:
    parts = (program.digest(), str(arch), version(), str(cubins.VERSION), _worker_text())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return tiles.cache() / f"{program.symbol}-sm{arch}-{key}{suffix}"


@lru_cache
def _worker_text() -> str:
    return WORKER.read_text(encoding="utf-8")


class _Workers:
    """Processes that compile, started as they are needed and used again."""

    def __init__(self, folder: Path, held: int) -> None:
        self.folder = folder
        self._held = held
        self._lock = threading.Lock()
        self._all: list[_Worker] = []
        self._free: list[_Worker] = []

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.end()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of a free worker; where it died, why."""
        with self._lock:
            if self._free:
                worker = self._free.pop()
            else:
                worker = _Worker(self.folder, len(self._all), self._held)
                self._all.append(worker)
        answer, alive = worker.ask(request)
        if alive:
            with self._lock:
                self._free.append(worker)
        return answer


class _Worker:
    """One process of ``worker.py``."""

    def __init__(self, folder: Path, number: int, held: int) -> None:
        self._said = folder / f"worker-{number}.log"
        with self._said.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), str(programs.SOURCES)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=_environment(folder, number),
                pass_fds=(held,),  # while it lives, the folder is in use
                start_new_session=True,  # the compiler starts processes of its own
            )

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Its answer, and whether it lives on."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(TIMEOUT, stop)
        timer.daemon = True
        timer.start()
        try:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer, True
        code = self._process.wait()
        if late.is_set():
            return {"why": f"took more than {TIMEOUT:.0f} s"}, False
        said = self._said.read_text(encoding="utf-8", errors="replace")[-4000:]
        return {"why": f"{said}\nthe compiler's process ended with {code}"}, False

    def end(self) -> None:
        """End it; it has no request."""
        self._kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what a dead process was still to read
                    pipe.close()

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)


def _environment(folder: Path, number: int) -> dict[str, str]:
    """Of a process that compiles: no setting of Triton's but ours, and all that it writes goes into ``folder``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return kept | {
        "TRITON_DISABLE_LINE_INFO": "1",  # a third of the size, and no path in it
        "TRITON_HOME": str(folder),
        "TRITON_CACHE_DIR": str(folder / f"triton-{number}"),
        "TMPDIR": str(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
