"""Tile configurations of ``decode.hpp``: attention of one query row over contiguous or paged keys."""

from __future__ import annotations

from dataclasses import dataclass

from dks.dispatch.kernel import Params
from dks.dispatch.problem import Precision, Problem
from dks.dispatch.tiles import threads
from dks.dispatch.tiles.isa import ELEMENTS, VECTORS
from dks.dispatch.tiles.unit import Unit

HEADER = "decode.hpp"
PRECISION = {"float32": Precision.EXACT, "bfloat16": Precision.BF16}


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
    constants = f"{VECTORS[isa]}, {ELEMENTS[x]}, {p['block']}, {('false', 'true')[p['pf']]}"
    symbol = f"dks_decode_{isa}_{x}_block{p['block']}_pf{p['pf']}"
    return Unit(symbol, isa, "decode", HEADER, f"dks::Decode<{constants}>")


def suits(problem: Problem, params: Params) -> str | None:
    """As many threads as there is work for."""
    b, h, hkv, kv, d = (problem.dim(name) for name in ("b", "h", "hkv", "kv", "d"))
    return threads.objection(params, 2 * b * h * kv * d, b * hkv * -(-kv // dict(params)["block"]))
