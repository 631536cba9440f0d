"""cuBLASLt's algorithms for linear on a GPU: those that its heuristic names for a problem, each by its very bytes.

The framework asks the heuristic too and takes its first; one of the others is often faster.
"""

from __future__ import annotations

import torch

from dks.dispatch.gpu.call import Buffer, Recipe, bound, buffer, given, rows
from dks.dispatch.gpu.cublaslt import library
from dks.dispatch.gpu.cublaslt.library import EPILOGUES, SOURCES, Algorithm, Matmul, Refused
from dks.dispatch.kernel import DTYPES, Kernel, Params, Run
from dks.dispatch.problem import Precision, Problem
from dks.dispatch.tiles.library import Missing

_EXACTNESS = {"bfloat16": Precision.BF16, "float16": Precision.BF16}
_WORDS = "abcdefgh"


def linear(align: int, rank: int) -> Kernel:
    """The kernel ``cublaslt.matmul``, of one alignment class.

    Args:
        align: 16, or 0 for the element's size.
    """

    def matmul(problem: Problem, m: int) -> Matmul:
        dtype = problem.trait("dtype")
        size = align or DTYPES[dtype].itemsize
        traits = dtype, problem.trait("epilogue"), problem.trait("bias") == "yes"
        return Matmul(m, problem.dim("n"), problem.dim("k"), *traits, align=(size,) * 5)

    def search(problem: Problem) -> tuple[Params, ...]:
        """The heuristic's best, in its order. Raises Missing where there is no cuBLASLt, or it knows none."""
        lt = library.opened(_current())
        try:
            return tuple(map(params_of, lt.search(matmul(problem, problem.dim("m")))))
        except Refused as error:
            raise Missing(str(error)) from None

    def bind(problem: Problem, params: Params, weight: torch.Tensor, bias: torch.Tensor | None) -> Run:
        """weight (n, k), bias (n,) or None -> run(x (..., k)[, residual (..., n)]) -> (..., n), of x's dtype.

        Raises:
            Missing: there is no cuBLASLt of the version that the algorithm is from.
        """
        n, k, dtype = problem.dim("n"), problem.dim("k"), problem.trait("dtype")
        adds = problem.trait("epilogue") == "add"
        held, shift = weight.detach().contiguous(), None if bias is None else bias.detach().contiguous()
        values = (given(0), 0, given(1) if adds else 0, buffer(0), rows(0), k, n if adds else 0, n)
        device = weight.device
        try:
            function = library.opened(device).function(
                matmul(problem, 1), algorithm_of(params), held, shift, device.index or 0, values
            )
        except Refused as error:
            raise Missing(str(error)) from None
        recipe = Recipe((dtype, dtype) if adds else (dtype,), (), (Buffer(last=n),), function=function)
        return bound(recipe, device=device)  # type: ignore[return-value]

    def supports(problem: Problem) -> str | None:
        epilogue = problem.trait("epilogue")
        return None if epilogue in EPILOGUES else f"cuBLASLt: fuses {', '.join(EPILOGUES)}, not {epilogue}"

    return Kernel(
        id="cublaslt.matmul" if align else "cublaslt.matmul_scalar",
        op="linear",
        precision=_EXACTNESS,
        bind=bind,
        form="the address of the weight",
        form_bytes=lambda _: 8,
        reads_in_place=True,
        files=tuple(f"cublaslt/{name}" for name in SOURCES),
        search=search,
        align=align,
        supports=supports,
        suits=lambda _, params: None if params else "stands for the algorithms that cuBLASLt names",
        rank=rank,
        devices=("cuda",),
    )


def params_of(algorithm: Algorithm) -> Params:
    """The version that made it, and its bytes as eight numbers."""
    words = (int.from_bytes(algorithm.data[i : i + 8], "little") for i in range(0, len(algorithm.data), 8))
    return ("version", algorithm.version), *zip(_WORDS, words, strict=True)


def algorithm_of(params: Params) -> Algorithm:
    """The inverse."""
    p = dict(params)
    return Algorithm(b"".join(p[name].to_bytes(8, "little") for name in _WORDS), p["version"])


def _current() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


KERNELS = (linear(16, 10), linear(0, 11))
