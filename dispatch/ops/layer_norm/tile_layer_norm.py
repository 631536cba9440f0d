"""Generated layer_norms (``tiles/rows.hpp``).

Rows go together, see ``tiles/rows.py``. ``ahead`` fetches the next ones while these are written, which pays where x
comes from beyond the second cache and costs a little where it does not.
"""

from __future__ import annotations

import ctypes

import torch

from dks.dispatch.kernel import DTYPES, Kernel, Launch, Params
from dks.dispatch.problem import Precision, Problem
from dks.dispatch.tiles import launch, library, rows, threads
from dks.dispatch.tiles.isa import ELEMENTS, ISAS, VECTORS
from dks.dispatch.tiles.unit import Unit

_WORK = 16  # multiply-adds that take as long as normalising one element


def layer_norm(isa: str) -> Kernel:
    """The kernel ``tile.layer_norm_<isa>``."""

    def unit(problem: Problem, params: Params) -> Unit:
        dtype, label = problem.trait("dtype"), "_".join(f"{k}{v}" for k, v in threads.without(params))
        constants = ", ".join((VECTORS[isa], ELEMENTS[dtype], *rows.constants(params)))
        return Unit(
            f"dks_layer_norm_{isa}_{dtype}_{label}", isa, "norm", rows.HEADER, f"dks::LayerNorm<{constants}>"
        )

    def bind(
        problem: Problem, params: Params, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> Launch:
        """weight (n,), bias (n,) or None, of x's dtype -> run(x (..., n)) -> (..., n).

        Raises:
            ValueError: weight or bias has another shape or dtype.
            Missing: there is no compiled form of it.
        """
        n, dtype = problem.dim("n"), DTYPES[problem.trait("dtype")]
        kept = tuple(None if t is None else t.detach().contiguous() for t in (weight, bias))
        for name, t in zip(("weight", "bias"), kept, strict=True):
            if t is not None and (t.dtype != dtype or t.shape != (n,)):
                raise ValueError(f"{name}: found {tuple(t.shape)} {t.dtype}, expected ({n},) {dtype}")
        addresses = (None if t is None else t.data_ptr() for t in kept)
        constant = library.Norm(*addresses, n, eps, dict(params)["t"])
        return launch.norm(unit(problem, params), constant, dtype, kept)

    return Kernel(
        id=f"tile.layer_norm_{isa}",
        op="layer_norm",
        precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16},
        bind=bind,
        form="the addresses of weight and bias",  # a form, since binding takes longer than a small call
        form_bytes=lambda _: ctypes.sizeof(library.Norm),
        reads_in_place=True,
        params=rows.norm_params(),
        unit=unit,
        header=rows.HEADER,
        batch_invariant=rows.is_batch_invariant,
        suits=lambda p, params: threads.objection(
            params, _WORK * p.dim("m") * p.dim("n"), -(-p.dim("m") // rows.rows_of(params))
        ),
        unavailable=ISAS[isa].unavailable,
        rank=3,
    )


KERNELS = (layer_norm("avx512"), layer_norm("avx2"))
