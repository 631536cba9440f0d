"""Compiling CUTLASS kernels with nvcc: as many at once as memory allows, once for each content, never to serve.

What is compiled lies beside the generated CPU kernels, in ``tiles.build.cache``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from dks.dispatch import room, trust
from dks.dispatch.compiler import asked, digest_of, failure, run_compiler
from dks.dispatch.gpu.cutlass.configuration import HERE, Configuration
from dks.dispatch.tiles.build import CACHE, cache, distrust
from dks.dispatch.tiles.library import Missing

FLAGS = (
    *("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    *("-Xcudafe", "--diag_suppress=177,--diag_suppress=20012"),  # of CUTLASS's own headers
)
# The run-time is linked in: a process may hold that of its framework beside it, in another version.
LINK = ("-shared", "-cudart", "static", "-Xlinker", "-s,--build-id=none")
_LICENCE = (
    "CUTLASS: Copyright (c) NVIDIA CORPORATION & AFFILIATES, BSD-3-Clause, https://github.com/NVIDIA/cutlass\n"
)
TIMEOUT = 1800.0  # seconds: one takes a minute where nothing else runs


def find_nvcc() -> tuple[Path | None, str]:
    """(nvcc, "") or (None, why there is none). ``$CUDA_HOME`` is taken at its word, else $PATH is searched."""
    home = os.environ.get("CUDA_HOME", "").strip()
    found = shutil.which(str(Path(home) / "bin" / "nvcc") if home else "nvcc")
    if found is None:
        return None, f"no nvcc: {f'$CUDA_HOME is {home!r}, and has no bin/nvcc' if home else 'found none in $PATH'}"
    return Path(found).absolute(), ""


def find_cutlass() -> tuple[Path | None, str]:
    """(the folder of CUTLASS's headers, "") or (None, why there is none)."""
    spec = importlib.util.find_spec("cutlass_library")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        headers = Path(place) / "source" / "include"
        if (headers / "cutlass" / "cutlass.h").is_file():
            return headers, ""
    return None, "no CUTLASS: install nvidia-cutlass (pip install 'dks[gpu]')"


def unavailable() -> str:
    """Why nothing can be compiled here, or an empty text."""
    return find_nvcc()[1] or find_cutlass()[1]


def build(wanted: Iterable[Configuration], told: Callable[[int, int], None] = lambda *_: None) -> dict[str, str]:
    """Compile what is not in the cache, as many at once as there is room for; what takes most memory comes first.

    Args:
        told: how many of how many have been compiled, each time that one has.

    Returns:
        Why it failed, by symbol, of each configuration that has no compiled form now.
    """
    configurations = list(dict.fromkeys(wanted))
    if why := distrust() or unavailable():
        return {each.symbol: why for each in configurations}
    missing = sorted((each for each in configurations if not is_built(each)), key=lambda each: -each.memory)
    limit = room.memory()
    failed = {
        each.symbol: f"{each.symbol}: needs {each.memory / 1e9:.1f} GB of memory, {limit / 1e9:.1f} GB may be used"
        for each in missing
        if each.memory > limit
    }
    with ThreadPoolExecutor(room.cpus()) as pool:
        running = {pool.submit(_build_one, each): each for each in missing if each.symbol not in failed}
        for done, ended in enumerate(as_completed(running), len(missing) - len(running) + 1):
            if why := ended.result():
                failed[running[ended].symbol] = why
            told(done, len(missing))
    return failed


def is_built(configuration: Configuration) -> bool:
    """Whether the cache has it."""
    return _path(configuration, ".so").is_file() and _path(configuration, ".o").is_file()


def locate(configuration: Configuration) -> Path:
    """The compiled library of one configuration.

    Raises:
        Missing: ``build`` has not made it, with the reason; or others may write to the folder.
    """
    path = _path(configuration, ".so")
    if why := distrust(path):
        raise Missing(why)
    if path.is_file():
        return path
    failed = _path(configuration, ".txt")
    said = failed.read_text(encoding="utf-8") if failed.is_file() else ""
    raise Missing(said or f"{configuration.symbol}: is not in {cache()}")


def link(configurations: Sequence[Configuration], out: Path) -> None:
    """One shared library of these kernels, compiling what is missing.

    Raises:
        Missing: one of them does not compile, or they do not link.
    """
    failed = build(configurations)
    if failed:
        more = f"; and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise Missing(f"{next(iter(failed.values()))}{more}")
    nvcc, _ = find_nvcc()  # there is one, or nothing was built
    objects = [str(_path(each, ".o")) for each in sorted(configurations, key=lambda each: each.symbol)]
    command = [str(nvcc), *LINK, *objects, "-o", out.name]
    code, output = run_compiler(command, out.parent)
    if code != 0 or not out.is_file():
        raise Missing(failure(command, code, output))


def source(configuration: Configuration) -> str:
    """The CUDA C++ of a configuration."""
    return str(_templates().get_template(configuration.template).render(it=configuration))


def command(configuration: Configuration) -> list[str]:
    """How nvcc is called to compile ``kernel.cu`` to ``kernel.o``; nvcc and CUTLASS have been found."""
    nvcc, _ = find_nvcc()
    headers, _ = find_cutlass()
    target = f"arch=compute_{configuration.target},code=sm_{configuration.target}"
    places = ("-I", str(HERE), "-I", str(headers))
    return [str(nvcc), *FLAGS, "-gencode", target, *places, "-c", "kernel.cu", "-o", "kernel.o"]


@lru_cache
def _templates() -> Any:
    import jinja2  # only needed where something is compiled

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _build_one(configuration: Configuration) -> str:
    """Why it failed, or an empty text; a failure is kept."""
    reason = configuration.objection() or _compile(configuration)
    if reason:
        reason = f"{configuration.symbol} does not compile: {reason}"
        try:
            trust.make_folder(cache())
            trust.put(_path(configuration, ".txt"), reason.encode())
        except OSError as error:
            reason = f"{cache()}: can't be written ({error.strerror}); set {CACHE} to a folder that can"
    return reason


def _compile(configuration: Configuration) -> str:
    try:
        trust.make_folder(cache())
        with tempfile.TemporaryDirectory(prefix=".compile-", dir=cache()) as name:
            folder = Path(name)
            (folder / "kernel.cu").write_text(source(configuration), encoding="utf-8")
            compiling = command(configuration)
            for step in (compiling, [compiling[0], *LINK, "kernel.o", "-o", "kernel.so"]):
                code, output = run_compiler(step, folder, TIMEOUT, configuration.memory)
                if code != 0:
                    return failure(step, code, output)
            for made in ("kernel.o", "kernel.so"):
                trust.tighten(folder / made)
            # The object first: a library without it would be taken as whole.
            (folder / "kernel.o").replace(_path(configuration, ".o"))
            (folder / "kernel.so").replace(_path(configuration, ".so"))
    except OSError as error:
        return f"{cache()}: {error.strerror or error}"
    return ""


def _path(configuration: Configuration, suffix: str) -> Path:
    parts = (configuration.digest(), *FLAGS, *LINK, nvcc_version(), _cutlass_version())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache() / f"{configuration.symbol}-{key}{suffix}"


def nvcc_version() -> str:
    """nvcc and what it says of its version: another one makes other code."""
    nvcc, reason = find_nvcc()
    return reason if nvcc is None else _version(nvcc)


def described() -> str:
    """nvcc and CUTLASS with versions and a digest of the flags, as evidence has them; or why there are none."""
    nvcc, reason = find_nvcc()
    if nvcc is None:
        return reason
    said = _version(nvcc).splitlines()[-1]  # the line that names the build
    return f"nvcc {said}, flags {digest_of((*FLAGS, *LINK))}, cutlass {_cutlass_version()}"


@lru_cache
def _version(nvcc: Path) -> str:
    code, output = asked([str(nvcc), "--version"])
    return f"{nvcc} {code} {output.strip()}"


@lru_cache
def _cutlass_version() -> str:
    try:
        return importlib.metadata.version("nvidia-cutlass")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def licence() -> str:
    """The text that must go wherever compiled CUTLASS goes."""
    with suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nvidia-cutlass") or ():
            if file.name.upper().startswith("LICENSE") and file.parent.as_posix().endswith(
                ("licenses", "dist-info")
            ):
                return file.read_text(encoding="utf-8")
    return _LICENCE
