"""Tile configurations of ``decode.hpp``: attention of one query row over contiguous or paged keys."""

from __future__ import annotations

from dataclasses import dataclass

from dks.dispatch.kernel import Params
from dks.dispatch.problem import Precision, Problem
from dks.dispatch.tiles import threads
from dks.dispatch.tiles.isa import ISAS
from dks.dispatch.tiles.unit import Unit

HEADER = "decode.hpp"
PRECISION = {"float32": Precision.EXACT, "bfloat16": Precision.BF16}
_VECTORS = {"avx2": "dks::Avx2", "avx512": "dks::Avx512"}
_ELEMENTS = {"float32": "float", "bfloat16": "dks::bf16"}


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """One tile configuration; see ``decode.hpp``.

    Attributes:
        block: keys between two corrections of the softmax.
        pf: whether the next block is prefetched.
    """

    block: int
    pf: int


TILES = (DecodeTile(16, 1), DecodeTile(32, 1), DecodeTile(32, 0))


def decode_params() -> tuple[Params, ...]:
    """Every tile with every number of threads."""
    return tuple((("block", tile.block), ("pf", tile.pf), ("t", t)) for tile in TILES for t in threads.COUNTS)


def decode_unit(isa: str, problem: Problem, params: Params) -> Unit:
    """The function for a problem's dtype."""
    p, x = dict(params), problem.trait("dtype")
    constants = f"{_VECTORS[isa]}, {_ELEMENTS[x]}, {p['block']}, {('false', 'true')[p['pf']]}"
    symbol = f"dks_decode_{isa}_{x}_block{p['block']}_pf{p['pf']}"
    return Unit(symbol, isa, "decode", HEADER, f"dks::Decode<{constants}>")


def unavailable(isa: str) -> str | None:
    """Why kernels of this instruction set are none of this machine's, or None."""
    if isa == "avx2" and ISAS["avx512"].unavailable() is None:
        return "this CPU has AVX-512: its kernels are these with vectors twice as wide"
    return ISAS[isa].unavailable()


def suits(problem: Problem, params: Params) -> str | None:
    """As many threads as there is work for."""
    return threads.objection(params, 2 * problem.dim("b") * problem.dim("h") * problem.dim("kv") * problem.dim("d"))
