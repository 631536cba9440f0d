"""cuBLASLt's algorithms as candidates of the pool: searched, swept, called and shipped; a library stands for it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dks.codegen import package
from dks.codegen.kernels import ship_cublaslt
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch import loader, native, pool
from dks.dispatch.choice import Choice
from dks.dispatch.evidence import read_run
from dks.dispatch.gpu.cublaslt import build, library
from dks.dispatch.gpu.launch import LaunchFailed, Misaligned
from dks.dispatch.kernel import Declined, Kernel, Params
from dks.dispatch.manifest import CUBLASLT, intact
from dks.dispatch.modes import EAGER
from dks.dispatch.ops.linear.cublaslt_linear import algorithm_of, params_of
from dks.dispatch.problem import Candidate, Problem, short
from dks.dispatch.tiles.library import Missing
from dks.profiler import worker
from dks.profiler.config import load
from dks.profiler.findings import Finding
from dks.profiler.isolation import Lost, Setting
from dks.profiler.sweep import run_sweep
from tests.codegen.rows import ENVIRONMENT, row
from tests.gpu.test_cublaslt import Fake, binary, made
from tests.profiler.fakes import FakeMachine, FakeProcess

__all__ = ["binary", "made"]  # fixtures

FORMS = [pytest.param(True, id="compiled"), pytest.param(False, id="python")]
KERNEL: Kernel = pool.kernels()["cublaslt.matmul"]


def problem(epilogue: str = "none", bias: str = "no", align: int = 16, **sizes: int) -> Problem:
    traits = {"dtype": "bfloat16", "bias": bias, "epilogue": epilogue}
    return Problem.of("linear", traits, {"m": 6, "n": 48, "k": 32, **sizes}, align)


@pytest.fixture
def fake(made: Fake, binary: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """In the place of PyTorch's cuBLASLt, found as a sweep finds it."""
    monkeypatch.setattr(library, "_of_torch", lambda: made.path)
    monkeypatch.setattr(library, "_locate", lambda: binary)
    monkeypatch.setattr(library, "_shipped", {})
    monkeypatch.setattr(library, "_opened", {})
    made.log()
    yield made
    made.log()


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(native, "module", None)


def searched(of: Problem) -> tuple[Params, ...]:
    assert KERNEL.search is not None
    return KERNEL.search(of)


def bound(of: Problem, params: Params) -> tuple[Any, Any]:
    inputs = pool.operator("linear").make_inputs(of, torch.Generator().manual_seed(3), "normal")
    return KERNEL.bind(of, params, *inputs.static), inputs


def test_a_search_gives_candidates_that_parse_back(fake: Fake) -> None:
    found = searched(problem("relu", "yes"))
    assert "alignments A 16 B 16 C 16 D 16" in fake.log()
    assert [dict(each)["a"] for each in found] == [71, 66] and {dict(each)["version"] for each in found} == {130100}
    assert {dict(each)["h"] for each in found} == {2**64 - 1}
    for params in found:
        candidate = Candidate(KERNEL.id, params)
        assert Candidate.parse(candidate.id) == candidate and len(candidate.id) < worker.NOTE_BYTES
        assert params_of(algorithm_of(params)) == params
    assert short("triton.matmul/bm16") == "triton.matmul/bm16"
    most = Candidate(KERNEL.id, tuple((name, 2**64 - 1) for name, _ in found[0]))
    assert len(most.id) < worker.NOTE_BYTES and Candidate.parse(most.id) == most
    chosen = Choice("linear", most.id, "bin", "measured")
    assert re.match(r"linear -> cublaslt\.matmul/#[0-9a-f]{8}  \(bin match\)\n", str(chosen))
    scalar = pool.kernels()["cublaslt.matmul_scalar"]
    assert scalar.search is not None and scalar.search(problem(align=2, n=47))
    assert "alignments A 2 B 2 C 2 D 2" in fake.log()
    assert KERNEL.candidates() == [Candidate(KERNEL.id)] and KERNEL.suits(problem(), ()) is not None
    assert "fuses none, relu, gelu_tanh, add, not silu" in (KERNEL.supports(problem("silu")) or "")


