"""``make bench-gpu``: what the device is asked for, in which order, and what is made of its times; no GPU needed.

The device is a stand-in whose tensors lie on the host. Its times are those that a call names, or the clock's.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import (
    gpu,
    gpu_attention,
    gpu_gemm,
    gpu_heldout,
    gpu_launch,
    gpu_llama,
    gpu_peers,
    gpu_rows,
    gpu_run,
    gpu_shapes,
    gpu_views,
    report,
    traffic,
)
from bench.gpu import EAGER, GRAPH, OURS, Bench, Case, Cell, Gpu, NotHere, each
from dks.dispatch.environment import Environment
from dks.dispatch.gpu.cublaslt.library import Algorithm, Refused
from dks.dispatch.problem import Problem
from dks.profiler.config import load

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
PLACE = Environment("cuda", "Some GPU 8 SMs", "sm_90", "1.0", "2.11", "cuda-13", "none", "none", "")


class FakeCuda:
    """What was asked of ``torch.cuda``, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.broken = False

    def is_available(self) -> bool:
        return True

    def set_device(self, device: torch.device) -> None:
        self.said.append(f"set {device}")

    def get_device_properties(self, _: torch.device) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=4096)

    def synchronize(self) -> None:
        self.said.append("synchronize")
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    def Event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        return SimpleNamespace(
            record=lambda: self.said.append("record"),
            synchronize=lambda: self.said.append("wait"),
            elapsed_time=lambda _: 0.0125,
        )

    def current_stream(self) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=7, wait_stream=lambda _: self.said.append("main waits"))

    def Stream(self) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda _: self.said.append("side waits"))

    @contextmanager
    def stream(self, _: object) -> Iterator[None]:
        self.said.append("side")
        yield

    def CUDAGraph(self) -> SimpleNamespace:
        names = {"capture_begin": "capture", "capture_end": "captured", "replay": "replay"}
        return SimpleNamespace(**{name: partial(self.said.append, word) for name, word in names.items()})


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    made = FakeCuda()
    real = torch.device
    monkeypatch.setattr(gpu.torch, "device", lambda name: real("cpu"))
    return made


