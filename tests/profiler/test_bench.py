"""Checking and timing real kernels on small problems: copies, alignment, caches, neighbours, second thoughts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from dks.dispatch import pool
from dks.dispatch.kernel import Kernel, Run
from dks.dispatch.problem import Candidate, Precision, Problem
from dks.profiler import bench as bench_module
from dks.profiler.bench import Bench, Job
from dks.profiler.device import Host
from dks.profiler.findings import Finding, Round
from dks.profiler.timing import StoppingRule

PROBLEM = Problem.of("linear", {"dtype": "float32", "bias": "yes", "epilogue": "none"}, {"m": 8, "n": 64, "k": 64})
NORM = Problem.of("layer_norm", {"dtype": "float32", "affine": "yes"}, {"m": 8, "n": 64})
SIX = StoppingRule(6, 6, 1.0)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else runs here: disturbed rounds are repeated, and their numbers are not what is tested."""
    monkeypatch.setattr(bench_module.Watch, "stop", lambda _: [])


@pytest.fixture
def fault() -> Iterator[Callable[..., str]]:
    """Adds a kernel of one's own to the pool for one test; returns its id."""
    added = []

    def add(name: str, bind: Callable[..., Run], **more: object) -> str:
        kernel = Kernel(f"fault.{name}", "linear", {"float32": Precision.EXACT}, bind, **more)  # type: ignore[arg-type]
        pool.kernels()[kernel.id] = kernel
        added.append(kernel.id)
        return kernel.id

    yield add
    for id in added:
        del pool.kernels()[id]


def timed(bench: Bench, job: Job) -> tuple[list[Round], dict[str, Finding]]:
    rounds: list[Round] = []
    findings = {}
    for found in bench.time(job):
        if isinstance(found, list):
            rounds += found
        else:
            findings[found[0]] = found[1]
    return rounds, findings


def test_a_check_says_all_that_a_row_needs() -> None:
    finding, poisoned = Bench(0, "cold").check(PROBLEM, Candidate("torch.linear"))
    assert (finding.status, poisoned, finding.stable) == ("ok", False, True)
    assert finding.errors["normal"] < 1e-5 and finding.errors["outliers"] < 1e-5
    assert (finding.peak_bytes is None) == bool(finding.peak_note)
    assert finding.energy_note


def test_an_int8_kernel_pays_for_outliers() -> None:
    finding, _ = Bench(0, "cold").check(PROBLEM, Candidate("quantized.dynamic_onednn"))
    if finding.status == "ok":
        assert finding.errors["outliers"] > 1e-2, "outliers must cost an int8 kernel its 1e-2 budget"


def test_what_a_candidate_cannot_do_is_said(fault: Callable[..., str]) -> None:
    absent = fault("absent", linear, unavailable=lambda: "needs a machine of tomorrow")
    finding, _ = Bench(0, "cold").check(PROBLEM, Candidate.parse(absent))
    assert (finding.status, finding.reason) == ("unavailable", "needs a machine of tomorrow")
    finding, _ = Bench(0, "cold").check(PROBLEM, Candidate("torch.weight_int8"))
    assert finding.status == "unsupported" and "bfloat16" in finding.reason


