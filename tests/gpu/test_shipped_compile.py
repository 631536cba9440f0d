"""Every Triton program that DKS ships compiles, for every architecture, on a machine without a GPU.

A test a family. All of them take some ten minutes of two cores, so that by default a few of each family are
compiled: one of each kernel and alignment class, for one architecture after the other. DKS_SOAK=1 compiles all for
all, and the cache keeps them.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator

import pytest

import dks.dispatch.gpu
from dks.dispatch.gpu import compile as compiling
from dks.dispatch.gpu import matmul
from dks.dispatch.gpu.cubin import ELEMENTS
from dks.dispatch.gpu.launch import Plan, Step
from dks.dispatch.gpu.limits import ARCHS, fits, lacks, spilled
from dks.dispatch.gpu.program import Program
from dks.dispatch.kernel import Declined
from tests.gpu.conftest import Fake, Open
from tests.gpu.ptx import copies_tiles, moves_16_bytes, moves_elements, multiplies_on

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


def wanted(family: list[Program]) -> list[tuple[Program, int]]:
    """What is compiled in this run."""
    archs = {program: [arch for arch in ARCHS if lacks(program, arch) is None] for program in family}
    if SOAK:
        return [(program, arch) for program, able in archs.items() for arch in able]
    kinds = {(each.source, each.function, each.align, copied(each)): each for each in family}.values()
    return [(program, archs[program][i % len(archs[program])]) for i, program in enumerate(kinds) if archs[program]]


def copied(program: Program) -> bool:
    """Whether the hardware copies its tiles."""
    return bool(dict(program.constants).get("TMA"))


@pytest.fixture(scope="module")
def failed() -> dict[tuple[str, int], str]:
    """Why what this run wants has no compiled form; all families at once, so that no core waits for another."""
    return compiling.build_tasks(task for programs in FAMILIES.values() for task in wanted(list(programs())))


@pytest.mark.parametrize("family", FAMILIES or [pytest.param("", marks=pytest.mark.skip(reason="no family yet"))])
def test_every_program_compiles(
    family: str, failed: dict[tuple[str, int], str], record_property: Callable[[str, object], None]
) -> None:
    programs = list(FAMILIES[family]())
    assert len({program.symbol for program in programs}) == len(programs) > 0, "a symbol names one program"
    tasks = wanted(programs)
    reasons = [failed[program.symbol, arch] for program, arch in tasks if (program.symbol, arch) in failed]
    assert not reasons, f"{len(reasons)} of {len(tasks)} don't compile:\n" + "\n\n".join(reasons[:3])
    filtered = {}
    for program, arch in tasks:
        cubin = compiling.load(program, arch)
        text = compiling.ptx(program, arch)
        if program.align >= 16:
            assert moves_16_bytes(text), f"{program.symbol} sm_{arch}: nothing is gained by its alignment"
        elif program.align < 4:
            size = max(ELEMENTS[each.type[1:]] for each in program.arguments if each.type.startswith("*"))
            assert moves_elements(text, size), f"{program.symbol} sm_{arch}: faults where it is not aligned"
        if copied(program) and program.function == "matmul":
            assert copies_tiles(text), f"{program.symbol} sm_{arch}: no TMA"
        if why := fits(cubin, arch) or spilled(cubin):
            filtered[f"{program.symbol} sm_{arch}"] = why
    record_property("filtered", filtered)
    for name, why in filtered.items():
        print(f"filtered: {name}: {why}")
    assert len(filtered) <= len(tasks) // 4, f"{len(filtered)} of {len(tasks)} can't be launched: {filtered}"


def test_hopper_copies_and_multiplies_whole_tiles(opened: Open, fake: Fake) -> None:
    """Resident blocks, even shares and TMA together; its descriptions are made in scratch memory of each block."""
    params = next(each for each in matmul.PARAMS if dict(each)["streamk"] and dict(each)["tma"])
    program, adds = matmul.matmul("bfloat16", params, 16)
    assert compiling.build([program, adds], [90]) == {}
    text, cubin = compiling.ptx(program, 90), compiling.load(program, 90)
    assert copies_tiles(text) and multiplies_on(text, 90) and not copies_tiles(compiling.ptx(adds, 90))
    assert cubin.scratch == 3 * 128 and cubin.scratch_align == 128
    assert cubin.shared <= matmul.shared_bytes(params, "bfloat16") and fits(cubin, 90) is None
    library = opened()
    plan = Plan(library, [Step(library.add(each)) for each in (cubin, compiling.load(adds, 90))])
    sizes = {"m": 1000, "n": 4096, "k": 4096, **dict.fromkeys(("x_stride", "weight_stride", "y_stride"), 4096)}
    values = [sizes.get(name, 0x10000) for name in plan.names]
    assert plan.scratch_bytes(*values) == 132 * cubin.scratch
    plan(*values, scratch=(0x2000, 132 * cubin.scratch))
    grids = [numbers[:3] for _, numbers in fake.calls("launch")]
    assert grids == [list(each.blocks(sizes, 132)) for each in (program, adds)] and grids[0] == [132, 1, 1]
    with pytest.raises(Declined, match="not aligned"):
        plan(*(4100 if name == "x_stride" else sizes.get(name, 0x10000) for name in plan.names))
    assert compiling.build([program], [80]) == {(program.symbol, 80): "sm_80 has no TMA: sm_90 is the first"}