@pytest.mark.parametrize("compiled", FORMS, indirect=True)
@pytest.mark.parametrize(("epilogue", "bias"), [("none", "yes"), ("add", "no"), ("relu", "no")])
def test_a_call_says_what_there_is_and_each_size_is_checked_once(
    epilogue: str, bias: str, fake: Fake, compiled: None
) -> None:
    of = problem(epilogue, bias)
    run, inputs = bound(of, searched(of)[0])
    fake.log()
    given = tuple(t.view(2, 3, -1) for t in inputs.dynamic)
    y = run(*given)
    said = fake.log()
    weight, shift = inputs.static
    assert y.shape == (2, 3, 48) and y.dtype is torch.bfloat16
    assert said.index("check") < said.index("matmul") and said.count("algorithm 71 ... -1") == 2
    assert "B: type 14, 32 x 6, leading 32" in said and "D: type 14, 48 x 6, leading 48" in said
    c = given[1] if epilogue == "add" else y
    addresses = " ".join(
        f"{name} {t.data_ptr():#x}" for name, t in zip("ABCD", (weight, given[0], c, y), strict=True)
    )
    assert addresses in said and f"beta {int(epilogue == 'add')}" in said
    assert (f"set 8 = {shift.data_ptr()}\n" in said) if bias == "yes" else ("set 8 " not in said)
    (room,) = re.findall(r"workspace 0x([0-9a-f]+) 4096 stream \(nil\)", said)
    assert int(room, 16) % 16 == 0
    run(*given)
    run(*(t[:1] for t in given))
    run(*(t[:1] for t in given))
    said = fake.log()
    assert said.count("matmul") == 3 and said.count("check") == 1, "two numbers of rows, each asked about once"
    assert "B: type 14, 32 x 3, leading 32" in said


@pytest.mark.parametrize("compiled", FORMS, indirect=True)
def test_what_an_algorithm_cannot_do_is_declined(fake: Fake, compiled: None) -> None:
    of, (params, *_) = problem(), searched(problem())
    unable = tuple((name, 666 if name == "a" else value) for name, value in params)
    run, inputs = bound(of, unable)
    with pytest.raises(Declined, match="can't run so many rows"):
        run(*inputs.dynamic)
    run, _ = bound(of, params)
    odd = torch.zeros(6 * 32 + 1, dtype=torch.bfloat16)[1:].view(6, 32)
    with pytest.raises(Misaligned, match="is not divisible by"):
        run(odd)
    with pytest.raises(Declined):
        run(odd.float())
    assert "matmul" not in fake.log()
    fake.fail("cublasLtMatmul", 13)
    with pytest.raises(LaunchFailed, match="cuBLASLt: status 13"):
        run(*inputs.dynamic)
    fake.fail("cublasLtMatmul", 15)
    with pytest.raises(Declined):
        run(*inputs.dynamic)
    fake.fail("", 0)
    assert run(inputs.dynamic[0][:0]).shape == (0, 48), "no rows are no work"


def test_another_version_refuses(fake: Fake) -> None:
    params = tuple((name, 120803 if name == "version" else value) for name, value in searched(problem())[0])
    with pytest.raises(Missing, match="algorithm of cuBLASLt 120803: found version 130100; sweep again"):
        bound(problem(), params)


