"""Compiling the library that opens cuBLASLt. It needs a C++ compiler, and nothing of CUDA."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dks.dispatch import compiler, trust
from dks.dispatch.gpu.cublaslt.library import HERE, digest
from dks.dispatch.tiles import build

BINARY = "libdks_cublaslt.so"
FLAGS = (
    *("-std=c++17", "-O2", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-Wall", "-Wextra", "-Wfatal-errors", "-s", "-Wl,--build-id=none"),
)


def compile_into(folder: Path) -> str:
    """Compile ``folder``/libdks_cublaslt.so, in one step.

    Returns:
        Why it failed, or an empty text.
    """
    source, libraries = str(HERE / "cublaslt.cpp"), ("-ldl",)
    flags = (*FLAGS, f'-DDKS_SOURCE="{digest()}"', "-iquote", str(HERE))
    return compiler.build(folder / BINARY, [*flags, source, *libraries])


def cached() -> tuple[Path | None, str]:
    """(the library, compiled once and kept beside the generated kernels, "") or (None, why there is none)."""
    if why := build.distrust():
        return None, why
    key = hashlib.sha256("\0".join((digest(), *FLAGS, build.compiler_version())).encode()).hexdigest()[:16]
    folder = build.cache() / f"cublaslt-{key}"
    if not (folder / BINARY).is_file():
        try:
            trust.make_folder(folder)
        except OSError as error:
            return None, f"{folder}: {error.strerror or error}"
        if why := compile_into(folder):
            return None, why
    return folder / BINARY, ""
