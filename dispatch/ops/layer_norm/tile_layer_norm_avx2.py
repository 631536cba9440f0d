"""Generated layer_norm in AVX2."""

from __future__ import annotations

from dks.dispatch.ops.layer_norm.tile_layer_norm import tile_layer_norm

KERNEL = tile_layer_norm("avx2")
