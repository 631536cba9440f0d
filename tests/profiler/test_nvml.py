"""NVML, on a stand-in for ``pynvml`` whose readings a test sets."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dks.profiler import nvml as nvml_module
from dks.profiler.device import Gpu
from dks.profiler.interference import Watch
from dks.profiler.nvml import ABSENT, QUEUED, Clocks, Nvml, Others, Throttling
from tests.profiler.test_device import FakeCuda


class Refused(Exception):
    """As NVML's errors, which have a number."""

    def __init__(self, value: int = 3) -> None:
        super().__init__("Not Supported")
        self.value = value


class FakeNvml:
    """The module; ``readings`` by the end of a function's name: a value, an error, or a function of arguments."""

    def __init__(self, **readings: Any) -> None:
        self.readings: dict[str, Any] = {"ClockInfo": lambda clock: {1: 1980, 2: 3201}[clock], **readings}
        self.asked: list[str] = []

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1234":
            raise Refused(6)
        return "handle"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        what = name.removeprefix("nvmlDeviceGet")

        def read(handle: str, *args: Any) -> Any:
            assert handle == "handle"
            self.asked.append(what)
            found = self.readings.get(what, Refused())
            found = found(*args) if callable(found) else found
            if isinstance(found, Exception):
                raise found
            return found

        return read


def made(**readings: Any) -> tuple[Nvml, FakeNvml]:
    library = FakeNvml(**readings)
    return Nvml("1234", library), library


def test_without_the_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(nvml_module, "import_module", absent)
    blind = Nvml("1234")
    assert blind.lack == blind.no_energy() == ABSENT
    assert blind.joules(lambda: pytest.fail("called for nothing"), 10.0, FakeCuda()) == (None, ABSENT)
    assert Watch(blind.sources()).unavailable() == dict.fromkeys(
        ("GPU clocks", "GPU throttling", Others.name), ABSENT
    )


def test_without_a_driver_or_this_gpu_it_says_so() -> None:
    gone = SimpleNamespace(nvmlInit=lambda: (_ for _ in ()).throw(Refused(12)))
    assert Nvml("1234", gone).lack == "NVML: Not Supported"
    assert Nvml("another", FakeNvml()).lack == "NVML: Not Supported"


def test_a_steady_gpu_disturbs_nothing() -> None:
    nvml, _ = made(CurrentClocksEventReasons=0x1 | 0x2, ComputeRunningProcesses=[], ViolationStatus=held(5))
    watch = Watch(nvml.sources())
    assert watch.unavailable() == {}
    for _ in range(3):
        watch.start()
        assert watch.stop() == []


@pytest.mark.parametrize(
    ("sm", "memory", "words"),
    [
        (1980, 3201, []),
        (1900, 3201, []),
        (1500, 3201, ["the GPU's SM clock fell from 1980 to 1500 MHz at 87 C, 700 W"]),
        (1980, 1600, ["the GPU's memory clock fell from 3201 to 1600 MHz at 87 C, 700 W"]),
        (2100, 3201, ["the GPU's SM clock rose from 1980 to 2100 MHz at 87 C, 700 W"]),
    ],
)
def test_a_clock_that_changed_marks_with_heat_and_power(sm: int, memory: int, words: list[str]) -> None:
    nvml, library = made(Temperature=87, PowerUsage=700_123)
    clocks = Clocks(nvml)
    for _ in range(3):
        clocks.start()
        assert clocks.stop() == []
    clocks.start()
    library.readings["ClockInfo"] = lambda clock: {1: sm, 2: memory}[clock]
    assert clocks.stop() == words


def test_a_lasting_change_is_the_new_usual() -> None:
    nvml, library = made()
    clocks = Clocks(nvml)
    clocks.start()
    clocks.stop()
    library.readings["ClockInfo"] = lambda clock: 1000
    marked = [bool(clocks.stop()) for _ in range(8)]
    assert marked[0] and not marked[-1]


def held(ns: int) -> SimpleNamespace:
    return SimpleNamespace(violationTime=ns)


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0x4, ["throttled: power cap"]),
        (0x20 | 0x8, ["throttled: hardware slowdown", "throttled: heat, by the driver"]),
        (0x1, []),
    ],
)
def test_a_reason_before_or_after_marks(bits: int, words: list[str]) -> None:
    for before, after in ((bits, 0), (0, bits)):
        nvml, library = made(CurrentClocksEventReasons=before)
        throttling = Throttling(nvml)
        throttling.start()
        library.readings["CurrentClocksEventReasons"] = after
        assert throttling.stop() == words


