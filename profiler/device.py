"""Where kernels are measured: how their inputs get there, how a call is timed, what stays in caches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from dks.dispatch.environment import private_cache_bytes
from dks.profiler.counters import EnergyMeter, peak_memory

ADDRESS = 128  # bytes: a copy's address has the same remainder by it
NO_ENERGY = "a GPU's energy is not measured by this version"


class Device(Protocol):
    """What measuring asks of a device.

    Attributes:
        torch: where tensors lie.
        beyond: bytes of which one half fills the last cache that counts.
    """

    torch: torch.device
    beyond: int

    def timed(self, call: Callable[..., object], args: Sequence[Any]) -> int:
        """Nanoseconds of one call, with what the host does for it."""

    def empty_cache(self, turn: int) -> None:
        """Fill the cache with something else."""

    def peak_memory(self, call: Callable[[], object]) -> tuple[int | None, str]:
        """Run a call: by how many bytes memory grew at its peak; null with the reason."""

    def no_energy(self) -> str | None:
        """Why joules can't be measured, or None."""

    def joules(self, call: Callable[[], object], seconds: float, /) -> tuple[float | None, str]:
        """Joules of one call, over repeated ones; null with the reason."""


class Host:
    """The CPU.

    Args:
        clock: nanoseconds; taken once, so that a kernel that patches ``time`` changes no time.
    """

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock = clock
        self.torch = torch.device("cpu")
        self.beyond = 2 * (private_cache_bytes() or 2**21)
        self._scratch = torch.zeros(self.beyond * torch.get_num_threads(), dtype=torch.uint8)
        self._energy = EnergyMeter()

    def timed(self, call: Callable[..., object], args: Sequence[Any]) -> int:
        clock = self._clock
        before = clock()
        result = call(*args)
        after = clock()
        del result  # freed outside the timed span, as a caller would later
        return after - before

    def empty_cache(self, turn: int) -> None:
        self._scratch.fill_(turn & 127)

    def peak_memory(self, call: Callable[[], object]) -> tuple[int | None, str]:
        _, found, why = peak_memory(call)
        return found, why

    def no_energy(self) -> str | None:
        return self._energy.unavailable()

    def joules(self, call: Callable[[], object], seconds: float) -> tuple[float | None, str]:
        return self._energy.joules(call, seconds)


class Gpu:
    """An NVIDIA GPU, by events on PyTorch's current stream.

    The device is idle before each call, so that a time holds what the host does until the kernel starts, as a
    caller meets it who waits for the result; and where a kernel is shorter than that, it is mostly the host's.
    """

    def __init__(self, name: str, cuda: Any = torch.cuda) -> None:
        self.torch = torch.device(name)
        self._cuda = cuda
        cuda.set_device(self.torch)
        self.beyond = 2 * int(cuda.get_device_properties(self.torch).L2_cache_size)
        self._scratch = torch.zeros(self.beyond, dtype=torch.uint8, device=self.torch)
        self._start, self._end = (cuda.Event(enable_timing=True) for _ in range(2))

    def timed(self, call: Callable[..., object], args: Sequence[Any]) -> int:
        self._cuda.synchronize(self.torch)
        self._start.record()
        result = call(*args)
        self._end.record()
        self._end.synchronize()
        del result
        return round(float(self._start.elapsed_time(self._end)) * 1e6)

    def empty_cache(self, turn: int) -> None:
        self._scratch.fill_(turn & 127)

    def peak_memory(self, call: Callable[[], object]) -> tuple[int | None, str]:
        self._cuda.synchronize(self.torch)
        self._cuda.reset_peak_memory_stats(self.torch)
        before = self._cuda.memory_allocated(self.torch)
        call()
        self._cuda.synchronize(self.torch)
        return int(self._cuda.max_memory_allocated(self.torch)) - int(before), ""

    def no_energy(self) -> str | None:
        return NO_ENERGY

    def joules(self, _call: Callable[[], object], _seconds: float, /) -> tuple[float | None, str]:
        return None, NO_ENERGY


def open_device(name: str) -> Device:
    """The device ``cpu``, ``cuda`` or ``cuda:N``. Raises RuntimeError where there is none."""
    return Host() if name == "cpu" else Gpu(name if ":" in name else f"{name}:0")


def moved(args: Sequence[Any], device: torch.device) -> tuple[Any, ...]:
    """Arguments with their tensors on ``device``: copies in the same strides and as aligned, or themselves."""
    return tuple(_moved(a, device) if isinstance(a, torch.Tensor) and a.device != device else a for a in args)


def _moved(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    item = t.element_size()
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    room = torch.empty(span + ADDRESS // item, dtype=t.dtype, device=device)
    begin = (t.data_ptr() - room.data_ptr()) % ADDRESS // item
    return room.as_strided(t.shape, t.stride(), begin).copy_(t)
