"""What a package says of itself, and every check that comes before any of it runs.

The way of a package: who may write there (``trust``) -> ``manifest.json`` as it was written -> each file by its
digest, and no other -> the environment, field by field -> kernel by kernel. ``examine`` is the whole of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dks.dispatch import pool
from dks.dispatch.environment import Environment
from dks.dispatch.errors import BadInput, unreadable
from dks.dispatch.plain import MAX_TEXT, in_words, parse_json
from dks.dispatch.problem import Candidate
from dks.dispatch.sources import source_digest
from dks.dispatch.trust import BYTECODE, distrust, importable, strangers

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
INIT, TABLE, EVIDENCE = "__init__.py", "_table.py", "lut.json"
KERNELS = "_kernels.so"
"""The shared library of the generated kernels that a table chose, where it chose any."""
GPU = "_gpu.so"
"""The same of Triton programs, with what launches them."""
CUTLASS = "_cutlass.so"
"""The same of CUTLASS kernels, with CUDA's run-time in it."""
CUBLASLT = "_cublaslt.so"
"""What opens cuBLASLt, where a table chose one of its algorithms."""

MAX_FILE_BYTES = 64 * 2**20
MAX_FILES = 64
MAX_KERNELS = 4096

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


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
        policy: the fields of the policy that it was selected by, for people.
        tools: versions of what built it, by name, for people.
        toolchains: what compiled its kernels when they were measured and when it was built, by kernel, for people.
        digest: SHA-256 of all of the above, as ``seal`` makes it; so of every file too.
    """

    name: str
    environment: Environment
    kernels: Mapping[str, str]
    files: Mapping[str, str]
    lookup: str
    generation: str
    certificate: Mapping[str, Any] | None = None
    certificate_note: str = ""
    policy: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    toolchains: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""


def seal(data: Mapping[str, Any]) -> str:
    """The text of a manifest: ``data`` and the digest that finds any change of it."""
    body = {name: value for name, value in data.items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(body, indent=2).encode()).hexdigest()
    return json.dumps({**body, "digest": digest}, indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a package directory.

    Raises:
        BadInput: there is none, it is not as it was written, or it does not read as one.
    """
    path = folder / MANIFEST
    try:
        return parse_manifest(read_at_most(path, MAX_TEXT), str(path))
    except PermissionError as error:
        raise BadInput(unreadable(path, error)) from None
    except OSError as error:
        raise BadInput(
            f"{path}: found no readable manifest ({error.strerror}), expected one that dks-codegen wrote; build "
            "the package again"
        ) from None


def parse_manifest(text: bytes, what: str = MANIFEST) -> Manifest:
    """The same from its text.

    Raises:
        BadInput: as ``read_manifest``.
    """
    data = parse_json(text, what)
    if data.get("version") != MANIFEST_VERSION:
        found = ascii(data.get("version"))[:40]
        raise BadInput(
            f"{what}: found version {found}, expected {MANIFEST_VERSION}; build the package again, or use the "
            "version of DKS that built it"
        )
    if seal(data).encode() != text:
        raise BadInput(f"{what}: found text that differs from its digest, expected it as dks-codegen wrote it")
    try:
        certificate = data["certificate"]
        if not isinstance(certificate, (dict, type(None))):
            raise ValueError(f"certificate is {type(certificate).__name__}")
        texts = ("name", "lookup", "generation", "certificate_note", "digest")
        return Manifest(
            environment=Environment.from_dict(_object(data, "environment")),
            kernels=_kernels(_object(data, "kernels")),
            files=_files(_object(data, "files")),
            certificate=certificate,
            policy=_object(data, "policy"),
            tools=_object(data, "tools"),
            toolchains=_toolchains(data),
            **{name: _text(data, name) for name in texts},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{what}: found no manifest ({in_words(error)}), expected one that "
            "dks-codegen wrote; build the package again"
        ) from None


