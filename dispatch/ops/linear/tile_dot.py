"""Generated kernels on dot-product instructions: int8 with x quantised inside, and bf16; by vectors or by AMX."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from dks.dispatch.kernel import Kernel, Params, Run
from dks.dispatch.ops.linear import panels
from dks.dispatch.ops.linear.quantize import per_channel_int8
from dks.dispatch.problem import Precision, Problem
from dks.dispatch.tiles import threads
from dks.dispatch.tiles.isa import ELEMENTS, ISAS
from dks.dispatch.tiles.unit import Unit

_CHUNK = 64  # bytes of k that one AMX tile holds
_MOST_INPUTS = 2**17  # whose products fit the 32 bits of an int8 sum; chunks.hpp declines more


@dataclass(frozen=True, slots=True)
class DotTile:
    """One configuration of ``gemm_dot.hpp``.

    Attributes:
        mr: most rows of the register tile.
        nv: vectors of output channels beside each other.
        kc: inputs before the next panel has its turn; 0 is all of them.
        pf: steps of nv * 256 bytes that weights are prefetched ahead; 0 leaves it to the machine.
    """

    mr: int
    nv: int
    kc: int = 0
    pf: int = 0

    header = "gemm_dot.hpp"

    @property
    def rows(self) -> int:
        """Most rows of one tile."""
        return self.mr

    @property
    def panel(self) -> int:
        """Output channels of one panel."""
        return 16 * self.nv

    def type(self, int8: bool, x: str) -> str:
        """The template with its constants, for activations of the C++ type ``x``."""
        kind = "dks::DotInt8" if int8 else "dks::DotBf16"
        return f"dks::DotGemm<{kind}, {x}, {self.mr}, {self.nv}, {self.kc}, {self.pf}>"


@dataclass(frozen=True, slots=True)
class AmxTile:
    """One configuration of ``gemm_amx.hpp``.

    Attributes:
        mt: most tiles of 16 rows of a block.
        nt: tiles of 16 output channels of a panel.
        kc: as for ``DotTile``, in whole tiles.
        pack: whether bf16 x is copied even where it could be read in place.
        pf: steps of nt KiB that weights are prefetched ahead; 0 leaves it to the machine.
    """

    mt: int
    nt: int
    kc: int = 0
    pack: int = 1
    pf: int = 0

    header = "gemm_amx.hpp"

    @property
    def rows(self) -> int:
        """Most rows of one tile."""
        return 16 * self.mt

    @property
    def panel(self) -> int:
        """Output channels of one panel."""
        return 16 * self.nt

    def type(self, int8: bool, x: str) -> str:
        """The template with its constants, for activations of the C++ type ``x``."""
        kind = "dks::AmxInt8" if int8 else "dks::AmxBf16"
        # x of another type is converted while it is copied.
        pack = "true" if self.pack or int8 or x == "float" else "false"
        return f"dks::AmxGemm<{kind}, {x}, {self.mt}, {self.nt}, {self.kc}, {pack}, {self.pf}>"


def dot_kernel(isa: str, tiles: tuple[DotTile, ...] | tuple[AmxTile, ...], *, int8: bool, rank: int) -> Kernel:
    """The kernel ``tile.<i8 or bf16>_<isa>`` with a candidate for each tile and way to use threads."""
    name = "i8" if int8 else "bf16"
    group = 4 if int8 else 2
    amx = isinstance(tiles[0], AmxTile)
    depth = _CHUNK * group // 4 if amx else group
    by_params = {tuple(asdict(tile).items()): tile for tile in tiles}

    def tile_of(params: Params) -> DotTile | AmxTile:
        return by_params[threads.without(params)]

    def unit(problem: Problem, params: Params) -> Unit:
        tile, dtype = tile_of(params), problem.trait("dtype")
        label = "_".join(f"{key}{value}" for key, value in threads.without(params))
        symbol = f"dks_linear_{name}_{isa}_{dtype}_{label}"
        return Unit(symbol, isa, "linear", tile.header, tile.type(int8, ELEMENTS[dtype]))

    def bind(problem: Problem, params: Params, weight: torch.Tensor, bias: torch.Tensor | None) -> Run:
        """weight (n, k), bias (n,) or None -> run(x (..., k)) -> (..., n), of x's dtype."""
        panel = tile_of(params).panel

        def make() -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
            if not int8:
                return panels.pack(weight.detach().bfloat16(), panel, group, depth), None, None
            quantized, scale = per_channel_int8(weight)
            sums = quantized.sum(dim=1, dtype=torch.int32)
            return panels.pack(quantized, panel, group, depth), scale, sums

        packed, scale, sums = panels.shared(weight, (name, panel, depth), make)
        return panels.bound(problem, params, unit(problem, params), packed, bias, scale=scale, sums=sums)

    def supports(problem: Problem) -> str | None:
        if int8 and problem.dim("k") > _MOST_INPUTS:
            return f"sums up at most {_MOST_INPUTS} inputs in 32 bits"
        return None

    def suits(problem: Problem, params: Params) -> str | None:
        tile, dtype = tile_of(params), problem.trait("dtype")
        if isinstance(tile, AmxTile) and not tile.pack and (dtype == "float32" or problem.dim("k") % (_CHUNK // 2)):
            return "x is copied here always: pack1 is the same kernel"
        if tile.kc > 0 and problem.dim("k") <= tile.kc:
            return f"k is not above kc={tile.kc}: nothing to block"
        return panels.threads_objection(problem, params, tile.rows, tile.panel)

    widest = max(tile.panel for tile in tiles)
    classes = Precision.INT8 if int8 else Precision.BF16
    what = "int8 panels, a scale and a sum a channel" if int8 else "bf16 panels of pairs"
    return Kernel(
        id=f"tile.{name}_{isa}",
        op="linear",
        precision={"float32": classes, "bfloat16": classes},
        bind=bind,
        form=what,
        form_bytes=lambda p: panels.packed_bytes(p, widest, 4 // group, depth) + 12 * p.dim("n"),
        params=tuple((*asdict(tile).items(), *use) for tile in tiles for use in threads.uses(by_rows=tile.kc > 0)),
        unit=unit,
        header=tiles[0].header,
        # Integer sums have no order; the others go over k in one, whatever the tile's rows.
        batch_invariant=lambda _: int8 or not amx,
        supports=supports,
        suits=suits,
        unavailable=ISAS[isa].unavailable,
        rank=rank,
    )


KERNELS = (
    dot_kernel(
        "avx512_vnni",
        (
            DotTile(6, 4),
            DotTile(8, 3, kc=512, pf=8),
            DotTile(14, 2, pf=24),
            DotTile(14, 2, kc=512, pf=8),
        ),
        int8=True,
        rank=6,
    ),
    dot_kernel(
        "avx512_bf16",
        (DotTile(6, 4), DotTile(8, 3, kc=256, pf=8), DotTile(14, 2, pf=24), DotTile(14, 2, kc=256, pf=8)),
        int8=False,
        rank=5,
    ),
    dot_kernel(
        "amx_bf16",
        (
            AmxTile(1, 4, pf=8),
            AmxTile(1, 3, pack=0),
            AmxTile(1, 3),
            AmxTile(2, 2, kc=512, pf=8),
            AmxTile(2, 2, pack=0, pf=8),
            AmxTile(2, 2, pf=8),
        ),
        int8=False,
        rank=5,
    ),
    dot_kernel(
        "amx_int8",
        (AmxTile(1, 4, pf=8), AmxTile(1, 3), AmxTile(2, 2), AmxTile(2, 2, kc=1024, pf=8)),
        int8=True,
        rank=6,
    ),
)
