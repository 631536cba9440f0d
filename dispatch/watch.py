"""Noticing that a layer's parameters are no longer those that its kernels were bound to.

- By the next call: another parameter object, another address, dtype, shape or stride, a version counter that moved.
- Within ``scrub_calls`` calls: bytes that changed where no counter sees it, as by a write through ``.data``, by
  numpy, another library or another process, or in place to an inference tensor. Each call looks at the next part of
  the parameter, in pieces spread evenly over it, and goes on where the last call stopped. So the next call notices
  a write in one piece that is longer than the distance of two pieces, and practically any that is widely spread.
- Not at all: such a write to a tensor on a GPU, whose memory is not read here. ``refresh`` is the caller's to call.

Bytes are looked at where a kernel keeps values of its own (``Kernel.keeps_values``): one that reads the parameter
where it lies sees every write.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from itertools import count
from typing import Any

import torch

from dks.dispatch import native

DEBUG = "DKS_DEBUG_WEIGHTS"
"""Environment variable: with "1", every call of a prepared layer compares all of its parameters, and raises."""

SMALL, LARGE = 64, 128
"""Calls within which every byte is looked at, at the most: of a parameter of up to ``FULL`` bytes, and of any."""

STEP, LEAST, FULL, PIECES = 16, 1024, 256 * 1024, 64
"""Pieces are STEP bytes or a multiple, a call looks at LEAST bytes or more; at PIECES pieces above FULL bytes."""


class Span:
    """A parameter's memory, and how it is looked at: call i looks at units i, i + calls, i + 2 * calls, ...

    Attributes:
        address, size: from the first element's to the last one's end, whatever lies between them; in bytes.
        unit: bytes.
        calls: after so many, all units were looked at.
    """

    __slots__ = ("_units", "address", "calls", "size", "unit")

    def __init__(self, t: torch.Tensor) -> None:
        elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        self.address, self.size = t.data_ptr(), elements * t.element_size()
        if self.size <= FULL:
            self.unit, self.calls = STEP, min(SMALL, -(-self.size // LEAST))
        else:
            self.unit = STEP * -(-self.size // (PIECES * LARGE * STEP))
            self.calls = self.size // PIECES // self.unit
        kind: Any = type("Unit", (ctypes.Structure,), {"_fields_": [("bytes", ctypes.c_ubyte * self.unit)]})
        self._units = memoryview((kind * (self.size // self.unit)).from_address(self.address))

    def sum(self, call: int) -> int:
        """Of what a call looks at, for the Python form: CRC-32, which shows any change inside of 32 bits."""
        whole, rest = divmod(self.size, self.unit)
        found = zlib.crc32(self._units[call :: self.calls].tobytes())
        if rest and whole % self.calls == call:
            found = zlib.crc32(ctypes.string_at(self.address + whole * self.unit, rest), found)
        return found


class Watch:
    """Watches a layer's parameters; compiled where the process has the fast path (``native/watch.hpp``).

    Attributes:
        native: the compiled form, or None.
        scrub_calls: calls within which every byte is looked at; 0 where none is.
        debugs: whether DEBUG is on: instead of a sum a copy of what is covered is kept, for ``overwritten``.
    """

    __slots__ = (
        "_bias", "_calls", "_copies", "_seen", "_spans", "_storages", "_sums", "_weight", "_written", "debugs",
        "native", "scrub_calls",
    )  # fmt: skip

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        tensors = [t for t in (weight, bias) if t is not None]
        # Held, so that no other tensor can come to lie at these addresses, and the bytes stay readable.
        self._storages = [t.untyped_storage() for t in tensors]
        self._seen = [(t, _place(t), None if t.is_inference() else t._version) for t in tensors]
        self._spans: tuple[Span, ...] = ()
        self._sums: list[list[int]] = []
        self._calls = count()
        self._written = False  # for good: what the next call looks at may be as it was
        self._copies: dict[str, torch.Tensor] = {}
        self.scrub_calls = 0
        self.debugs = os.environ.get(DEBUG) == "1"
        seen = tuple((t, t.data_ptr(), -1 if version is None else version) for t, _, version in self._seen)
        self.native = None if native.module is None else native.module.Watch(weight, bias, seen)

    def cover(self) -> None:
        """Look at bytes as well, from now on. To be called before a kernel takes values from the parameters."""
        if self.scrub_calls:
            return
        if self.debugs:
            named = {"weight": self._weight, "bias": self._bias}
            self._copies = {name: _bytes(t).clone() for name, t in named.items() if t is not None}
            self.scrub_calls = 1
            return
        spans = tuple(Span(t) for t, _, _ in self._seen if t.is_cpu)
        if self.native is not None:
            self.native.cover(tuple((s.address, s.size, s.unit, s.calls) for s in spans))
        else:
            self._sums = [[span.sum(call) for call in range(span.calls)] for span in spans]
        self._spans = spans
        self.scrub_calls = max((span.calls for span in spans), default=0)

    def changed(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> bool:
        """The look of a call: whether the parameters, as the layer holds them now, are known to be others."""
        if self.native is not None:
            return bool(self.native.changed(weight, bias))
        if self._replaced(weight, bias):
            return True
        if self._spans and not self._written:
            call = next(self._calls)
            for span, sums in zip(self._spans, self._sums, strict=True):
                if span.sum(call % span.calls) != sums[call % span.calls]:
                    self._written = True
        return self._written

    def differs(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> bool:
        """The same after a look at every byte that can be read."""
        if self.overwritten() is not None:
            return True
        if self.native is not None:
            return bool(self.native.differs(weight, bias))
        if self._replaced(weight, bias):
            return True
        for span, sums in zip(self._spans, self._sums, strict=True):
            self._written = self._written or [span.sum(call) for call in range(span.calls)] != sums
        return self._written

    def _replaced(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> bool:
        if weight is not self._weight or bias is not self._bias:
            return True
        return any(
            _place(t) != place or (version is not None and t._version != version)
            for t, place, version in self._seen
        )

    def overwritten(self) -> str | None:
        """With DEBUG, the name of a parameter that was bound and has other bytes now, or None."""
        for name, kept in self._copies.items():
            now = self._weight if name == "weight" else self._bias
            assert now is not None  # only what there was is kept
            if not torch.equal(_bytes(now), kept):
                return name
        return None


def _place(t: torch.Tensor) -> tuple[object, ...]:
    """Where and how ``t`` lies. ``weight.data = weight.data.t()`` moves neither address nor version."""
    return t.data_ptr(), t.dtype, t.shape, t.stride()


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().view(torch.uint8)  # as numbers NaN would not equal itself
