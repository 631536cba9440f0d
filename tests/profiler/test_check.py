"""The correctness checks: every wrong kernel is out with a reason, and every good one stays."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dks.dispatch import pool
from dks.dispatch.kernel import PERIOD, Declined, Inputs, Kernel, Run, draw_normal, parts, relative_error
from dks.dispatch.problem import Candidate, Precision, Problem
from dks.profiler.check import Checker, Verdict
from dks.profiler.config import load
from dks.profiler.draws import redrawn, same, tensors
from dks.profiler.gaps import gap
from tests.profiler import wrong_kernels as wrong

SOAK = os.environ.get("DKS_SOAK") == "1"
M = 40

Add = Callable[..., Candidate]


def linear(epilogue: str = "none", m: int = M, n: int = 24, k: int = 48, align: int = 64, **more: str) -> Problem:
    traits = {"dtype": "float32", "bias": "yes", "epilogue": epilogue} | more
    return Problem.of("linear", traits, {"m": m, "n": n, "k": k}, align)


def layer_norm() -> Problem:
    return Problem.of("layer_norm", {"dtype": "float32", "affine": "yes"}, {"m": 9, "n": 24})


def rms_norm(residual: str = "yes") -> Problem:
    traits = {"dtype": "float32", "affine": "yes", "residual": residual}
    return Problem.of("rms_norm", traits, {"m": 9, "n": 24})


def silu_and_mul() -> Problem:
    return Problem.of("silu_and_mul", {"dtype": "float32"}, {"m": 9, "n": 24})


def rotary() -> Problem:
    return Problem.of(
        "rotary", {"dtype": "float32", "cache": "float32"}, {"tokens": 9, "h": 4, "hkv": 2, "d": 8}, 16
    )


def cross_entropy() -> Problem:
    return Problem.of("cross_entropy", {"dtype": "float32"}, {"m": 9, "n": 24})


def softmax() -> Problem:
    return Problem.of("softmax", {"dtype": "float32"}, {"m": 9, "n": 24})


def attention(**traits: str) -> Problem:
    dims = {"b": 2, "q": 9, "kv": 9, "h": 4, "hkv": 2, "d": 8}
    return Problem.of(
        "attention", {"dtype": "float32", "mask": "none", "causal": "no", "layout": "bhsd"} | traits, dims
    )


def paged() -> Problem:
    dims = {"b": 3, "kv": 37, "h": 4, "hkv": 2, "d": 8, "page": 8}
    return Problem.of("paged_attention", {"dtype": "float32"}, dims)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small calls wait long for a second thread on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checker() -> Checker:
    return Checker(0)


@pytest.fixture
def add() -> Iterator[Add]:
    """Puts a kernel into the pool for one test."""
    added: list[str] = []

    def put(bind: Callable[..., Run], op: str = "linear", **more: Any) -> Candidate:
        fields: dict[str, Any] = {"precision": {"float32": Precision.EXACT}} | more
        kernel = Kernel(f"wrong.kernel{len(added)}", op=op, bind=bind, **fields)
        pool.kernels()[kernel.id] = kernel
        added.append(kernel.id)
        return Candidate(kernel.id)

    yield put
    for id in added:
        del pool.kernels()[id]


def expect_out(verdict: Verdict) -> None:
    assert verdict.status in ("wrong_result", "failed", "out_of_memory"), verdict
    assert verdict.reason and "\n" not in verdict.reason and len(verdict.reason) <= 300


@pytest.fixture
def fresh(checker: Checker) -> Checker:
    """The shared checker, forgetting what it found of a kernel of the same name."""
    checker._known.clear()
    return checker


@pytest.mark.parametrize("name", wrong.LINEAR)
def test_a_wrong_linear_is_out(fresh: Checker, add: Add, name: str) -> None:
    expect_out(fresh.check(linear(), add(wrong.LINEAR[name])))


@pytest.mark.parametrize(
    "name",
    [name for name in wrong.LINEAR if name.startswith(("mutates", "writes", "late", "raises", "one buffer"))],
)
def test_the_next_kernel_is_judged_on_its_own(fresh: Checker, add: Add, name: str) -> None:
    assert fresh.check(linear(), Candidate("torch.linear")).status == "ok"
    expect_out(fresh.check(linear(), add(wrong.LINEAR[name])))
    time.sleep(0.005)  # what is late has come
    fresh._known.clear()
    verdict = fresh.check(linear(), Candidate("torch.linear"))
    assert (verdict.status, verdict.poisoned) == ("ok", False), verdict


@pytest.mark.parametrize("name", wrong.GELU)
def test_a_wrong_epilogue_is_out(fresh: Checker, add: Add, name: str) -> None:
    expect_out(fresh.check(linear("gelu"), add(wrong.GELU[name])))


@pytest.mark.parametrize("name", wrong.ADD)
def test_a_wrong_residual_is_out(fresh: Checker, add: Add, name: str) -> None:
    expect_out(fresh.check(linear("add"), add(wrong.ADD[name])))


@pytest.mark.parametrize("name", wrong.LAYER_NORM)
def test_a_wrong_layer_norm_is_out(fresh: Checker, add: Add, name: str) -> None:
    expect_out(fresh.check(layer_norm(), add(wrong.LAYER_NORM[name], op="layer_norm")))


@pytest.mark.parametrize("name", wrong.RMS_NORM)
def test_a_wrong_rms_norm_with_residual_is_out(fresh: Checker, add: Add, name: str) -> None:
    expect_out(fresh.check(rms_norm(), add(wrong.RMS_NORM[name], op="rms_norm")))


def test_a_fault_in_one_of_two_outputs_is_told_by_its_number(fresh: Checker, add: Add) -> None:
    for name, said in (("residual not added", "output 1 of 2"), ("h is x", "output 2 of 2")):
        verdict = fresh.check(rms_norm(), add(wrong.RMS_NORM[name], op="rms_norm"))
        assert verdict.status == "wrong_result" and said in verdict.reason, verdict


def test_small_rows_of_a_pair_are_judged_beside_large_ones(fresh: Checker, add: Add) -> None:
    """Where h is huge, its size must not excuse y, which is not."""

    def compute(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
        h = x + r
        return wrong.rms(h, w, eps) + 1e-3 * (float(h.abs().max()) > 2**30), h

    verdict = fresh.check(rms_norm(), add(wrong.fused(compute), op="rms_norm"))
    assert "output 1 of 2 on large values" in verdict.reason, verdict


@pytest.mark.parametrize("name", wrong.SOFTMAX)
def test_a_wrong_softmax_is_out(fresh: Checker, add: Add, name: str) -> None:
    expect_out(fresh.check(softmax(), add(wrong.SOFTMAX[name], op="softmax")))


@pytest.mark.parametrize("name", wrong.ATTENTION)
def test_a_wrong_attention_is_out(fresh: Checker, add: Add, name: str) -> None:
    traits, bind = wrong.ATTENTION[name]
    expect_out(fresh.check(attention(**traits), add(bind, op="attention")))


@pytest.mark.parametrize("name", wrong.PAGED)
def test_a_wrong_paged_attention_is_out(fresh: Checker, add: Add, name: str) -> None:
    expect_out(fresh.check(paged(), add(wrong.PAGED[name], op="paged_attention")))


@pytest.mark.parametrize("name", wrong.SILU_AND_MUL)
def test_a_wrong_silu_and_mul_is_out(fresh: Checker, add: Add, name: str) -> None:
    expect_out(fresh.check(silu_and_mul(), add(wrong.SILU_AND_MUL[name], op="silu_and_mul")))


@pytest.mark.parametrize("name", wrong.ROTARY)
def test_a_wrong_rotary_is_out(fresh: Checker, add: Add, name: str) -> None:
    expect_out(fresh.check(rotary(), add(wrong.ROTARY[name], op="rotary")))


@pytest.mark.parametrize("name", wrong.CROSS_ENTROPY)
def test_a_wrong_cross_entropy_is_out(fresh: Checker, add: Add, name: str) -> None:
    expect_out(fresh.check(cross_entropy(), add(wrong.CROSS_ENTROPY[name], op="cross_entropy")))


def test_what_is_right_in_its_own_way_stays(fresh: Checker, add: Add) -> None:
    """In float32, rounded once, as generated kernels compute; the framework rounds on the way."""
    for op, bind in wrong.RIGHT.items():
        for dtype in ("bfloat16", "float16"):
            dims = dict.fromkeys(pool.operator(op).dims, 10)
            traits = {name: values[0] for name, values in pool.operator(op).traits.items()} | {"dtype": dtype}
            candidate = add(bind, op=op, precision={dtype: Precision.BF16})
            verdict = fresh.check(Problem.of(op, traits, dims, 2), candidate)
            assert verdict.status == "ok", (op, dtype, verdict)


def test_there_are_enough_of_them() -> None:
    kinds = (wrong.LINEAR, wrong.LATER, wrong.GELU, wrong.ADD, wrong.LAYER_NORM, wrong.ATTENTION, wrong.PAGED)
    assert sum(len(kind) for kind in kinds) >= 55


# -- after timing ----------------------------------------------------------------------------------------


def timed(
    problem: Problem, bind: Callable[..., Run], calls: int = 1100
) -> tuple[Run, tuple[Any, ...], tuple[Any, ...]]:
    made = pool.operator(problem.op).make_inputs(problem, torch.Generator().manual_seed(0), "normal")
    run = bind(problem, (), *made.static)
    for _ in range(calls):
        run(*made.dynamic)
    return run, made.static, made.dynamic


@pytest.mark.parametrize("name", wrong.LATER)
def test_wrong_after_many_calls_is_found_by_the_recheck(fresh: Checker, add: Add, name: str) -> None:
    candidate = add(wrong.LATER[name])
    assert fresh.check(linear(), candidate).status == "ok"
    expect_out(fresh.recheck(linear(), candidate, *timed(linear(), wrong.LATER[name])))


@pytest.mark.parametrize(
    "name",
    [
        "first output forever", "previous output", "one buffer", "memoised by address", "memoised by object",
        "memoised by version", "mutates x", "mutates weight", "late change", "threads", "racy always",
    ],
)  # fmt: skip
def test_the_recheck_alone_finds_it(fresh: Checker, add: Add, name: str) -> None:
    bind = wrong.LINEAR.get(name, wrong.wrong_after(0))
    candidate = add(bind)
    bound = timed(linear(), bind, 0 if name == "threads" else 1)
    verdict = fresh.recheck(linear(), candidate, *bound)
    expect_out(verdict)
    assert verdict.poisoned is (name == "threads") or name == "late change"


@pytest.mark.parametrize(
    "problem",
    [
        linear(),
        linear("add"),
        layer_norm(),
        rms_norm(),
        softmax(),
        attention(mask="float"),
        paged(),
        silu_and_mul(),
        rotary(),
        cross_entropy(),
    ],
)
def test_a_right_kernel_passes_the_recheck(checker: Checker, problem: Problem) -> None:
    default = pool.kernels()[pool.operator(problem.op).default]
    run, static, dynamic = timed(problem, default.bind, 3)
    before = [t.clone() for t in tensors(dynamic)]
    verdict = checker.recheck(problem, Candidate(default.id), run, static, dynamic)
    assert (verdict.status, verdict.stable, verdict.poisoned) == ("ok", True, False), verdict
    for old, new in zip(before, tensors(dynamic), strict=True):
        assert same(old, new) is not new.is_floating_point(), "the values are others; integers stay"
        assert torch.equal(old.isnan(), new.isnan()), "what may not be read stays where it is"


def test_a_process_that_changed_while_timing_is_poisoned(fresh: Checker, add: Add) -> None:
    bind = wrong.LINEAR["threads"]
    verdict = fresh.recheck(linear(), add(bind), *timed(linear(), bind, 1))
    assert verdict.poisoned and "while it was timed" in verdict.reason
    run, *tensors = timed(linear(), pool.kernels()["torch.linear"].bind, 1)
    assert fresh.recheck(linear(), Candidate("torch.linear"), run, *tensors).status == "ok", "it was set back"


def test_a_recheck_takes_other_weights(checker: Checker) -> None:
    run, static, dynamic = timed(linear(), pool.kernels()["torch.linear"].bind, 1)
    static[0].mul_(3)
    assert checker.recheck(linear(), Candidate("torch.linear"), run, static, dynamic).status == "ok"


# -- what is said ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("mutates x", "wrong_result", "changed its input"),
        ("mutates weight", "wrong_result", "changed its input"),
        ("writes after x", "wrong_result", "wrote outside its input"),
        ("mutates weight at bind", "wrong_result", "in bind"),
        ("one buffer", "wrong_result", "earlier output"),
        ("returns its input", "wrong_result", "memory of an input"),
        ("touches its last output", "wrong_result", "overwrote the output of the one before"),
        ("subclass", "wrong_result", "Lazy"),
        ("one row too few", "wrong_result", "shape"),
        ("last element by a thousandth", "wrong_result", "worst element"),
        ("drops nan", "wrong_result", "finite values where NaN"),
        ("raises", "failed", "RuntimeError: no such"),
        ("exits", "failed", "SystemExit"),
        ("declines all", "failed", "declined"),
        ("out of memory", "out_of_memory", "MemoryError"),
        ("torch out of memory", "out_of_memory", "RuntimeError"),
    ],
)
def test_the_reason_says_what_is_wrong(fresh: Checker, add: Add, name: str, status: str, said: str) -> None:
    verdict = fresh.check(linear(), add(wrong.LINEAR[name]))
    assert verdict.status == status and said in verdict.reason, verdict
    assert not verdict.poisoned


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("threads", "torch.get_num_threads()"), ("default dtype", "float64"), ("deterministic", "deterministic"),
        ("flushes denormals", "denormal"), ("grad mode", "grad mode"), ("mkldnn off", "mkldnn"),
        ("matmul precision", "medium"), ("changes directory", "working directory"),
        ("changes environment", "OMP_NUM_THREADS"), ("patches the timer", "time.perf_counter_ns"),
        ("patches torch.equal", "torch.equal"), ("patches the norm", "vector_norm"),
        ("patches the framework", "relu"), ("leaves threads", "alive"),
    ],
)  # fmt: skip
def test_a_changed_process_is_poisoned_and_set_back(fresh: Checker, add: Add, name: str, said: str) -> None:
    before = (torch.get_num_threads(), torch.get_default_dtype(), Path.cwd(), time.perf_counter_ns, torch.equal)
    verdict = fresh.check(linear(), add(wrong.LINEAR[name]))
    assert (verdict.status, verdict.poisoned) == ("wrong_result", True) and said in verdict.reason, verdict
    assert before == (
        torch.get_num_threads(), torch.get_default_dtype(), Path.cwd(), time.perf_counter_ns, torch.equal,
    )  # fmt: skip
    assert torch.is_grad_enabled() and sys.float_info.min * float("0.5") > 0
    assert fresh.check(linear(), Candidate("torch.linear")).status == "ok"


def test_unavailable_and_unsupported_say_why(checker: Checker, add: Add) -> None:
    absent = add(wrong.LINEAR["zeros"], unavailable=lambda: "needs a machine of tomorrow")
    found = checker.check(linear(), absent)
    assert (found.status, found.reason) == ("unavailable", "needs a machine of tomorrow")
    found = checker.check(linear(), Candidate("torch.weight_int8"))
    assert found.status == "unsupported" and "bfloat16" in found.reason


def test_values_may_be_declined_but_not_answered_wrongly(fresh: Checker, add: Add) -> None:
    def bind(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
        def run(x: torch.Tensor) -> torch.Tensor:
            if not 1e-3 < float(x.abs().max()) < 1e4:  # NaN as well
                raise Declined("outside its domain")
            return torch.nn.functional.linear(x, weight, bias)

        return run

    assert fresh.check(linear(), add(bind)).status == "ok"


def test_interrupts_pass(fresh: Checker, add: Add) -> None:
    with pytest.raises(KeyboardInterrupt):
        fresh.check(linear(), add(wrong.raises(KeyboardInterrupt())))


def test_errors_are_those_of_the_problem_whatever_came_before() -> None:
    int8 = Candidate("quantized.dynamic_onednn")
    if pool.kernels()[int8.kernel].unavailable():
        pytest.skip("no such engine")
    seen = []
    for sizes in ((1, M), (M,)):
        made = Checker(0)
        verdicts = [made.check(linear(m=m, n=64, k=128), int8) for m in sizes]
        assert all(v.status == "ok" for v in verdicts)
        seen.append(verdicts[-1].errors)
    assert seen[0] == seen[1] and set(seen[0]) == {"normal", "outliers", "rows"}
    assert seen[0]["outliers"] > 1e-2, "outliers must cost an int8 kernel its 1e-2 budget"


def test_a_kernel_that_is_not_stable_but_right_stays(fresh: Checker, add: Add) -> None:
    def bind(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
        count = itertools.count()
        return lambda x: torch.nn.functional.linear(x, weight, bias) * (1 + 3e-7 * (next(count) % 2))

    verdict = fresh.check(linear(), add(bind))
    assert (verdict.status, verdict.stable) == ("ok", False), verdict
    assert fresh.check(linear(), Candidate("torch.linear")).stable is True


def test_the_declared_alignment_is_kept(fresh: Checker, add: Add) -> None:
    """A kernel that needs 16 bytes sees no less; its fault at 4 is nobody's."""
    picky = wrong.LINEAR["at odd addresses"]
    assert fresh.check(linear(), add(picky, align=16)).status == "ok"


