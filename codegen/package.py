"""From a Lut to a package on disk: rendered, compiled, bound by digests, and put in place whole."""

from __future__ import annotations

import dataclasses
import hashlib
import keyword
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from dks.codegen.certificate import check_regret
from dks.codegen.cpp import check_namespace, render_header
from dks.codegen.kernels import (
    chosen_configurations,
    chosen_programs,
    chosen_units,
    describe,
    ship,
    ship_configurations,
    ship_cublaslt,
    ship_programs,
)
from dks.codegen.launch import compile_library, ship_headers
from dks.codegen.lut import Lut
from dks.codegen.templating import environment as templates
from dks.codegen.toolchains import check_toolchains
from dks.dispatch import compiler, pool, trust
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement
from dks.dispatch.manifest import MANIFEST, MANIFEST_VERSION, damaged, file_digest, read_manifest, seal
from dks.dispatch.native.build import compile_into
from dks.dispatch.plain import parse_json
from dks.dispatch.problem import Candidate

ORIGIN = "dks-codegen"
LOOKUP = Path(__file__).parent.parent / "dispatch" / "cpp" / "lookup.hpp"


@dataclass(frozen=True, slots=True)
class Built:
    """What ``build`` left on disk.

    Attributes:
        folder: the package.
        changed: whether it differs from what was there.
        lookup: ``compiled``, or why the Python form serves.
        kernels: which generated kernels are in it, in words.
        caution: why it won't be loaded from where it lies, or empty.
    """

    folder: Path
    changed: bool
    lookup: str
    kernels: str
    caution: str = ""


def check_package_name(name: str) -> str:
    """Return ``name`` if it can be imported, and is a namespace in C++ too.

    Raises:
        BadInput: it is no identifier, a keyword of either language, or a module's name already.
    """
    usable = name.isascii() and name.isidentifier() and len(name) <= 64 and not name.startswith("_")
    taken = {*keyword.kwlist, *keyword.softkwlist, *sys.stdlib_module_names, "dks", "torch"}
    if not usable or name in taken:
        raise BadInput(
            f"name: found {name!r}, expected a Python identifier of at most 64 letters, digits and '_' that is "
            "no keyword and no module of Python's own, such as minilm_exact"
        )
    try:
        check_namespace(name)
    except ValueError as error:
        raise BadInput(str(error)) from None
    return name


def check_destination(out: Path, name: str) -> None:
    """Refuse to write where something of somebody else's is.

    Raises:
        BadInput: ``out`` is no directory, or ``out/name`` exists and was not written by dks-codegen.
    """
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: found a file, expected a directory; choose another -o OUT_DIR")
    folder = out / name
    if folder.is_symlink():
        raise BadInput(f"{folder}: found a link, expected a directory of ours or nothing; choose another --name")
    if folder.exists() and not _is_ours(folder):
        raise BadInput(
            f"{folder}: found something that dks-codegen did not write, expected a package of ours or nothing; "
            "choose another -o OUT_DIR or --name"
        )