def linear(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
    return lambda x: torch.nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_rounds_have_every_candidate_once_and_the_collector_is_as_it_was(cache: str) -> None:
    bench = Bench(0, cache)
    rounds, findings = timed(bench, Job(PROBLEM, ("torch.linear", "torch.addmm"), SIX, process=5))
    assert len(rounds) == 6 and not findings and gc.isenabled()
    assert all(set(each.ns) == {"torch.linear", "torch.addmm"} for each in rounds)
    assert all(ns > 0 for each in rounds for ns in each.ns.values()) and {r.process for r in rounds} == {5}
    assert [each.number for each in rounds] == list(range(6))


def test_a_later_visit_numbers_on() -> None:
    earlier = tuple(Round(number, 0, {"torch.linear": 1000}) for number in range(9))
    rounds, _ = timed(Bench(0, "cold"), Job(PROBLEM, ("torch.linear",), SIX, process=1, rounds=earlier))
    assert [each.number for each in rounds] == list(range(9, 15))


class Spy:
    """Notes the addresses that a kernel is bound to and called with."""

    def __init__(self) -> None:
        self.weights: set[int] = set()
        self.inputs: list[int] = []

    def bind(self, problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
        self.weights.add(weight.data_ptr())

        def run(x: torch.Tensor) -> torch.Tensor:
            self.inputs.append(x.data_ptr())
            return torch.nn.functional.linear(x, weight, bias)

        return run


@pytest.mark.parametrize(("cache", "copies"), [("cold", True), ("warm", False)])
def test_cold_rotates_weights_and_inputs_that_no_other_candidate_has_and_warm_does_not(
    fault: Callable[..., str], cache: str, copies: bool
) -> None:
    spies = [Spy(), Spy()]
    ids = [fault(f"spy{i}", spy.bind) for i, spy in enumerate(spies)]
    timed(Bench(0, cache), Job(PROBLEM, ("torch.linear", *ids), SIX, process=0, recheck=False))
    assert not spies[0].weights & spies[1].weights
    assert (len(spies[0].weights) > 1) == copies
    assert (len(set(spies[0].inputs)) > 1) == copies


def test_inputs_are_drawn_once_for_all_candidates_and_copies_of_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, drawn = pool.operator("linear"), []

    def noted(problem: Problem, generator: torch.Generator, draw: str) -> object:
        drawn.append(problem)
        return operator.make_inputs(problem, generator, draw)

    monkeypatch.setitem(pool.operators(), "linear", replace(operator, make_inputs=noted))
    bench = Bench(0, "cold")
    first, second = bench._inputs(PROBLEM), bench._inputs(PROBLEM)
    assert first.static[0] is second.static[0], "the weight is kept"
    assert not torch.equal(first.dynamic[0].fill_(7.0), second.dynamic[0]), "what may be changed is not"
    others = [bench._another(PROBLEM, copy)[0] for copy in (1, 2)]
    assert torch.equal(others[0], second.dynamic[0]) and others[0].data_ptr() != others[1].data_ptr()
    assert drawn == [PROBLEM]


def test_who_is_out_of_the_race_is_not_bound_again(fault: Callable[..., str]) -> None:
    spies = [Spy(), Spy()]
    ids = [fault(f"spy{i}", spy.bind) for i, spy in enumerate(spies)]
    names = ("torch.linear", *ids)
    last = Round(10, 0, {"torch.linear": 1000, ids[1]: 1000})
    earlier = [Round(i, 0, dict.fromkeys(names, 1000)) for i in range(10)]
    job = Job(PROBLEM, names, StoppingRule(6, 6, 0.01, 0.02), 1, (*earlier, last), recheck=False)
    timed(Bench(0, "cold"), job)
    assert not spies[0].weights and spies[1].weights


def test_a_problem_too_small_to_rotate_beyond_the_cache_has_it_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []
    for cache in ("cold", "warm"):
        bench = Bench(0, cache)
        monkeypatch.setattr(bench._device, "empty_cache", emptied.append)
        timed(bench, Job(PROBLEM, ("torch.linear",), SIX, process=0))
        assert len(emptied) == 6, cache
        assert bench._device._scratch.numel() >= bench._device.beyond


def test_the_problem_s_alignment_reaches_the_kernel(fault: Callable[..., str]) -> None:
    for align in (64, 16, 4):
        spy = Spy()
        id = fault(f"spy{align}", spy.bind)
        problem = Problem.of("linear", dict(PROBLEM.traits), dict(PROBLEM.dims), align)
        timed(Bench(0, "cold"), Job(problem, ("torch.linear", id), SIX, process=0))
        assert spy.inputs and all(address % align == 0 for address in spy.inputs)
        assert align == 64 or all(address % (2 * align) for address in spy.inputs), "and no better than it says"


def test_the_neighbours_run_around_the_candidate_on_its_data_and_are_in_its_time(
    fault: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    norm = pool.kernels()["torch.layer_norm"]

    def noted(problem: Problem, params: object, *static: torch.Tensor) -> Run:
        inner = norm.bind(problem, params, *static)

        def run(x: torch.Tensor) -> torch.Tensor:
            order.append("norm")
            return inner(x)

        return run

    seen: list[float] = []

    def candidate(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
        def run(x: torch.Tensor) -> torch.Tensor:
            order.append("linear")
            seen.append(float(x.mean(dim=-1).abs().max()))
            return torch.nn.functional.linear(x, weight, bias)

        return run

    import dataclasses

    monkeypatch.setitem(pool.kernels(), "torch.layer_norm", dataclasses.replace(norm, bind=noted))
    id = fault("noted", candidate)
    job = Job(PROBLEM, (id, "torch.linear"), SIX, 0, before=(NORM,), after=(NORM, NORM), recheck=False)
    bench = Bench(0, "pipeline")
    timed(bench, job)
    text = " ".join(order)
    assert text.count("norm linear norm norm") >= 6
    warmed = len(bench._bound[id])
    biased = [mean for mean in seen[warmed:] if mean > 0.5]
    assert not biased, "it reads what the norm before it wrote: rows of mean 0, but for the norm's own bias"


def test_a_kernel_that_leaves_the_caches_empty_pays_for_it_in_the_pipeline(fault: Callable[..., str]) -> None:
    """The same numbers as the clock gives: what the follower takes is the candidate's."""
    ticks = iter(range(0, 10**6, 100))
    clock = lambda: next(ticks)  # noqa: E731
    host = Host(clock)
    neighbours = bench_module._Neighbours(Bench(0, "pipeline", device=host), (), (NORM,))

    def slow_follower(x: torch.Tensor) -> torch.Tensor:
        for _ in range(7):
            clock()
        return x

    neighbours._after = [(slow_follower, (torch.ones(8, 64),))]
    assert host.timed(*neighbours.around(lambda x: x, (torch.ones(8, 64),))) == 800


def test_a_kernel_that_answers_from_memory_is_found_after_timing(fault: Callable[..., str]) -> None:
    def cached(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
        known: dict[int, torch.Tensor] = {}

        def run(x: torch.Tensor) -> torch.Tensor:
            if x.data_ptr() not in known:
                known[x.data_ptr()] = torch.nn.functional.linear(x, weight, bias)
            return known[x.data_ptr()].clone()

        return run

    id = fault("cached", cached)
    _, findings = timed(Bench(0, "cold"), Job(PROBLEM, ("torch.linear", id), SIX, process=0))
    assert set(findings) == {id} and findings[id].status == "wrong_result"


def test_a_patched_clock_changes_no_time_and_is_found(fault: Callable[..., str]) -> None:
    import time

    real = time.perf_counter_ns

    def cheat(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
        def run(x: torch.Tensor) -> torch.Tensor:
            time.perf_counter_ns = lambda: 0  # type: ignore[assignment]
            return torch.nn.functional.linear(x, weight, bias)

        return run

    id = fault("cheat", cheat)
    try:
        rounds, findings = timed(Bench(0, "cold"), Job(PROBLEM, ("torch.linear", id), SIX, process=0))
        assert all(each.ns[id] > 0 for each in rounds)
        assert any("perf_counter" in finding.reason for finding in findings.values())
    finally:
        time.perf_counter_ns = real
