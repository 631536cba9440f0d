"""Where kernels are measured: how their inputs get there, how a call is timed, what stays in caches."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from weakref import WeakSet

import torch

from dks.dispatch.environment import private_cache_bytes
from dks.dispatch.kernel import Output, parts
from dks.dispatch.modes import EAGER
from dks.profiler.counters import EnergyMeter, peak_memory
from dks.profiler.interference import ClockRate, Cores, Source, default_sources, quota
from dks.profiler.nvml import Nvml
from dks.profiler.trial import describe, stays

ADDRESS = 128  # bytes: a copy's address has the same remainder by it
MAX_COPIES = 8  # of a CPU's buffers, to keep caches cold
MAX_COPIES_GPU = 16  # of a GPU's: more would cost a graph and a binding each, for every candidate
HOLD = 200_000  # of a GPU's clock, 0.1 ms: it waits so long before a replay, which the host launches meanwhile
MOST_HOLD = 100 * HOLD
MOST_IDLE = 8 * 2**30  # bytes of a GPU that PyTorch holds and no tensor has, as after a float64 reference


class Uncapturable(RuntimeError):
    """A call that can't be a part of a CUDA graph. The attempt leaves a process that is unfit for others."""


class Replay(Protocol):
    """A call that was captured, bound to the addresses it was captured with."""

    def __call__(self, *args: object) -> Output:
        """Run it; the arguments are those that it was captured with. Returns copies of its output."""

    def again(self) -> None:
        """Run it and leave the output where it is."""


