"""Symmetric int8 weights with one scale an output channel, as the int8 kernels share them."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache

import torch

from dks.dispatch.environment import cpu_flags
from dks.dispatch.kernel import Declined


def per_channel_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise (n, k) weights to int8 in -127..127.

    Returns:
        (int8 weights (n, k), float32 scales (n,)), so that weight is about int8 * scale.

    Raises:
        ValueError: a weight is NaN or infinite, which no integer stands for.
    """
    weight = weight.detach().float()
    largest = weight.abs().amax(dim=1)
    check_finite(largest)
    # The scale of a row of zeros stays a normal number: a denormal one may be flushed to zero.
    scale = largest.clamp_min(1e-30) / 127.0
    return torch.round(weight / scale[:, None]).clamp_(-127, 127).to(torch.int8), scale


def check_finite(extremes: torch.Tensor) -> None:
    """Raise ValueError where ``extremes`` of a weight show that it can't be quantised."""
    if not torch.isfinite(extremes).all():
        raise ValueError("weight: found NaN or infinity, expected finite values")


def value_range(x: torch.Tensor) -> tuple[float, float]:
    """Smallest and largest value of ``x``, widened to hold zero, so that padding stays zero when quantised.

    Raises:
        Declined: a value is NaN, which integers can't say, or infinite, which no one scale stands for.
    """
    low, high = (extreme.item() for extreme in torch.aminmax(x))
    if not math.isfinite(high - low):
        raise Declined("activations are not finite")
    return min(low, 0.0), max(high, 0.0)


@lru_cache(maxsize=1)
def hush() -> None:
    """Let torch say, once and unheard, that quantized tensors will go: a request should not warn of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.quantize_per_tensor(torch.zeros(1, device="cpu"), 1.0, 0, torch.quint8)


def onednn_saturates() -> str | None:
    """Why oneDNN's int8 products are wrong on this CPU, or None.

    Without VNNI, x86 adds pairs of products in 16 bits, which saturate unless one bit is left unused; oneDNN leaves
    none: https://oneapi-src.github.io/oneDNN/dev_guide_int8_computations.html
    """
    flags = cpu_flags()
    if "avx2" in flags and not flags & {"avx512_vnni", "avx_vnni"}:
        return "this CPU has no VNNI: the 16-bit sums of oneDNN's int8 products saturate"
    return None
