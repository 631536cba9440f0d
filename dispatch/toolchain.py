"""What would compile a kernel here: a measurement holds for code that one compiler made with one set of flags.

Asked where kernels are measured and where a package is built. A package ships what was compiled by then, so serving
asks for the digest of its libraries alone.
"""

from __future__ import annotations

from dks.dispatch import compiler
from dks.dispatch.environment import UNKNOWN
from dks.dispatch.gpu import compile as gpu_compile
from dks.dispatch.gpu import embed
from dks.dispatch.gpu.cublaslt import build as cublaslt_build
from dks.dispatch.gpu.cutlass import build as cutlass_build
from dks.dispatch.kernel import Kernel
from dks.dispatch.tiles import build


def toolchain(kernel: Kernel) -> str:
    """The compilers of a kernel with their versions and flags, on one line; why there are none; empty where nothing
    is compiled; ``unknown``, which equals nothing, where one does not say its version."""
    parts = []
    if kernel.unit is not None:
        parts.append(compiler.described((*build.FLAGS, *build.LINK)))
    if kernel.programs is not None:  # Triton brings its own ptxas
        parts += [gpu_compile.described(), compiler.described(embed.FLAGS)]
    if kernel.configuration is not None:
        parts.append(cutlass_build.described())
    if kernel.search is not None:
        parts.append(compiler.described(cublaslt_build.FLAGS))
    return UNKNOWN if UNKNOWN in parts else "; ".join(dict.fromkeys(parts))


def holds(measured: str, now: str) -> bool:
    """Whether what was measured with one toolchain is what another would make."""
    return measured == now != UNKNOWN
