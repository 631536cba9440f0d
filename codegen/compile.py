"""Compiling a package's lookup into ``_lookup.abi3.so``, where the machine can."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import dks.dispatch

SOURCE = Path(dks.dispatch.__file__).parent / "extension.cpp"
BINARY = "_lookup.abi3.so"
TIMEOUT = 300.0  # seconds; a table of 100,000 cells takes about one
COMPILERS = ("g++", "clang++", "c++")

# No path, time or identifier of a build may reach the output: -s drops the names of temporary files, and a
# second build in another place must give the same bytes.
FLAGS = (
    *("-std=c++17", "-O2", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-Wall", "-Wextra", "-Wfatal-errors", "-s", "-Wl,--build-id=none", "-Wl,--as-needed"),
)

_GENERATION = re.compile(r"[0-9A-Za-z._:-]+\Z")


@dataclass(frozen=True, slots=True)
class CompileResult:
    """What became of a compilation.

    Attributes:
        path: the extension, None where there is none.
        reason: why there is none, in words; empty where there is one.
    """

    path: Path | None
    reason: str


def compile_extension(package_dir: Path, generation: str) -> CompileResult:
    """Compile the lookup for the ``table.hpp`` in ``package_dir``, into the same folder.

    The same table, generation and compiler give the same bytes anywhere. The file is replaced in one step.
    A machine that cannot compile is no error: the Python form serves, and the result says why. A binary of
    an earlier call is then removed, since it answers for another table.

    Args:
        package_dir: holds ``table.hpp``.
        generation: digest that the extension shows as ``GENERATION``.

    Raises:
        ValueError: ``generation`` holds something else than letters, digits and ``._:-``.
    """
    if not _GENERATION.match(generation):
        raise ValueError(f"generation: found {generation!r}, expected letters, digits and ._:-")
    binary = package_dir / BINARY
    try:
        reason = _compile(package_dir, generation, binary)
    except OSError as error:
        reason = f"{package_dir}: {error.strerror or error}"
    if reason:
        with suppress(OSError):  # such as a folder that may not be written, which is the reason then
            binary.unlink(missing_ok=True)
    return CompileResult(None if reason else binary, reason)


def _compile(package_dir: Path, generation: str, binary: Path) -> str:
    """Why it failed, or an empty text."""
    compiler, reason = _find_compiler()
    if reason:
        return reason
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        return f"no Python.h in {headers}; install Python's development headers"
    with tempfile.TemporaryDirectory(prefix=".compile-", dir=package_dir) as folder:
        made = Path(folder) / BINARY
        command = [*compiler, *FLAGS, f'-DDKS_GENERATION="{generation}"', "-iquote", ".", "-isystem"]
        command += [str(headers), str(SOURCE), "-o", f"{made.parent.name}/{BINARY}"]
        code, output = _run(command, package_dir)
        if code != 0 or not made.is_file():
            last = "\n".join(output.strip().splitlines()[-8:])
            return f"{compiler[0]} ended with code {code}: {last or 'no output'}"
        made.chmod(0o755)
        made.replace(binary)
    return ""


def _find_compiler() -> tuple[list[str], str]:
    """(command, "") or ([], why there is none). ``$CXX`` is taken at its word: nothing stands in for it."""
    named = os.environ.get("CXX", "").strip()
    if not named:
        found = next(filter(None, map(shutil.which, COMPILERS)), None)
        if found is None:
            return [], f"no C++ compiler: found none of {', '.join(COMPILERS)}"
        return [str(Path(found).absolute())], ""
    try:
        words = shlex.split(named)
    except ValueError as error:
        return [], f"no C++ compiler: $CXX is {named!r}: {error}"
    found = shutil.which(words[0])
    if found is None:
        return [], f"no C++ compiler: $CXX is {named!r}, and there is no such program"
    return [str(Path(found).absolute()), *words[1:]], ""


def _run(command: Sequence[str], folder: Path) -> tuple[int, str]:
    """Exit code and output of a command in ``folder``; past the time limit its process group is killed."""
    with subprocess.Popen(
        command,
        cwd=folder,  # so that messages name no path of ours
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "LC_ALL": "C"},
        start_new_session=True,  # the compiler's driver starts processes of its own
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait(), f"took more than {TIMEOUT:.0f} s"
        return process.returncode, output.decode("utf-8", "replace")
