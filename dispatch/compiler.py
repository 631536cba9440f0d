"""The machine's C++ compiler: found, and run with a limit. Used while measuring and generating, never to serve."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from dks.dispatch import room, trust
from dks.dispatch.environment import UNKNOWN

COMPILERS = ("g++", "clang++", "c++")
TIMEOUT = 300.0  # seconds


def find_compiler() -> tuple[list[str], str]:
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


def run_compiler(
    command: Sequence[str], folder: Path, timeout: float | None = None, need: int = room.CXX_BYTES
) -> tuple[int, str]:
    """Exit code and output of a command in ``folder``; past so many seconds, or TIMEOUT, its group is killed.

    It waits for a CPU and ``need`` bytes of memory to be free, so that no build takes more than there is.
    """
    try:
        with room.taken(need):
            return _run(command, folder, TIMEOUT if timeout is None else timeout)
    except OSError as error:  # no program after all, such as a script without its first line
        return 126, f"{error.strerror}: {command[0]}"


def build(out: Path, arguments: Sequence[str], files: Mapping[str, bytes] | None = None) -> str:
    """Compile one file, in one step: it is there whole, or what was there before.

    Args:
        out: what is made.
        arguments: of the compiler, without its output.
        files: name and content of what lies in the folder that it runs in, a new one inside of ``out``'s.

    Returns:
        Why it failed, or an empty text.
    """
    compiler, reason = find_compiler()
    if reason:
        return reason
    try:
        with tempfile.TemporaryDirectory(prefix=".compile-", dir=out.parent) as name:
            folder = Path(name)
            for file, data in (files or {}).items():
                (folder / file).write_bytes(data)
            made = folder / out.name
            code, output = run_compiler([*compiler, *arguments, "-o", out.name], folder)
            if code != 0 or not made.is_file():
                return failure(compiler, code, output)
            trust.tighten(made)
            made.replace(out)
    except OSError as error:
        return f"{out.parent}: {error.strerror or error}"
    return ""


def version() -> str:
    """The first line that the compiler says of its version, or ``none``; without a path."""
    command, reason = find_compiler()
    return "none" if reason else _version(tuple(command))


@lru_cache
def _version(command: tuple[str, ...]) -> str:
    code, output = asked([*command, "--version"])
    return output.partition("\n")[0].strip() if code == 0 else UNKNOWN


def described(flags: Sequence[str]) -> str:
    """The compiler's version and a digest of how it is called, as evidence has them; why there is none; or
    ``unknown``. Where it lies does not count."""
    command, reason = find_compiler()
    said = reason or _version(tuple(command))
    return said if reason or said == UNKNOWN else f"{said}, flags {digest_of((*command[1:], *flags))}"


def digest_of(flags: Sequence[str]) -> str:
    """Flags are many; this tells one set from another."""
    return sha256("\0".join(flags).encode()).hexdigest()[:8]


def asked(command: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of a command that compiles nothing, such as ``--version``: it waits for nobody."""
    try:
        return _run(command, Path("/"), TIMEOUT)
    except OSError as error:
        return 126, f"{error.strerror}: {command[0]}"


def _run(command: Sequence[str], folder: Path, timeout: float) -> tuple[int, str]:
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
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait(), f"took more than {timeout:.0f} s"
        return process.returncode, output.decode("utf-8", "replace")


def failure(command: Sequence[str], code: int, output: str) -> str:
    """Why a compilation failed, in a few lines."""
    lines = output.strip().splitlines()
    # What comes before the first error is where it was included from.
    first = next((i for i, line in enumerate(lines) if "error" in line), max(len(lines) - 8, 0))
    said = "\n".join(lines[first : first + 8])
    return f"{command[0]} ended with code {code}: {said or 'no output'}"