def _object(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(data[name], dict):
        raise ValueError(f"{name} is {type(data[name]).__name__}")
    found: dict[str, Any] = data[name]
    return found


def _text(data: Mapping[str, Any], name: str) -> str:
    if not isinstance(data[name], str):
        raise ValueError(f"{name} is {type(data[name]).__name__}")
    return str(data[name])


def _toolchains(data: Mapping[str, Any]) -> dict[str, str]:
    if "toolchains" not in data:  # earlier packages say nothing of it
        return {}
    found = _object(data, "toolchains")
    return {id: _text(found, id) for id in _kernels(found)}


def _kernels(found: Mapping[str, Any]) -> dict[str, str]:
    if len(found) > MAX_KERNELS:
        raise ValueError(f"{len(found)} kernels, expected at most {MAX_KERNELS}")
    for id in found:
        if Candidate.parse(id).kernel != id:
            raise ValueError(f"kernel {id!r}")
    return {id: _text(found, id) for id in found}


def _files(found: Mapping[str, Any]) -> dict[str, str]:
    if len(found) > MAX_FILES:
        raise ValueError(f"{len(found)} files, expected at most {MAX_FILES}")
    for name in found:
        if not _FILE.match(name) or name in (MANIFEST, BYTECODE) or not _SHA256.match(_text(found, name)):
            raise ValueError(f"file {name!r}")
    if missing := {INIT, TABLE, EVIDENCE} - set(found):
        raise ValueError(f"no digest of {', '.join(sorted(missing))}")
    return dict(found)


def examine(folder: Path) -> tuple[Manifest | None, list[str]]:
    """The manifest, and every reason why the package must not serve here; none of its files has been run.

    Entries of a single kernel that may not run are no reason: see ``dead_kernels``.
    """
    try:
        manifest, found = intact(folder)
    except BadInput as error:
        return None, [str(error)]
    return manifest, found or misfits(manifest)


def intact(folder: Path) -> tuple[Manifest, list[str]]:
    """The manifest, and one line for each thing that is not as dks-codegen wrote it. On any machine.

    Raises:
        BadInput: others may write there, or there is no manifest to compare with.
    """
    try:
        if why := list(filter(None, [distrust(folder)])) or strangers(folder):
            raise BadInput("; ".join(f"not trusted: {line}" for line in why))
    except OSError as error:
        raise BadInput(unreadable(folder, error)) from None
    manifest = read_manifest(folder)
    return manifest, [f"damaged: {line}" for line in damaged(folder, manifest)]


def damaged(folder: Path, manifest: Manifest) -> list[str]:
    """One line for each file of the package that is missing or changed, and each that would be imported beside
    them and is not its own."""
    lines = []
    for name in manifest.files:
        try:
            checked(folder, manifest, name)
        except BadInput as error:
            lines.append(str(error))
    own = {*manifest.files, MANIFEST, BYTECODE}
    for path in sorted(folder.iterdir()):
        if path.name not in own and importable(path):
            lines.append(f"{ascii(path.name)[1:-1]}: not a file of this package, and it could be imported")
    return lines


def checked(folder: Path, manifest: Manifest, name: str) -> bytes:
    """The bytes of one file, with the digest that the manifest names: what is made of them is of this package,
    whatever happens on the disk meanwhile.

    Raises:
        BadInput: it is missing, changed or of another package; the text begins with ``name``.
        KeyError: the manifest names no such file.
    """
    path, digest = folder / name, manifest.files[name]
    try:
        if not path.is_file():
            raise BadInput(f"{name}: missing or not a plain file")
        data = read_at_most(path, MAX_FILE_BYTES)
    except OSError as error:
        raise BadInput(f"{name}: {unreadable(path, error)}") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise BadInput(f"{name}: changed since it was built")
    return data


def device_of(folder: Path) -> str:
    """The kind of device that a package which must not serve was measured on; ``cpu`` where it can't be said."""
    try:
        device = read_manifest(folder).environment.device
    except BadInput:
        return "cpu"
    return device if device == "cuda" else "cpu"


def misfits(manifest: Manifest) -> list[str]:
    """One line for each field of the environment that differs here; of a table for GPUs, on any GPU that PyTorch
    sees, with the names of those, since a call may come with tensors of any.

    Asking for GPUs initialises CUDA: processes forked from this one later can't use it.
    """
    wanted = manifest.environment
    try:
        if wanted.device != "cuda":
            return wanted.diff(Environment.current(wanted.device))
        every = [f"cuda:{index}" for index in range(max(1, torch.cuda.device_count()))]
        found: dict[str, list[str]] = {}
        for device in every:
            for line in wanted.diff(Environment.current(device)):
                found.setdefault(line, []).append(device)
    # PyTorch raises the second where CUDA can't be used, as in the child of a process that used it.
    except (ValueError, RuntimeError) as error:
        return [" ".join(str(error).split())]
    return [line if named == every else f"{', '.join(named)}: {line}" for line, named in found.items()]


def dead_kernels(manifest: Manifest) -> dict[str, str]:
    """Chosen kernels that must not run here, with the reason: gone, changed, or not available."""
    dead = {}
    for id, digest in manifest.kernels.items():
        kernel = pool.kernels().get(id)
        if kernel is None:
            dead[id] = "this version has no such kernel"
        elif not kernel.runs_on(manifest.environment.device):
            dead[id] = f"it is no kernel for {manifest.environment.device}"
        elif source_digest(kernel) != digest:
            dead[id] = "its source changed since it was measured"
        elif (why := kernel.unavailable()) is not None:
            dead[id] = why
    return dead


def table_hash(manifest: Manifest | None, dead: Collection[str] = (), refused: str | None = None) -> str:
    """What a process chooses by, in 64 hex digits: equal in two processes if and only if both hold the same package
    with the same entries alive. ``ranks.check_ranks`` compares it over ``torch.distributed``.

    Args:
        dead: the candidates or kernels that may not run here, in any order; why does not count.
        refused: why the table serves nothing, or None. All refused tables are alike: the framework serves.
    """
    if manifest is None or refused is not None:
        return hashlib.sha256(b"refused").hexdigest()
    return hashlib.sha256("\0".join((manifest.digest, *sorted(dead))).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_at_most(path: Path, limit: int) -> bytes:
    """A file's bytes. Raises BadInput where it holds more than ``limit``, without reading them all."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BadInput(f"{path.name}: found more than {limit} bytes, expected less")
    return data
