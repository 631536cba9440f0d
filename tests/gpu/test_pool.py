"""The pool's GPU kernels as they are bound: right against float64, on CPU tensors, by the interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dks.dispatch import native, pool
from dks.dispatch.generation import Generation
from dks.dispatch.gpu import call, launch, library, rows
from dks.dispatch.gpu.library import Steps
from dks.dispatch.kernel import Inputs, Kernel, Params, relative_error
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import Group, Rule, Table
from dks.profiler.check import Checker
from tests.gpu.conftest import Fake, Open
from tests.gpu.cubins import made
from tests.gpu.interpreted import SOAK
from tests.gpu.interpreting import Plan

KERNELS = [kernel for kernel in pool.kernels().values() if kernel.programs is not None and not kernel.configuration]


def of(op: str) -> Any:
    """A test for each kernel of an operator."""
    found = [kernel for kernel in KERNELS if kernel.op == op]
    assert found
    return pytest.mark.parametrize("kernel", found, ids=lambda kernel: kernel.id)


@pytest.fixture(autouse=True)
def interpreting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(library, "_locate", Plan)
    monkeypatch.setattr(call, "DEVICE", "cpu")
    yield


def problem_of(kernel: Kernel, dims: dict[str, int], **traits: str) -> Problem:
    """In the kernel's own alignment class."""
    traits = {"dtype": "bfloat16", **traits}
    return Problem.of(kernel.op, traits, dims, kernel.alignment_for(traits["dtype"]))


def drawn(problem: Problem) -> Inputs:
    return pool.operator(problem.op).make_inputs(problem, torch.Generator().manual_seed(3), "normal")


def check_call(kernel: Kernel, problem: Problem, params: Params, inputs: Inputs) -> Any:
    """One call against the reference; returns its output."""
    expected = pool.operator(problem.op).reference(problem, inputs)
    y = kernel.bind(problem, params, *inputs.static)(*inputs.dynamic)
    assert relative_error(y, expected) < kernel.precision[problem.trait("dtype")].limit, (kernel.id, params)
    return y


def check(kernel: Kernel, problem: Problem, step: int = 1) -> int:
    """Run some of its parameter sets; how many were meant for the problem."""
    assert kernel.objection(problem) is None
    inputs = drawn(problem)
    meant = [params for params in kernel.params if kernel.suits(problem, params) is None]
    for params in meant[::step]:
        check_call(kernel, problem, params, inputs)
    return len(meant)


def of_each_kind(kernel: Kernel) -> list[Params]:
    """The smallest tile of each way to work; with DKS_SOAK=1 every sixth set."""
    if SOAK:
        return list(kernel.params[::6])
    found: dict[object, Params] = {}
    for params in sorted(kernel.params, key=lambda params: dict(params).get("bm", 1) * dict(params)["bn"]):
        p = dict(params)
        if not p.get("streamk"):  # takes seconds a call; tests/gpu/test_matmul.py does it in small
            found.setdefault((p["split"] > 1, p.get("resident", 0) > 0, p.get("tma", 0)), params)
    return list(found.values())


@of("linear")
def test_linear(kernel: Kernel) -> None:
    n, k = (24, 80) if kernel.align else (23, 75)
    many = 5 if kernel.id.startswith("triton.gemv") else 19  # more rows than any set but the widest is meant for
    cases = ((3, "add", "no"), (many, "silu", "yes"))
    slow = not SOAK and kernel.id in ("triton.gemv_fp8", "triton.gemv_int8")  # one byte an element: twice the steps
    for m, epilogue, bias in cases[slow:]:
        problem = problem_of(kernel, {"m": m, "n": n, "k": k}, bias=bias, epilogue=epilogue)
        inputs = drawn(problem)
        for params in of_each_kind(kernel):
            check_call(kernel, problem, params, inputs)


@of("rms_norm")
def test_rms_norm(kernel: Kernel) -> None:
    for n, affine, residual, dtype in (
        (96, "yes", "yes", "bfloat16"),
        (640, "no", "no", "float32"),
        (8200, "yes", "no", "bfloat16"),
        (8200, "no", "yes", "float32"),
    ):
        width = n if kernel.align else n - 3
        problem = problem_of(kernel, {"m": 5, "n": width}, affine=affine, residual=residual, dtype=dtype)
        assert check(kernel, problem)


@of("layer_norm")
def test_layer_norm(kernel: Kernel) -> None:
    for n, affine, dtype in ((96, "yes", "bfloat16"), (640, "no", "float32"), (8200, "yes", "float32")):
        width = n if kernel.align else n - 3
        assert check(kernel, problem_of(kernel, {"m": 5, "n": width}, affine=affine, dtype=dtype))