def test_throttling_that_came_and_went_inside_a_window_is_seen_by_its_counter() -> None:
    lost = {0: 10, 1: 70, 3: Refused(), 5: 10**12}
    now = [0]

    def read(policy: int) -> object:
        found = lost[policy]
        return found if isinstance(found, Exception) else held(found)  # type: ignore[arg-type]

    nvml, _ = made(CurrentClocksEventReasons=0, ViolationStatus=read)
    throttling = Throttling(nvml, lambda: now[0])
    throttling.start()
    now[0], lost[0], lost[1] = 100_000_000, 10 + 4_000_000, 70 + 6_000_000
    assert throttling.stop() == ["throttled by heat for 6.0 ms"], "4 % of a window is a tie's worth"


def test_older_drivers_have_another_name_for_the_reasons() -> None:
    nvml, _ = made(CurrentClocksThrottleReasons=0x80)
    throttling = Throttling(nvml)
    assert throttling.unavailable() is None
    throttling.start()
    assert throttling.stop() == ["throttled: power brake"]
    assert "Not Supported" in str(Throttling(made()[0]).unavailable())


def processes(*pids: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid) for pid in pids]


def used(time: int, **busy: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=int(pid[1:]), smUtil=share, timeStamp=time) for pid, share in busy.items()]


def test_a_process_that_computes_beside_us_is_interference() -> None:
    nvml, library = made(ComputeRunningProcesses=processes(7, 8), ProcessUtilization=used(100, p7=40, p8=99))
    others = Others(nvml, own=7)
    assert others.unavailable() is None
    others.start()
    library.readings["ProcessUtilization"] = used(200, p7=40, p8=0)
    assert others.stop() == []
    library.readings["ProcessUtilization"] = used(300, p7=40, p8=25)
    assert others.stop() == ["process 8 computed on the GPU, 25 % of the time"]
    library.readings["ProcessUtilization"] = Refused(6)  # no sample since
    assert others.stop() == []


def test_where_nobody_counts_what_each_does_being_there_is_enough() -> None:
    nvml, library = made(ComputeRunningProcesses=processes(7, 8, 9))
    others = Others(nvml, own=7)
    assert others.stop() == ["2 more processes have the GPU open"]
    library.readings["ComputeRunningProcesses"] = processes(7)
    assert others.stop() == []


def test_in_a_container_we_are_known_by_being_alone() -> None:
    nvml, library = made(ComputeRunningProcesses=processes(4711))
    others = Others(nvml, own=7)
    assert others.unavailable() is None and others.stop() == []
    library.readings["ComputeRunningProcesses"] = processes(4711, 4712)
    assert others.stop() == ["1 more processes have the GPU open"]
    assert "inside a container" in str(others.unavailable())


class Clock:
    """Seconds that pass with each call."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_joules_are_those_of_a_long_window_over_its_calls() -> None:
    clock, cuda = Clock(), FakeCuda()
    nvml, library = made(TotalEnergyConsumption=5000)

    def call() -> None:
        clock.now += 0.01
        library.readings["TotalEnergyConsumption"] += 7  # mJ

    assert nvml.joules(call, 10.0, cuda, clock) == (pytest.approx(0.007), "")
    assert 10.0 <= clock.now < 10.0 + 2 * QUEUED * 0.01
    assert cuda.said[0] == cuda.said[-1] == "synchronize"
    assert cuda.said.count("wait") == cuda.said.count("record") > 2, "no more than two batches are under way"


def test_joules_that_can_t_be_read_have_a_reason() -> None:
    clock, cuda = Clock(), FakeCuda()

    def call() -> None:
        clock.now += 1.0

    refused, _ = made()
    assert refused.joules(call, 10.0, cuda, clock) == (None, "NVML, TotalEnergyConsumption: Not Supported")
    still, _ = made(TotalEnergyConsumption=5000)
    assert still.joules(call, 10.0, cuda, clock) == (None, "the GPU's energy counter did not move in 10 s")


def test_a_gpu_reads_ten_seconds_and_watches_the_host_where_it_is_timed() -> None:
    nvml, _ = made(TotalEnergyConsumption=5000, ComputeRunningProcesses=[], CurrentClocksEventReasons=0)
    gpu = Gpu("cpu", FakeCuda(), nvml)
    assert gpu.energy_s == 10.0 and gpu.no_energy() is None
    graph = [source.name for source in gpu.sources("graph")]
    assert graph == ["others on the GPU", "GPU throttling", "GPU clocks"]
    eager = [source.name for source in gpu.sources("eager")]
    assert eager[:3] == graph and "waiting for a core" in eager and "load by others and steal" not in eager
