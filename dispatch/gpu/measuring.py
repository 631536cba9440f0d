"""Launching what the cache of compiled kernels has: for measuring, not for serving."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from dks.dispatch.gpu import compile as compiling
from dks.dispatch.gpu import embed, limits
from dks.dispatch.gpu.cublaslt import build as cublaslt_build
from dks.dispatch.gpu.cutlass import build as cutlass_build
from dks.dispatch.gpu.cutlass import library as cutlass_library
from dks.dispatch.gpu.cutlass.configuration import Configuration
from dks.dispatch.gpu.launch import Kernel, Library, Plan, Step
from dks.dispatch.gpu.library import Locate, Steps, Unsuited
from dks.dispatch.gpu.program import Program
from dks.dispatch.tiles.library import Missing


def capability(device: str) -> int:
    """Of a GPU: 80, 90 ..."""
    major, minor = torch.cuda.get_device_capability(torch.device(device))
    return 10 * major + minor


def capability_of(isa: str) -> int:
    """The same of an environment's: 90 of sm_90."""
    return int(isa.removeprefix("sm_"))


def arch_for(device: int) -> int:
    """The architecture that programs are compiled for to run on a device of this capability.

    Raises:
        Missing: none of ours runs there.
    """
    found = [arch for arch in limits.ARCHS if limits.runs_on(arch, device)]
    if not found:
        ours = ", ".join(f"sm_{arch}" for arch in limits.ARCHS)
        raise Missing(f"device: found sm_{device}, expected one that runs code for {ours}")
    return max(found)


def locate(device: int) -> Locate:
    """How to find programs for a device of this capability."""

    @cache
    def kernel(program: Program) -> Kernel:
        cubin = compiling.load(program, arch_for(device))
        if why := limits.fits(cubin, device):
            raise Missing(f"{program.symbol}: {why}")
        if why := limits.spilled(cubin):
            raise Unsuited(f"{program.symbol}: {why}")
        return library().add(cubin)

    @cache
    def library() -> Library:
        return Library(embed.launcher())

    def found(steps: Steps) -> Plan:
        return Plan(library(), [Step(kernel(program), bound) for program, bound in steps])

    return found


def locate_cublaslt() -> Path:
    """The library that opens cuBLASLt, compiled once. Raises Missing."""
    path, why = cublaslt_build.cached()
    if path is None:
        raise Missing(f"cuBLASLt: {why}")
    return path


def locate_cutlass(device: int) -> cutlass_library.Locate:
    """How to find CUTLASS kernels for a device of this capability."""

    def found(configuration: Configuration) -> cutlass_library.Kernel:
        compiled = configuration.on(device)
        return cutlass_library.load(cutlass_build.locate(compiled), compiled)

    return found
