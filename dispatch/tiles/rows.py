"""Tiles that layer_norm and rms_norm share (``rows.hpp``)."""

from __future__ import annotations

from dks.dispatch.kernel import Params
from dks.dispatch.tiles import threads

HEADER = "rows.hpp"
_ROWS, _UNROLL = 4, 2  # within 5 % of the best of 1 to 8 rows by 1 to 8 vectors
TILES: tuple[Params, ...] = ((("ahead", 0),), (("ahead", 1),), (("ahead", 0), ("rows", 1)))
"""Rows go together, and those that are left over one by one, summed up in another order. ``rows1`` takes all of
them one by one, so that a row's bits are the same in every batch."""


def norm_params() -> tuple[Params, ...]:
    """Every tile with every number of threads."""
    return tuple((*tile, ("t", t)) for tile in TILES for t in threads.COUNTS)


def rows_of(params: Params) -> int:
    """Rows that go together."""
    return dict(params).get("rows", _ROWS)


def constants(params: Params) -> tuple[str, ...]:
    """UNROLL, ROWS and AHEAD of the template: as many vectors are in flight in every tile."""
    rows = rows_of(params)
    return str(_ROWS * _UNROLL // rows), str(rows), ("false", "true")[dict(params)["ahead"]]


def is_batch_invariant(params: Params) -> bool:
    """Whether no row is left over: see TILES."""
    return rows_of(params) == 1
