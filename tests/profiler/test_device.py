"""Where kernels are measured; the GPU's part on a stand-in for ``torch.cuda`` whose tensors lie on the host."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dks.dispatch import pool
from dks.dispatch.kernel import Kernel
from dks.dispatch.problem import Candidate, Problem
from dks.profiler.bench import Bench, Job
from dks.profiler.config import load
from dks.profiler.device import ADDRESS, Gpu, Host, _moved, moved, open_device
from dks.profiler.draws import HOST
from dks.profiler.timing import StoppingRule

LINEAR = Problem.of("linear", {"dtype": "float32", "bias": "yes", "epilogue": "none"}, {"m": 4, "n": 8, "k": 8})


class FakeCuda:
    """What was asked of ``torch.cuda``, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.allocated = 1000

    def set_device(self, device: torch.device) -> None:
        self.said.append(f"set {device}")

    def get_device_properties(self, _: torch.device) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=4096)

    def synchronize(self, _: torch.device) -> None:
        self.said.append("synchronize")

    def reset_peak_memory_stats(self, _: torch.device) -> None:
        self.said.append("reset")

    def memory_allocated(self, _: torch.device) -> int:
        return self.allocated

    def max_memory_allocated(self, _: torch.device) -> int:
        return self.allocated + 4096

    def Event(self, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.cuda.said.append("record")

    def synchronize(self) -> None:
        self.cuda.said.append("wait")

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end is not self
        return 0.0125


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def gpu(cuda: FakeCuda) -> Gpu:
    made = Gpu("cpu", cuda)
    cuda.said.clear()
    return made


def test_a_call_is_timed_between_events_on_an_idle_device(gpu: Gpu, cuda: FakeCuda) -> None:
    assert gpu.timed(lambda x: cuda.said.append(f"call {x}"), (7,)) == 12_500
    assert cuda.said == ["synchronize", "record", "call 7", "record", "wait"]
    assert gpu.beyond == 8192


def test_memory_is_the_allocators_and_energy_says_why_not(gpu: Gpu, cuda: FakeCuda) -> None:
    assert gpu.peak_memory(lambda: cuda.said.append("call")) == (4096, "")
    assert cuda.said == ["synchronize", "reset", "call", "synchronize"]
    assert gpu.joules(lambda: None, 0.1) == (None, gpu.no_energy())


@pytest.mark.parametrize("offset", [0, 4, 8, 60, 124])
def test_copies_keep_strides_and_alignment(offset: int) -> None:
    room = torch.arange(256, dtype=torch.float32)
    begin = (offset - room.data_ptr()) % ADDRESS // 4
    t = room.as_strided((3, 5), (8, 1), begin)
    there = _moved(t, HOST)
    assert torch.equal(there, t) and there.stride() == t.stride()
    assert there.data_ptr() % ADDRESS == offset and there.data_ptr() != t.data_ptr()


def test_what_is_there_already_is_not_copied() -> None:
    t = torch.ones(3)
    assert moved((t, 5, None), HOST) == (t, 5, None)
    assert moved((t,), HOST)[0] is t
    (there, number) = moved((t, 5), torch.device("meta"))
    assert there.device.type == "meta" and number == 5


def test_the_host_is_the_default() -> None:
    assert isinstance(open_device("cpu"), Host)


def test_a_bench_asks_its_device_for_everything(gpu: Gpu, cuda: FakeCuda) -> None:
    bench = Bench(3, "cold", device=gpu)
    finding, poisoned = bench.check(LINEAR, Candidate.parse("torch.addmm"))
    assert finding.status == "ok" and not poisoned
    assert finding.peak_bytes == 4096 and "GPU" in finding.energy_note
    job = Job(LINEAR, ("torch.linear", "torch.addmm"), StoppingRule(3, 3, 9.0, 0.5), 0)
    rounds = [each for found in bench.time(job) if isinstance(found, list) for each in found]
    assert len(rounds) == 3 and {ns for each in rounds for ns in each.ns.values()} == {12_500}
    assert cuda.said.count("wait") >= 6


OURS = ("triton.", "cutlass.", "cublaslt.")


def test_kernels_that_say_nothing_run_where_pytorchs_operators_do() -> None:
    on_gpu = {kernel.id for kernel in pool.kernels_for("linear", "cuda")}
    assert {id for id in on_gpu if not id.startswith(OURS)} == {
        "torch.linear",
        "torch.linear_inplace",
    }
    for op in pool.operators().values():
        kernels = {kernel.id for kernel in pool.kernels_for(op.name, "cuda")}
        assert op.default in kernels and not any(id.startswith(("tile.", "mkl")) for id in kernels)
    everywhere = {kernel.id for kernel in pool.kernels_for("linear")}
    assert everywhere == {kernel.id for kernel in pool.kernels_for("linear", "cpu")} | on_gpu


def test_a_kernel_may_say_where_it_runs() -> None:
    kernel: Kernel = pool.kernels()["torch.linear"]
    alone = type(kernel)("x.y", "linear", kernel.precision, kernel.bind, form="cubin", devices=("cuda",))
    assert alone.runs_on("cuda") and not alone.runs_on("cpu")


def test_a_sweep_takes_the_candidates_of_its_device(tmp_path: Path) -> None:
    config = tmp_path / "gpu.yaml"
    config.write_text(
        "version: 1\nname: gpu\ndevice: cuda:0\noperators:\n  linear:\n"
        "    bins: {m: {scheme: explicit, edges: [8]}}\n"
        "    problems:\n      - {dims: {n: 32, k: 32}}\n"
    )
    (part,) = load(config).operators
    assert {each.kernel for each in part.candidates} == {each.id for each in pool.kernels_for("linear", "cuda")}
    (part,) = load(config, "cpu").operators
    assert "tile.f32_avx512" in {candidate.kernel for candidate in part.candidates}