def test_one_element_in_a_large_output_is_found() -> None:
    y = torch.randn(100, 30_000)
    reference = y.double()
    y[70, 29_999] += 1e-3
    found = gap(y, reference)
    assert relative_error(y, reference) < 1e-5 < found.element
    assert found.over(Precision.EXACT, y.shape) and not found.over(Precision.BF16, y.shape)


def expect_finite(x: torch.Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise Declined("not finite")


def quantised(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    expect_finite(x)
    step = largest / 127 + 1e-30
    return (x / step).round() * step


def one_scale(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
    return lambda x: torch.nn.functional.linear(quantised(x, x.abs().max()), weight, bias)


def a_scale_a_row(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
    return lambda x: torch.nn.functional.linear(quantised(x, x.abs().amax(-1, keepdim=True)), weight, bias)


def one_scale_for_alike_rows(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
    run = one_scale(problem, params, weight, bias)

    def careful(x: torch.Tensor) -> torch.Tensor:
        expect_finite(x)
        sizes = x.norm(dim=-1)
        if float(sizes.max()) > 50.0 * float(sizes.min()):
            raise Declined("rows of too different sizes")
        return run(x)

    return careful


def test_a_row_beside_a_massive_one_keeps_its_class_or_the_call_is_declined(fresh: Checker, add: Add) -> None:
    int8 = {"precision": {"float32": Precision.INT8}}
    spoiled = fresh.check(linear(), add(one_scale, **int8))
    assert spoiled.status == "wrong_result" and "on rows of very different sizes" in spoiled.reason
    alone = fresh.check(linear(), add(a_scale_a_row, **int8))
    assert alone.status == "ok" and alone.errors["rows"] < 0.05 and not alone.declines_rows
    declined = fresh.check(linear(), add(one_scale_for_alike_rows, **int8))
    assert declined.status == "ok" and declined.declines_rows and set(declined.errors) == {"normal", "outliers"}


def test_a_large_row_hides_no_other() -> None:
    reference = torch.randn(8, 64, dtype=torch.float64)
    reference[3] *= 1000
    y = reference.float()
    y[5] = 0
    assert gap(y, reference).total < 1e-3 and gap(y, reference).row == pytest.approx(1.0)
    assert relative_error(y, reference) == pytest.approx(1.0)


def test_a_short_row_near_zero_by_cancellation_is_held_against_its_usual_size() -> None:
    reference = torch.tensor([[1000.0], [1e-9], [1.0]], dtype=torch.float64)
    usual = torch.tensor([1000.0, 1.0, 1.0], dtype=torch.float64)
    assert gap(reference + 1e-6, reference, usual=usual).row == pytest.approx(1e-6)
    assert gap(reference + torch.tensor([[0.0], [0.0], [0.5]]), reference, usual=usual).row == pytest.approx(0.5)


def with_factors(factors: Callable[[int], torch.Tensor]) -> Callable[..., Run]:
    """Right within its class, but for the bits: each of m rows times a factor."""

    def bind(problem: Problem, params: object, weight: torch.Tensor, bias: torch.Tensor) -> Run:
        def run(x: torch.Tensor) -> torch.Tensor:
            y = (x.unsqueeze(-2) * weight).sum(-1) + bias
            return y * factors(len(x))[:, None]

        return run

    return bind


@pytest.mark.parametrize(
    "factors",
    [
        lambda m: torch.full((m,), 1 + 2e-7 * (m > 16)),
        lambda m: 1 + 2e-7 * (torch.arange(m) % 4 == 1),
        lambda m: 1 + 2e-7 * (torch.arange(m) >= m // 8 * 8),
    ],
    ids=["by the number of rows", "by place", "in the tail"],
)
def test_declared_batch_invariance_is_checked(
    factors: Callable[[int], torch.Tensor], fresh: Checker, add: Add
) -> None:
    assert fresh.check(linear(), add(with_factors(factors))).status == "ok"
    broken = fresh.check(linear(), add(with_factors(factors), batch_invariant=lambda _: True))
    assert broken.status == "wrong_result" and "declares batch invariance, but rows" in broken.reason
    kept = add(with_factors(torch.ones), batch_invariant=lambda _: True)
    assert fresh.check(linear(), kept).status == "ok"


# -- good kernels ----------------------------------------------------------------------------------------

LEAST = {"float32": 4, "bfloat16": 2, "float16": 2}
STATICS: dict[str, list[dict[str, int]]] = {
    "linear": [{"n": 65, "k": 33}, {"n": 64, "k": 128}],
    "layer_norm": [{"n": 33}, {"n": 2}],
    "rms_norm": [{"n": 33}, {"n": 2}],
    "softmax": [{}],
    "attention": [{"h": 2, "hkv": 1, "d": 16}],
    "paged_attention": [{"h": 2, "hkv": 1, "d": 16, "page": 16}],
    "silu_and_mul": [{"n": 33}, {"n": 2}],
    "rotary": [{"h": 3, "hkv": 1, "d": 16}],
    "cross_entropy": [{"n": 33}, {"n": 2}],
}
MORE: dict[str, list[dict[str, int]]] = {
    "linear": [{"n": 1, "k": 1}, {"n": 384, "k": 384}, {"n": 3, "k": 4096}],
    "layer_norm": [{"n": 1}, {"n": 384}],
    "rms_norm": [{"n": 1}, {"n": 384}],
    "softmax": [],
    "attention": [{"h": 4, "hkv": 4, "d": 32}, {"h": 3, "hkv": 1, "d": 33}],
    "paged_attention": [{"h": 4, "hkv": 4, "d": 32, "page": 1}, {"h": 3, "hkv": 1, "d": 33, "page": 5}],
    "silu_and_mul": [{"n": 1}, {"n": 384}],
    "rotary": [{"h": 4, "hkv": 4, "d": 2}, {"h": 8, "hkv": 2, "d": 80}],
    "cross_entropy": [{"n": 1}, {"n": 384}],
}
DYNAMIC: dict[str, list[dict[str, int]]] = {
    "linear": [{"m": 8}, {"m": 200}],
    "layer_norm": [{"m": 1}, {"m": 200}],
    "rms_norm": [{"m": 1}, {"m": 200}],
    "softmax": [{"m": 1, "n": 300}, {"m": 200, "n": 7}],
    "attention": [{"b": 1, "q": 33, "kv": 33}, {"b": 3, "q": 1, "kv": 33}],
    "paged_attention": [{"b": 3, "kv": 33}],
    "silu_and_mul": [{"m": 1}, {"m": 200}],
    "rotary": [{"tokens": 1}, {"tokens": 100}],
    "cross_entropy": [{"m": 1}, {"m": 200}],
}


def groups() -> Iterator[Any]:
    """One weight a case: all of them with DKS_SOAK=1, else one for each combination of traits."""
    for op, operator in pool.operators().items():
        traits = [dict(zip(operator.traits, v, strict=True)) for v in itertools.product(*operator.traits.values())]
        cases = list(
            itertools.product(STATICS[op] + MORE[op] if SOAK else STATICS[op], (64, 16, 4) if SOAK else (64, 4))
        )
        for i, (chosen, case) in enumerate(itertools.product(traits, cases)):
            if SOAK or i % len(cases) == i // len(cases) % len(cases):
                yield pytest.param(op, chosen, *case, id=f"{op}-{'-'.join(chosen.values())}-{case}")


@pytest.mark.parametrize(("op", "traits", "statics", "align"), list(groups()))
def test_no_good_kernel_is_out(op: str, traits: dict[str, str], statics: dict[str, int], align: int) -> None:
    checker, operator = Checker(1), pool.operator(op)
    for sizes in DYNAMIC[op]:
        dims = {name: (statics | sizes)[name] for name in operator.dims}
        problem = Problem.of(op, traits, dims, max(align, LEAST[traits["dtype"]]))
        for candidate in pool.candidates_for(op, "cpu"):
            verdict = checker.check(problem, candidate)
            assert verdict.status in ("ok", "unsupported", "unsuited", "unavailable"), (
                problem.id,
                candidate.id,
                verdict,
            )
            if verdict.status == "ok":
                expected = {"normal", "outliers"} if verdict.declines_rows else {"normal", "outliers", "rows"}
                assert set(verdict.errors) == expected and not verdict.poisoned


def taken(kernel: Kernel) -> Iterator[tuple[Problem, Candidate]]:
    """Problems that a kernel and one of its parameter sets say they are for."""
    operator = pool.operator(kernel.op)
    for statics, sizes in itertools.product(STATICS[kernel.op] + MORE[kernel.op], DYNAMIC[kernel.op]):
        dims = {name: (statics | sizes)[name] for name in operator.dims}
        for values in itertools.product(*operator.traits.values()):
            problem = Problem.of(kernel.op, dict(zip(operator.traits, values, strict=True)), dims)
            if kernel.objection(problem) is None:
                suited = (c for c in kernel.candidates() if kernel.suits(problem, c.params) is None)
                yield from ((problem, candidate) for candidate in suited)


@pytest.mark.parametrize("kernel", pool.kernels().values(), ids=lambda kernel: kernel.id)
def test_each_kernel_passes_on_a_problem_that_it_takes(kernel: Kernel) -> None:
    if not kernel.runs_on("cpu") or kernel.search is not None:
        pytest.skip("not for a CPU")
    if why := kernel.unavailable():
        pytest.skip(why)
    problem, candidate = next(taken(kernel))
    verdict = Checker(1).check(problem, candidate)
    assert (verdict.status, verdict.reason) == ("ok", "")
    assert set(verdict.errors) | ({"rows"} if verdict.declines_rows else set()) == {"normal", "outliers", "rows"}


def test_more_numbers_than_are_drawn_are_redrawn_in_moments() -> None:
    x = draw_normal((3, PERIOD), torch.Generator().manual_seed(0), 2.0, torch.bfloat16)
    y = redrawn(x, torch.Generator().manual_seed(1))
    assert y.shape == x.shape and y.dtype == x.dtype and bool(((x == y).float().mean(dim=1) < 0.01).all())
    assert y.float().std().item() == pytest.approx(0.5, rel=0.01) and abs(y.float().mean().item()) < 1e-3
    x[1, 5] = torch.nan
    y = redrawn(x, torch.Generator().manual_seed(1))
    assert torch.equal(y.isnan(), x.isnan()) and 0.4 < (x == y).float().mean() < 0.6


def test_references_are_made_on_the_device_of_their_inputs() -> None:
    seen = set()
    for config in sorted(Path("configs").glob("*.yaml")):
        for part in load(config, "cuda").operators if "gpu" in config.name or "h200" in config.name else ():
            operator = pool.operator(part.op)
            for problem in [each.problem for each in part.problems]:
                # This PyTorch can't index what only pretends to lie on a GPU.
                if (problem.op, problem.traits) in seen or problem.op in ("paged_attention", "rotary"):
                    continue
                seen.add((problem.op, problem.traits))
                small = replace(
                    problem, dims=tuple((n, 9 if n in operator.dynamic else d) for n, d in problem.dims)
                )
                made = operator.make_inputs(small, torch.Generator().manual_seed(0), "normal")
                with FakeTensorMode():
                    inputs = Inputs(*(tuple(map(_pretended, each)) for each in (made.static, made.dynamic)))
                    found = parts(operator.reference(small, inputs))
                assert {(y.device.type, y.dtype) for y in found} == {("cuda", torch.float64)}, small
    assert {op for op, _ in seen} >= {"attention", "linear", "softmax", "rms_norm"}


def _pretended(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")
