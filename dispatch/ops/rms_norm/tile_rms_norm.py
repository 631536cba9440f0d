"""Generated rms_norms (``tiles/rows.hpp``), which add a residual in the same pass; see the layer_norms."""

from __future__ import annotations

import ctypes

import torch

from dks.dispatch.kernel import DTYPES, Kernel, Launch, Params
from dks.dispatch.problem import Precision, Problem
from dks.dispatch.tiles import launch, library, rows, threads
from dks.dispatch.tiles.isa import ELEMENTS, ISAS, VECTORS
from dks.dispatch.tiles.unit import Unit

_WORK = 12  # multiply-adds that take as long as normalising one element


def rms_norm(isa: str) -> Kernel:
    """The kernel ``tile.rms_norm_<isa>``."""

    def unit(problem: Problem, params: Params) -> Unit:
        dtype, label = problem.trait("dtype"), "_".join(f"{k}{v}" for k, v in threads.without(params))
        constants = ", ".join((VECTORS[isa], ELEMENTS[dtype], *rows.constants(params)))
        return Unit(f"dks_rms_norm_{isa}_{dtype}_{label}", isa, "norm", rows.HEADER, f"dks::RmsNorm<{constants}>")

    def bind(problem: Problem, params: Params, weight: torch.Tensor | None, eps: float | None) -> Launch:
        """weight (n,) of x's dtype, or None -> run(x (..., n)) -> (..., n), or run(x, r) -> (y, h).

        Raises:
            ValueError: weight has another shape or dtype.
            Missing: there is no compiled form of it.
        """
        n, dtype = problem.dim("n"), DTYPES[problem.trait("dtype")]
        kept = None if weight is None else weight.detach().contiguous()
        if kept is not None and (kept.dtype != dtype or kept.shape != (n,)):
            raise ValueError(f"weight: found {tuple(kept.shape)} {kept.dtype}, expected ({n},) {dtype}")
        # torch takes float32's epsilon for 16-bit types too: it computes in float32.
        least = torch.finfo(torch.float32).eps if eps is None else eps
        constant = library.Norm(None if kept is None else kept.data_ptr(), None, n, least, dict(params)["t"])
        adds = problem.trait("residual") == "yes"
        return launch.norm(unit(problem, params), constant, dtype, (kept,), adds=adds)

    return Kernel(
        id=f"tile.rms_norm_{isa}",
        op="rms_norm",
        precision={"float32": Precision.EXACT, "bfloat16": Precision.BF16},
        bind=bind,
        form="the address of the weight",  # a form, since binding takes longer than a small call
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


KERNELS = (rms_norm("avx512"), rms_norm("avx2"))