class Device(Protocol):
    """What measuring asks of a device.

    Attributes:
        torch: where tensors lie.
        beyond: bytes of which one half fills the last cache that counts.
        energy_s: seconds of repeated calls for one reading of its energy counter.
        shares: whether one weight may serve all candidates in turn, where it has no copies to rotate through: its
            cache is then emptied before each call.
    """

    torch: torch.device
    beyond: int
    energy_s: float
    shares: bool

    def copies(self, size: int) -> int:
        """How many buffers of ``size`` bytes rotate to keep caches cold. Where they do not fill ``beyond``, the
        cache is emptied before each call in their stead."""

    def timed(self, call: Callable[..., object], args: Sequence[Any]) -> int:
        """Nanoseconds of one call, with what the host does for it."""

    def captured(self, call: Callable[..., Output], args: Sequence[Any], keep: bool = True) -> Replay:
        """A call as a graph. Raises Uncapturable, or what the call itself raises.

        Args:
            keep: whether its output has memory of its own, and can be asked for; else others may write there too.
        """

    def replayed(self, replay: Replay) -> int | None:
        """Nanoseconds of one replay, without what the host does for it; None where that could not be kept out."""

    def settle(self) -> None:
        """Wait for all that was started. Raises what it left behind."""

    def lost(self, error: BaseException) -> str:
        """Why nothing can run in this process any more after a call raised this, in words; empty where it can."""

    def empty_cache(self, turn: int, /) -> None:
        """Fill the cache with something else, before whatever is started next."""

    def sources(self, mode: str) -> list[Source]:
        """What can disturb timing in a mode."""

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
        self.energy_s, self.shares = 0.3, False
        self._scratch = torch.zeros(self.beyond * torch.get_num_threads(), dtype=torch.uint8)
        self._energy = EnergyMeter()

    def copies(self, size: int) -> int:
        return min(MAX_COPIES, max(1, -(-self.beyond // size))) if size else 1

    def captured(self, _call: Callable[..., Output], _args: Sequence[Any], _keep: bool = True, /) -> Replay:
        raise Uncapturable("a CPU has no graphs")

    def replayed(self, replay: Replay) -> int | None:
        raise NotImplementedError  # nothing was captured

    def settle(self) -> None: ...

    def lost(self, error: BaseException) -> str:
        return stays(error)

    def sources(self, _mode: str, /) -> list[Source]:
        return default_sources(torch.get_num_threads())

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

    The device is idle before each eager call, so that a time holds what the host does until the kernel starts, as a
    caller meets it who waits for the result; and where a kernel is shorter than that, it is mostly the host's.
    Before a replay the device is kept waiting instead until the host has launched it, and the time is the device's.

    Args:
        name: ``cuda:N``.
        nvml: what reads its energy and health; found by its UUID if None.
    """

    def __init__(self, name: str, cuda: Any = torch.cuda, nvml: Nvml | None = None) -> None:
        self.torch = torch.device(name)
        self._cuda = cuda
        cuda.set_device(self.torch)
        properties = cuda.get_device_properties(self.torch)
        self.beyond = 2 * int(properties.L2_cache_size)
        self.energy_s, self.shares = 10.0, True
        self._nvml = nvml or Nvml(str(getattr(properties, "uuid", "")))
        self._scratch = torch.zeros(self.beyond // 8, dtype=torch.int64, device=self.torch)
        self._sum = torch.zeros((), dtype=torch.int64, device=self.torch)
        self._start, self._end = (cuda.Event(enable_timing=True) for _ in range(2))
        self._hold = HOLD
        self._graphs: WeakSet[_Graph] = WeakSet()
        self._side = cuda.Stream(self.torch)  # one for all captures: libraries keep a workspace for each stream

    def copies(self, size: int) -> int:
        # They take ``beyond`` and one more together, for every candidate; what would need more of them is emptied.
        wanted = -(-self.beyond // size) if size else 1
        return wanted if wanted <= MAX_COPIES_GPU else 1

    def timed(self, call: Callable[..., object], args: Sequence[Any]) -> int:
        self._cuda.synchronize(self.torch)
        self._start.record()
        result = call(*args)
        self._end.record()
        self._end.synchronize()
        del result
        return round(float(self._start.elapsed_time(self._end)) * 1e6)

    def captured(self, call: Callable[..., Output], args: Sequence[Any], keep: bool = True) -> Replay:
        cuda = self._cuda
        # What PyTorch holds for later calls is not for a graph, and nothing is given back while one is captured.
        if cuda.memory_reserved(self.torch) - cuda.memory_allocated(self.torch) > MOST_IDLE:
            cuda.empty_cache()
        # Graphs share a pool: they never run at once, and who is asked for its output keeps it. PyTorch takes one
        # that is in use, or a new one.
        pool = next((each.pool for each in self._graphs), None) or cuda.graph_pool_handle()
        graph = cuda.CUDAGraph()
        self._side.wait_stream(cuda.current_stream(self.torch))
        with cuda.stream(self._side):
            call(*args)  # what only a first call on a stream does
            cuda.synchronize(self.torch)
            with _no_collection():
                try:
                    graph.capture_begin(pool=pool)
                    output = call(*args)
                except Exception as error:
                    with suppress(Exception):
                        graph.capture_end()
                    raise _uncapturable(error) from error
                try:
                    graph.capture_end()
                except Exception as error:
                    raise _uncapturable(error) from error
        cuda.synchronize(self.torch)
        made = _Graph(graph, output if keep else (), pool)
        self._graphs.add(made)
        return made

    def replayed(self, replay: Replay) -> int | None:
        self._cuda._sleep(self._hold)
        self._start.record()
        replay.again()
        self._end.record()
        late = self._start.query()
        self._end.synchronize()
        if late:
            self._hold = min(2 * self._hold, MOST_HOLD)
            return None
        # A host that was held up once is not waited for ever after.
        self._hold = max(HOLD, self._hold - self._hold // 16)
        return round(float(self._start.elapsed_time(self._end)) * 1e6)

    def settle(self) -> None:
        self._cuda.synchronize(self.torch)

    def lost(self, error: BaseException) -> str:
        if isinstance(error, Uncapturable):  # no kernel ran
            return ""
        if why := stays(error):
            return why
        try:
            self._cuda.synchronize(self.torch)
        except Exception as left:  # an error that stays is told again by every call
            return stays(left) or describe(left)
        return ""

    def empty_cache(self, _turn: int, /) -> None:
        # In the stream, so before the event that a time begins with. By reading: what is written would be written
        # back at the expense of the kernel that is timed.
        torch.sum(self._scratch, dim=0, out=self._sum)

    def sources(self, mode: str) -> list[Source]:
        """The GPU's own; and in eager mode, where the host's part is timed, what stops or slows one thread of it.
        Load on other cores is left out: it takes bandwidth, of which launching a kernel needs little."""
        host: list[Source] = [quota(), ClockRate(), Cores()] if mode == EAGER else []
        return [*self._nvml.sources(), *host]

    def peak_memory(self, call: Callable[[], object]) -> tuple[int | None, str]:
        self._cuda.synchronize(self.torch)
        self._cuda.reset_peak_memory_stats(self.torch)
        before = self._cuda.memory_allocated(self.torch)
        call()
        self._cuda.synchronize(self.torch)
        return int(self._cuda.max_memory_allocated(self.torch)) - int(before), ""

    def no_energy(self) -> str | None:
        return self._nvml.no_energy()

    def joules(self, call: Callable[[], object], seconds: float) -> tuple[float | None, str]:
        return self._nvml.joules(call, seconds, self._cuda)


class _Graph:
    """A CUDA graph and the output that it writes, which must outlive it; or none, where others may write there."""

    def __init__(self, graph: Any, output: Output, pool: Any) -> None:
        self._graph, self._output, self.pool = graph, output, pool

    def __call__(self, *_: object) -> Output:
        self.again()
        copies = tuple(part.clone() for part in parts(self._output))
        return copies if isinstance(self._output, tuple) else copies[0]

    def again(self) -> None:
        self._graph.replay()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage: freeing an old graph or event is not allowed while another one is captured."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _uncapturable(error: Exception) -> Uncapturable:
    return Uncapturable(f"can't be captured in a CUDA graph: {describe(error)}")


def open_device(name: str) -> Device:
    """The device ``cpu``, ``cuda`` or ``cuda:N``. Raises RuntimeError where there is none."""
    return Host() if name == "cpu" else Gpu(name if ":" in name else f"{name}:0")


def moved(args: Sequence[Any], device: torch.device) -> tuple[Any, ...]:
    """Arguments with their tensors on ``device``: copies in the same strides and as aligned, or themselves."""
    return tuple(_moved(a, device) if isinstance(a, torch.Tensor) and a.device != device else a for a in args)


def copied(args: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments with copies of their tensors, in the same strides and as aligned."""
    return tuple(_moved(a, a.device) if isinstance(a, torch.Tensor) else a for a in args)


def _moved(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    item = t.element_size()
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    room = torch.empty(span + ADDRESS // item, dtype=t.dtype, device=device)
    begin = (t.data_ptr() - room.data_ptr()) % ADDRESS // item
    return room.as_strided(t.shape, t.stride(), begin).copy_(t)
