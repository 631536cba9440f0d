"""What NVIDIA's management library says of a GPU: energy, and whatever disturbs a window of timing.

The library is Python's ``nvidia-ml-py`` (module ``pynvml``, in the extra ``gpu``) over the driver's own. Neither
has to be there, and a GPU, or a part of one, may refuse any reading: that is said in words, and is never fatal.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from statistics import median
from typing import Any, NamedTuple

from dks.profiler.interference import CLOCK_MEMORY, CLOCK_SHARE, LOST_NS, LOST_SHARE, Source

ABSENT = "nvidia-ml-py is not installed, which the extra gpu of dks brings"
NOTHING_FOUND = (0, 6)  # NVML's codes of "done" and "not found", with which it says that there is no sample
QUEUED = 16  # calls in a batch of ``joules``; one batch is queued while another runs, so that the GPU never waits

_SM, _MEMORY, _TEMPERATURE = 1, 2, 0  # NVML's numbers of clocks and sensors

REASONS: Mapping[int, str] = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "heat, by the driver",
    0x40: "heat, by the hardware",
    0x80: "power brake",
}
"""NVML's bits of why clocks are lower than they might be. Left out are being idle, clocks that a person has set,
and limits of a display: none of these comes and goes with a window."""

POLICIES: Mapping[int, str] = {0: "power", 1: "heat", 3: "the board's limits"}
"""NVML's counters of the time that each held clocks down. The one of reliability grows at the highest clock too."""


class Unreadable(Exception):
    """A GPU's or its driver's refusal of a reading, in words."""


class Nvml:
    """One GPU.

    Args:
        uuid: as PyTorch has it, without ``GPU-``: its numbers of devices are others than NVML's.
        library: the module ``pynvml``; imported if None.

    Attributes:
        lack: why nothing can be read, or an empty text.
    """

    def __init__(self, uuid: str, library: Any = None) -> None:
        self.lack = ""
        try:
            self._library = library or import_module("pynvml")
            self._library.nvmlInit()
            self._handle = self._found(uuid)
        except ImportError:
            self.lack = ABSENT
        except Exception as error:  # its errors have no base that is known before it is imported
            self.lack = f"NVML: {error}"

    def _found(self, uuid: str) -> Any:
        try:
            return self._library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except Exception:
            return self._library.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")

    def ask(self, what: str, *args: Any) -> Any:
        """``nvmlDeviceGet`` + ``what`` of this GPU. Raises Unreadable."""
        if self.lack:
            raise Unreadable(self.lack)
        try:
            return getattr(self._library, f"nvmlDeviceGet{what}")(self._handle, *args)
        except Exception as error:
            if what == "ProcessUtilization" and getattr(error, "value", None) in NOTHING_FOUND:
                return []
            raise Unreadable(f"NVML, {what}: {error}") from None

    def state(self) -> str:
        """Temperature and power, for a message; empty where neither can be read."""
        found = []
        with suppress(Unreadable):
            found.append(f"{self.ask('Temperature', _TEMPERATURE)} C")
        with suppress(Unreadable):
            found.append(f"{self.ask('PowerUsage') / 1000:.0f} W")
        return f" at {', '.join(found)}" if found else ""

    def no_energy(self) -> str | None:
        """Why energy can't be read, or None."""
        return _refused(lambda: self.ask("TotalEnergyConsumption"))

    def joules(
        self,
        call: Callable[[], object],
        seconds: float,
        cuda: Any,
        clock: Callable[[], float] = time.perf_counter,
    ) -> tuple[float | None, str]:
        """Energy of one call, as the mean over calls back to back: all that the GPU drew, its idle power included.

        The counter moves in steps of its own; ten seconds hold many of them, and a short window few.

        Args:
            call: what to run, again and again; warm.
            seconds: for at least so long.
            cuda: ``torch.cuda``.

        Returns:
            Joules a call, null if they cannot be measured; why null, else empty.

        Raises:
            Whatever the call raises.
        """
        if (why := self.no_energy()) is not None:
            return None, why
        ends = [cuda.Event() for _ in range(2)]
        cuda.synchronize()
        before = self.ask("TotalEnergyConsumption")
        start, batches = clock(), 0
        while not batches or clock() - start < seconds:
            ends[batches % 2].synchronize()  # of the batch before the last; at first there is nothing to wait for
            for _ in range(QUEUED):
                call()
            ends[batches % 2].record()
            batches += 1
        cuda.synchronize()
        try:
            used = self.ask("TotalEnergyConsumption") - before
        except Unreadable as error:
            return None, str(error)
        if used <= 0:
            return None, f"the GPU's energy counter did not move in {seconds:g} s"
        return used / 1e3 / (batches * QUEUED), ""

    def sources(self) -> list[Source]:
        """What can disturb a window on this GPU."""
        return [Others(self), Throttling(self), Clocks(self)]