def _is_ours(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        return parse_json((folder / MANIFEST).read_bytes(), MANIFEST).get("origin") == ORIGIN
    except (OSError, BadInput):
        return False


def render(lut: Lut, name: str) -> dict[str, str]:
    """File name to text of everything that is rendered: a pure function, the same text for the same Lut."""
    table = lut.table()
    operators = [
        {"name": op, "prepares": hasattr(operator.server, "prepare")}
        for op, operator in sorted(pool.operators().items())
    ]
    env = templates()
    context = {
        "name": name,
        "environment": lut.environment,
        "policy": lut.policy,
        "operators": operators,
        "expected_us": lut.expected_us,
        "table": table,
    }
    return {
        "__init__.py": env.get_template("__init__.py.j2").render(context),
        "_table.py": env.get_template("_table.py.j2").render(context),
        "table.hpp": render_header(name, table, LOOKUP.read_text(encoding="utf-8")),
        "lut.json": lut.to_json(),
        "py.typed": "",
    }


def build(lut: Lut, rows: Iterable[Measurement], out: Path, name: str) -> Built:
    """Write ``out/name``. The old package serves until the new one is whole.

    Args:
        rows: the measurements behind the Lut, for the kernels' source digests.

    Raises:
        BadInput: the name or the destination can't be used or can't be written, the certificate shows more
            regret than the policy allows, or generated kernels that were chosen can't be compiled, or would be by
            other tools than were measured.
    """
    check_package_name(name)
    check_destination(out, name)
    check_regret(lut.certificate, lut.policy.max_regret)
    check_toolchains(lut)
    try:
        trust.make_folder(out)
        work = Path(tempfile.mkdtemp(dir=out, prefix=f".{name}-"))
    except OSError as error:
        raise BadInput(f"{out}: can't be written ({error.strerror}); choose another -o OUT_DIR") from None
    try:
        package = work / name
        package.mkdir()
        units, programs, configurations = chosen_units(lut), chosen_programs(lut), chosen_configurations(lut)
        ship(units, package)
        ship_programs(programs, lut.environment.isa, package)
        ship_configurations(configurations, package)
        ship_cublaslt(lut, package)
        kernels = describe(package, len(units), len(programs), len(configurations))
        lookup = _fill(package, lut, rows, name)
        changed = _put_in_place(package, out / name)
    except OSError as error:
        raise BadInput(f"{out}: can't be written ({error.strerror}); what was there before is intact") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Built(out / name, changed, lookup, kernels, trust.distrust(out / name))


def _fill(package: Path, lut: Lut, rows: Iterable[Measurement], name: str) -> str:
    files = render(lut, name)
    for file, text in files.items():
        (package / file).write_text(text, encoding="utf-8", newline="\n")
    generation = hashlib.sha256((files["_table.py"] + files["table.hpp"]).encode()).hexdigest()[:16]
    lookup = compile_into(package) or "compiled"
    ship_headers(package, lut, name, generation)
    library = compile_library(package)
    digests = {Candidate.parse(row.candidate).kernel: row.kernel_digest for row in rows}
    chosen = sorted({Candidate.parse(id).kernel for id in lut.candidates()})
    manifest = {
        "version": MANIFEST_VERSION,
        "origin": ORIGIN,
        "name": name,
        "generation": generation,
        "environment": lut.environment.to_dict(),
        "policy": dataclasses.asdict(lut.policy),
        "lookup": lookup,
        "tools": _tools(),
        "toolchains": lut.toolchains,
        "library": library or "compiled",
        **lut.certificate.to_json(),
        "kernels": {kernel: digests[kernel] for kernel in chosen},
        "files": {path.name: file_digest(path) for path in sorted(package.iterdir()) if path.is_file()},
    }
    (package / MANIFEST).write_text(seal(manifest), encoding="utf-8")
    for path in (package, *package.iterdir()):
        trust.tighten(path)  # or loading it would be refused, where the umask lets others write
    return lookup


def _tools() -> dict[str, str]:
    """Versions of what builds a package, by name. What matters at load is in the environment."""
    try:
        version = metadata.version("dks")
    except metadata.PackageNotFoundError:  # run from its sources
        version = "from source"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "jinja2": metadata.version("jinja2"),
        "compiler": compiler.version(),
        "dks": version,
    }


def _put_in_place(new: Path, target: Path) -> bool:
    """Swap ``new`` in for ``target``; leaves it untouched where nothing changed."""
    if target.exists():
        if (target / MANIFEST).read_bytes() == (new / MANIFEST).read_bytes() and not _tampered(target):
            return False
        old = new.parent / "old"
        target.rename(old)
        try:
            new.rename(target)
        except BaseException:  # an interruption too must leave a package in place
            if not target.exists():
                old.rename(target)
            raise
        return True
    new.rename(target)
    return True


def _tampered(folder: Path) -> bool:
    return bool(damaged(folder, read_manifest(folder)) or trust.strangers(folder))
