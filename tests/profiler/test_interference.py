"""What marks a window, fed with fake folders of the kernel's and with numbers for clocks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dks.profiler import interference
from dks.profiler.interference import ClockRate, Cores, Machine, Source, Watch, quota, throttling

MS = 1_000_000
CALLER = 7


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class Fake:
    """A machine whose clocks and counters a test moves."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.wall = self.ran = self.slept = 0
        self.idle = self.steal = 0
        self.waits: dict[int, int] = {}
        self.wait(CALLER, 0)

    def wait(self, task: int, ns: int) -> None:
        self.waits[task] = self.waits.get(task, 0) + ns
        write(self.root / "task" / str(task) / "schedstat", f"123 {self.waits[task]} 4\n")

    def run(self, ns: int, *, ran: int | None = None, idle: int = 0, steal: int = 0) -> None:
        """Time passes; the thread or process ran all of it unless told otherwise; two cores' jiffies of 10 ms."""
        self.wall += ns
        self.ran += ns if ran is None else ran
        self.idle += idle
        self.steal += steal
        jiffies = [9, 9, 9, self.idle // (10 * MS), 5, 9, 9, self.steal // (10 * MS), 0, 0]
        write(self.root / "stat", "cpu  " + " ".join(map(str, jiffies)) + "\ncpu0 1 2 3\n")

    def cores(self, threads: int = 1) -> Cores:
        return Cores(
            threads,
            self.root / "task",
            wall=lambda: self.wall,
            ran=lambda: self.ran,
            slept=lambda: self.slept,
            caller=lambda: CALLER,
            cores=2,
        )

    def machine(self) -> Machine:
        self.run(0)
        return Machine(self.root / "stat", cores=2, wall=lambda: self.wall, ran=lambda: self.ran, tick=10 * MS)


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


class Saying:
    """A source that says what it is given."""

    def __init__(self, name: str, words: Sequence[str], why: str | None = None) -> None:
        self.name, self._words, self._why, self.started = name, list(words), why, 0

    def unavailable(self) -> str | None:
        return self._why

    def start(self) -> None:
        self.started += 1

    def stop(self) -> list[str]:
        return self._words


class TestWatch:
    def test_says_what_every_source_says(self) -> None:
        watch = Watch([Saying("a", ["one"]), Saying("b", []), Saying("c", ["two", "three"])])
        watch.start()
        assert sorted(watch.stop()) == ["one", "three", "two"]

    def test_leaves_out_what_cannot_be_read_and_says_why(self) -> None:
        absent = Saying("a", ["never"], why="no such file")
        watch = Watch([absent, Saying("b", [])])
        watch.start()
        assert watch.stop() == []
        assert absent.started == 0
        assert watch.unavailable() == {"a": "no such file"}

    @pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel shows no schedstat")
    def test_reads_this_machine(self) -> None:
        watch = Watch()
        for _ in range(3):
            watch.start()
            time.sleep(0.001)
            assert all(isinstance(words, str) for words in watch.stop())
        assert "waiting for a core" not in watch.unavailable()
        assert all(watch.unavailable().values())


class TestCores:
    def test_an_undisturbed_window(self, fake: Fake) -> None:
        source = fake.cores()
        source.start()
        fake.wait(CALLER, 50_000)
        fake.run(10 * MS, ran=10 * MS - 50_000)
        assert source.stop() == []

    def test_threads_that_waited_for_a_core(self, fake: Fake) -> None:
        fake.wait(8, 500 * MS)  # before the window: not of it
        source = fake.cores()
        source.start()
        fake.wait(CALLER, 2 * MS)
        fake.wait(8, 3 * MS)
        fake.run(20 * MS, ran=18 * MS)
        assert source.stop() == ["our threads waited 5.0 ms for a core in 20.0 ms"]

    def test_a_thread_begun_inside_the_window_counts_from_its_beginning(self, fake: Fake) -> None:
        source = fake.cores()
        source.start()
        fake.wait(9, 4 * MS)
        fake.run(20 * MS)
        assert source.stop() == ["our threads waited 4.0 ms for a core in 20.0 ms"]

    def test_a_thread_that_ended_is_forgotten(self, fake: Fake) -> None:
        fake.wait(8, 500 * MS)
        source = fake.cores()
        source.start()
        (fake.root / "task" / "8" / "schedstat").unlink()
        (fake.root / "task" / "8").rmdir()
        fake.run(20 * MS)
        assert source.stop() == []

    def test_a_short_wait_is_no_disturbance_however_short_the_window(self, fake: Fake) -> None:
        source = fake.cores()
        source.start()
        fake.wait(CALLER, interference.LOST_NS)
        fake.run(MS // 2)
        assert source.stop() == []

    def test_steal_is_what_a_thread_lost_that_neither_slept_nor_waited(self, fake: Fake) -> None:
        source = fake.cores()
        source.start()
        fake.run(10 * MS, ran=8 * MS)
        assert source.stop() == ["steal or interrupts took 20 % of the calling thread's time"]

    def test_sleep_is_not_steal(self, fake: Fake) -> None:
        source = fake.cores()
        source.start()
        fake.slept += 1
        fake.run(10 * MS, ran=8 * MS)
        assert source.stop() == []

    @pytest.mark.parametrize("pause", [interference.REUSE_NS // 2, 50 * MS])
    def test_a_disturbance_is_of_one_window(self, fake: Fake, pause: int) -> None:
        source = fake.cores()
        source.start()
        fake.wait(CALLER, 5 * MS)
        fake.run(10 * MS, ran=5 * MS)
        assert source.stop()
        fake.run(pause)
        source.start()
        fake.run(10 * MS)
        assert source.stop() == []

    def test_what_happens_in_a_long_pause_disturbs_no_window(self, fake: Fake) -> None:
        source = fake.cores()
        source.start()
        fake.run(10 * MS)
        assert source.stop() == []
        fake.wait(CALLER, 30 * MS)
        fake.run(50 * MS, ran=20 * MS)
        source.start()
        fake.run(10 * MS)
        assert source.stop() == []

    def test_more_threads_than_cores_wait_for_each_other(self, fake: Fake) -> None:
        assert fake.cores(threads=2).unavailable() is None
        assert fake.cores(threads=3).unavailable() == "3 threads on 2 cores wait for each other"

    def test_a_kernel_without_the_counter(self, tmp_path: Path) -> None:
        why = Cores(1, tmp_path / "none").unavailable()
        assert why is not None and "schedstat" in why


class TestMachine:
    def test_our_own_time_is_no_interference(self, fake: Fake) -> None:
        source = fake.machine()
        source.start()
        fake.run(200 * MS, ran=300 * MS, idle=100 * MS)
        assert source.stop() == []

    def test_others(self, fake: Fake) -> None:
        source = fake.machine()
        source.start()
        fake.run(200 * MS, ran=200 * MS, idle=100 * MS)
        assert source.stop() == ["others ran for 25 % of the machine's time in the last 200 ms"]

    def test_steal_is_not_others(self, fake: Fake) -> None:
        source = fake.machine()
        source.start()
        fake.run(200 * MS, ran=360 * MS, steal=40 * MS)
        assert source.stop() == ["steal took 10 % of the machine's time in the last 200 ms"]

    def test_short_windows_are_judged_together_and_the_verdict_stands(self, fake: Fake) -> None:
        source = fake.machine()
        said = []
        for _ in range(20):
            source.start()
            fake.run(20 * MS, ran=20 * MS)  # the other core is never idle, and not ours
            said.append(source.stop())
        assert said[:9] == [[]] * 9
        assert all(words == ["others ran for 50 % of the machine's time in the last 200 ms"] for words in said[9:])

    def test_a_verdict_ends_with_the_load(self, fake: Fake) -> None:
        source = fake.machine()
        for ran in (200 * MS, 400 * MS):
            source.start()
            fake.run(200 * MS, ran=ran)
            found = source.stop()
        assert found == []

    def test_what_ran_in_a_pause_is_not_counted(self, fake: Fake) -> None:
        source = fake.machine()
        source.start()
        fake.run(100 * MS, ran=200 * MS)
        assert source.stop() == []
        fake.run(500 * MS, ran=0)  # both cores busy with others
        source.start()
        fake.run(200 * MS, ran=400 * MS)
        assert source.stop() == []

    def test_missing(self, tmp_path: Path) -> None:
        why = Machine(tmp_path / "stat").unavailable()
        assert why == f"{tmp_path / 'stat'} cannot be read: No such file or directory"


class TestClockRate:
    @pytest.fixture
    def core(self) -> Iterator[list[int]]:
        yield [0]

    def source(self, root: Path, core: list[int]) -> ClockRate:
        return ClockRate(root, core=lambda: core[0])

    def set(self, root: Path, core: int, mhz: int) -> None:
        write(root / f"cpu{core}" / "cpufreq" / "scaling_cur_freq", f"{mhz * 1000}\n")

    def window(self, source: ClockRate, root: Path, mhz: int) -> list[str]:
        source.start()
        self.set(root, 0, mhz)
        return source.stop()

    def test_a_fall_and_a_rise_are_marked_and_a_waver_is_not(self, tmp_path: Path, core: list[int]) -> None:
        self.set(tmp_path, 0, 3100)
        source = self.source(tmp_path, core)
        assert self.window(source, tmp_path, 3040) == []
        assert self.window(source, tmp_path, 3100) == []
        assert self.window(source, tmp_path, 2400) == ["frequency fell from 3100 to 2400 MHz"]
        assert self.window(source, tmp_path, 3700) == ["frequency rose from 3070 to 3700 MHz"]

    def test_a_lasting_change_becomes_the_usual(self, tmp_path: Path, core: list[int]) -> None:
        self.set(tmp_path, 0, 3100)
        source = self.source(tmp_path, core)
        for _ in range(interference.CLOCK_MEMORY):
            self.window(source, tmp_path, 3100)
        marked = [bool(self.window(source, tmp_path, 2400)) for _ in range(interference.CLOCK_MEMORY)]
        assert marked[0] and not marked[-1]

    def test_the_core_that_the_thread_is_on_is_read(self, tmp_path: Path, core: list[int]) -> None:
        self.set(tmp_path, 0, 3000)
        self.set(tmp_path, 1, 1200)
        source = self.source(tmp_path, core)
        source.start()
        core[0] = 1
        assert source.stop() == ["frequency fell from 3000 to 1200 MHz"]

    def test_unavailable_where_the_kernel_shows_no_clock(self, tmp_path: Path, core: list[int]) -> None:
        why = self.source(tmp_path, core).unavailable()
        assert why is not None and "scaling_cur_freq" in why


class TestThrottling:
    def core(self, root: Path, number: int, package: int, own: int, of_package: int) -> None:
        folder = root / f"cpu{number}"
        write(folder / "topology" / "physical_package_id", f"{package}\n")
        write(folder / "thermal_throttle" / "core_throttle_count", f"{own}\n")
        write(folder / "thermal_throttle" / "package_throttle_count", f"{of_package}\n")

    def test_cores_are_added_and_a_package_counts_once(self, tmp_path: Path) -> None:
        for number in range(4):
            self.core(tmp_path, number, number // 2, own=5, of_package=9)
        source = throttling(tmp_path, allowed=range(4))
        assert source.unavailable() is None
        source.start()
        assert source.stop() == []
        source.start()
        for number in range(4):  # the first package two times more, its cores once each
            self.core(tmp_path, number, number // 2, own=6 if number < 2 else 5, of_package=11 if number < 2 else 9)
        assert source.stop() == ["throttled 4 times"]

    def test_cores_that_we_may_not_use_do_not_count(self, tmp_path: Path) -> None:
        for number in range(2):
            self.core(tmp_path, number, number, own=0, of_package=0)
        source = throttling(tmp_path, allowed=[0])
        source.start()
        self.core(tmp_path, 1, 1, own=3, of_package=3)
        assert source.stop() == []

    def test_of_many_cores_some_are_read(self, tmp_path: Path) -> None:
        for number in range(100):
            self.core(tmp_path, number, 0, own=0, of_package=0)
        source = throttling(tmp_path, allowed=range(100))
        source.start()
        for number in range(100):
            self.core(tmp_path, number, 0, own=1, of_package=0)
        (words,) = source.stop()
        assert 20 <= int(words.split()[1]) <= interference.MAX_COUNTERS

    def test_unavailable_without_counters(self, tmp_path: Path) -> None:
        why = throttling(tmp_path, allowed=[0]).unavailable()
        assert why is not None and "thermal_throttle" in why


class TestQuota:
    def test_a_group_above_ours_has_the_quota(self, tmp_path: Path) -> None:
        membership = write(tmp_path / "cgroup", "0::/pod/box\n")
        groups = tmp_path / "fs"
        write(groups / "pod" / "cpu.max", "200000 100000\n")
        stat = write(groups / "pod" / "cpu.stat", "usage_usec 10\nnr_periods 8\nnr_throttled 2\n")
        write(groups / "pod" / "box" / "cpu.max", "max 100000\n")
        write(groups / "pod" / "box" / "cpu.stat", "usage_usec 10\nnr_periods 0\nnr_throttled 0\n")
        source = quota(groups, membership)
        assert source.unavailable() is None
        source.start()
        assert source.stop() == []
        source.start()
        stat.write_text("usage_usec 99\nnr_periods 9\nnr_throttled 5\n")
        assert source.stop() == ["the CPU quota stopped us 3 times"]

    def test_groups_of_the_first_version(self, tmp_path: Path) -> None:
        membership = write(tmp_path / "cgroup", "4:memory:/a\n2:cpu,cpuacct:/a\n")
        group = tmp_path / "fs" / "cpu,cpuacct" / "a"
        write(group / "cpu.cfs_quota_us", "50000\n")
        stat = write(group / "cpu.stat", "nr_periods 8\nnr_throttled 2\nthrottled_time 7\n")
        source = quota(tmp_path / "fs", membership)
        source.start()
        stat.write_text("nr_periods 9\nnr_throttled 3\nthrottled_time 9\n")
        assert source.stop() == ["the CPU quota stopped us 1 times"]

    @pytest.mark.parametrize("limit", ["max 100000\n", None])
    def test_unavailable_without_a_quota(self, tmp_path: Path, limit: str | None) -> None:
        membership = write(tmp_path / "cgroup", "0::/\n")
        write(tmp_path / "fs" / "cpu.stat", "usage_usec 10\nnr_throttled 0\n")
        if limit:
            write(tmp_path / "fs" / "cpu.max", limit)
        why = quota(tmp_path / "fs", membership).unavailable()
        assert why is not None and "quota" in why


def test_default_sources_are_all_of_them_and_the_most_exact_is_read_nearest_to_the_window() -> None:
    sources: list[Source] = interference.default_sources(threads=os.cpu_count() or 1)
    names = [source.name for source in sources]
    assert names == ["throttling", "CPU quota", "clock rate", "load by others and steal", "waiting for a core"]
