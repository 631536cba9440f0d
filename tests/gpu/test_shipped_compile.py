"""Every Triton program that DKS ships compiles, for every architecture, on a machine without a GPU.

One family, one test: the cache keeps what was compiled, in this run or before. By default each program compiles for
one architecture, and the first and last of a family for all; with DKS_SOAK=1 all do for all.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator

import pytest

import dks.dispatch.gpu
from dks.dispatch.gpu import compile as compiling
from dks.dispatch.gpu.limits import ARCHS, fits
from dks.dispatch.gpu.program import Program

pytest.importorskip("triton")
SOAK = os.environ.get("DKS_SOAK") == "1"


def families() -> dict[str, Callable[[], Iterator[Program]]]:
    """By module name: what yields a family's programs."""
    names = [each.name for each in pkgutil.iter_modules(dks.dispatch.gpu.__path__)]
    modules = {name: importlib.import_module(f"dks.dispatch.gpu.{name}") for name in names}
    return {
        name: module.programs for name, module in modules.items() if callable(getattr(module, "programs", None))
    }


FAMILIES = families()


def wanted(all_: list[Program]) -> Iterator[tuple[Program, int]]:
    """What is compiled in this run."""
    for i, program in enumerate(all_):
        for j, arch in enumerate(ARCHS):
            if SOAK or i in (0, len(all_) - 1) or i % len(ARCHS) == j:
                yield program, arch


@pytest.mark.parametrize("family", FAMILIES or [pytest.param("", marks=pytest.mark.skip(reason="no family yet"))])
def test_every_program_compiles(family: str, record_property: Callable[[str, object], None]) -> None:
    all_ = list(FAMILIES[family]())
    assert len({program.symbol for program in all_}) == len(all_) > 0, "a symbol names one program"
    tasks = list(wanted(all_))
    for arch in ARCHS:
        failed = compiling.build([program for program, its in tasks if its == arch], [arch])
        assert not failed, "\n\n".join(list(failed.values())[:3])
    filtered = {}
    for program, arch in tasks:
        cubin = compiling.load(program, arch)
        if (why := fits(cubin, arch)) is not None:
            filtered[f"{program.symbol} sm_{arch}"] = why
    record_property("filtered", filtered)
    for name, why in filtered.items():
        print(f"filtered: {name}: {why}")
    for arch in ARCHS:
        of_arch = [program for program, its in tasks if its == arch]
        dropped = sum(name.endswith(f" sm_{arch}") for name in filtered)
        assert dropped <= len(of_arch) // 4, f"sm_{arch}: {dropped} of {len(of_arch)} can't be launched: {filtered}"
