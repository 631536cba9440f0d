"""Compiling a package's lookup into ``_lookup.abi3.so``, where the machine can."""

from __future__ import annotations

import re
import sysconfig
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import dks.dispatch
from dks.dispatch.compiler import failure, find_compiler, run_compiler

SOURCE = Path(dks.dispatch.__file__).parent / "extension.cpp"
BINARY = "_lookup.abi3.so"

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
    compiler, reason = find_compiler()
    if reason:
        return reason
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        return f"no Python.h in {headers}; install Python's development headers"
    with tempfile.TemporaryDirectory(prefix=".compile-", dir=package_dir) as folder:
        made = Path(folder) / BINARY
        command = [*compiler, *FLAGS, f'-DDKS_GENERATION="{generation}"', "-iquote", ".", "-isystem"]
        command += [str(headers), str(SOURCE), "-o", f"{made.parent.name}/{BINARY}"]
        code, output = run_compiler(command, package_dir)
        if code != 0 or not made.is_file():
            return failure(compiler, code, output)
        made.chmod(0o755)
        made.replace(binary)
    return ""
