"""Generated kernels that multiply in float: fp32 weights, and narrower ones that are widened as they are read."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from dks.dispatch.kernel import Kernel, Params, Run
from dks.dispatch.ops.linear import panels
from dks.dispatch.ops.linear.quantize import per_channel_int8
from dks.dispatch.problem import Precision, Problem
from dks.dispatch.tiles import threads
from dks.dispatch.tiles.isa import ELEMENTS, ISAS, VECTORS
from dks.dispatch.tiles.unit import Unit

HEADER = "gemm_fma.hpp"
_WIDTHS = {"avx2": 8, "avx512": 16}  # floats of a vector
_REGISTERS = {"avx2": 16, "avx512": 32}


@dataclass(frozen=True, slots=True)
class FmaTile:
    """One tile configuration; see ``gemm_fma.hpp``.

    Attributes:
        mr: most rows of the register tile.
        nv: vectors of output channels beside each other.
        kc: inputs before the next panel has its turn; 0 is all of them.
        pack: whether x is copied into the order in which it is read.
        pf: inputs that weights are prefetched ahead; 0 leaves it to the machine.
    """

    mr: int
    nv: int
    kc: int = 0
    pack: int = 0
    pf: int = 0

    def check(self, isa: str) -> None:
        """Raise ValueError where there is no such kernel."""
        registers = _REGISTERS[isa]
        if self.mr * self.nv + self.nv + 1 > registers:
            raise ValueError(
                f"{self}: accumulators, a row of weights and a broadcast of x take more than {registers} registers"
            )


@dataclass(frozen=True, slots=True)
class Weights:
    """What the weights of a kernel are stored as."""

    name: str
    cpp: str
    precision: dict[str, Precision]
    form: str
    dtype: torch.dtype


_BF16 = {"float32": Precision.BF16, "bfloat16": Precision.BF16}
_INT8 = {"float32": Precision.INT8, "bfloat16": Precision.INT8}
F32 = Weights("f32", "float", {"float32": Precision.EXACT}, "fp32 panels", torch.float32)
W16 = Weights("w16", "dks::bf16", _BF16, "bf16 panels, multiplied as fp32", torch.bfloat16)
W8 = Weights("w8", "int8_t", _INT8, "int8 panels, a scale a channel, multiplied as fp32", torch.int8)

_FEW = 8
"""Rows up to which weight-only int8 is tried: with more, multiplying takes longer than reading the weights, and
integer arithmetic is faster at it."""


def fma_kernel(weights: Weights, isa: str, tiles: tuple[FmaTile, ...], rank: int) -> Kernel:
    """The kernel ``tile.<weights>_<isa>`` with a candidate for each tile and number of threads."""
    width = _WIDTHS[isa]

    def unit(problem: Problem, params: Params) -> Unit:
        p, x = dict(params), problem.trait("dtype")
        # A 16-bit element can't be broadcast as a float: x is widened while it is packed.
        packs = p["pack"] or x != "float32"
        constants = (p["mr"], p["nv"], p["kc"], ("false", "true")[packs], p["pf"])
        arguments = ", ".join(map(str, (VECTORS[isa], ELEMENTS[x], weights.cpp, *constants)))
        name = "_".join(f"{key}{value}" for key, value in threads.without(params))
        return Unit(
            f"dks_linear_{weights.name}_{isa}_{x}_{name}", isa, "linear", HEADER, f"dks::FmaGemm<{arguments}>"
        )

    def bind(problem: Problem, params: Params, weight: torch.Tensor, bias: torch.Tensor | None) -> Run:
        """weight (n, k), bias (n,) or None -> run(x (..., k)) -> (..., n), of x's dtype."""
        panel = dict(params)["nv"] * width

        def make() -> tuple[torch.Tensor, torch.Tensor | None]:
            if weights is W8:
                quantized, scale = per_channel_int8(weight)
                return panels.pack(quantized, panel), scale
            return panels.pack(weight.detach().to(weights.dtype), panel), None

        packed, scale = panels.shared(weight, (weights.name, panel), make)
        return panels.bound(problem, params, unit(problem, params), packed, bias, scale=scale)

    def suits(problem: Problem, params: Params) -> str | None:
        p, m = dict(params), problem.dim("m")
        if problem.trait("dtype") != "float32" and not p["pack"]:
            return "16-bit activations are packed always: pack1 is the same kernel"
        if weights is W8 and m > _FEW:
            return f"more than {_FEW} rows are not bound by reading the weights"
        if p["kc"] > 0 and problem.dim("k") <= p["kc"]:
            return f"k is not above kc={p['kc']}: nothing to block"
        return panels.threads_objection(problem, params, p["mr"], p["nv"] * width)

    for tile in tiles:
        tile.check(isa)
    widest = max(tile.nv for tile in tiles) * width
    return Kernel(
        id=f"tile.{weights.name}_{isa}",
        op="linear",
        precision=weights.precision,
        bind=bind,
        form=weights.form,
        form_bytes=lambda p: panels.packed_bytes(p, widest, weights.dtype.itemsize) + 4 * p.dim("n"),
        params=tuple((*asdict(tile).items(), *use) for tile in tiles for use in threads.uses(by_rows=tile.kc > 0)),
        unit=unit,
        header=HEADER,
        batch_invariant=lambda _: True,  # one order over k, whatever the tile's rows
        suits=suits,
        unavailable=ISAS[isa].unavailable,
        rank=rank,
    )


KERNELS = (
    fma_kernel(
        F32,
        "avx512",
        (
            FmaTile(4, 4, pf=8),
            FmaTile(8, 3, pf=8),
            FmaTile(8, 3, kc=256, pack=1),
            FmaTile(12, 2, kc=192, pack=1, pf=4),
        ),
        rank=4,
    ),
    fma_kernel(F32, "avx2", (FmaTile(4, 2, pf=8), FmaTile(4, 3), FmaTile(6, 2, kc=256, pack=1)), rank=4),
    fma_kernel(
        W16,
        "avx512",
        (
            FmaTile(4, 4, pf=8),
            FmaTile(8, 3, pf=8),
            FmaTile(4, 4, pack=1, pf=8),
            FmaTile(8, 3, pack=1, pf=8),
            FmaTile(8, 3, kc=256, pack=1),
        ),
        rank=5,
    ),
    fma_kernel(W16, "avx2", (FmaTile(4, 2, pf=8), FmaTile(4, 2, pack=1), FmaTile(6, 2, kc=256, pack=1)), rank=5),
    fma_kernel(W8, "avx512", (FmaTile(4, 4, pf=16), FmaTile(4, 4, pack=1, pf=16)), rank=6),
    fma_kernel(W8, "avx2", (FmaTile(4, 2, pf=16), FmaTile(4, 2, pack=1, pf=16)), rank=6),
)
