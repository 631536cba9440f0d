"""Inputs made to find faults: placed between guards at chosen addresses, redrawn, and pushed to extremes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dks.dispatch.kernel import PERIOD

HOST = torch.device("cpu")
GUARD = 256  # bytes before and after each input
_FILL = 0xFF  # reads as NaN in every float: a kernel that lets in what lies beside its input shows it


class Slot:
    """One tensor inside a larger storage, between guards.

    Args:
        like: gives shape, strides and dtype; its values are copied.
        align: bytes; the address is divisible by it and by no larger power of two up to 64.
        turn: another number gives another such address.
        device: where it lies.
    """

    def __init__(self, like: torch.Tensor, align: int, turn: int = 0, device: torch.device = HOST) -> None:
        item = like.element_size()
        align = max(align, item)
        span = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        room = 64 * (turn % 8) if align >= 64 else 0
        residue = 0 if align >= 64 else align * (2 * turn + 1) % 64
        size = span * item + 2 * GUARD + 128 + room
        self._words = torch.empty(
            -(-size // 8), dtype=torch.int64, device=device
        )  # wide ones are quicker to compare
        self.storage = self._words.view(torch.uint8)
        start = GUARD + room + (residue - self.storage.data_ptr() - GUARD) % 64
        self._start, self._stop = start, start + span * item
        self.tensor = self.storage[start : self._stop].view(like.dtype).as_strided(like.shape, like.stride())
        self._held = self.image(like)

    def image(self, values: torch.Tensor) -> torch.Tensor:
        """All bytes as they are with these values inside the guards; the slot holds them now."""
        self.storage.fill_(_FILL)
        self.tensor.copy_(values)
        self._held = self._words.clone()
        return self._held

    def load(self, image: torch.Tensor) -> None:
        """Hold the values of ``image``, as a buffer that is used again: same tensor, address and version."""
        self._words.data.copy_(image)
        self._held = image

    def fault(self) -> str:
        """What a kernel did to it since it was loaded, or ""; it then holds its values again."""
        if torch.equal(self._words, self._held):
            return ""
        inside = slice(self._start, self._stop)
        changed = not torch.equal(self.storage[inside], self._held.view(torch.uint8)[inside])
        self.load(self._held)
        return "changed its input" if changed else "wrote outside its input"

    def overlaps(self, low: int, high: int) -> bool:
        """Whether it has bytes in the addresses low..high."""
        start = self.storage.data_ptr()
        return low < start + self.storage.numel() and start < high


class Lent:
    """A tensor of somebody else, watched in the same way, without guards."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._held = tensor.clone()

    def fault(self) -> str:
        """As a slot's, without the guards."""
        return "" if same(self.tensor, self._held) else "changed its input"

    def overlaps(self, low: int, high: int) -> bool:
        """As a slot's."""
        storage = self.tensor.untyped_storage()
        return low < storage.data_ptr() + storage.nbytes() and storage.data_ptr() < high


def place(
    args: Sequence[Any], align: int, turn: int = 0, device: torch.device = HOST
) -> tuple[list[Slot], tuple[Any, ...]]:
    """(a slot for each tensor of ``args``, ``args`` with the tensors in their slots)."""
    placed = [Slot(a, align, turn + i, device) if isinstance(a, torch.Tensor) else a for i, a in enumerate(args)]
    slots = [p for p in placed if isinstance(p, Slot)]
    return slots, tuple(p.tensor if isinstance(p, Slot) else p for p in placed)


def tensors(args: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among the arguments of a call."""
    return [a for a in args if isinstance(a, torch.Tensor)]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape hold the same values; NaN is the same as NaN."""
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def is_mask(t: torch.Tensor) -> bool:
    """Whether it hides things: it is boolean, or holds zero and minus infinity alone."""
    return t.dtype == torch.bool or (t.is_floating_point() and bool(((t == 0) | (t == -math.inf)).all()))


def has_values(t: torch.Tensor) -> bool:
    """Whether it holds activations. Masks do not, nor do integers: they say where values are, and how many."""
    return t.is_floating_point() and not is_mask(t)


def redrawn(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Other values of the same distribution: shuffled, with random signs. A mask gets rows that differ. More than
    ``PERIOD`` numbers move along together, and not at all beside NaN, with signs that repeat.

    NaN stays where it is: an operator's inputs have it where nothing may be read. Integers stay as they are.
    """
    if is_mask(t):
        return _varied(t, generator)
    if not has_values(t):
        return t.clone()
    unread = t.isnan()
    if t.numel() > PERIOD:  # that many draws, or places, would take longer than all that is done with them
        shift = int(torch.randint(1, t.numel(), (1,), generator=generator))
        signs = torch.randint(0, 2, (PERIOD,), generator=generator).to(t.dtype).mul_(2).sub_(1)
        signs = signs.repeat(-(-t.numel() // PERIOD))[: t.numel()]
        flat = t.reshape(-1)
        return signs.mul_(flat if bool(unread.any()) else flat.roll(shift)).view(t.shape)
    if bool(unread.any()):
        t = t.clone()
        t[~unread] = redrawn(t[~unread], generator)
        return t
    order = torch.randperm(t.numel(), generator=generator)
    signs = torch.randint(0, 2, t.shape, generator=generator).to(t.dtype).mul_(2).sub_(1)
    # At least one sign differs from what was there, so that a single number changes as well.
    return t.reshape(-1)[order].view(t.shape).mul_(signs) if t.numel() > 1 else -t


def flipped(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The same activations with random signs, each where it was; what holds none stays as it is."""
    if not has_values(t):
        return t
    return t * torch.randint(0, 2, t.shape, generator=generator).to(t.dtype).mul_(2).sub_(1)


def _varied(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A third of what was seen hidden, other keys for each row, the first key never."""
    rows, keys = (torch.arange(size) for size in mask.shape[-2:])
    hidden = ((rows[:, None] + keys) % 3 == 1) & (keys > 0)
    if mask.dtype == torch.bool:
        return mask & ~hidden
    # Biases that every float format holds exactly.
    bias = torch.randint(-4, 5, mask.shape, generator=generator).to(mask.dtype) / 4
    return (mask + bias).masked_fill_(hidden, -math.inf)


def noisy(t: torch.Tensor, size: float, generator: torch.Generator) -> torch.Tensor:
    """Activations with relative noise, rounded to their dtype; a mask as it is."""
    if not t.is_floating_point() or bool((t == -math.inf).any()):
        return t
    return (t.double() * (1.0 + size * torch.randn(t.shape, generator=generator))).to(t.dtype)


def _scaled(power: int) -> Callable[[torch.Tensor], torch.Tensor]:
    # In two steps: 2^-130 itself is no normal float32.
    half = power // 2
    return lambda t: t * 2.0**half * 2.0 ** (power - half)


def _one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t[(*(size // 2 for size in t.shape[:-1]), 0)] = value
        return t

    return change


SCALED: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "large": _scaled(40),
    "tiny": _scaled(-40),
    "subnormal": _scaled(-130),
}
"""Changes of every activation. Squares of ``large`` still fit float32, so no right kernel overflows."""

NOT_FINITE: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "infinite": _one(math.inf),
    "minus infinite": _one(-math.inf),
    "nan": _one(math.nan),
}
"""Changes of one number, in the middle row of the first activation."""

FLUSHED = 2.0**-110
"""Absolute error of ``subnormal`` draws that counts as none: sums of numbers that were flushed to zero."""
