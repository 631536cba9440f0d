"""Compiling units with the machine's own compiler: in parallel, once for each content, never while serving."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from dks.dispatch import room, trust
from dks.dispatch.compiler import asked, failure, find_compiler, run_compiler
from dks.dispatch.errors import unreadable
from dks.dispatch.tiles.library import Missing
from dks.dispatch.tiles.unit import HEADERS, TEMPLATE, Unit

CACHE = "DKS_CACHE"
"""Environment variable: where compiled units are kept; else $XDG_CACHE_HOME/dks, else ~/.cache/dks. For a user
without a home that can be used it is a folder of its own in $TMPDIR, or /tmp."""

# Contractions and reassociation stay as written: fma is called where it is meant, and NaN must survive.
FLAGS = (
    *("-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wextra", "-Wfatal-errors"),
    # GCC sees through its own intrinsics' "undefined" operands and through templates of no rows.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-array-bounds"),
)
LINK = ("-shared", "-s", "-Wl,--build-id=none", "-Wl,--as-needed", "-Wl,-Bsymbolic")


def cache() -> Path:
    """The folder of compiled units."""
    named = os.environ.get(CACHE)
    if named:
        return Path(named).absolute()  # compilers run elsewhere
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named).absolute() / "dks"
    with suppress(RuntimeError, OSError):  # no home; or one of somebody else's
        folder = Path.home().absolute() / ".cache" / "dks"
        if _usable(folder):
            return folder
    return Path(os.environ.get("TMPDIR") or "/tmp").absolute() / f"dks-{os.geteuid()}"


def _usable(folder: Path) -> bool:
    """Whether this user may write there, or make it."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def distrust(path: Path | None = None) -> str:
    """Why no code may be loaded from the folder of compiled units, or a file in it, or an empty text."""
    path = path or cache()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):  # nothing is there to be loaded
        return ""
    except OSError as error:
        return f"{unreadable(path, error)}, or set {CACHE} to a folder of your own"
    why = trust.distrust(path)
    return f"{why}, or set {CACHE} to a folder of your own" if why else ""


def closed() -> str:
    """Why nothing can be kept in the folder of compiled units, or an empty text; it is made if it is not there."""
    try:
        trust.make_folder(cache())
    except OSError as error:
        return f"{cache()}: can't be made ({error.strerror}); set {CACHE} to a folder that can"
    if not os.access(cache(), os.W_OK | os.X_OK):
        return f"{cache()}: can't be written by user {os.geteuid()}; set {CACHE} to a folder that can"
    return distrust()


def build(units: Iterable[Unit]) -> dict[str, str]:
    """Compile what is not in the cache, as many at once as there is room for.

    Returns:
        Why it failed, by symbol, of each unit that has no compiled form now.
    """
    wanted = list(dict.fromkeys(units))
    with ThreadPoolExecutor(room.at_once(room.CXX_BYTES)) as pool:
        return {unit.symbol: why for unit, why in zip(wanted, pool.map(_build_one, wanted), strict=True) if why}


def is_built(unit: Unit) -> bool:
    """Whether the cache has it."""
    return _path(unit, ".so").is_file() and _path(unit, ".o").is_file()


def locate(unit: Unit) -> Path:
    """The compiled library of one unit.

    Raises:
        Missing: ``build`` has not made it, with the reason; or others may write to the folder.
    """
    path = _path(unit, ".so")
    if why := distrust(path):
        raise Missing(why)
    if path.is_file():
        return path
    failed = _path(unit, ".txt")
    raise Missing(failed.read_text(encoding="utf-8") if failed.is_file() else f"{unit.symbol}: is not in {cache()}")


def link(units: Sequence[Unit], out: Path) -> None:
    """One shared library of these units, compiling what is missing.

    Raises:
        Missing: one of them does not compile, or they do not link.
    """
    failed = build(units)
    if failed:
        more = f"; and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise Missing(f"{next(iter(failed.values()))}{more}")
    objects = [str(_path(unit, ".o")) for unit in sorted(units, key=lambda unit: unit.symbol)]
    compiler, _ = find_compiler()  # there is one, or nothing was built
    command = [*compiler, *LINK, *objects, "-o", out.name]
    code, output = run_compiler(command, out.parent)
    if code != 0 or not out.is_file():
        raise Missing(failure(compiler, code, output))


def source(units: Sequence[Unit]) -> str:
    """The C++ of some units."""
    import jinja2  # only needed where something is compiled

    text = (HEADERS / TEMPLATE).read_text(encoding="utf-8")
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.from_string(text).render(units=units)


def _build_one(unit: Unit) -> str:
    """Why it failed, or an empty text."""
    if why := distrust():
        return why
    if is_built(unit):
        return ""
    compiler, reason = find_compiler()
    if not reason:
        reason = _compile(compiler, unit)
    if reason:
        reason = f"{unit.symbol} does not compile: {reason}"
        try:
            trust.make_folder(cache())
            trust.put(_path(unit, ".txt"), reason.encode())
        except OSError as error:
            reason = f"{cache()}: can't be written ({error.strerror}); set {CACHE} to a folder that can"
    return reason


def _compile(compiler: Sequence[str], unit: Unit) -> str:
    try:
        trust.make_folder(cache())
        with tempfile.TemporaryDirectory(prefix=".compile-", dir=cache()) as name:
            folder = Path(name)
            (folder / "unit.cpp").write_text(source([unit]), encoding="utf-8")
            flags = [*FLAGS, *unit.options, "-iquote", str(HEADERS)]
            for command in (
                [*compiler, *flags, "-c", "unit.cpp", "-o", "unit.o"],
                [*compiler, *LINK, "unit.o", "-o", "unit.so"],
            ):
                code, output = run_compiler(command, folder)
                if code != 0:
                    return failure(compiler, code, output)
            for made in ("unit.o", "unit.so"):
                trust.tighten(folder / made)
            # The object first: a library without it would be taken as whole.
            (folder / "unit.o").replace(_path(unit, ".o"))
            (folder / "unit.so").replace(_path(unit, ".so"))
    except OSError as error:
        return f"{cache()}: {error.strerror or error}"
    return ""


def _path(unit: Unit, suffix: str) -> Path:
    key = hashlib.sha256("\0".join((unit.digest(), *FLAGS, *LINK, compiler_version())).encode()).hexdigest()[:16]
    return cache() / f"{unit.symbol}-{key}{suffix}"


def compiler_version() -> str:
    """The compiler and its version: another one makes other code."""
    command, reason = find_compiler()
    return reason or _version(tuple(command))


@lru_cache
def _version(command: tuple[str, ...]) -> str:
    code, output = asked([*command, "--version"])
    return f"{' '.join(command)} {code} {output.partition(chr(10))[0]}"
