"""Loading a generated package: check that it is whole and belongs to this machine, before any of it runs."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

from dks.dispatch.errors import BadInput
from dks.dispatch.manifest import (
    EVIDENCE,
    INIT,
    KERNELS,
    TABLE,
    Manifest,
    checked,
    dead_kernels,
    examine,
    intact,
)
from dks.dispatch.plain import parse_table
from dks.dispatch.problem import Candidate
from dks.dispatch.runtime import Find, Runtime
from dks.dispatch.strict import STRICT, needs
from dks.dispatch.table import Table
from dks.dispatch.tiles import library

EMPTY = Table((), ())


def load(package: str, folder: str) -> Runtime:
    """The runtime of a generated package; called by its ``__init__``, never fails unless DKS_STRICT is 1.

    Args:
        package: its import name.
        folder: its directory.

    A package that is damaged or was measured elsewhere is refused with a warning that names each
    difference: none of its other files is then imported, and the framework's own kernels serve.

    Raises:
        RuntimeError: it was refused, and DKS_STRICT is 1.
    """
    path = Path(folder)
    manifest, found = examine(path)
    table = EMPTY
    if manifest is not None and not found:
        try:
            table = parse_table(checked(path, manifest, TABLE), TABLE)
        except BadInput as error:
            found = [str(error)]
    strict = os.environ.get(STRICT) == "1"
    if manifest is None or found:
        refused = "; ".join(found)
        text = f"{package}: the table is refused, the framework's own kernels serve: {refused}"
        if strict:
            raise RuntimeError(text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        return Runtime(package, EMPTY, refused=refused)
    dead_ids = dead_kernels(manifest)
    if KERNELS in manifest.files:
        try:
            library.add(path / KERNELS)
        except OSError as error:  # each of its kernels is then found to be missing when it is bound
            warnings.warn(f"{package}: {KERNELS} can't be loaded: {error}", RuntimeWarning, stacklevel=3)
    dead = {
        rule.candidate: dead_ids[kernel]
        for rule in table.rules
        if (kernel := Candidate.parse(rule.candidate).kernel) in dead_ids
    }
    for id, why in dead_ids.items():
        warnings.warn(f"{package}: entries of {id} are switched off: {why}", RuntimeWarning, stacklevel=3)
    if strict and (lines := needs(table, dead)):
        raise RuntimeError(f"{package}: the table can't be served without a search here: {'; '.join(lines)}")
    return Runtime(
        package,
        table,
        dead=dead,
        find=_compiled_find(package, path, manifest),
        evidence=path / EVIDENCE,
        generation=manifest.generation,
    )


def _compiled_find(package: str, folder: Path, manifest: Manifest) -> Find | None:
    """The compiled lookup, where one was built for this very table and loads here."""
    if manifest.lookup != "compiled":
        return None
    try:
        module = import_extension(f"{package}._lookup", folder / "_lookup.abi3.so")
    except ImportError as error:
        warnings.warn(f"{package}: the Python lookup serves: {error}", RuntimeWarning, stacklevel=4)
        return None
    if manifest.generation != module.GENERATION:
        warnings.warn(
            f"{package}: the Python lookup serves: the compiled one is of generation {module.GENERATION}, "
            f"expected {manifest.generation}",
            RuntimeWarning,
            stacklevel=4,
        )
        return None
    find: Find = module.find
    return find


def import_extension(name: str, path: Path) -> ModuleType:
    """The compiled module in this very file, whatever else a search of its folder would find.

    Raises:
        ImportError: it can't be loaded.
    """
    spec = importlib.util.spec_from_file_location(name, path, loader=ExtensionFileLoader(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def import_package(folder: Path) -> ModuleType:
    """Import a generated package from its directory, for the commands; its digests are checked first.

    What runs is the source that was checked, not what was once compiled from some source.

    Raises:
        BadInput: it is damaged, has no manifest, or lies where others may write.
    """
    manifest, found = intact(folder)
    if found:
        raise BadInput(f"{folder}: {'; '.join(found)}; expected it as dks-codegen wrote it: build it again")
    # Under a name of its own, so that whatever the package is called hides nothing here.
    alias = f"_dks_package_{manifest.name}"
    path = folder / INIT
    spec = importlib.util.spec_from_file_location(alias, path, submodule_search_locations=[str(folder)])
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    exec(compile(checked(folder, manifest, INIT), str(path), "exec"), module.__dict__)
    return module
