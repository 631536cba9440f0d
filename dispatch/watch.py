"""Noticing that a layer's parameters are no longer those that its kernels were bound to."""

from __future__ import annotations

import ctypes

import torch

_WINDOWS, _WINDOW = 4, 16  # places in a parameter that are compared at each call, and bytes at each


class Watch:
    """Notices that one of a layer's parameters was written to or replaced.

    A write that hides from the version counter (through ``.data``, a fused optimizer, numpy) is noticed if it
    changes one of the few bytes that are sampled across the tensor.
    """

    __slots__ = ("_bias", "_sampled", "_seen", "_storages", "_weight", "_windows")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        tensors = [t for t in (weight, bias) if t is not None]
        # Held, so that no other tensor can come to lie at these addresses, and the samples stay readable.
        self._storages = [t.untyped_storage() for t in tensors]
        self._seen = [(t, t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]
        self._windows = [window for t in tensors for window in _windows(t)]
        self._sampled = b"".join(self._windows)

    def changed(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> bool:
        """Whether the parameters are no longer what they were."""
        if weight is not self._weight or bias is not self._bias:
            return True
        for t, address, version in self._seen:
            if t.data_ptr() != address or (version is not None and t._version != version):
                return True
        # Last: what was resized away must not be read.
        return _join(self._windows) != self._sampled


_join = b"".join


def _windows(t: torch.Tensor) -> list[memoryview]:
    elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    size = elements * t.element_size()
    memory = memoryview((ctypes.c_uint8 * size).from_address(t.data_ptr())).cast("B")
    step = max(_WINDOW, (size - _WINDOW) // (_WINDOWS - 1))
    return [memory[start : start + _WINDOW] for start in range(0, size, step)][:_WINDOWS]
