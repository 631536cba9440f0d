"""Factory of the generated layer_norms (``tiles/rows.hpp``): one kernel an instruction set, in the files beside this.

Four rows go together. ``ahead`` fetches the next ones while these are written, which pays where x comes from beyond
the second cache and costs a little where it does not. ``t`` is the number of threads.
"""

from __future__ import annotations

import ctypes
import os

import torch

from dks.dispatch.kernel import DTYPES, Kernel, Run
from dks.dispatch.problem import Precision, Problem
from dks.dispatch.tiles import library
from dks.dispatch.tiles.isa import ISAS
from dks.dispatch.tiles.unit import Unit

_ROWS, _UNROLL = 4, 2  # never more than 5 % behind the best of 1, 2, 4, 8 rows by 1, 2, 4, 8 vectors
_VECTORS = {"avx2": "dks::Avx2", "avx512": "dks::Avx512"}
_ELEMENTS = {"float32": "float", "bfloat16": "dks::bf16"}
_THREADS = tuple(1 << e for e in range((os.cpu_count() or 1).bit_length()))

Params = tuple[tuple[str, int], ...]


def tile_layer_norm(isa: str) -> Kernel:
    """The kernel ``tile.layer_norm_<isa>``."""

    def unit(problem: Problem, params: Params) -> Unit:
        dtype, ahead = problem.trait("dtype"), "true" if dict(params)["ahead"] else "false"
        constants = f"{_VECTORS[isa]}, {_ELEMENTS[dtype]}, {_UNROLL}, {_ROWS}, {ahead}"
        symbol = f"dks_layer_norm_{isa}_{dtype}_ahead{dict(params)['ahead']}"
        return Unit(symbol, isa, "norm", "rows.hpp", f"dks::LayerNorm<{constants}>")

    def bind(
        problem: Problem, params: Params, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> Run:
        """weight (n,), bias (n,) or None, of x's dtype -> run(x (..., n)) -> (..., n).

        Raises:
            ValueError: weight or bias have another dtype, or torch has fewer threads than ``t``.
            RuntimeError: the unit has no compiled form.
        """
        n, dtype = problem.dim("n"), DTYPES[problem.trait("dtype")]
        threads = dict(params)["t"]
        if threads > torch.get_num_threads():
            raise ValueError(f"t: found {threads}, expected at most torch's {torch.get_num_threads()} threads")
        kept = tuple(None if t is None else t.detach().contiguous() for t in (weight, bias))
        for name, t in zip(("weight", "bias"), kept, strict=True):
            if t is not None and (t.dtype != dtype or t.shape != (n,)):
                raise ValueError(f"{name}: found {tuple(t.shape)} {t.dtype}, expected ({n},) {dtype}")
        addresses = [None if t is None else t.data_ptr() for t in kept]
        norm = library.Norm(addresses[0], addresses[1], n, eps, threads)
        norm.kept = kept  # the addresses are theirs
        call, constants, empty_like = library.function(unit(problem, params)), ctypes.byref(norm), torch.empty_like

        def run(x: torch.Tensor) -> torch.Tensor:
            y = empty_like(x)
            call(constants, x.data_ptr(), None, y.data_ptr(), None, x.numel() // n)
            return y

        return run

    return Kernel(
        id=f"tile.layer_norm_{isa}",
        op="layer_norm",
        precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16},
        bind=bind,
        form="the addresses of its constants",  # binding costs more than a small call
        form_bytes=lambda _: ctypes.sizeof(library.Norm),
        params=tuple((("ahead", ahead), ("t", t)) for ahead in (0, 1) for t in _THREADS),
        unavailable=ISAS[isa].unavailable,
        rank=3,
        unit=unit,
    )
