"""From a Lut to a package on disk: rendered, compiled, bound by digests, and put in place whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import keyword
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dks.codegen.certificate import check_regret
from dks.codegen.compile import compile_extension
from dks.codegen.cpp import check_namespace, render_header
from dks.codegen.kernels import chosen_units, describe, ship
from dks.codegen.launch import compile_library, ship_headers
from dks.codegen.lut import Lut
from dks.codegen.templating import environment as templates
from dks.dispatch import pool
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement
from dks.dispatch.loader import MANIFEST, MANIFEST_VERSION, file_digest
from dks.dispatch.problem import Candidate

ORIGIN = "dks-codegen"
LOOKUP = Path(__file__).parent.parent / "dispatch" / "lookup.hpp"


@dataclass(frozen=True, slots=True)
class Built:
    """What ``build`` left on disk.

    Attributes:
        folder: the package.
        changed: whether it differs from what was there.
        lookup: ``compiled``, or why the Python form serves.
        kernels: which generated kernels are in it, in words.
    """

    folder: Path
    changed: bool
    lookup: str
    kernels: str


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
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("origin") == ORIGIN


def render(lut: Lut, name: str) -> dict[str, str]:
    """File name to text of everything that is rendered: a pure function, the same text for the same Lut."""
    table = lut.table()
    operators = [
        {"name": op, "prepares": hasattr(operator.server, "prepare")}
        for op, operator in sorted(pool.operators().items())
    ]
    env = templates()
    env.filters["literal"] = ascii
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
            regret than the policy allows, or generated kernels that were chosen can't be compiled.
    """
    check_package_name(name)
    check_destination(out, name)
    check_regret(lut.certificate, lut.policy.max_regret)
    try:
        out.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=out, prefix=f".{name}-"))
    except OSError as error:
        raise BadInput(f"{out}: can't be written ({error.strerror}); choose another -o OUT_DIR") from None
    try:
        package = work / name
        package.mkdir()
        units = chosen_units(lut)
        ship(units, package)
        kernels = describe(package, len(units))
        lookup = _fill(package, lut, rows, name)
        changed = _put_in_place(package, out / name)
    except OSError as error:
        raise BadInput(f"{out}: can't be written ({error.strerror}); what was there before is intact") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Built(out / name, changed, lookup, kernels)


def _fill(package: Path, lut: Lut, rows: Iterable[Measurement], name: str) -> str:
    files = render(lut, name)
    for file, text in files.items():
        (package / file).write_text(text, encoding="utf-8", newline="\n")
    generation = hashlib.sha256((files["_table.py"] + files["table.hpp"]).encode()).hexdigest()[:16]
    ship_headers(package, lut, name, generation)
    library = compile_library(package)
    compiled = compile_extension(package, generation)
    lookup = "compiled" if compiled.path is not None else compiled.reason
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
        "library": library or "compiled",
        **lut.certificate.to_json(),
        "kernels": {kernel: digests[kernel] for kernel in chosen},
        "files": {path.name: file_digest(path) for path in sorted(package.iterdir()) if path.is_file()},
    }
    (package / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return lookup


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
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return any(not (folder / f).is_file() or file_digest(folder / f) != d for f, d in files.items())
