"""Loading a generated package: check that it is whole and belongs to this machine, before any of it runs."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

from dks.dispatch import native
from dks.dispatch.errors import BadInput
from dks.dispatch.generation import Generation
from dks.dispatch.gpu import library as programs
from dks.dispatch.gpu.cublaslt import library as cublaslt
from dks.dispatch.gpu.cutlass import library as cutlass
from dks.dispatch.manifest import (
    CUBLASLT,
    CUTLASS,
    EVIDENCE,
    GPU,
    INIT,
    KERNELS,
    TABLE,
    checked,
    dead_kernels,
    device_of,
    examine,
    intact,
    table_hash,
)
from dks.dispatch.plain import parse_table
from dks.dispatch.problem import Candidate
from dks.dispatch.runtime import Runtime
from dks.dispatch.strict import STRICT, needs
from dks.dispatch.tiles import library
from dks.dispatch.tiles.library import Missing


def load(package: str, folder: str) -> Runtime:
    """The runtime of a generated package; called by its ``__init__``, never fails unless DKS_STRICT is 1.

    Args:
        package: its import name.
        folder: its directory.

    A package that is damaged or was measured elsewhere is refused with a warning that names each
    difference: none of its other files is then used, and the framework's own kernels serve.

    Raises:
        RuntimeError: it was refused, and DKS_STRICT is 1.
    """
    try:
        generation = open_generation(Path(folder))
    except BadInput as error:
        text = f"{package}: the table is refused, the framework's own kernels serve: {error}"
        if _strict():
            raise RuntimeError(text) from None
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        device = device_of(Path(folder))
        generation = Generation(refused=str(error), origin=folder, hash=table_hash(None), device=device)
    else:
        if native.module is None:
            warnings.warn(f"{package}: the Python form serves: {native.why}", RuntimeWarning, stacklevel=3)
    for line in generation.losses():
        warnings.warn(f"{package}: {line}", RuntimeWarning, stacklevel=3)
    return Runtime(package, generation, open_generation)


def open_generation(path: Path) -> Generation:
    """The table of a package's folder, checked, with its kernels loaded. Compiles nothing.

    Raises:
        BadInput: it must not serve here, for every reason that there is; or DKS_STRICT is 1 and some entry of it
            can't be served without a search.
    """
    manifest, found = examine(path)
    if manifest is None or found:
        raise BadInput("; ".join(found))
    table = parse_table(checked(path, manifest, TABLE), TABLE)
    evidence = checked(path, manifest, EVIDENCE).decode("utf-8")
    dead_ids = dead_kernels(manifest)
    if native.BINARY in manifest.files:
        native.install(path / native.BINARY)
    elif native.module is None:
        native.why = manifest.lookup
    if KERNELS in manifest.files:
        try:
            library.add(KERNELS, checked(path, manifest, KERNELS), manifest.files[KERNELS])
        except OSError as error:  # each of its kernels is then found to be missing when it is bound
            warnings.warn(f"{path}: {KERNELS} can't be loaded: {error}", RuntimeWarning, stacklevel=3)
    for name, add in ((GPU, programs.add), (CUTLASS, cutlass.add), (CUBLASLT, cublaslt.add)):
        if name in manifest.files:
            try:
                add(checked(path, manifest, name), manifest.files[name])
            except Missing as error:
                warnings.warn(f"{path}: {name} can't be loaded: {error}", RuntimeWarning, stacklevel=3)
    dead = {
        rule.candidate: dead_ids[kernel]
        for rule in table.rules
        if (kernel := Candidate.parse(rule.candidate).kernel) in dead_ids
    }
    if _strict() and (lines := needs(table, dead)):
        raise BadInput(f"the table can't be served without a search here: {'; '.join(lines)}")
    digest = table_hash(manifest, dead)
    device = manifest.environment.device
    return Generation(table, dead=dead, evidence=evidence, origin=str(path), hash=digest, device=device)


def _strict() -> bool:
    return os.environ.get(STRICT) == "1"


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
