"""Where kernels are measured; the GPU's part on a stand-in for ``torch.cuda`` whose tensors lie on the host."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dks.dispatch import pool
from dks.dispatch.gpu.launch import ContextLost, LaunchFailed
from dks.dispatch.kernel import Kernel
from dks.dispatch.problem import Candidate, Problem
from dks.profiler.bench import Bench, Job
from dks.profiler.config import ConfigError, load
from dks.profiler.device import (
    ADDRESS,
    HOLD,
    MAX_COPIES_GPU,
    MOST_HOLD,
    MOST_IDLE,
    Gpu,
    Host,
    Uncapturable,
    _moved,
    moved,
    open_device,
)
from dks.profiler.draws import HOST
from dks.profiler.nvml import Nvml
from dks.profiler.timing import StoppingRule

LINEAR = Problem.of("linear", {"dtype": "float32", "bias": "yes", "epilogue": "none"}, {"m": 4, "n": 8, "k": 8})


class FakeCuda:
    """What was asked of ``torch.cuda``, in order.

    Calls run when they are made. A graph runs nothing when it is replayed, but what a test gives it in ``replays``.

    Attributes:
        left: what the next synchronisation raises, and each after it: an error that stays.
        late: answers of an event that is asked whether it has happened.
        replays: called by each replay, in order of capture.
    """

    def __init__(self) -> None:
        self.said: list[str] = []
        self.allocated, self.idle = 1000, 0
        self.left: Exception | None = None
        self.late: list[bool] = []
        self.replays: list[Callable[[], object]] = []
        self.graphs = self.pools = 0
        self.uncapturable = False

    def graph_pool_handle(self) -> str:
        self.pools += 1
        return f"pool {self.pools}"

    def Stream(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: self.said.append("wait for stream"))

    def current_stream(self, device: torch.device) -> object:
        return object()

    def stream(self, _: object) -> AbstractContextManager[None]:
        return nullcontext()

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph(self)

    def _sleep(self, cycles: int) -> None:
        self.said.append(f"sleep {cycles}")

    def set_device(self, device: torch.device) -> None:
        self.said.append(f"set {device}")

    def get_device_properties(self, _: torch.device) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=4096)

    def synchronize(self, *_: torch.device) -> None:
        self.said.append("synchronize")
        if self.left is not None:
            raise self.left

    def reset_peak_memory_stats(self, _: torch.device) -> None:
        self.said.append("reset")

    def memory_allocated(self, _: torch.device) -> int:
        return self.allocated

    def memory_reserved(self, _: torch.device) -> int:
        return self.allocated + self.idle

    def empty_cache(self) -> None:
        self.said.append("empty")
        self.idle = 0

    def max_memory_allocated(self, _: torch.device) -> int:
        return self.allocated + 4096

    def Event(self, enable_timing: bool = False) -> FakeEvent:
        return FakeEvent(self)


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.number = cuda, cuda.graphs
        cuda.graphs += 1

    def capture_begin(self, pool: object) -> None:
        self.cuda.said.append(f"begin {self.number} in {pool}")

    def capture_end(self) -> None:
        self.cuda.said.append(f"end {self.number}")
        if self.cuda.uncapturable:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.cuda.said.append(f"replay {self.number}")
        if self.cuda.replays:
            self.cuda.replays[self.number]()


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.cuda.said.append("record")

    def synchronize(self) -> None:
        self.cuda.said.append("wait")

    def query(self) -> bool:
        return self.cuda.late.pop(0) if self.cuda.late else False

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end is not self
        return 0.0125


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def gpu(cuda: FakeCuda) -> Gpu:
    made = Gpu("cpu", cuda, Nvml("none", SimpleNamespace()))
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
    assert finding.peak_bytes == 4096 and "NVML" in finding.energy_note
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


def test_a_replay_is_timed_while_the_device_waits_for_it(gpu: Gpu, cuda: FakeCuda) -> None:
    replay = gpu.captured(lambda: cuda.said.append("call") or torch.ones(2), ())  # type: ignore[func-returns-value]
    assert cuda.said == [
        "wait for stream", "call", "synchronize", "begin 0 in pool 1", "call", "end 0", "synchronize",
    ]  # fmt: skip
    cuda.said.clear()
    assert gpu.replayed(replay) == 12_500
    assert cuda.said == [f"sleep {HOLD}", "record", "replay 0", "record", "wait"]


def test_a_replay_that_the_host_launched_too_late_is_not_timed(gpu: Gpu, cuda: FakeCuda) -> None:
    replay = gpu.captured(lambda: torch.ones(2), ())
    cuda.late = [True, True, False]
    assert [gpu.replayed(replay) for _ in range(3)] == [None, None, 12_500]
    assert [said for said in cuda.said if said.startswith("sleep")] == [f"sleep {HOLD * n}" for n in (1, 2, 4)]
    cuda.late = [True] * 30
    for _ in range(30):
        gpu.replayed(replay)
    assert cuda.said[-5] == f"sleep {MOST_HOLD}"


def test_what_no_tensor_has_is_given_back_before_a_capture_and_outputs_nobody_asks_for_are_not_kept(
    gpu: Gpu, cuda: FakeCuda
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def call() -> torch.Tensor:
        made.append(weakref.ref(y := torch.ones(2)))
        return y

    cuda.idle = MOST_IDLE + 1
    graphs = [gpu.captured(call, (), keep) for keep in (True, False)]
    assert cuda.said.count("empty") == 1 and cuda.said.index("empty") < cuda.said.index("begin 0 in pool 1")
    assert [each() is not None for each in made] == [False, True, False, False]
    assert len(graphs) == 2


def test_a_host_that_was_held_up_once_is_not_waited_for_ever_after(gpu: Gpu, cuda: FakeCuda) -> None:
    replay = gpu.captured(lambda: torch.ones(2), ())
    cuda.late = [True] * 30 + [False] * 200
    for _ in range(230):
        gpu.replayed(replay)
    assert cuda.said[-5] == f"sleep {HOLD}"


def test_what_a_replay_returns_is_a_copy_of_what_it_wrote(gpu: Gpu, cuda: FakeCuda) -> None:
    written = (torch.zeros(2), torch.zeros(3))
    cuda.replays = [lambda: [t.add_(1) for t in written], lambda: written[0].add_(1)]
    both, one = gpu.captured(lambda: written, ()), gpu.captured(lambda: written[0], ())
    first = both(), one()
    assert isinstance(first[0], tuple) and torch.equal(first[0][0], torch.ones(2))
    both()
    assert torch.equal(first[0][1], torch.ones(3)) and torch.equal(first[1], torch.full((2,), 2.0))  # type: ignore[arg-type]


def test_graphs_share_a_pool_for_as_long_as_one_of_them_lives(gpu: Gpu, cuda: FakeCuda) -> None:
    """PyTorch refuses a pool that all graphs have left."""
    held = [gpu.captured(lambda: torch.ones(2), ()) for _ in range(2)]
    del held[0]
    held.append(gpu.captured(lambda: torch.ones(2), ()))
    held.clear()
    gc.collect()
    gpu.captured(lambda: torch.ones(2), ())
    begun = [said.split(" in ")[1] for said in cuda.said if said.startswith("begin")]
    assert begun == ["pool 1", "pool 1", "pool 1", "pool 2"]


def test_what_can_t_be_captured_is_told_by_its_first_error(gpu: Gpu, cuda: FakeCuda) -> None:
    collecting: list[bool] = []
    calls = iter([None, RuntimeError("a synchronisation is not permitted when stream is capturing")])

    def call() -> torch.Tensor:
        collecting.append(gc.isenabled())
        if (error := next(calls)) is not None:
            cuda.uncapturable = True
            raise error
        return torch.ones(2)

    with pytest.raises(Uncapturable, match="can't be captured in a CUDA graph: RuntimeError: a synchronisation"):
        gpu.captured(call, ())
    assert collecting == [True, False] and gc.isenabled(), "garbage is not freed in the middle of a capture"
    with pytest.raises(KeyError):  # what the plain call raises is its own
        gpu.captured(lambda: {}["x"], ())


@pytest.mark.parametrize("size", [1, 1000, 8192 // MAX_COPIES_GPU, 5000, 8192, 10**6])
def test_rotation_goes_through_twice_the_cache_or_not_at_all(gpu: Gpu, size: int) -> None:
    copies = gpu.copies(size)
    assert copies == 1 or gpu.beyond <= copies * size < gpu.beyond + size
    assert copies <= MAX_COPIES_GPU and gpu.copies(0) == 1


def test_no_copy_of_a_gigabyte_is_made_to_evict_60_megabytes() -> None:
    cuda = FakeCuda()
    cuda.get_device_properties = lambda _: SimpleNamespace(L2_cache_size=60 * 2**20)  # type: ignore[method-assign]
    big = Gpu("cpu", cuda, Nvml("none", SimpleNamespace()))
    assert big.copies(2**30) == 1 and big.copies(16 * 2**20) == 8 and big.copies(2**20) == 1
    assert max(big.copies(size) * size for size in (2**k for k in range(20, 31)) if big.copies(size) > 1) <= 2**27


def test_the_cache_is_emptied_in_the_stream_before_the_time_begins(
    gpu: Gpu, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gpu, "empty_cache", lambda self, turn: cuda.said.append("empty"))
    bench = Bench(3, "cold", device=gpu)
    list(bench.time(Job(LINEAR, ("torch.linear",), StoppingRule(2, 2, 9.0, 0.5), 0)))
    spans = " ".join(cuda.said).split("empty")[1:]
    assert len(spans) == 2 and all(span.startswith(" synchronize record record wait") for span in spans)


def in_graphs(gpu: Gpu, names: tuple[str, ...] = ("torch.linear", "torch.addmm")) -> tuple[Bench, Job]:
    return Bench(3, "cold", device=gpu), Job(LINEAR, names, StoppingRule(3, 3, 9.0, 0.5), 0, mode="graph")


def test_a_contest_of_graphs_has_one_for_each_copy_in_turn(gpu: Gpu, cuda: FakeCuda) -> None:
    bench, job = in_graphs(gpu)
    gpu.copies = lambda size: 3  # type: ignore[method-assign]
    found = list(bench.time(dataclasses.replace(job, recheck=False)))
    rounds = [each for one in found if isinstance(one, list) for each in one]
    assert len(rounds) == 3 and {ns for each in rounds for ns in each.ns.values()} == {12_500}
    replayed = [int(said.split()[1]) for said in cuda.said if said.startswith("replay")]
    assert cuda.graphs == 6 and {n // 3 for n in replayed} == {0, 1}
    turns = [n % 3 for n in replayed]
    assert turns == [(turns[0] + i) % 3 for i in range(6)], "what was replayed last comes last"


def test_what_changed_in_place_must_reach_a_replay(gpu: Gpu, cuda: FakeCuda) -> None:
    """Here a replay does nothing, so that its output stays that of the capture."""
    bench, job = in_graphs(gpu)
    finding, _ = bench.check(LINEAR, Candidate.parse("torch.linear"), "graph")
    assert finding.status == "wrong_result" and "after timing" in finding.reason
    assert bench.check(LINEAR, Candidate.parse("torch.linear"))[0].status == "ok"
    late = [found for found in bench.time(job) if isinstance(found, tuple)]
    assert {name: found.status for name, found in late} == dict.fromkeys(job.names, "wrong_result")


def test_what_is_right_at_once_is_judged_again_only_as_a_graph(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, _ = in_graphs(gpu)
    checked: list[Problem] = []
    check = bench._checker.check
    monkeypatch.setattr(bench._checker, "check", lambda *asked: checked.append(asked[0]) or check(*asked))  # type: ignore[func-returns-value]
    linear, other = Candidate.parse("torch.linear"), dataclasses.replace(LINEAR, align=16)
    found = [bench.check(LINEAR, linear, mode)[0].status for mode in ("eager", "graph", "eager")]
    assert found == ["ok", "wrong_result", "ok"] and checked == [LINEAR, LINEAR]
    bench.check(other, linear, "graph")
    assert checked[2:] == [other], "nothing is known of another problem"


def test_a_candidate_that_no_graph_holds_fails_in_graphs_alone(gpu: Gpu, cuda: FakeCuda) -> None:
    bench, job = in_graphs(gpu)
    cuda.uncapturable = True
    finding, poisoned = bench.check(LINEAR, Candidate.parse("torch.linear"), "graph")
    assert finding.status == "failed" and "can't be captured in a CUDA graph" in finding.reason
    assert poisoned, "what is left of a capture is a mess"
    assert bench.check(LINEAR, Candidate.parse("torch.linear"), "eager")[0].status == "ok"
    ((name, found),) = list(bench.time(job))
    assert name == "torch.linear" and found.status == "failed" and "captured" in found.reason


ILLEGAL = RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")


def test_an_error_that_shows_at_the_next_synchronisation_is_charged_to_the_call_before_it(
    gpu: Gpu, cuda: FakeCuda
) -> None:
    noted: list[str] = []
    bench = Bench(3, "cold", noted.append, gpu)
    real = pool.kernels()["torch.addmm"]

    def binds(*args: object) -> Callable[..., object]:
        run = real.bind(*args)

        def breaks(x: torch.Tensor) -> object:
            y = run(x)
            cuda.left = ILLEGAL
            return y

        return breaks

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pool.kernels(), "torch.addmm", dataclasses.replace(real, bind=binds))
        finding, poisoned = bench.check(LINEAR, Candidate.parse("torch.addmm"))
        assert (finding.status, finding.reason, poisoned) == ("crashed", str(ILLEGAL).splitlines()[0], True)
        cuda.left = None
        noted.clear()
        ((name, found),) = list(
            bench.time(Job(LINEAR, ("torch.linear", "torch.addmm"), StoppingRule(2, 2, 9.0, 0.5), 0))
        )
    assert (name, found.status) == ("torch.addmm", "crashed") and "illegal memory access" in found.reason
    assert noted[-1] == "torch.addmm", "it is the one in flight until it is known to be done"


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (ILLEGAL, True),
        (RuntimeError("CUDA error: misaligned address"), True),
        (RuntimeError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("CUDA error: something that nobody has heard of"), True),
        (ContextLost("CUDA error 700: an illegal address, in k_16"), True),
        (torch.AcceleratorError("CUDA error: misaligned address"), True),
        (RuntimeError("CUDA error: invalid configuration argument"), False),
        (RuntimeError("CUDA error: operation not permitted when stream is capturing"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (LaunchFailed("invalid argument"), False),
        (ValueError("CUDA error: an illegal memory access, as text"), False),
    ],
)
def test_errors_that_stay_are_told_from_those_that_do_not(gpu: Gpu, error: Exception, stays: bool) -> None:
    assert bool(gpu.lost(error)) is stays is bool(Host().lost(error))


def test_a_device_that_can_t_be_waited_for_is_lost_whatever_the_call_said(gpu: Gpu, cuda: FakeCuda) -> None:
    cuda.left = ILLEGAL
    assert gpu.lost(ValueError("shapes do not fit")) == "CUDA error: an illegal memory access was encountered"
    assert gpu.lost(RuntimeError("CUDA error: invalid argument"))


def test_graphs_are_refused_on_a_cpu(tmp_path: Path) -> None:
    config = tmp_path / "graphs.yaml"
    text = (
        "version: 1\nname: gpu\ndevice: DEVICE\noperators:\n  linear:\n"
        "    bins: {m: {scheme: explicit, edges: [8]}}\n"
        "    problems:\n      - {dims: {n: 32, k: 32}}\nmeasure: {modes: MODES}\n"
    )
    config.write_text(text.replace("DEVICE", "cuda:0").replace("MODES", "[graph, eager]"))
    assert load(config).measure.modes == ("eager", "graph")
    with pytest.raises(
        ConfigError, match=r"measure\.modes: found graph on a CPU, expected eager: it has no graphs"
    ):
        load(config, "cpu")
    for wrong in ("[]", "[lazy]", "graph", "[eager, eager]"):
        config.write_text(text.replace("DEVICE", "cuda:0").replace("MODES", wrong))
        with pytest.raises(ConfigError, match="expected a list of eager and graph, each once at most"):
            load(config)
