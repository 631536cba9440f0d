"""Compiled programs and their launcher as one shared library, which needs no CUDA to be built or loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from dks.dispatch import compiler
from dks.dispatch.gpu.cubin import Cubin, check
from dks.dispatch.gpu.launch import described
from dks.dispatch.tiles import build as tiles
from dks.dispatch.tiles.library import Missing
from dks.dispatch.trust import make_folder

HERE = Path(__file__).parent
TEMPLATE = HERE / "gpu.cpp.j2"
SOURCES = (HERE / "gpu.h", HERE / "driver.hpp", TEMPLATE)

# No path or time of a build reaches the output: the same programs and compiler give the same bytes anywhere.
FLAGS = (
    *("-std=c++17", "-O2", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-Wall", "-Wextra", "-Wfatal-errors", "-pthread", "-s", "-Wl,--build-id=none", "-Wl,--as-needed"),
    *("-Wl,-Bsymbolic", "-Wl,-z,noexecstack"),
)
_LIBRARIES = ("-ldl",)


def source(cubins: Sequence[Cubin]) -> str:
    """The C++ of a library of these programs; it takes their codes from files ``0.cubin``, ``1.cubin`` ..."""
    import jinja2  # only needed where something is compiled

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(cubins=cubins, described=described) + "\n"


def build(cubins: Sequence[Cubin], out: Path) -> None:
    """One shared library of these programs, by symbol and architecture; none makes the launcher alone.

    Raises:
        Missing: there is no C++ compiler here, or it refuses.
        ValueError: one of them can't be launched, or two are one.
    """
    ordered = sorted(cubins, key=lambda each: (each.symbol, each.arch))
    for each in ordered:
        check(each)
    if len({(each.symbol, each.arch) for each in ordered}) != len(ordered):
        raise ValueError("two compiled programs of one symbol and architecture")
    files = {f"{number}.cubin": each.elf for number, each in enumerate(ordered)}
    files["gpu.cpp"] = source(ordered).encode()
    if why := compiler.build(out, [*FLAGS, "-iquote", str(HERE), "gpu.cpp", *_LIBRARIES], files):
        raise Missing(why)


def launcher() -> Path:
    """The library without a program, for those that come from the cache: compiled once and kept beside them.

    Raises:
        Missing: it can't be compiled here, or others may write to the folder.
    """
    if why := tiles.distrust():
        raise Missing(why)
    texts = (path.read_text(encoding="utf-8") for path in SOURCES)
    key = hashlib.sha256("\0".join((*texts, *FLAGS, tiles.compiler_version())).encode()).hexdigest()[:16]
    path = tiles.cache() / f"gpu-{key}.so"
    if not path.is_file():
        try:
            make_folder(path.parent)
        except OSError as error:
            raise Missing(f"{path.parent}: {error.strerror or error}; set {tiles.CACHE}") from None
        build((), path)
    return path
