"""Loading a generated package: check that it is whole and belongs to this machine, before any of it runs."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dks.dispatch import pool
from dks.dispatch.environment import Environment
from dks.dispatch.errors import BadInput
from dks.dispatch.kernel import source_digest
from dks.dispatch.problem import Candidate
from dks.dispatch.runtime import Find, Runtime
from dks.dispatch.table import Table
from dks.dispatch.tiles import library

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
MAX_FILE_BYTES = 64 * 2**20
KERNELS = "_kernels.so"
"""The shared library of the generated kernels that a table chose, where it chose any."""
STRICT = "DKS_STRICT"
"""With this environment variable set to 1, a table that can't serve here raises instead of falling back."""

EMPTY = Table((), ())


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a package says of itself.

    Attributes:
        name: of the package.
        environment: where it was measured.
        kernels: source digest by kernel id, of every kernel some rule chose.
        files: SHA-256 by file name, of every other file.
        lookup: ``compiled``, or why there is only the Python form.
        generation: digest of the table's text, which the compiled lookup carries too.
        certificate: what the table is worth on held-out shapes, as ``dks.codegen.certificate`` writes it; None
            where there is none.
        certificate_note: why there is none.
    """

    name: str
    environment: Environment
    kernels: Mapping[str, str]
    files: Mapping[str, str]
    lookup: str
    generation: str
    certificate: Mapping[str, Any] | None = None
    certificate_note: str = ""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a package directory.

    Raises:
        BadInput: there is none, or it does not read as one.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BadInput(f"{path}: found {path.stat().st_size} bytes, expected a small JSON file")
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != MANIFEST_VERSION:
            raise BadInput(
                f"{path}: found version {data['version']!r}, expected {MANIFEST_VERSION}; build the package again"
            )
        texts = {"kernels": dict(data["kernels"]), "files": dict(data["files"])}
        for name, value in [pair for part in texts.values() for pair in part.items()]:
            if not isinstance(value, str):
                raise ValueError(f"{name} is {value!r}")
        environment = Environment.from_dict(data["environment"])
        lookup, generation = str(data["lookup"]), str(data["generation"])
        certificate, note = data.get("certificate"), str(data.get("certificate_note", ""))
        if not isinstance(certificate, (dict, type(None))):
            raise ValueError(f"certificate is {type(certificate).__name__}")
        return Manifest(
            str(data["name"]),
            environment,
            **texts,
            lookup=lookup,
            generation=generation,
            certificate=certificate,
            certificate_note=note,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path}: found no readable manifest ({type(error).__name__}: {error}), expected one that "
            "dks-codegen wrote; build the package again"
        ) from None


def damaged(folder: Path, manifest: Manifest) -> list[str]:
    """One line for each file of the package that is missing, changed, or not its own."""
    lines = []
    for name, digest in manifest.files.items():
        path = folder / name
        if "/" in name or path.is_symlink() or not path.is_file():
            lines.append(f"{name}: missing or not a plain file")
            continue
        try:
            same = path.stat().st_size <= MAX_FILE_BYTES and file_digest(path) == digest
        except OSError as error:
            lines.append(f"{name}: can't be read ({error.strerror})")
            continue
        if not same:
            lines.append(f"{name}: changed since it was built")
    return lines


def misfits(manifest: Manifest) -> list[str]:
    """One line for each field of the environment that differs here."""
    try:
        here = Environment.current(manifest.environment.device)
    except ValueError as error:
        return [str(error)]
    return manifest.environment.diff(here)


def dead_kernels(manifest: Manifest) -> dict[str, str]:
    """Chosen kernels that must not run here, with the reason: gone, changed, or not available."""
    dead = {}
    for id, digest in manifest.kernels.items():
        kernel = pool.kernels().get(id)
        if kernel is None:
            dead[id] = "this version has no such kernel"
        elif source_digest(kernel) != digest:
            dead[id] = "its source changed since it was measured"
        elif (why := kernel.unavailable()) is not None:
            dead[id] = why
    return dead


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
    try:
        manifest = read_manifest(path)
        found = [f"damaged: {line}" for line in damaged(path, manifest)] or misfits(manifest)
    except BadInput as error:
        found = [str(error)]
    if found:
        refused = "; ".join(found)
        text = f"{package}: the table is refused, the framework's own kernels serve: {refused}"
        if os.environ.get(STRICT) == "1":
            raise RuntimeError(text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        return Runtime(package, EMPTY, refused=refused)
    table: Table = importlib.import_module(f"{package}._table").TABLE
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
    return Runtime(
        package,
        table,
        dead=dead,
        find=_compiled_find(package, manifest),
        evidence=path / "lut.json",
        generation=manifest.generation,
    )


def _compiled_find(package: str, manifest: Manifest) -> Find | None:
    """The compiled lookup, where one was built for this very table and loads here."""
    if manifest.lookup != "compiled":
        return None
    try:
        module: ModuleType = importlib.import_module(f"{package}._lookup")
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


def import_package(folder: Path) -> ModuleType:
    """Import a generated package from its directory, for the commands; its digests are checked first.

    Raises:
        BadInput: it is damaged, or has no manifest.
    """
    manifest = read_manifest(folder)
    if found := damaged(folder, manifest):
        raise BadInput(f"{folder}: {'; '.join(found)}; expected it as dks-codegen wrote it: build it again")
    # Under a name of its own, so that whatever the package is called hides nothing here.
    alias = f"_dks_package_{manifest.name}"
    spec = importlib.util.spec_from_file_location(
        alias, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return module


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
