"""``make bench-gpu-attention``: paged decoding and causal prompts against SDPA and, if it is there, FlashInfer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F

from bench.gpu import MODES, OURS, Bench, Case, Gpu, Maker, each, normal
from bench.gpu_peers import flashinfer_decode, gathered
from bench.gpu_run import package, row, run
from bench.peers import contiguous_attention
from bench.report import Row
from dks.dispatch.kernel import Inputs

PACKAGE = "h200_attention"
GATHER, CONTIGUOUS, FLASHINFER, SDPA = "gather + SDPA", "SDPA, contiguous", "FlashInfer", "SDPA"
HEADS, KEY_HEADS, D = 64, 8, 128
DECODE = tuple((b, kv, page) for b in (32, 64) for kv in (4096, 8192) for page in (16, 64))
PREFILL = tuple(
    (b, q, h, d) for b in (1, 4) for q in (512, 2048, 4096) for h, d in ((64, 128), (32, 128), (32, 64))
)


def rows(bench: Bench) -> Iterator[Row]:
    """The rows of the table."""
    served = package(PACKAGE)
    cells = bench.measure(
        [
            *(decode(bench.gpu, served, *sizes) for sizes in DECODE),
            *(prefill(bench.gpu, served, *sizes) for sizes in PREFILL),
        ]
    )
    for mode in MODES:
        decoding = [cell for cell in cells if cell.mode == mode and cell.name.startswith("decode ")]
        prompts = [cell for cell in cells if cell.mode == mode and cell.name.startswith("prefill ")]
        for peer, id in ((GATHER, "gather"), (CONTIGUOUS, "contiguous"), (FLASHINFER, "flashinfer")):
            words = f"paged decode, B 32 and 64, KV 4096 and 8192, pages of 16 and 64, {mode}"
            if decoding:
                yield row(f"decode-{id}-{mode}", words, peer, decoding, 1.05)
                yield row(f"decode-{id}-worst-{mode}", f"{words}, the worst", peer, decoding, 1.0, "worst")
        if prompts:
            words = f"causal prompts of 512 to 4096, {mode}"
            yield row(f"prefill-{mode}", words, SDPA, prompts, 1.05)
            yield row(f"prefill-worst-{mode}", f"{words}, the worst", SDPA, prompts, 1.0, "worst")


def decode(gpu: Gpu, served: ModuleType, b: int, kv: int, page: int) -> Case:
    """Sequences of one length, so that no peer needs a mask; pages in shuffled order."""

    def draw(copy: int) -> tuple[object, ...]:
        pages = -(-kv // page)
        q = normal((b, HEADS, D), torch.bfloat16, gpu.torch, copy)
        shape = (b * pages, page, KEY_HEADS, D)
        k, v = (normal(shape, torch.bfloat16, gpu.torch, 1000 * copy + i) for i in (1, 2))
        order = torch.randperm(b * pages, generator=torch.Generator().manual_seed(copy)).int().to(gpu.torch)
        lengths = torch.full((b,), kv, dtype=torch.int32, device=gpu.torch)
        return q, k, v, order.view(b, pages), lengths, None

    gather = gathered(kv)
    makers = {
        GATHER: each(lambda *inputs: lambda: gather(*inputs)),
        OURS: each(lambda *inputs: lambda: served.paged_attention(*inputs)),
        CONTIGUOUS: each(lambda *inputs: contiguous_attention(Inputs((), inputs))),
        FLASHINFER: each(lambda *inputs: flashinfer_decode(Inputs((), inputs))),
    }
    return Case(f"decode b={b} kv={kv} page={page}", draw, makers)


def prefill(gpu: Gpu, served: ModuleType, b: int, q: int, h: int, d: int) -> Case:
    """Prompts of one length; heads lie beside each other in a token, as projections leave them."""

    def draw(copy: int) -> tuple[torch.Tensor, ...]:
        return tuple(
            normal((b, q, heads, d), torch.bfloat16, gpu.torch, 3 * copy + i).transpose(1, 2)
            for i, heads in enumerate((h, KEY_HEADS, KEY_HEADS))
        )

    makers = {SDPA: _attention(F.scaled_dot_product_attention), OURS: _attention(served.attention)}
    return Case(f"prefill b={b} q={q} h={h} d={d}", draw, makers)


def _attention(function: object) -> Maker:
    return each(lambda q, k, v: lambda: function(q, k, v, is_causal=True, enable_gqa=True))  # type: ignore[operator]


if __name__ == "__main__":
    sys.exit(run("attention", __doc__, rows, [PACKAGE]))
