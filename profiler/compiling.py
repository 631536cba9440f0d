"""Generated kernels are compiled before anything is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

from dks.dispatch import pool
from dks.dispatch.environment import Environment
from dks.dispatch.gpu import compile as gpu_compile
from dks.dispatch.gpu import embed, measuring
from dks.dispatch.gpu.cutlass import build as cutlass_build
from dks.dispatch.gpu.cutlass.configuration import Configuration
from dks.dispatch.gpu.program import Program
from dks.dispatch.kernel import Kernel
from dks.dispatch.native import build as native_build
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.tiles import build
from dks.dispatch.tiles.library import Missing
from dks.dispatch.tiles.unit import Unit

Said = Callable[[str], None]
Asked = Iterable[tuple[Problem, Candidate]]
_T = TypeVar("_T")


def units(asked: Asked) -> list[Unit]:
    """The generated functions that these candidates run on this machine, each once."""
    return _each_once(asked, lambda kernel, *rest: () if kernel.unit is None else (kernel.unit(*rest),))


def programs(asked: Asked) -> list[Program]:
    """The Triton programs that these candidates launch, each once."""
    return _each_once(asked, lambda kernel, *rest: () if kernel.programs is None else kernel.programs(*rest))


def configurations(asked: Asked) -> list[Configuration]:
    """The CUTLASS kernels that these candidates run, each once."""
    return _each_once(
        asked, lambda kernel, *rest: () if kernel.configuration is None else (kernel.configuration(*rest),)
    )


def _each_once(asked: Asked, of: Callable[..., Iterable[_T]]) -> list[_T]:
    found: dict[_T, None] = {}
    for problem, candidate in asked:
        kernel: Kernel = pool.kernels()[candidate.kernel]
        # A kernel of somebody's own may raise anything: that is recorded when it is checked.
        with suppress(Exception):
            if kernel.unavailable() or kernel.objection(problem):
                continue
            if kernel.suits(problem, candidate.params) is None:
                found.update(dict.fromkeys(of(kernel, problem, candidate.params)))
    return list(found)


def compile_for(asked: Asked, say: Said, environment: Environment | None = None) -> None:
    """Compile what these candidates need. What does not compile gets a status when it is checked.

    Args:
        environment: of the GPU that Triton programs are to run on; None where there are none.
    """
    asked = list(asked)
    wanted, launched, cutlass = units(asked), programs(asked), configurations(asked)
    if not (wanted or launched or cutlass):
        return
    if why := build.distrust():
        say(f"no generated kernel is measured: {why}")
        return
    _, why = native_build.cached()
    if why:
        say(f"generated kernels are launched through Python, which takes longer: {why}")
    if missing := [unit for unit in wanted if not build.is_built(unit)]:
        _said(len(missing), len(wanted), "generated kernels", say)
        _failures(build.build(missing), say)
    if environment is None:
        return
    if launched:
        _compile_programs(launched, environment.isa, say)
    if cutlass:
        _compile_cutlass(cutlass, environment.isa, say)


def _compile_programs(wanted: list[Program], isa: str, say: Said) -> None:
    try:
        arch = measuring.arch_for(measuring.capability_of(isa))
        embed.launcher()
    except Missing as error:
        say(f"no Triton program is measured: {error}")
        return
    missing = [program for program in wanted if not gpu_compile.is_built(program, arch)]
    if not missing:
        return
    _said(len(missing), len(wanted), f"Triton programs for sm_{arch}", say)

    def told(done: int, of: int, *_: object) -> None:
        if done % 50 == 0:
            say(f"{done} of {of} compiled")

    failed = gpu_compile.build(missing, (arch,), progress=told)
    _failures({symbol: why for (symbol, _), why in failed.items()}, say)


def _compile_cutlass(wanted: list[Configuration], isa: str, say: Said) -> None:
    if why := cutlass_build.unavailable():
        say(f"no CUTLASS kernel is compiled: {why}")
        return
    capability = measuring.capability_of(isa)
    compiled = [configuration.on(capability) for configuration in wanted]
    missing = [configuration for configuration in compiled if not cutlass_build.is_built(configuration)]
    if missing:
        _said(len(missing), len(wanted), f"CUTLASS kernels for sm_{capability}, a minute each", say)
        _failures(cutlass_build.build(missing, told=lambda done, of: say(f"{done} of {of} compiled")), say)


def _said(missing: int, wanted: int, what: str, say: Said) -> None:
    say(f"compiling {missing} {what} ({wanted - missing} are there) into {build.cache()}")


def _failures(failed: dict[str, str], say: Said) -> None:
    for symbol, why in failed.items():
        say(f"not compiled: {symbol}: {why.splitlines()[0]}")
