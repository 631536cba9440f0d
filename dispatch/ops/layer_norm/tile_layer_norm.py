"""Generated layer_norms (``tiles/rows.hpp``).

Four rows go together, and the rows that are left over one by one, summed up in another order. ``rows1`` takes all
of them one by one, so that a row's bits are the same in every batch. ``ahead`` fetches the next ones while these
are written, which pays where x comes from beyond the second cache and costs a little where it does not.
"""

from __future__ import annotations

import ctypes

import torch

from dks.dispatch.kernel import DTYPES, Kernel, Launch, Params
from dks.dispatch.problem import Precision, Problem
from dks.dispatch.tiles import launch, library, threads
from dks.dispatch.tiles.isa import ELEMENTS, ISAS, VECTORS
from dks.dispatch.tiles.unit import Unit

HEADER = "rows.hpp"
_ROWS, _UNROLL = 4, 2  # within 5 % of the best of 1 to 8 rows by 1 to 8 vectors
TILES: tuple[Params, ...] = ((("ahead", 0),), (("ahead", 1),), (("ahead", 0), ("rows", 1)))
_WORK = 16  # multiply-adds that take as long as normalising one element


def rows_of(params: Params) -> int:
    """Rows that go together."""
    return dict(params).get("rows", _ROWS)


def layer_norm(isa: str) -> Kernel:
    """The kernel ``tile.layer_norm_<isa>``."""

    def unit(problem: Problem, params: Params) -> Unit:
        dtype, label = problem.trait("dtype"), "_".join(f"{k}{v}" for k, v in threads.without(params))
        rows, ahead = rows_of(params), dict(params)["ahead"]
        constants = (VECTORS[isa], ELEMENTS[dtype], _ROWS * _UNROLL // rows, rows, ("false", "true")[ahead])
        template = f"dks::LayerNorm<{', '.join(map(str, constants))}>"
        return Unit(f"dks_layer_norm_{isa}_{dtype}_{label}", isa, "norm", HEADER, template)

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
        params=tuple((*tile, ("t", t)) for tile in TILES for t in threads.COUNTS),
        unit=unit,
        header=HEADER,
        batch_invariant=lambda params: rows_of(params) == 1,
        suits=lambda p, params: threads.objection(
            params, _WORK * p.dim("m") * p.dim("n"), -(-p.dim("m") // rows_of(params))
        ),
        unavailable=ISAS[isa].unavailable,
        rank=3,
    )


KERNELS = (layer_norm("avx512"), layer_norm("avx2"))