@of("rms_norm")
def test_a_row_wider_than_the_block_is_refused_when_bound(kernel: Kernel) -> None:
    problem = problem_of(kernel, {"m": 5, "n": 1024}, affine="no", residual="no")
    with pytest.raises(ValueError, match="holds a row of at most 512 elements, not 1024"):
        kernel.bind(problem, rows.PARAMS[1], None, 1e-5)


@of("softmax")
def test_softmax(kernel: Kernel) -> None:
    for n, dtype in ((40, "bfloat16"), (523, "float32"), (8192, "bfloat16")):
        assert check(kernel, problem_of(kernel, {"m": 5, "n": n}, dtype=dtype))


@of("softmax")
def test_softmax_takes_rows_of_any_width_at_any_address(kernel: Kernel) -> None:
    params = kernel.params[0]  # whose block holds 128
    run = kernel.bind(problem_of(kernel, {"m": 1, "n": 1}), params)
    wide = torch.randn(3 * 5000 + 8).bfloat16()
    for n in (1, 8, 127, 128, 129, 136, 4096, 5000):
        for shape in ((3, n), (n,), (1, 2, n)):
            for offset in (0, 1):
                x = wide[offset:][: torch.Size(shape).numel()].view(shape)
                assert relative_error(run(x), torch.softmax(x.double(), -1)) < 1e-2, (shape, offset)


def heads(problem: Problem, gap: int) -> Inputs:
    """q, k and v of an attention problem ``gap`` elements further apart in each dim than they would have to be."""
    *tensors, mask, scale = drawn(problem).dynamic

    def apart(t: torch.Tensor) -> torch.Tensor:
        one, two = (1, 2) if problem.trait("layout") == "bhsd" else (2, 1)
        b, d = t.shape[0], t.shape[3]
        made = torch.full((b, t.shape[one] + 1, t.shape[two] + 1, d + gap), torch.nan, dtype=t.dtype)
        view = made[:, 1:, 1:, :d]
        view = view if one == 1 else view.transpose(1, 2)
        return view.copy_(t)

    return Inputs((), (*map(apart, tensors), mask, scale))


ATTENTIONS = (
    {"b": 2, "q": 19, "kv": 37, "h": 4, "hkv": 2, "d": 64},
    {"b": 1, "q": 37, "kv": 19, "h": 2, "hkv": 2, "d": 128},
    {"b": 3, "q": 1, "kv": 70, "h": 2, "hkv": 1, "d": 64},
)


@of("attention")
@pytest.mark.parametrize("dims", ATTENTIONS, ids=lambda dims: f"q{dims['q']}")
def test_attention(kernel: Kernel, dims: dict[str, int]) -> None:
    odd = not kernel.align
    for layout, causal, dtype in (("bshd", "yes", "bfloat16"), ("bhsd", "no", "float32")):
        problem = problem_of(kernel, dims, mask="none", causal=causal, layout=layout, dtype=dtype)
        assert check(kernel, problem, step=2)
        params = kernel.params[-1]
        y = check_call(kernel, problem, params, heads(problem, 3 if odd else 8))
        rows_of_y = y.transpose(1, 2) if layout == "bshd" else y
        assert rows_of_y.is_contiguous()
        q, k, v, mask, _ = drawn(problem).dynamic
        run = kernel.bind(problem, params)
        assert torch.equal(run(q, k, v, mask, None), run(q, k, v, mask, dims["d"] ** -0.5))


@of("attention")
def test_attention_of_what_there_is_no_program_for(kernel: Kernel) -> None:
    traits = {"causal": "no", "layout": "bhsd"}
    assert kernel.objection(problem_of(kernel, ATTENTIONS[0], mask="bool", **traits)) == "takes no mask"
    problem = problem_of(kernel, {**ATTENTIONS[0], "d": 80}, mask="none", **traits)
    assert kernel.objection(problem) == "takes heads of 64 or 128 elements, not 80"


@of("attention")
def test_attention_of_one_sequence_whose_strides_mean_nothing(kernel: Kernel) -> None:
    """As a slice of a packed projection has them: no sequence and no row follows."""
    problem = problem_of(
        kernel, {"b": 1, "q": 1, "kv": 9, "h": 2, "hkv": 2, "d": 64}, mask="none", causal="no", layout="bhsd"
    )
    q, k, v, mask, scale = drawn(problem).dynamic
    odd = [t.as_strided(t.shape, (t.numel() + 1, *t.stride()[1:])) for t in (q, k, v)]
    odd[0] = q.as_strided(q.shape, (129, 64, 65, 1))
    check_call(kernel, problem, kernel.params[-1], Inputs((), (*odd, mask, scale)))


