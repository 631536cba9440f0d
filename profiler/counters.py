"""Peak memory and energy of a call: measured, or null with the reason. Never estimated."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

RESET_PEAK = "5"
"""What makes ``clear_refs`` set the peak of resident memory back to what is resident now."""


def peak_memory(call: Callable[[], T], process: Path = Path("/proc/self")) -> tuple[T, int | None, str]:
    """Run a call and see how far resident memory grew at its peak.

    Free memory of the heap is given back to the kernel first, so that what the call recycles counts as well.
    The call pays for touching it again: do not time it here. Beside the call this takes under a millisecond;
    some tens where the heap has 100 MB of small holes.

    What is seen is the growth of the whole process, in pages (2 MiB where the kernel gives huge ones); kernels
    that count pages per core round by up to some hundred KiB a core. Not seen: memory asked for and never
    touched; memory that a library keeps from an earlier call and uses again (so take the first call on it);
    memory of a device. What other threads allocate meanwhile is counted too.

    Args:
        call: what to run, once.
        process: the kernel's folder of this process.

    Returns:
        The result of the call; bytes, null if they cannot be measured; why null, else empty.

    Raises:
        Whatever the call raises.
    """
    why, before = "", 0
    try:
        _give_back_free_memory()
        (process / "clear_refs").write_text(RESET_PEAK)
        before = _resident(process, "VmRSS")
    except (OSError, LookupError) as error:
        why = f"peak memory cannot be reset or read: {_reason(error)}"
    result = call()
    if why:
        return result, None, why
    try:
        return result, max(0, _resident(process, "VmHWM") - before), ""
    except (OSError, LookupError) as error:
        return result, None, f"peak memory cannot be read: {_reason(error)}"


class EnergyMeter:
    """Energy of the processor packages, by the RAPL counters that Linux shows under powercap.

    Package domains alone are added up: their sub-domains (cores, uncore, memory) are inside them or not
    of the processor, ``psys`` holds the packages again, and ``intel-rapl-mmio`` counts the same ones a second time.

    Args:
        folder: of the power capping framework.
        clock: monotonic seconds.
    """

    def __init__(
        self, folder: Path = Path("/sys/class/powercap"), clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._folder, self._clock = folder, clock

    def unavailable(self) -> str | None:
        """Why energy cannot be measured here; None where it can."""
        try:
            self._read()
        except (OSError, ValueError, LookupError) as error:
            return _reason(error)
        return None

    def joules(self, call: Callable[[], object], seconds: float = 0.5) -> tuple[float | None, str]:
        """Energy of one call, as the mean over repeated calls.

        It is all that the packages drew meanwhile: their idle power and that of other processes is in it.
        The counters move about every millisecond, so half a second is exact to some thousandths. A counter may
        wrap around once.

        Args:
            call: what to run, again and again; warm.
            seconds: for at least so long, and at least once.

        Returns:
            Joules a call, null if they cannot be measured; why null, else empty.

        Raises:
            Whatever the call raises.
        """
        try:
            before = self._read()
        except (OSError, ValueError, LookupError) as error:
            return None, _reason(error)
        start, calls = self._clock(), 0
        while not calls or self._clock() - start < seconds:
            call()
            calls += 1
        try:
            after = self._read()
            used = sum(_used(before[domain], now) for domain, now in after.items())
        except (OSError, ValueError, LookupError) as error:
            return None, _reason(error)
        if used <= 0:
            return None, f"the energy counters under {self._folder} did not move in {seconds:g} s"
        return used / 1e6 / calls, ""

    def _read(self) -> dict[str, tuple[int, int]]:
        """Microjoules now, and where the counter wraps around, by package domain."""
        found = {}
        for domain in sorted(self._folder.iterdir()) if self._folder.is_dir() else []:
            if re.fullmatch(r"intel-rapl:\d+", domain.name) and _line(domain / "name").startswith("package"):
                found[domain.name] = int(_line(domain / "energy_uj")), int(_line(domain / "max_energy_range_uj"))
        if not found:
            raise LookupError(
                f"no RAPL package domain under {self._folder}: this processor, or this virtual machine, shows none"
            )
        return found


def _used(before: tuple[int, int], now: tuple[int, int]) -> int:
    grown = now[0] - before[0]
    return grown if grown >= 0 else grown + now[1]


def _line(path: Path) -> str:
    return path.read_text().strip()


def _resident(process: Path, field: str) -> int:
    """Bytes of one field of the process's status."""
    status = process / "status"
    match = re.search(rf"^{field}:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
    if match is None:
        raise LookupError(f"{status} has no {field}")
    return int(match[1]) * 1024


def _give_back_free_memory() -> None:
    # glibc only; without it what the call recycles from the heap is not seen, as with any allocator of its own.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    hint = "; it is for root alone: run as root, or make it readable" if isinstance(error, PermissionError) else ""
    return f"{error.filename} cannot be opened: {error.strerror}{hint}"
