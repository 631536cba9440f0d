"""Peak memory of real calls, energy from fake folders: measured, or null with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dks.profiler.counters import EnergyMeter, peak_memory

MIB = 2**20

measurable = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets the peak")


def floats(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB // 4)


@measurable
class TestPeakMemory:
    def test_what_a_call_keeps(self) -> None:
        kept, grown, why = peak_memory(lambda: floats(64))
        assert why == ""
        assert grown == pytest.approx(64 * MIB, rel=0.03)
        assert kept.numel() == 16 * MIB

    def test_what_a_call_frees_again_counts_at_its_peak(self) -> None:
        _, grown, _ = peak_memory(lambda: float(floats(64)[0]))
        assert grown == pytest.approx(64 * MIB, rel=0.03)

    def test_the_peak_of_an_earlier_call_does_not_count(self) -> None:
        del_me = floats(64)
        del del_me
        _, grown, why = peak_memory(lambda: None)
        assert grown is not None and grown < MIB and why == ""

    def test_memory_of_the_heap_that_is_used_again_counts(self) -> None:
        def small() -> list[bytearray]:
            return [bytearray(8_000) for _ in range(4_000)]

        freed = small()
        above = bytearray(8_000)  # glibc gives back by itself only what lies at the end of the heap
        del freed
        _, grown, _ = peak_memory(small)
        assert grown is not None and grown > 28 * MIB
        del above

    def test_an_error_of_the_call_is_its_own(self) -> None:
        with pytest.raises(ZeroDivisionError):
            peak_memory(lambda: 1 // 0)


class TestPeakMemoryNotMeasured:
    def test_where_the_peak_cannot_be_reset(self, tmp_path: Path) -> None:
        result, grown, why = peak_memory(lambda: 3, tmp_path / "gone")
        assert (result, grown) == (3, None)
        assert "clear_refs" in why and "No such file" in why

    def test_where_the_kernel_shows_no_peak(self, tmp_path: Path) -> None:
        (tmp_path / "status").write_text("Name:\tx\nVmRSS:\t  100 kB\n")
        result, grown, why = peak_memory(lambda: 3, tmp_path)
        assert (result, grown) == (3, None)
        assert "VmHWM" in why

    def test_the_growth_is_the_peak_less_what_was_there(self, tmp_path: Path) -> None:
        status = tmp_path / "status"
        status.write_text("VmHWM:\t  100 kB\nVmRSS:\t  100 kB\n")
        _, grown, _ = peak_memory(lambda: status.write_text("VmHWM:\t  164 kB\nVmRSS:\t  90 kB\n"), tmp_path)
        assert grown == 64 * 1024
        assert (tmp_path / "clear_refs").read_text() == "5"


def domain(root: Path, folder: str, name: str, microjoules: int, wraps_at: int = 10**9) -> Path:
    where = root / folder
    where.mkdir(exist_ok=True)
    (where / "name").write_text(f"{name}\n")
    (where / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    (where / "energy_uj").write_text(f"{microjoules}\n")
    return where / "energy_uj"


def using(counter: Path, microjoules: int, wraps_at: int = 10**9) -> Callable[[], None]:
    """A call that uses so much energy."""

    def call() -> None:
        counter.write_text(str((int(counter.read_text()) + microjoules) % wraps_at))

    return call


class Ticking:
    """A clock that is a tenth of a second on at each look."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> float:
        self.now += 1
        return self.now / 10


class TestEnergyMeter:
    def test_joules_a_call_over_repeated_calls(self, tmp_path: Path) -> None:
        calls: list[int] = []
        one = using(domain(tmp_path, "intel-rapl:0", "package-0", 500), 3_000_000)

        def call() -> None:
            calls.append(1)
            one()

        meter = EnergyMeter(tmp_path, Ticking())
        assert meter.unavailable() is None
        assert meter.joules(call, seconds=1.0) == (pytest.approx(3.0), "")
        assert 5 <= len(calls) <= 11

    def test_a_call_longer_than_the_time_is_made_once(self, tmp_path: Path) -> None:
        call = using(domain(tmp_path, "intel-rapl:0", "package-0", 0), 2_000_000)
        assert EnergyMeter(tmp_path, Ticking()).joules(call, seconds=0.0) == (pytest.approx(2.0), "")

    def test_packages_are_added(self, tmp_path: Path) -> None:
        first = using(domain(tmp_path, "intel-rapl:0", "package-0", 1), 1_000_000)
        second = using(domain(tmp_path, "intel-rapl:1", "package-1", 1), 500_000)
        used, _ = EnergyMeter(tmp_path, Ticking()).joules(lambda: (first(), second()))
        assert used == pytest.approx(1.5)

    def test_a_counter_that_wraps_around(self, tmp_path: Path) -> None:
        counter = domain(tmp_path, "intel-rapl:0", "package-0", 9_500_000, wraps_at=10_000_000)
        call = using(counter, 1_000_000, wraps_at=10_000_000)
        assert EnergyMeter(tmp_path, Ticking()).joules(call, seconds=0.0) == (pytest.approx(1.0), "")

    @pytest.mark.parametrize(
        ("folder", "name"),
        [("intel-rapl:0:0", "core"), ("intel-rapl:1", "psys"), ("intel-rapl-mmio:0", "package-0")],
    )
    def test_nothing_is_counted_twice(self, tmp_path: Path, folder: str, name: str) -> None:
        package = using(domain(tmp_path, "intel-rapl:0", "package-0", 0), 1_000_000)
        other = using(domain(tmp_path, folder, name, 0), 700_000)
        used, _ = EnergyMeter(tmp_path, Ticking()).joules(lambda: (package(), other()))
        assert used == pytest.approx(1.0)

    @pytest.mark.parametrize("there", [True, False])
    def test_missing(self, tmp_path: Path, there: bool) -> None:
        folder = tmp_path / "powercap"
        if there:
            folder.mkdir()
        meter = EnergyMeter(folder)
        why = meter.unavailable()
        assert why is not None and str(folder) in why
        assert meter.joules(lambda: pytest.fail("called for nothing")) == (None, why)

    def test_unreadable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        counter = domain(tmp_path, "intel-rapl:0", "package-0", 0)
        plain = Path.read_text

        def guarded(path: Path, *args: str) -> str:
            if path == counter:
                raise PermissionError(13, "Permission denied", str(path))
            return plain(path, *args)

        monkeypatch.setattr(Path, "read_text", guarded)
        meter = EnergyMeter(tmp_path)
        why = meter.unavailable()
        assert why is not None
        assert str(counter) in why and "Permission denied" in why and "root" in why
        assert meter.joules(lambda: None) == (None, why)

    def test_unreadable_afterwards(self, tmp_path: Path) -> None:
        counter = domain(tmp_path, "intel-rapl:0", "package-0", 0)
        used, why = EnergyMeter(tmp_path, Ticking()).joules(lambda: counter.unlink(missing_ok=True))
        assert used is None and str(counter) in why

    def test_a_counter_that_stands_still_is_no_measurement(self, tmp_path: Path) -> None:
        domain(tmp_path, "intel-rapl:0", "package-0", 5)
        used, why = EnergyMeter(tmp_path, Ticking()).joules(lambda: None)
        assert used is None and "did not move" in why
