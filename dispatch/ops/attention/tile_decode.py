"""Generated kernels for one query row a sequence, as in decoding: the keys and values are read once."""

from __future__ import annotations

import ctypes

import torch

from dks.dispatch.kernel import Declined, Kernel, Params, Run
from dks.dispatch.problem import Problem
from dks.dispatch.tiles import decode, library
from dks.dispatch.tiles.isa import ISAS


def supports(problem: Problem) -> str | None:
    """One query row, which sees every key."""
    if problem.dim("q") != 1:
        return "takes one query row a sequence"
    if problem.trait("causal") == "yes":
        return "sees every key: an upper-left causal mask would leave the row one"
    return "has no masked form" if problem.trait("mask") != "none" else None


def decode_kernel(isa: str) -> Kernel:
    """The kernel ``tile.decode_<isa>``."""

    def bind(problem: Problem, params: Params) -> Run:
        """run(q (b, h, 1, d), k, v (b, hkv, kv, d), mask None, scale) -> (b, h, 1, d), last dims' strides 1.

        Raises Missing where the function has no compiled form.
        """
        function = library.function(decode.decode_unit(isa, problem, params))
        h, hkv, d = (problem.dim(name) for name in ("h", "hkv", "d"))
        default_scale, count = d**-0.5, dict(params)["t"]
        address, form = ctypes.addressof, library.Decode

        def run(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: torch.Tensor | None, scale: float | None
        ) -> torch.Tensor:
            if q.shape[2] != 1:
                raise Declined("more than one query row")
            b = q.shape[0]
            y = q.new_empty(b, h, 1, d)
            # One for each call: several threads may be here at once.
            call = form(b, h, hkv, d, k.shape[2], *q.stride()[:2], *k.stride()[:3], *v.stride()[:3])
            call.scale = default_scale if scale is None else scale
            call.threads = count
            if code := function(address(call), q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr()):
                raise Declined(library.DECLINED[code])
            return y

        return run

    return Kernel(
        id=f"tile.decode_{isa}",
        op="attention",
        precision=decode.PRECISION,
        bind=bind,
        params=decode.decode_params(),
        unit=lambda problem, params: decode.decode_unit(isa, problem, params),
        header=decode.HEADER,
        # Several threads share out all keys of a batch, and so cut a sequence elsewhere in another one.
        batch_invariant=lambda params: dict(params)["t"] == 1,
        supports=supports,
        suits=decode.suits,
        unavailable=ISAS[isa].unavailable,
        rank=4,
    )


KERNELS = (decode_kernel("avx512"), decode_kernel("avx2"))
