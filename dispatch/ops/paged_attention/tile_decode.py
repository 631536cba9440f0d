"""Generated kernels that read the pages where they are: nothing is gathered."""

from __future__ import annotations

import ctypes

import torch

from dks.dispatch.kernel import Declined, Kernel, Params, Run
from dks.dispatch.problem import Problem
from dks.dispatch.tiles import decode, library
from dks.dispatch.tiles.isa import ISAS


def decode_kernel(isa: str) -> Kernel:
    """The kernel ``tile.paged_decode_<isa>``."""

    def bind(problem: Problem, params: Params) -> Run:
        """run(q (b, h, d), k_cache, v_cache (pages, page, hkv, d), block_table, lengths, scale) -> (b, h, d).

        The last dims' strides are 1, of lengths too; block_table and lengths hold int32. Raises Missing where
        the function has no compiled form.
        """
        function = library.function(decode.decode_unit(isa, problem, params))
        h, hkv, d, page = (problem.dim(name) for name in ("h", "hkv", "d", "page"))
        default_scale, count = d**-0.5, dict(params)["t"]
        address, form = ctypes.addressof, library.Decode

        def run(
            q: torch.Tensor,
            k_cache: torch.Tensor,
            v_cache: torch.Tensor,
            block_table: torch.Tensor,
            lengths: torch.Tensor,
            scale: float | None,
        ) -> torch.Tensor:
            b, pages = block_table.shape
            k_b, k_s, k_h, _ = k_cache.stride()
            v_b, v_s, v_h, _ = v_cache.stride()
            y = q.new_empty(b, h, d)
            # One for each call: several threads may be here at once.
            call = form(b, h, hkv, d, pages * page, *q.stride()[:2], k_b, k_h, k_s, v_b, v_h, v_s, page)
            call.block_table, call.table_stride = block_table.data_ptr(), block_table.stride(0)
            call.lengths = lengths.data_ptr()
            call.scale = default_scale if scale is None else scale
            call.threads = count
            if code := function(address(call), q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), y.data_ptr()):
                raise Declined(library.DECLINED[code])
            return y

        return run

    return Kernel(
        id=f"tile.paged_decode_{isa}",
        op="paged_attention",
        precision=decode.PRECISION,
        bind=bind,
        params=decode.decode_params(),
        unit=lambda problem, params: decode.decode_unit(isa, problem, params),
        header=decode.HEADER,
        # Several threads share out all keys of a batch, and so cut a sequence elsewhere in another one.
        batch_invariant=lambda params: dict(params)["t"] == 1,
        suits=decode.suits,
        unavailable=ISAS[isa].unavailable,
        rank=4,
    )


KERNELS = (decode_kernel("avx512"), decode_kernel("avx2"))
