"""What int8 kernels share: weights with one scale an output channel, activations with one scale a row."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch

from dks.dispatch.kernel import Declined, Run


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


def activation_levels() -> int:
    """Steps of quantised activations: a byte's where the machine has VNNI. Elsewhere 16-bit sums of pairs of
    products can saturate, and one bit less keeps them apart."""
    return 255 if torch.cpu._is_vnni_supported() else 127


def by_rows(
    product: Callable[[torch.Tensor], torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype, n: int, k: int
) -> Run:
    """A linear with a scale for each row of its activations, of a product that has one scale for all of them.

    Each row is divided by its largest magnitude before, and its outputs are multiplied by it: no row is so large
    that the scale has no steps left for the others.

    Args:
        product: float32 activations (m, k) in -1..1 -> float32 outputs (m, n), without a bias.
        bias: (n,) or None.
        dtype: of the outputs.
        n, k: of the weight.

    Returns:
        run(x (..., k)) -> (..., n). It raises Declined for NaN, which integers can't say, and for infinity, which
        no scale stands for.
    """
    wide_bias = None if bias is None else bias.detach().float()

    def run(x: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, k).float()
        low, high = torch.aminmax(rows, dim=1, keepdim=True)
        largest = torch.maximum(high, low.neg_())
        if not largest.isfinite().all():
            raise Declined("activations are not finite")
        # Rows of zeros stay zeros; the least is a normal number, since a denormal one may be flushed to zero.
        largest.clamp_min_(1e-30)
        y = product(rows / largest)
        y = y.mul_(largest) if wide_bias is None else torch.addcmul(wide_bias, y, largest)
        return y.to(dtype).view(*x.shape[:-1], n)

    return run


@lru_cache(maxsize=1)
def hush() -> None:
    """Let torch say, once and unheard, that quantized tensors will go: a request should not warn of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.quantize_per_tensor(torch.zeros(1, device="cpu"), 1.0, 0, torch.quint8)