@of("paged_attention")
def test_paged_attention(kernel: Kernel) -> None:
    for dims, dtype in (
        ({"b": 3, "kv": 150, "h": 4, "hkv": 2, "d": 64, "page": 16}, "bfloat16"),
        ({"b": 1, "kv": 70, "h": 3, "hkv": 1, "d": 128, "page": 64}, "float32"),
    ):
        assert check(kernel, problem_of(kernel, dims, dtype=dtype), step=4)
    problem = problem_of(kernel, dims, dtype=dtype)
    for params in kernel.params[1::5]:  # more splits than blocks of keys as well
        check_call(kernel, problem, params, drawn(problem))
    assert kernel.objection(problem_of(kernel, {**dims, "d": 80})) == "takes heads of 64 or 128 elements, not 80"


@of("silu_and_mul")
def test_silu_and_mul(kernel: Kernel) -> None:
    for n, dtype in ((48, "float16"), (1304, "float32")):
        width = n if kernel.align else n - 3
        assert check(kernel, problem_of(kernel, {"m": 6, "n": width}, dtype=dtype))


@of("rotary")
def test_rotary(kernel: Kernel) -> None:
    for h, hkv, d, cache in ((9, 2, 64, "float32"), (3, 3, 32, "same")):
        size = d if kernel.align else d - 6
        problem = problem_of(kernel, {"tokens": 5, "h": h, "hkv": hkv, "d": size}, cache=cache)
        assert check(kernel, problem)
        q, k, cos, sin, positions = drawn(problem).dynamic
        packed = torch.cat((q, k), 1)  # heads of one projection, and halves of one cache
        caches = torch.cat((cos, sin), 1)
        split = (packed[:, :h], packed[:, h:], caches[:, : size // 2], caches[:, size // 2 :], positions)
        check_call(kernel, problem, kernel.params[0], Inputs((), split))
    wide = problem_of(kernel, {"tokens": 5, "h": 2, "hkv": 3, "d": 64}, cache="same")
    assert kernel.objection(wide) == "takes no more key heads than query heads, not 3 and 2"


@of("cross_entropy")
def test_cross_entropy(kernel: Kernel) -> None:
    for n, dtype in ((600, "float16"), (4208, "float32")):
        width = n if kernel.align else n - 3
        problem = problem_of(kernel, {"m": 5, "n": width}, dtype=dtype)
        assert check(kernel, problem)
        logits = drawn(problem).dynamic[0]
        inputs = Inputs((), (logits, torch.arange(5), 0))
        y = check_call(kernel, problem, kernel.params[0], inputs)
        assert y[0] == 0 and y.dtype is logits.dtype


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.id)
def test_the_compiled_fast_path_launches_what_python_does(
    kernel: Kernel, opened: Open, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = opened()

    def locate(steps: Steps) -> launch.Plan:
        found = []
        for each, values in steps:
            cubin = made(each.symbol, arguments=each.arguments, align=each.align, grid=each.grid)
            found.append(launch.Step(launcher.add(cubin), values))
        return launch.Plan(launcher, found)

    monkeypatch.setattr(library, "_locate", locate)
    traits = {"mask": "none"} if kernel.op == "attention" else {}
    problem = problem_of(kernel, SIZES[kernel.op], **traits, **VARIANTS[kernel.op][0])
    inputs, params = drawn(problem), kernel.params[-1]
    assert native.module is not None
    kernel.bind(problem, params, *inputs.static)(*inputs.dynamic)
    fast, fastest = fake.calls("launch"), native.module
    monkeypatch.setattr(native, "module", None)
    kernel.bind(problem, params, *inputs.static)(*inputs.dynamic)
    both = fake.calls("launch")
    slow = both[len(fast) :]
    assert fast
    alike(fast, slow)
    if kernel.unprepared is None:
        return
    (weight, *_), told = inputs.static, len(both)
    for module in (None, fastest):
        monkeypatch.setattr(native, "module", module)
        kernel.unprepared(problem, params)(*inputs.dynamic, *inputs.static)
        direct, told = fake.calls("launch")[told:], len(fake.calls("launch"))
        alike(slow, direct)
        where = weight.data_ptr()
        assert [where in numbers for _, numbers in direct] == [where in numbers for _, numbers in slow]


def alike(some: list[tuple[str, list[int]]], others: list[tuple[str, list[int]]]) -> None:
    """Assert that both launched the same."""
    assert [names for names, _ in some] == [names for names, _ in others]
    for (_, one), (_, other) in zip(some, others, strict=True):
        assert len(one) == len(other)
        # Addresses of what each call allocates differ; they are far above all other numbers.
        assert [each for each in one if abs(each) < 2**40] == [each for each in other if abs(each) < 2**40]


@pytest.mark.parametrize(
    "kernel", [kernel for kernel in KERNELS if kernel.unprepared is not None], ids=lambda kernel: kernel.id
)
def test_calls_without_preparation_say_where_the_weight_lies(kernel: Kernel) -> None:
    assert not kernel.form and kernel.unprepared is not None
    for variant in VARIANTS[kernel.op]:
        problem = problem_of(kernel, SIZES[kernel.op], **variant)
        meant = (each for each in kernel.params if kernel.suits(problem, each) is None)
        params = next(meant, kernel.params[0])
        run = kernel.unprepared(problem, params)
        for _ in range(2):  # the weight may lie elsewhere in each call
            inputs = drawn(problem)
            inputs = Inputs(
                tuple(t if t is None or isinstance(t, float) else t.clone() for t in inputs.static), inputs.dynamic
            )
            expected = pool.operator(problem.op).reference(problem, inputs)
            y = run(*inputs.dynamic, *inputs.static)
            assert relative_error(y, expected) < kernel.precision["bfloat16"].limit


def test_functional_calls_are_served_by_what_reads_the_callers_weight() -> None:
    loop = dict(rows.LOOP)
    candidate = Candidate("triton.rms_norm_direct", tuple(loop.items()))
    traits = (("affine", "yes"), ("dtype", "bfloat16"), ("residual", "yes"))
    group = Group("rms_norm", "direct", traits, (("n", 96),), ((8,),), {16: (0,)})
    runtime = Runtime("t", Generation(Table((Rule(candidate.id, 16),), (group,))))
    x, r = (torch.randn(5, 96).bfloat16() for _ in range(2))
    for weight in (torch.randn(96).bfloat16(), torch.randn(96).bfloat16()):
        y, h = runtime.server("rms_norm").call(x, (96,), weight, 1e-6, r)
        wanted = torch.nn.functional.rms_norm((x + r).double(), (96,), weight.double(), 1e-6)
        assert relative_error(y, wanted) < 1e-2 and torch.equal(h, x + r)
    assert runtime.stats()["ops"]["rms_norm"] == {"hits": {"bin": 2}, "fallbacks": {}}, runtime.stats()


# -- by the checks that a sweep makes, with extreme values among them ------------------------------------------

SIZES: dict[str, dict[str, int]] = {
    "linear": {"m": 4, "n": 16, "k": 1040},
    "rms_norm": {"m": 5, "n": 96},
    "layer_norm": {"m": 5, "n": 96},
    "softmax": {"m": 5, "n": 96},
    "silu_and_mul": {"m": 5, "n": 96},
    "rotary": {"tokens": 5, "h": 3, "hkv": 2, "d": 32},
    "cross_entropy": {"m": 5, "n": 96},
    "attention": {"b": 2, "q": 20, "kv": 40, "h": 1, "hkv": 1, "d": 64},
    "paged_attention": {"b": 2, "kv": 80, "h": 1, "hkv": 1, "d": 64, "page": 16},
}
VARIANTS: dict[str, tuple[dict[str, str], ...]] = {
    "linear": ({"bias": "yes", "epilogue": "silu"}, {"bias": "no", "epilogue": "add"}),
    "rms_norm": ({"affine": "yes", "residual": "yes"}, {"affine": "no", "residual": "no"}),
    "layer_norm": ({"affine": "yes"}, {"affine": "no"}),
    "softmax": ({},),
    "silu_and_mul": ({},),
    "rotary": ({"cache": "float32"}, {"cache": "same"}),
    "cross_entropy": ({},),
    "attention": ({"layout": "bshd", "causal": "yes"}, {"layout": "bhsd", "causal": "no"}),
    "paged_attention": ({},),
}


@pytest.mark.skipif(not SOAK, reason="a soak: the interpreter is slow")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.id)
def test_what_a_sweep_checks(kernel: Kernel) -> None:
    checker = Checker(seed=0)
    for dtype, variant in zip(kernel.precision, itertools.cycle(VARIANTS[kernel.op])):
        traits = {"mask": "none"} if kernel.op == "attention" else {}
        problem = problem_of(kernel, SIZES[kernel.op], dtype=dtype, **traits, **variant)
        params = next(each for each in kernel.params if kernel.suits(problem, each) is None)
        verdict = checker.check(problem, Candidate(kernel.id, params))
        assert (verdict.status, verdict.stable) == ("ok", True), (problem.id, params, verdict.reason)
