"""Compiling the fast path: for a package by dks-codegen, for this machine where kernels are measured."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

from dks.dispatch import compiler, trust
from dks.dispatch.native import BINARY, HERE, SOURCES, digest
from dks.dispatch.tiles import build

# No path, time or identifier of a build may reach the output: -s drops the names of temporary files, and a
# second build in another place must give the same bytes.
FLAGS = (
    *("-std=c++17", "-O2", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-Wall", "-Wextra", "-Wfatal-errors", "-s", "-Wl,--build-id=none", "-Wl,--as-needed"),
)


def compile_into(folder: Path) -> str:
    """Compile the fast path as ``folder``/_dispatch.abi3.so, in one step.

    The same sources and compiler give the same bytes anywhere.

    Returns:
        Why it failed, or an empty text. A machine that cannot compile is no error: the Python form serves.
    """
    headers = Path(sysconfig.get_paths()["include"])
    _, reason = compiler.find_compiler()
    if reason:
        return reason
    if not (headers / "Python.h").is_file():
        return f"no Python.h in {headers}; install Python's development headers"
    places = [flag for place in sorted({path.parent for path in SOURCES}) for flag in ("-iquote", str(place))]
    flags = [*FLAGS, f'-DDKS_SOURCE="{digest()}"', *places, "-isystem", str(headers)]
    return compiler.build(folder / BINARY, [*flags, str(HERE / "module.cpp")])


def cached() -> tuple[Path | None, str]:
    """(the fast path of this machine, compiled once and kept beside the generated kernels, "") or (None, why)."""
    key = hashlib.sha256("\0".join((digest(), *FLAGS, build.compiler_version())).encode()).hexdigest()[:16]
    folder = build.cache() / f"dispatch-{key}"
    if why := build.distrust() or build.distrust(folder / BINARY):
        return None, why
    if not (folder / BINARY).is_file():
        try:
            trust.make_folder(folder)
        except OSError as error:
            return None, f"{folder}: {error.strerror or error}"
        if why := compile_into(folder):
            return None, why
    return folder / BINARY, ""
