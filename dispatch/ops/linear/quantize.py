"""Symmetric int8 weights with one scale an output channel, as the int8 kernels share them."""

from __future__ import annotations

import torch


def per_channel_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise (n, k) weights to int8 in -127..127.

    Returns:
        (int8 weights (n, k), float32 scales (n,)), so that weight is about int8 * scale.
    """
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127.0
    return torch.round(weight / scale[:, None]).clamp_(-127, 127).to(torch.int8), scale
