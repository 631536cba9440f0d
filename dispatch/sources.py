"""Which files a kernel rests on, and their digest: evidence and packages hold for these sources alone.

Followed are imports as they are written, and the includes of C++; what a process happens to have loaded plays no
part. What runs when a kernel is bound or called, or makes what runs, counts: the modules beside it under ``ops``,
and ``tiles``, ``gpu`` and ``native``. An operator's package, ``serve`` and ``traced`` choose who is called and are
not followed; nor are the modules at the top of ``dks.dispatch``, which declare, and compute nothing that a kernel
returns. Compilers and their flags are the business of ``toolchain``.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path

from dks.dispatch import pool
from dks.dispatch.kernel import Kernel

HERE = Path(__file__).parent
_OURS = "dks.dispatch."
_FOLLOWED = re.compile(r"dks\.dispatch\.(ops\.\w+\.(?!serve$|traced$)\w+|(tiles|gpu|native)(\..+)?)$")
_INCLUDE = re.compile(r'^\s*#\s*include "([\w./]+)"', re.MULTILINE)
_PLACES = (HERE / "tiles", HERE / "gpu", HERE / "cpp")
"""Where includes are found that do not lie beside the file which includes them."""

_BESIDE = {
    "dks.dispatch.native": ("native/kernel.hpp",),
    "dks.dispatch.gpu.call": ("native/gpu_kernel.hpp",),
    "dks.dispatch.gpu.launch": ("gpu/gpu.cpp.j2", "gpu/worker.py"),
}
"""Files that a module runs and does not import: how the compiled fast path reads a kernel's arguments and launches
it (not how a call gets there), and a GPU's launcher with what asks Triton for programs."""


def source_digest(kernel: Kernel) -> str:
    """First 16 hex digits of a SHA-256 over every file that a kernel rests on."""
    digest = hashlib.sha256()
    for name, path in sorted(files_of(kernel).items()):
        digest.update(name.encode() + b"\0" + _read(path) + b"\0")
    return digest.hexdigest()[:16]


def files_of(kernel: Kernel) -> dict[str, Path]:
    """The files that a kernel rests on, by a name that does not depend on where they are installed.

    Of a kernel of somebody's own (``DKS_KERNELS``): also the modules of its package, or, where it is in none, those
    beside it.
    """
    home = pool.homes().get(kernel.id, kernel.bind.__module__)
    todo = list({home, *_modules_of(kernel), *map(_module_of, _declared(kernel))} - {""})
    files = [HERE / name for name in _declared(kernel) if not _module_of(name)]
    found: dict[str, Path] = {}
    while todo:
        module = todo.pop()
        path = _file_of(module, home)
        if path is None or module in found:
            continue
        found[module] = path
        todo += _imports(_read(path), module, path.name == "__init__.py")
        for name in _BESIDE.get(module, ()):
            todo += filter(None, [_module_of(name)])
            files += [HERE / name] if not _module_of(name) else []
    while files:
        path = files.pop()
        if (name := path.relative_to(HERE).as_posix()) not in found:
            found[name] = path
            files += _included(path)
    return found


def _modules_of(kernel: Kernel) -> Iterator[str]:
    """Where the functions are written that a kernel holds: a factory's are not those of the file that calls it."""
    for field in fields(kernel):
        function = getattr(kernel, field.name)
        while isinstance(function, partial):
            function = function.func
        if callable(function) and (name := getattr(function, "__module__", None)):
            yield name


def _declared(kernel: Kernel) -> Iterator[str]:
    """The files that a kernel names itself."""
    if kernel.header:
        yield from (f"tiles/{kernel.header}", "tiles/units.cpp.j2")
    yield from (f"gpu/kernels/{name}" for name in kernel.sources)
    yield from (f"gpu/{name}" for name in kernel.files)


def _read(path: Path) -> bytes:
    return path.read_bytes()


def _module_of(name: str) -> str:
    """The module that a file of ours is; empty of one that is no Python."""
    return _OURS + name.removesuffix(".py").replace("/", ".") if name.endswith(".py") else ""


@lru_cache(maxsize=512)
def _imports(text: bytes, module: str, is_package: bool) -> tuple[str, ...]:
    """Every module that a file may import, wherever in it: of ``from a import b`` both ``a`` and ``a.b``."""
    named: dict[str, None] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            named.update(dict.fromkeys(alias.name for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                base = ".".join([*kept, *filter(None, [base])])
            named[base] = None
            named.update(dict.fromkeys(f"{base}.{alias.name}" for alias in node.names))
    return tuple(named)


def _file_of(module: str, home: str) -> Path | None:
    """The file of a module that counts for a kernel which is declared in ``home``; None of any other."""
    if module.startswith(_OURS):
        return _ours(module) if module == home or _FOLLOWED.match(module) else None
    return None if home.startswith(_OURS) else _foreign(module, home)


@lru_cache(maxsize=4096)
def _ours(module: str) -> Path | None:
    path = HERE.joinpath(*module.removeprefix(_OURS).split("."))
    return next(filter(Path.is_file, (path.with_suffix(".py"), path / "__init__.py")), None)


def _foreign(module: str, home: str) -> Path | None:
    """The file of a module of somebody's own, where it counts for a kernel that is declared in ``home``."""
    if module.partition(".")[0] == home.partition(".")[0]:
        return _place(module)
    beside = None if "." in home or "." in module else _place(home)
    if beside is None or beside.name == "__init__.py":
        return None
    path = _place(module)
    installed = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib", "platstdlib")}
    return path if path is not None and path.parent == beside.parent and path.parent not in installed else None


def _place(module: str) -> Path | None:
    """Where a module's text is; None of what is no module, as many a name that is imported from one."""
    loaded = sys.modules.get(module)
    try:
        spec = None if loaded else importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    place = getattr(loaded, "__file__", None) or (spec.origin if spec else None)
    path = Path(place) if place else None
    return path if path is not None and path.suffix == ".py" and path.is_file() else None


def _included(path: Path) -> list[Path]:
    """The files of ours that a C++ file includes."""
    found = []
    for name in _INCLUDE.findall(_read(path).decode()):
        places = (place / name for place in (path.parent, *_PLACES))
        found += [next(filter(Path.is_file, places), None)]
    return [each for each in found if each is not None]
