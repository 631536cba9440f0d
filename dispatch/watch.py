"""Noticing that a layer's parameters are no longer those that its kernels were bound to."""

from __future__ import annotations

import ctypes

import torch

_WINDOWS, _WINDOW = 4, 16  # places in a parameter that are compared at each call, and bytes at each


class Watch:
    """Notices that one of a layer's parameters was written to or replaced.

    A write that hides from the version counter (through ``.data``, a fused optimizer, numpy) is noticed if it
    changes one of the few bytes that are sampled across the tensor. Those of a tensor on a GPU can't be read here:
    there such a write goes unnoticed, and kernels that packed the weight serve what it was until ``refresh``.
    """

    __slots__ = ("_bias", "_places", "_sampled", "_seen", "_storages", "_weight", "_windows")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        tensors = [t for t in (weight, bias) if t is not None]
        # Held, so that no other tensor can come to lie at these addresses, and the samples stay readable.
        self._storages = [t.untyped_storage() for t in tensors]
        self._seen = [(t, t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]
        self._places = [place for t in tensors if t.is_cpu for place in _places(t)]
        self._windows = [_memory(*place) for place in self._places]
        self._sampled = b"".join(self._windows)

    def told(self) -> tuple[object, ...]:
        """What the compiled form watches by: the parameters, (tensor, address, version or -1) of each, (address,
        bytes) of each place, and what was seen there. Whoever takes it holds this object as well."""
        seen = tuple((t, address, -1 if version is None else version) for t, address, version in self._seen)
        return (self._weight, self._bias, seen, tuple(self._places), self._sampled)

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


def _places(t: torch.Tensor) -> list[tuple[int, int]]:
    elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    size = elements * t.element_size()
    step = max(_WINDOW, (size - _WINDOW) // (_WINDOWS - 1))
    starts = range(0, size, step)[:_WINDOWS]
    return [(t.data_ptr() + start, min(_WINDOW, size - start)) for start in starts]


def _memory(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_uint8 * size).from_address(address)).cast("B")