def test_an_eager_call_finds_an_idle_device_and_a_captured_one_a_busy_one(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Gpu(cuda)
    monkeypatch.setattr(there, "_empty_cache", lambda: cuda.said.append("other memory"))
    cuda.said.clear()
    assert there.eager(lambda: cuda.said.append("call")) == 12_500
    assert cuda.said == ["other memory", "synchronize", "record", "call", "record", "wait"]
    cuda.said.clear()
    there.device(lambda: cuda.said.append("call"))
    assert cuda.said == ["other memory", "record", "call", "record", "wait"]
    cuda.said.clear()
    replay = there.capture(lambda: cuda.said.append("call") or "answer")
    warm_up = ["side waits", "side", "call", "call", "synchronize"]
    assert cuda.said == [*warm_up, "capture", "call", "captured", "main waits"]
    cuda.said.clear()
    assert replay() == "answer" and cuda.said == ["replay"]
    cuda.said.clear()

    def reads_a_value() -> None:
        if "capture" in cuda.said:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        there.capture(reads_a_value)
    assert cuda.said[-1] == "captured", "what was begun is ended, so that the next one can begin"
    assert there.beyond == 8192 and there.stream() == 7


def test_an_error_that_stays_is_told_from_others(cuda: FakeCuda) -> None:
    there = Gpu(cuda)
    cuda.broken = True
    with pytest.raises(gpu.Broken, match=r"^CUDA error: an illegal memory access was encountered$"):
        there.wait()


class Named:
    """A call that says how long it takes."""

    def __init__(self, ns: float, y: torch.Tensor | None) -> None:
        self.ns, self.y = ns, y

    def __call__(self) -> torch.Tensor | None:
        return self.y


class FakeGpu(Gpu):
    """Tensors on the host; a call takes what it says, a hundredth more each time it is asked."""

    def __init__(self) -> None:
        self.torch, self.beyond = torch.device("cpu"), 4096
        self.log: list[tuple[str, object]] = []
        self.broken = False

    def eager(self, call: Callable[[], object]) -> float:
        return self._time("eager", call)

    def device(self, call: Callable[[], object]) -> float:
        return self._time("device", call)

    def _time(self, mode: str, call: Callable[[], object]) -> float:
        before = time.perf_counter_ns()
        call()
        self.log.append((mode, call))
        if isinstance(call, Named):
            return call.ns * (1 + len(self.log) % 7 / 1000)
        return float(time.perf_counter_ns() - before)

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        self.log.append(("capture", call))
        return call

    def stream(self) -> int:
        return 0

    def tidy(self) -> None: ...

    def wait(self) -> None:
        if self.broken:
            raise gpu.Broken("it is gone")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for module in (gpu, gpu_run, gpu_heldout):
        monkeypatch.setattr(module, "HOME", tmp_path / "runs" / "gpu")
    for name in ("LEAST", "MOST"):
        monkeypatch.setattr(gpu, name, 8)
    return tmp_path


@pytest.fixture
def quick(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two copies and one thread: what is timed are sums of a few numbers. Nothing is compiled: it takes seconds."""
    monkeypatch.setattr(gpu, "MOST_COPIES", 2)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def named(ns: float, y: float = 1.0) -> gpu.Maker:
    return lambda copies: [Named(ns, torch.full((4,), y)) for _ in copies]


def case(name: str = "a", ours: float = 100.0, peer: float = 200.0, **more: Any) -> Case:
    makers = {"peer": named(peer), OURS: named(ours), **more.pop("makers", {})}
    return Case(name, lambda copy: (torch.zeros(256),), makers, **more)


def test_a_case_rotates_copies_and_times_everybody_in_each_round(home: Path) -> None:
    there = FakeGpu()
    drawn: list[int] = []
    made = case()
    made = Case("a", lambda copy: (drawn.append(copy), torch.zeros(256))[1:], made.makers)
    cells = Bench(there, "t", 60.0).measure([made])
    assert drawn == [0, 1, 2, 3] * 2, "4096 bytes beyond the cache take 4 copies of 1024"
    assert [cell.mode for cell in cells] == [EAGER, GRAPH]
    for cell in cells:
        assert len(cell.ns["peer"]) == len(cell.ns[OURS]) >= 8
        ratio = cell.ratio("peer")
        assert ratio is not None and ratio.value == pytest.approx(2.0, rel=0.02) and ratio.low <= ratio.high
    assert cells[0].ratio("nobody") is None
    assert sum(what == "capture" for what, _ in there.log) == 8, (
        "each copy of each is captured, in graph mode alone"
    )
    turns = [call for what, call in there.log if what == "eager"]
    by_call = {id(call): sum(other is call for other in turns) for call in turns}
    assert len(by_call) == 8 and max(by_call.values()) - min(by_call.values()) <= 1, "copies take turns"


def test_a_wrong_answer_and_one_that_raises_are_left_out(home: Path) -> None:
    def refused(_: object) -> list[Callable[[], object]]:
        raise Refused("not for this shape\nand more")

    more = {
        "wrong": named(1.0, 1.1),
        "refused": refused,
        "copy": lambda copies: [Named(50.0, None) for _ in copies],
    }
    (cell, _) = Bench(FakeGpu(), "t", 60.0).measure([case(makers=more)])
    assert set(cell.ns) == {"peer", OURS, "copy"}
    assert "off by 1.0e-01" in cell.lost["wrong"] and cell.lost["refused"] == "Refused: not for this shape"


def test_the_answer_that_counts_is_that_of_the_mode(home: Path) -> None:
    class Capturing(FakeGpu):
        def capture(self, call: Callable[[], object]) -> Callable[[], object]:
            assert isinstance(call, Named) and call.y is not None
            return Named(call.ns, call.y * 1.1 if call.ns == 100.0 else call.y)  # ours, by another kernel

    graph, eager = Bench(Capturing(), "t", 60.0).measure([case(modes=(GRAPH, EAGER))])
    assert "off by 1.0e-01" in graph.lost[OURS] and OURS in eager.ns


@pytest.mark.parametrize(("free", "given_back"), [(69, True), (70, False)])
def test_memory_of_graphs_that_are_gone_is_given_back_before_it_runs_out(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, free: int, given_back: bool
) -> None:
    monkeypatch.setattr(cuda, "mem_get_info", lambda: (free, 140), raising=False)
    monkeypatch.setattr(cuda, "empty_cache", lambda: cuda.said.append("emptied"), raising=False)
    Gpu(cuda).tidy()
    assert (cuda.said[-1] == "emptied") is given_back


def test_cells_are_kept_and_a_run_goes_on(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = Bench(FakeGpu(), "t", 60.0, ["x"])
    (cell,) = first.measure([case("a", modes=(EAGER,))])
    with (home / "runs" / "gpu" / "cells" / "t.jsonl").open("a") as file:
        file.write('\n{"name": "cut sho')
    there = FakeGpu()
    again = Bench(there, "t", 60.0, ["x"]).measure([case("a", modes=(EAGER,)), case("b", modes=(EAGER,))])
    assert again[0] == cell and again[1].name == "b"
    assert len(Bench(there, "t", -1.0, ["x"]).measure([case("a", modes=(EAGER,)), case("b", modes=(EAGER,))])) == 2
    late = Bench(there, "t", -1.0, ["another commit"])
    assert late.measure([case("a", modes=(EAGER,))]) == []
    assert late.notes == ["no time for 1 of 1 cells; run it again to go on"]


def test_a_device_that_is_lost_ends_the_run_and_keeps_what_was_measured(home: Path) -> None:
    there = FakeGpu()

    def fatal(_: object) -> list[Callable[[], object]]:
        there.broken = True
        raise RuntimeError("CUDA error: misaligned address")

    bench = Bench(there, "t", 60.0)
    cells = bench.measure([case("a"), case("b", makers={"fatal": fatal}), case("c")])
    assert [cell.name for cell in cells] == ["a", "a"]
    assert bench.notes == ["stopped at b, eager: it is gone; run it again to go on"]


def cell(name: str, peer: Sequence[float], ours: Sequence[float], weight: float = 1.0) -> Cell:
    return Cell(name, GRAPH, weight, {"flop": 1.0}, {"peer": peer, OURS: ours}, {})


def test_rows_over_cells() -> None:
    cells = [cell("a", [400.0] * 8, [100.0] * 8), cell("b", [50.0] * 8, [100.0] * 8, weight=10.0)]
    mean = gpu_run.row("x", "words", "peer", cells, 1.1).to_json()
    assert mean["ratio"] == pytest.approx(math.sqrt(2.0), rel=1e-3) and mean["worst"] == 0.5
    assert mean["worst_cell"] == "b" and mean["target"] == 1.1 and len(mean["cells"]) == 2  # type: ignore[arg-type]
    assert gpu_run.row("x", "words", "peer", cells, 1.1, "worst").to_json()["ratio"] == 0.5
    weighted = gpu_run.row("x", "words", "peer", cells, 1.1, "weighted").to_json()
    assert weighted["ratio"] == pytest.approx((400 + 500) / (100 + 1000), rel=1e-3) and weighted["pairs"] == 8
    lost = Cell("c", GRAPH, 1.0, {}, {OURS: [1.0] * 8}, {"peer": "ValueError: no"})
    some = gpu_run.row("x", "words", "peer", [*cells, lost], None)
    assert some.extra["note"] == "peer or dks missing in 1 of 3 cells; ValueError: no"
    none = gpu_run.row("x", "words", "peer", [lost], None)
    assert none.ratio is None and "ValueError: no" in str(none.extra["note"])


def test_the_table_and_the_result_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [cell("a", [400.0] * 8, [100.0] * 8)]
    gpu_run.report("gemm", [gpu_run.row("x", "words", "peer", cells, 1.1)], ["a note"], PLACE)
    written = json.loads((home / "runs" / "gpu-gemm" / "result.json").read_text())
    assert {"command", "commit", "notes", "rows"} <= written.keys() and written["environment"]["device"] == "cuda"
    (row,) = written["rows"]
    assert {"id", "workload", "peer", "ratio", "ci_low", "ci_high", "target"} <= row.keys() and row["ratio"] == 4.0
    said = capsys.readouterr().out
    assert "yes" in said and "a note" in said


@pytest.mark.parametrize("name", ["gemm", "llama", "launch", "rows", "attention", "views"])
def test_without_a_gpu_each_says_so_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = {
        "gemm": gpu_gemm, "llama": gpu_llama, "launch": gpu_launch,
        "rows": gpu_rows, "attention": gpu_attention, "views": gpu_views,
    }[name]  # fmt: skip
    assert gpu_run.run(name, "", module.rows, words=[]) == 2
    assert capsys.readouterr().err == f"bench gpu-{name}: needs an NVIDIA GPU, and PyTorch sees none here\n"


def test_from_the_command_line_to_the_result_file(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_run, "Gpu", FakeGpu)
    monkeypatch.setattr(Environment, "current", lambda _device: PLACE)
    (home / "runs" / "gpu" / "out" / "p").mkdir(parents=True)
    (home / "runs" / "gpu" / "out" / "p" / "manifest.json").write_text("{}")
    monkeypatch.setattr(gpu_run, "package", lambda _: SimpleNamespace(stats=lambda: {"ops": {}}))

    def rows(bench: Bench) -> Iterator[report.Row]:
        assert not torch.is_grad_enabled()
        yield gpu_run.row("x", "words", "peer", bench.measure([case(modes=(GRAPH,))]), 1.5)

    assert gpu_run.run("try", "", rows, ["p"], ["--seconds", "9"]) == 0
    written = json.loads((home / "runs" / "gpu-try" / "result.json").read_text())
    assert written["rows"][0]["ratio"] == pytest.approx(2.0, rel=0.02)
    assert written["notes"][0] == "p: not called" and written["notes"][1].startswith("before: nvidia-smi")
    lines = (home / "runs" / "gpu" / "cells" / "try.jsonl").read_text().splitlines()
    assert len(json.loads(lines[0])) == 2, "the commit and the package's digest"


def test_who_served_is_said() -> None:
    ops = {"linear": {"hits": {"exact": 3, "bin": 1}, "fallbacks": {"unknown_shape": 2}}}
    assert gpu_run.served_by("p", ops) == "p: linear 4 hits, 2 unknown_shape"
    assert gpu_run.served_by("p", {}) == "p: not called"


def test_a_package_that_is_not_there_is_named(
    home: Path, cuda: FakeCuda, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NotHere, match="needs the package h200_gemm"):
        gpu_run.package("h200_gemm")
    assert gpu_heldout.main() == 2 and "needs one of the packages" in capsys.readouterr().err


def test_a_package_that_is_refused_here_is_not_measured(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = home / "runs" / "gpu" / "out" / "refused_one"
    made.mkdir(parents=True)
    (made / "manifest.json").write_text("{}")
    monkeypatch.setattr(sys, "path", [])  # what package() adds goes with the test
    said = {"table": "refused: driver: 580.1 != 590.1"}
    monkeypatch.setattr(gpu_run.importlib, "import_module", lambda _: SimpleNamespace(stats=lambda: said))
    with pytest.raises(NotHere, match="refused_one would measure the framework against"):
        gpu_run.package("refused_one")
    said["table"] = "serving"
    assert gpu_run.package("refused_one").stats() is said


SERVED = SimpleNamespace(
    prepare_linear=lambda weight, bias=None: lambda x: F.linear(x, weight, bias),
    prepare_rms_norm=lambda weight, eps: (
        lambda x, residual=None: (
            F.rms_norm(x, weight.shape, weight, eps)
            if residual is None
            else (F.rms_norm(x + residual, weight.shape, weight, eps), x + residual)
        )
    ),
    linear=F.linear,
    softmax=torch.softmax,
    rms_norm=F.rms_norm,
    cross_entropy=lambda logits, targets, reduction="none": F.cross_entropy(logits, targets, reduction=reduction),
    silu_and_mul=lambda x: F.silu(x[..., :512]) * x[..., 512:],
    rotary=gpu_peers.default_of(
        Problem.of("rotary", {"dtype": "bfloat16", "cache": "same"}, {"tokens": 64, "h": 8, "hkv": 2, "d": 128})
    ),
    attention=F.scaled_dot_product_attention,
    paged_attention=gpu_peers.default_of(
        Problem.of(
            "paged_attention", {"dtype": "bfloat16"}, {"b": 4, "kv": 256, "h": 8, "hkv": 2, "d": 128, "page": 16}
        )
    ),
)
"""A package as torch would be one: every answer is right."""


def served(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
    for module in modules:
        monkeypatch.setattr(module, "package", lambda _name: SERVED)
        if hasattr(module, "compiled"):
            monkeypatch.setattr(module, "compiled", lambda f: each(lambda *copy: lambda: f(*copy)))


def ratios(rows: Iterator[report.Row]) -> dict[str, float | None]:
    found = {row.id: row for row in rows}
    assert all(row.ratio is None or row.ratio.low <= row.ratio.high for row in found.values())
    return {id: row.target for id, row in found.items()}


def test_gemm(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, gpu_gemm)
    monkeypatch.setattr(gpu_gemm, "shapes", lambda: [(4, 8, 16), (8, 16, 32)])
    monkeypatch.setattr(gpu_gemm, "SMALL", 2000.0)
    monkeypatch.setattr(gpu_gemm, "best_of_cublaslt", lambda _: each(lambda x, w: lambda: x @ w.T))
    assert ratios(gpu_gemm.rows(Bench(FakeGpu(), "t", 60.0))) == {
        "gemm-torch-eager": 1.10,
        "gemm-torch-worst-eager": 0.98,
        "gemm-torch-graph": 1.10,
        "gemm-torch-worst-graph": 0.98,
        "gemm-cublaslt-graph": 1.03,
        "gemm-cublaslt-small-graph": 1.10,
        "gemm-cublaslt-worst-graph": 0.98,
    }


def test_llama(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, gpu_llama)
    monkeypatch.setattr(gpu_llama, "MODELS", {"8b": ("p", ((8, 16, 2), (16, 8, 1)))})
    monkeypatch.setattr(gpu_llama, "read_histogram", lambda _: ((1, 10.0), (2, 5.0), (3, 1.0), (64, 0.5)))
    found = list(gpu_llama.rows(Bench(FakeGpu(), "t", 60.0), ["8b"]))
    assert {row.id: row.target for row in found} == {
        "llama-8b-torch-eager": 1.10,
        "llama-8b-compile-eager": 1.03,
        "llama-8b-torch-graph": 1.10,
        "llama-8b-compile-graph": 1.03,
    }
    weights = [part["weight"] for part in found[0].extra["cells"]]  # type: ignore[attr-defined]
    assert sum(weights) == pytest.approx(3.0), "shares of a pass, times the calls of a model's pass"


def test_llama_takes_the_models_whose_packages_are_built(home: Path) -> None:
    assert gpu_llama.there() == ["8b"], "whose absence is then said"
    folder = home / "runs" / "gpu" / "out" / "h200_llama3_70b"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    assert gpu_llama.there() == ["70b"]


def test_points_of_traffic_have_its_passes_and_its_prompts() -> None:
    histogram = ((1, 900.0), (30, 90.0), (1000, 5.0), (4000, 5.0))
    points = gpu_llama.points(histogram, 4)
    assert sum(share for _, share in points) == pytest.approx(1.0)
    assert {m for m, _ in points} >= {1, 4000} and all(m in dict(histogram) for m, _ in points)
    real = gpu_llama.points(gpu_llama.read_histogram(gpu_llama.TRAFFIC))
    assert len(real) >= gpu_llama.POINTS - 2 and max(m for m, _ in real) > 2000


def test_rows_of_operators(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, gpu_rows)
    for name, value in (("ROWS", 4), ("HIDDEN", (32,)), ("VOCABULARY", (40,))):
        monkeypatch.setattr(gpu_rows, name, value)
    targets = ratios(gpu_rows.rows(Bench(FakeGpu(), "t", 60.0)))
    assert len(targets) == 2 * (3 * 3 + 1)
    assert targets["rms-norm-eager-graph"] == 5.3 and targets["softmax-eager-graph"] == 2.8
    assert targets["cross-entropy-eager-eager"] == 2.2 and targets["softmax-copy-graph"] == 0.9


def test_attention(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, gpu_attention)
    for name, value in (
        ("HEADS", 4), ("KEY_HEADS", 2), ("D", 16), ("DECODE", ((2, 24, 8),)), ("PREFILL", ((1, 8, 4, 16),)),
    ):  # fmt: skip
        monkeypatch.setattr(gpu_attention, name, value)
    found = {row.id: row for row in gpu_attention.rows(Bench(FakeGpu(), "t", 60.0))}
    assert len(found) == 2 * (3 * 2 + 2)
    assert found["decode-contiguous-graph"].ratio is not None and found["decode-gather-eager"].target == 1.05
    lost = found["decode-flashinfer-graph"]
    assert lost.ratio is None and "No module named 'flashinfer'" in str(lost.extra["note"])


def test_flashinfer_is_given_pages_as_it_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Wrapper:
        def __init__(self, space: torch.Tensor, layout: str, use_tensor_cores: bool) -> None:
            asked.update(layout=layout, cores=use_tensor_cores)

        def plan(
            self, ends: torch.Tensor, indices: torch.Tensor, last: torch.Tensor, *sizes: int, **more: Any
        ) -> None:
            asked.update(ends=ends.tolist(), indices=indices.tolist(), last=last.tolist(), sizes=sizes, **more)

        def run(self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return q

    library = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setattr(gpu_peers.importlib, "import_module", lambda _: library)
    q, cache = torch.zeros(2, 8, 16, dtype=torch.bfloat16), torch.zeros(6, 8, 2, 16, dtype=torch.bfloat16)
    table, lengths = torch.tensor([[3, 1, 0], [4, 5, 2]], dtype=torch.int32), torch.tensor([17, 16])
    inputs = gpu_peers.Inputs((), (q, cache, cache, table, lengths, None))
    assert gpu_peers.flashinfer_decode(inputs)() is q
    assert asked["ends"] == [0, 3, 5] and asked["indices"] == [3, 1, 0, 4, 5] and asked["last"] == [1, 8]
    assert asked["sizes"] == (8, 2, 16, 8) and asked["layout"] == "NHD" and asked["cores"]


def test_views(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, gpu_views)
    there = FakeGpu()
    for each_ in gpu_views.cases(there, SERVED):
        inputs = each_.draw(0)
        offset = int(each_.name.split()[-1])
        which = {int(i) for i in each_.name.split()[1].split("+")}
        for i, t in enumerate(inputs):
            assert t.data_ptr() % 256 == (offset if i in which else 0), each_.name
    small = [c for c in gpu_views.cases(there, SERVED) if c.name.startswith(("softmax", "rotary 1"))]
    monkeypatch.setattr(gpu_views, "cases", lambda *_: small)
    found = {row.id: row for row in gpu_views.rows(Bench(there, "t", 60.0))}
    assert set(found) == {f"views-{op}-{mode}" for op in ("softmax", "rotary", "worst") for mode in gpu.MODES}
    assert "offsets 1: no torch.bfloat16 tensor can begin there" in str(found["views-worst-graph"].extra["note"])


def test_a_place_that_no_tensor_can_have() -> None:
    with pytest.raises(ValueError, match="can't begin at byte 1"):
        gpu.placed(torch.zeros(3, dtype=torch.bfloat16), 1)
    assert gpu.placed(torch.ones(3, dtype=torch.uint8), 1).data_ptr() % 256 == 1


def test_held_out_rows_come_from_the_certificate(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lut = json.loads((HERE.parent / "luts" / "cpu-genuineintel-6-85-7" / "minilm_bf16.lut.json").read_text())
    folder = home / "runs" / "gpu" / "out" / "h200_llama3_8b"
    folder.mkdir(parents=True)
    (folder / "lut.json").write_text(json.dumps(lut))
    assert gpu_heldout.main() == 0
    rows = json.loads((home / "runs" / "gpu-heldout" / "result.json").read_text())["rows"]
    overall = next(row for row in rows if row["id"] == "heldout-h200_llama3_8b-all")
    mean = lut["certificate"]["overall"]["geomean"][0]
    assert overall["ratio"] == pytest.approx(1 / (1 + mean), abs=1e-4) and overall["target"] == 0.98


class FakeLt:
    """cuBLASLt with three algorithms, of which one can't run and the last is the fastest."""

    def search(self, matmul: Any, most: int) -> list[Algorithm]:
        assert (matmul.m, matmul.n, matmul.k, matmul.dtype, most) == (2, 3, 4, "bfloat16", 32)
        return [Algorithm(bytes([i]) * 64, 1) for i in range(3)]

    def bind(self, _: Any, algorithm: Algorithm) -> Callable[[Any], None]:
        number = algorithm.data[0]

        def run(call: Any) -> None:
            if number == 1:
                raise Refused("not this one")
            assert call.workspace_bytes == 32 << 20
            ran.append(number)

        return run


ran: list[int] = []


def test_the_best_of_cublaslt_is_the_fastest_that_runs() -> None:
    class Timer(FakeGpu):
        def device(self, call: Callable[[], object]) -> float:
            call()
            return {0: 300.0, 2: 200.0}[ran[-1]]

    copies = [(torch.zeros(2, 4).bfloat16(), torch.zeros(3, 4).bfloat16()) for _ in range(2)]
    calls = gpu_peers.best_of_cublaslt(Timer(), FakeLt)(copies)  # type: ignore[arg-type]
    ran.clear()
    y = calls[1]()
    assert ran == [2] and isinstance(y, torch.Tensor) and y.shape == (2, 3)


def test_launch_rows_and_their_blocks(home: Path) -> None:
    there, order = FakeGpu(), []

    def launcher(name: str, ns: float) -> Callable[[int], float]:
        return lambda count: order.append(name) or ns  # type: ignore[func-returns-value]

    costs = {gpu_launch.JIT: 9000.0, gpu_launch.AUTOTUNE: 15000.0, gpu_launch.BARE: 1800.0, OURS: 2000.0}
    ns = gpu_launch.interleaved(there, {name: launcher(name, each_) for name, each_ in costs.items()}, blocks=8)
    assert {len(each_) for each_ in ns.values()} == {8}
    rounds = [set(order[i : i + 4]) for i in range(0, len(order), 4)]
    assert all(names == set(costs) for names in rounds) and len(rounds) == 10
    found = {row.id: row for row in gpu_launch.judged(ns)}
    ratio = {id: row.ratio.value for id, row in found.items() if row.ratio is not None}
    assert ratio == {"launch-dks-triton.jit": 4.5, "launch-dks-triton.autotune": 7.5, "launch-dks-bare": 1.15}
    assert [row.target for row in found.values()] == [4.0, 6.0, 1.0]


# Configs and their data.


def test_the_200_shapes_are_those_of_the_config() -> None:
    assert (CONFIGS / "h200-gemm.yaml").read_text() == gpu_shapes.config()
    found = gpu_shapes.shapes()
    assert len(set(found)) == 200 and all(64 <= size <= 16384 for shape in found for size in shape)
    sweep = load(CONFIGS / "h200-gemm.yaml")
    asked = {tuple(p.problem.dim(d) for d in "mnk") for p in sweep.operators[0].problems}
    assert asked == set(found)
    assert 30 <= sum(p.problem.align < 16 for p in sweep.operators[0].problems) <= 60


@pytest.mark.parametrize("name", ["h200-llama3-8b", "h200-llama3-70b", "h200-rows", "h200-attention", "gpu-smoke"])
def test_configs_for_a_gpu_load(name: str) -> None:
    sweep = load(CONFIGS / f"{name}.yaml")
    assert sweep.device == "cuda" and sweep.name == name.replace("-", "_")
    assert sum(len(part.problems) for part in sweep.operators) <= 60, "a sweep of minutes"


def test_shapes_of_the_llama_bench_are_those_of_its_config() -> None:
    for model, (package, shapes) in gpu_llama.MODELS.items():
        sweep = load(CONFIGS / f"h200-llama3-{model}.yaml")
        assert sweep.name == package
        counts = {
            (n, k): sum(
                p.weight for p in sweep.operators[0].problems if (p.problem.dim("n"), p.problem.dim("k")) == (n, k)
            )
            for n, k, _ in shapes
        }
        assert counts == pytest.approx({(n, k): calls for n, k, calls in shapes})


def test_passes_of_recorded_requests() -> None:
    # Two requests overlap for 3 steps; a third comes when both are answered.
    requests = [(0.0, 100, 5), (0.05, 7, 3), (1.0, 16, 1)]
    assert traffic.passes(requests, step=0.025) == {112: 1, 16: 2, 1: 2 + 1, 2: 3}


def test_passes_are_read_from_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.6805900,5,2\n"
    )
    assert traffic.read(path) == [(0.0, 374, 44), (1.0, 5, 2)]