class Clocks:
    """The clocks of multiprocessors and memory, which are busy before and after every window.

    As with a CPU's, a window is marked that ends with a clock far from the median of the last readings.
    """

    name = "GPU clocks"

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml
        self._seen: dict[str, deque[int]] = {name: deque(maxlen=CLOCK_MEMORY) for name in ("SM", "memory")}

    def unavailable(self) -> str | None:
        """Why it cannot be read here; None where it can."""
        return _refused(self._read)

    def start(self) -> None:
        """Read before a window."""
        if not self._seen["SM"]:
            self._note()

    def stop(self) -> list[str]:
        """Read after it: what disturbed it, in words with figures."""
        usual = {name: median(seen) for name, seen in self._seen.items() if seen}
        changed = [
            f"the GPU's {name} clock {'fell' if mhz < usual[name] else 'rose'} from {usual[name]:.0f} to {mhz} MHz"
            for name, mhz in self._note().items()
            if name in usual and abs(mhz - usual[name]) > CLOCK_SHARE * usual[name]
        ]
        return [words + self._nvml.state() for words in changed]

    def _note(self) -> dict[str, int]:
        try:
            now = self._read()
        except Unreadable:
            return {}
        for name, mhz in now.items():
            self._seen[name].append(mhz)
        return now

    def _read(self) -> dict[str, int]:
        return {"SM": self._nvml.ask("ClockInfo", _SM), "memory": self._nvml.ask("ClockInfo", _MEMORY)}


class Throttling:
    """Clocks held down by power or heat: NVML's reasons before and after a window, and how long each held in it."""

    name = "GPU throttling"

    def __init__(self, nvml: Nvml, wall: Callable[[], int] = time.perf_counter_ns) -> None:
        self._nvml, self._wall = nvml, wall
        self._before = _Held(0, frozenset(), {})

    def unavailable(self) -> str | None:
        """Why it cannot be read here; None where it can."""
        return _refused(self._reasons)

    def start(self) -> None:
        """Read before a window."""
        self._before = self._read()

    def stop(self) -> list[str]:
        """Read after it: what disturbed it, in words with figures."""
        before, now = self._before, self._read()
        allowed = max(LOST_SHARE * (now.wall - before.wall), LOST_NS)
        lost = {name: ns - before.lost[name] for name, ns in now.lost.items() if name in before.lost}
        found = [f"throttled by {name} for {ns / 1e6:.1f} ms" for name, ns in lost.items() if ns > allowed]
        found += [f"throttled: {reason}" for reason in sorted(before.reasons | now.reasons)]
        return [words + self._nvml.state() for words in found]

    def _reasons(self) -> frozenset[str]:
        try:
            bits = self._nvml.ask("CurrentClocksEventReasons")
        except Unreadable:  # its name in drivers of before 2023
            bits = self._nvml.ask("CurrentClocksThrottleReasons")
        return frozenset(words for bit, words in REASONS.items() if bits & bit)

    def _read(self) -> _Held:
        lost = {}
        for policy, name in POLICIES.items():
            try:
                lost[name] = int(self._nvml.ask("ViolationStatus", policy).violationTime)
            except (Unreadable, AttributeError):  # many GPUs count some of them alone
                continue
        try:
            reasons = self._reasons()
        except Unreadable:
            reasons = frozenset()
        return _Held(self._wall(), reasons, lost)


class _Held(NamedTuple):
    """What ``Throttling`` reads: the time in ns, the reasons, and ns so far by what held clocks down."""

    wall: int
    reasons: frozenset[str]
    lost: dict[str, int]


class Others:
    """Processes that compute on this GPU beside ours.

    Where the driver says how busy each keeps it, those that do; else all that have opened it. The driver's numbers
    of processes are those of the host: inside a container ours can't be told from others, unless it is alone.
    """

    name = "others on the GPU"

    def __init__(self, nvml: Nvml, own: int | None = None) -> None:
        self._nvml, self._own = nvml, own or os.getpid()
        self._since = 0

    def unavailable(self) -> str | None:
        """Why it cannot be read here; None where it can."""
        try:
            found = self._open()
        except Unreadable as error:
            return str(error)
        if self._own not in found and len(found) > 1:
            return f"{len(found)} processes have it open, and none has our number, as inside a container"
        return None

    def start(self) -> None:
        """Read before a window."""
        self._computing()

    def stop(self) -> list[str]:
        """Read after it: what disturbed it, in words with figures."""
        return self._computing()

    def _open(self) -> set[int]:
        return {each.pid for each in self._nvml.ask("ComputeRunningProcesses")}

    def _computing(self) -> list[str]:
        """Who did since the last reading, in words."""
        try:
            found = self._open()
        except Unreadable:
            return []
        if len(found) < 2:
            return []
        present = [f"{len(found) - 1} more processes have the GPU open"]
        if self._own not in found:  # it was alone when the watch began
            return present
        try:
            samples = self._nvml.ask("ProcessUtilization", self._since)
        except Unreadable:
            return present
        # Samples have the driver's time: those of before the first reading belong to no window.
        first, self._since = self._since, max([self._since, *(each.timeStamp for each in samples)])
        busy = {each.pid: each.smUtil for each in samples if each.pid != self._own and each.smUtil} if first else {}
        return [f"process {pid} computed on the GPU, {share} % of the time" for pid, share in sorted(busy.items())]


def _refused(read: Callable[[], object]) -> str | None:
    try:
        read()
    except Unreadable as error:
        return str(error)
    return None
