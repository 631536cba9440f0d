"""What measuring relies on, on the device itself: clocks of events and replays, emptied caches, what disturbs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from statistics import median

import pytest
import torch

from dks.dispatch.environment import UNKNOWN, _driver, _driver_by
from dks.dispatch.modes import GRAPH
from dks.profiler.device import Gpu
from dks.profiler.interference import Watch

REPLAYS = 50


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    device = Gpu("cuda:0")
    yield device
    device.settle()


def replayed(gpu: Gpu, call: object, args: tuple[torch.Tensor, ...], cold: bool = False) -> float:
    """Median ns of a replay."""
    graph, found = gpu.captured(call, args), list[int]()  # type: ignore[arg-type]
    for turn in range(3 * REPLAYS):
        if cold:
            gpu.empty_cache(turn)
        if (ns := gpu.replayed(graph)) is not None:
            found.append(ns)
        if len(found) == REPLAYS:
            break
    assert len(found) == REPLAYS, f"the host was late {3 * REPLAYS - len(found)} times of {3 * REPLAYS}"
    return median(found)


def test_a_replay_takes_as_long_as_one_of_many_calls_back_to_back(gpu: Gpu) -> None:
    x = torch.randn(4096, 4096, device="cuda").bfloat16()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    x @ x
    torch.cuda._sleep(10**7)
    start.record()
    for _ in range(REPLAYS):
        x @ x
    end.record()
    end.synchronize()
    one = start.elapsed_time(end) * 1e6 / REPLAYS
    assert 0.7 < replayed(gpu, torch.matmul, (x, x)) / one < 1.4


def test_an_eager_call_takes_longer_than_its_replay(gpu: Gpu) -> None:
    x = torch.randn(8, 64, device="cuda").bfloat16()
    eager = median(gpu.timed(torch.matmul, (x, x.T)) for _ in range(REPLAYS))
    assert eager > replayed(gpu, torch.matmul, (x, x.T))


def test_an_emptied_cache_is_colder(gpu: Gpu) -> None:
    x = torch.randn(gpu.beyond // 16, device="cuda")  # a quarter of it
    assert replayed(gpu, torch.sum, (x,), cold=True) > replayed(gpu, torch.sum, (x,))


def test_replays_alone_disturb_no_window(gpu: Gpu) -> None:
    x = torch.randn(1024, 1024, device="cuda").bfloat16()
    watch, said = Watch(gpu.sources(GRAPH)), list[str]()
    replayed(gpu, torch.matmul, (x, x))
    for _ in range(10):
        watch.start()
        replayed(gpu, torch.matmul, (x, x))
        said += watch.stop()
    assert len(said) <= 3, "\n".join(said)


def test_the_driver_is_known_and_the_same_from_its_library() -> None:
    assert _driver() not in (UNKNOWN, "") and _driver_by("libnvidia-ml.so.1") == _driver()


def test_asking_for_the_capability_does_not_open_the_device() -> None:
    """The process that runs a sweep does, and would else be a neighbour to what its workers measure."""
    program = """
import subprocess, torch
def there():
    words = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
before = there()
torch.cuda.get_device_capability()
assert there() == before, (before, there())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
