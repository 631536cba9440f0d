"""Code that is compiled for a package is what was measured: the same compilers, versions and flags."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from dks.codegen.lut import Lut
from dks.dispatch import pool
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement
from dks.dispatch.problem import Candidate
from dks.dispatch.toolchain import holds, toolchain

_AGAIN = "run dks-profile again, which measures only what changed"


def measured_with(rows: Iterable[Measurement], chosen: Collection[str]) -> dict[str, str]:
    """What compiled the kernels of the chosen candidates, by kernel, where anything is compiled.

    Raises:
        BadInput: one of them was measured with two toolchains.
    """
    found: dict[str, str] = {}
    for row in rows:
        kernel = Candidate.parse(row.candidate).kernel
        if row.candidate not in chosen or not toolchain(pool.kernels()[kernel]):
            continue
        if found.setdefault(kernel, row.toolchain) != row.toolchain:
            raise BadInput(
                f"{kernel}: found results measured with {found[kernel]} and with {row.toolchain}, expected one of "
                f"them; {_AGAIN}"
            )
    return dict(sorted(found.items()))


def check_toolchains(lut: Lut) -> None:
    """Refuse a table whose kernels would be compiled by other tools than those that were measured.

    Raises:
        BadInput: such a kernel.
    """
    for kernel, measured in lut.toolchains.items():
        now = toolchain(pool.kernels()[kernel])
        if not holds(measured, now):
            raise BadInput(
                f"{kernel}: found it measured with {measured}, expected what would compile it here, {now}; "
                f"{_AGAIN}, or build with the tools that it was measured with"
            )