def test_what_is_missing_is_said(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_of_torch", lambda: "/nowhere/libcublasLt.so")
    with pytest.raises(Missing, match="cuBLASLt: no cuBLASLt: /nowhere"):
        searched(problem())
    monkeypatch.setattr(library, "_locate", library._nowhere)
    with pytest.raises(Missing, match="no loaded package ships what opens it"):
        bound(problem(), ())


def test_a_worker_searches_and_survives_what_cannot(fake: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    of = problem()
    assert worker._searched(of, Candidate(KERNEL.id)) == [Candidate(KERNEL.id, each).id for each in searched(of)]
    assert worker._searched(problem("silu"), Candidate(KERNEL.id)) == []
    assert worker._searched(of, Candidate("torch.linear")) == []
    fake.fail("cublasLtMatmulAlgoGetHeuristic", 15)
    assert worker._searched(of, Candidate(KERNEL.id)) == []
    assert "its search found nothing" in capfd.readouterr().err


CONFIG = """
version: 1
name: searched
operators:
  linear:
    bins: {m: {scheme: explicit, edges: [8]}}
    problems:
      - {dims: {n: 32, k: 32}, traits: {dtype: float32}}
    candidates: ["torch.addmm"]
measure: {min_rounds: 10, max_rounds: 10, processes: 1, held_out: false}
"""


class Searching(FakeMachine):
    """The second of two that a search finds is the fastest; ``stops`` ends the sweep in the first's check."""

    stops = lost = False
    searches = 0

    def start(self, number: int, setting: Setting) -> FakeProcess:
        super().start(number, setting)
        machine = self

        class Process(FakeProcess):
            def search(self, problem: Problem, candidate: Candidate) -> list[Candidate]:
                machine.searches += 1
                if machine.lost:
                    raise Lost(candidate.id, "crashed", "killed by signal 11")
                return [Candidate(candidate.kernel, (("a", value),)) for value in (1, 2)]

            def check(self, problem: Problem, candidate: Candidate, mode: str = EAGER) -> tuple[Finding, bool]:
                if machine.stops and candidate.params == (("a", 2),):
                    raise KeyboardInterrupt
                if candidate.id == "torch.addmm":
                    return Finding("unsuited", "stands for others"), False
                return super().check(problem, candidate, mode)

        return Process(self, number)


def test_a_sweep_measures_what_a_search_finds_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pool.kernels()["torch.addmm"]
    monkeypatch.setitem(pool.kernels(), kernel.id, dataclasses.replace(kernel, search=lambda _: ()))
    config = tmp_path / "searched.yaml"
    config.write_text(CONFIG)
    times = {"torch.linear": 3e5, "torch.addmm/a1": 2e5, "torch.addmm/a2": 1e5}
    machine = Searching(lambda _, name: times[name])
    machine.stops = True
    with pytest.raises(KeyboardInterrupt):
        run_sweep(load(config), tmp_path / "run", start=machine.start)
    machine.stops = False
    run_sweep(load(config), tmp_path / "run", start=machine.start)
    found = {each.candidate: each for each in read_run(tmp_path / "run")}
    assert {id: each.status for id, each in found.items()} == {
        "torch.linear": "ok",
        "torch.addmm": "unsuited",
        "torch.addmm/a1": "ok",
        "torch.addmm/a2": "ok",
    }
    assert found["torch.addmm/a2"].samples_ns and machine.searches == 2
    assert [name for _, name in machine.checked].count("torch.addmm/a1") == 1, "what was known stayed known"
    outcome = run_sweep(load(config), tmp_path / "run", start=machine.start)
    assert (outcome.reused, outcome.measured, machine.searches) == (1, 0, 2)


def test_a_search_that_crashes_costs_its_kernel_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pool.kernels()["torch.addmm"]
    monkeypatch.setitem(pool.kernels(), kernel.id, dataclasses.replace(kernel, search=lambda _: ()))
    config = tmp_path / "searched.yaml"
    config.write_text(CONFIG)
    machine = Searching(lambda _, name: 1e5)
    machine.lost = True
    run_sweep(load(config), tmp_path / "run", start=machine.start)
    found = {each.candidate: (each.status, each.reason) for each in read_run(tmp_path / "run")}
    assert found["torch.linear"][0] == "ok"
    assert found["torch.addmm"] == ("crashed", "searching: killed by signal 11")


def test_a_package_ships_what_opens_it(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compile_into", "compile_library"):
        monkeypatch.setattr(package, name, lambda *_: "not in this test")
    there = dataclasses.replace(ENVIRONMENT, device="cuda", arch="NVIDIA H200 132", isa="sm_90", threads="none")
    text, of, params = json.dumps(there.to_dict(), sort_keys=True), problem(), searched(problem())[1]
    chosen = Candidate(KERNEL.id, params)
    rows = [row("torch.linear", 100, of, environment=text), row(chosen.id, 50, of, environment=text)]
    lut = select(rows, Policy(max_error=1e-2))
    assert chosen.id in {rule.candidate for rule in lut.rules}
    built = package.build(lut, rows, tmp_path, "shipped")
    monkeypatch.setattr(library, "_locate", library._nowhere)
    monkeypatch.setattr(loader, "examine", intact)  # it belongs to another machine
    loader.open_generation(built.folder)
    run, inputs = bound(of, params)
    fake.log()
    run(*inputs.dynamic)
    assert "algorithm 66 ... -1" in fake.log()
    monkeypatch.setattr(library, "digest", lambda: "another")
    with pytest.raises(Missing, match="no loaded package ships what opens it"):
        bound(of, params)
    plain = select(rows[:1], Policy(max_error=1e-2))
    (tmp_path / "plain").mkdir()
    ship_cublaslt(plain, tmp_path / "plain")
    assert not list((tmp_path / "plain").iterdir()) and (built.folder / CUBLASLT).is_file()
    assert build.BINARY not in {path.name for path in built.folder.iterdir()}
