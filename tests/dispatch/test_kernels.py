"""Every kernel of every operator: right within its class, wherever it says that it can serve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from dks.dispatch import pool
from dks.dispatch.kernel import (
    DRAWS,
    DTYPES,
    Declined,
    Inputs,
    Kernel,
    Output,
    aligned,
    parts,
    relative_error,
    row_length,
)
from dks.dispatch.problem import Problem
from dks.dispatch.tiles.isa import ISAS
from dks.profiler.draws import same

STATICS = {
    "linear": [{"n": 65, "k": 33}, {"n": 64, "k": 128}],
    "layer_norm": [{"n": 33}, {"n": 384}],
    "rms_norm": [{"n": 33}, {"n": 384}],
    "softmax": [{}],
    "attention": [{"h": 4, "hkv": 4, "d": 32}, {"h": 4, "hkv": 2, "d": 24}, {"h": 3, "hkv": 1, "d": 33}],
    "paged_attention": [{"h": 4, "hkv": 2, "d": 24, "page": 4}, {"h": 3, "hkv": 1, "d": 33, "page": 16}],
    "silu_and_mul": [{"n": 33}, {"n": 384}],
    "rotary": [{"h": 4, "hkv": 2, "d": 24}, {"h": 3, "hkv": 1, "d": 2}],
    "cross_entropy": [{"n": 33}, {"n": 384}],
}
DYNAMIC = {
    "linear": [{"m": m} for m in (1, 2, 3, 17, 64)],
    "layer_norm": [{"m": m} for m in (1, 2, 3, 17, 64)],
    "rms_norm": [{"m": m} for m in (1, 2, 3, 17, 64)],
    "softmax": [{"m": m, "n": n} for m, n in ((1, 1), (2, 64), (17, 33), (64, 5))],
    "attention": [{"b": b, "q": q, "kv": kv} for b, q, kv in ((1, 1, 1), (2, 17, 17), (3, 1, 33), (1, 5, 7))],
    "paged_attention": [{"b": b, "kv": kv} for b, kv in ((1, 1), (2, 16), (5, 33), (1, 70))],
    "silu_and_mul": [{"m": m} for m in (1, 2, 3, 17, 64)],
    "rotary": [{"tokens": tokens} for tokens in (1, 2, 3, 17, 64)],
    "cross_entropy": [{"m": m} for m in (1, 2, 3, 17, 64)],
}
KERNELS = [pytest.param(kernel, id=kernel.id) for kernel in pool.kernels().values() if kernel.runs_on("cpu")]
LINEAR = [pytest.param(kernel, id=kernel.id) for kernel in pool.kernels_for("linear", "cpu")]
NORM = [pytest.param(kernel, id=kernel.id) for kernel in pool.kernels_for("layer_norm", "cpu")]


def limit(kernel: Kernel, dtype: str, output: Output | None = None) -> float:
    """Of a class; the worst of many short rows scatters around it."""
    n = math.inf if output is None else min(row_length(part.shape) for part in parts(output))
    return kernel.precision[dtype].limit * (1 + 6 / math.sqrt(n))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def runnable(kernel: Kernel) -> None:
    # Kernels of AVX2 stand back where there is AVX-512; they are right there too.
    why = ISAS["avx2"].lack() if kernel.id.endswith("_avx2") else kernel.unavailable()
    if why is not None:
        pytest.skip(why)


def problems(kernel: Kernel) -> Iterator[tuple[Problem, list[Problem]]]:
    """Each trait and shape of weights that the kernel takes, with its problems of all sizes."""
    operator = pool.operator(kernel.op)
    for values in itertools.product(*operator.traits.values()):
        traits = dict(zip(operator.traits, values, strict=True))
        for statics in STATICS[kernel.op]:
            sized = [
                Problem.of(kernel.op, traits, {n: (statics | sizes)[n] for n in operator.dims})
                for sizes in DYNAMIC[kernel.op]
            ]
            if taken := [problem for problem in sized if kernel.objection(problem) is None]:
                yield taken[0], taken


def versions(inputs: Inputs) -> list[tuple[torch.Tensor, int, torch.Tensor]]:
    tensors = [t for t in (*inputs.static, *inputs.dynamic) if isinstance(t, torch.Tensor)]
    return [(t, t._version, t.clone()) for t in tensors]


@pytest.mark.parametrize("kernel", KERNELS)
def test_is_right_in_its_class_on_all_traits_and_sizes(kernel: Kernel) -> None:
    runnable(kernel)
    operator = pool.operator(kernel.op)
    seen = 0
    for first, sized in problems(kernel):
        dtype = first.trait("dtype")
        inputs = {p: operator.make_inputs(p, generator(), "normal") for p in sized}
        static = inputs[first].static
        for candidate in kernel.candidates():
            run = kernel.bind(first, candidate.params, *static)
            for problem in sized:
                mine = Inputs(static, inputs[problem].dynamic)
                before = versions(mine)
                output, again = run(*mine.dynamic), run(*mine.dynamic)
                reference = operator.reference(problem, mine)
                error = relative_error(output, reference)
                assert error <= limit(kernel, dtype, output), (problem.id, candidate.id, error)
                for y, other in zip(parts(output), parts(again), strict=True):
                    assert y.dtype == DTYPES[dtype] and y.isfinite().all(), problem.id
                    assert torch.equal(y, other), f"{problem.id}: two calls differ"
                for t, version, copy in before:
                    assert t._version == version and same(t, copy), f"{problem.id}: an input was written"
                held = [t for t, _, _ in before] + [*parts(output), *parts(again)]
                assert len({t.untyped_storage().data_ptr() for t in held}) == len(held), problem.id
                seen += 1
    assert seen or kernel.id == "torch.linear_inplace", "no problem of this test is one the kernel takes"


@pytest.mark.parametrize("kernel", LINEAR + NORM)
def test_takes_x_of_one_to_five_dims(kernel: Kernel) -> None:
    runnable(kernel)
    operator = pool.operator(kernel.op)
    for first, _ in problems(kernel):
        static = operator.make_inputs(first, generator(), "normal").static
        last = first.dim("k" if kernel.op == "linear" else "n")
        run = kernel.bind(first, kernel.candidates()[0].params, *static)
        for lead in ((), (1,), (2,), (2, 3), (1, 1), (2, 1, 3), (1, 2, 1, 3)):
            x = torch.randn((*lead, last), generator=generator()).to(DTYPES[first.trait("dtype")])
            rows = math.prod(lead)
            dims = {name: rows if name == "m" else size for name, size in first.dims}
            flat = Problem.of(kernel.op, dict(first.traits), dims)
            _, *residual = operator.make_inputs(flat, generator(), "normal").dynamic
            reference = operator.reference(flat, Inputs(static, (x.view(rows, last), *residual)))
            y = run(x, *(r.view(*lead, r.shape[1]) for r in residual))
            assert y.shape == (*lead, reference.shape[1]), (first.id, lead)
            # One row holds few numbers: its error scatters around the class's.
            assert relative_error(y.view(reference.shape), reference) <= 2 * limit(kernel, first.trait("dtype"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_serves_every_alignment_it_allows(kernel: Kernel) -> None:
    runnable(kernel)
    operator = pool.operator(kernel.op)
    for first, sized in problems(kernel):
        dtype = first.trait("dtype")
        inputs = operator.make_inputs(sized[-1], generator(), "normal")
        run = kernel.bind(first, kernel.candidates()[-1].params, *inputs.static)
        reference = operator.reference(sized[-1], inputs)
        for align in (1 << e for e in range(7)):
            if align < kernel.alignment_for(dtype):
                continue
            moved = [aligned_like(t, align) if isinstance(t, torch.Tensor) else t for t in inputs.dynamic]
            error = relative_error(run(*moved), reference)
            assert error <= 2 * limit(kernel, dtype), (first.id, align, error)


def aligned_like(t: torch.Tensor, align: int) -> torch.Tensor:
    """``t`` at another address, in its own strides."""
    if t.is_contiguous() or t.dim() != 4:
        return aligned(t, max(align, t.element_size()))
    return aligned(t.transpose(1, 2), align).transpose(1, 2)


@pytest.mark.parametrize("kernel", LINEAR)
def test_outliers_stay_finite(kernel: Kernel) -> None:
    runnable(kernel)
    operator = pool.operator("linear")
    for first, sized in problems(kernel):
        inputs = operator.make_inputs(sized[-1], generator(), DRAWS[1])
        y = kernel.bind(first, kernel.candidates()[0].params, *inputs.static)(*inputs.dynamic)
        assert math.isfinite(relative_error(y, operator.reference(sized[-1], inputs)))


HARD = {
    "zeros": torch.zeros_like,
    "small": lambda x: x * 1e-3,
    "tiny": lambda x: x * 1e-20,
    "constant": lambda x: torch.full_like(x, 7.0),
    "positive": lambda x: x.abs() + 5,
    "negative": lambda x: -x.abs() - 5,
}
NOT_FINITE = {
    "nan": lambda x: x.index_fill(0, torch.tensor([1]), math.nan),
    "infinity": lambda x: x.index_fill(0, torch.tensor([1]), math.inf),
    "minus infinity": lambda x: x.index_fill(0, torch.tensor([0]), -math.inf),
}


@pytest.mark.parametrize("kernel", LINEAR)
def test_hard_values(kernel: Kernel) -> None:
    runnable(kernel)
    operator = pool.operator("linear")
    for first, sized in problems(kernel):
        inputs = operator.make_inputs(sized[2], generator(), "normal")
        run = kernel.bind(first, kernel.candidates()[0].params, *inputs.static)
        for name, change in HARD.items():
            x, *residual = inputs.dynamic
            x = change(x)
            y = run(x, *residual)
            error = relative_error(y, operator.reference(sized[2], Inputs(inputs.static, (x, *residual))))
            assert error <= 2 * limit(kernel, first.trait("dtype")), (first.id, name, error)


@pytest.mark.parametrize("kernel", LINEAR)
def test_never_turns_nan_or_infinity_into_numbers_nor_spoils_other_rows(kernel: Kernel) -> None:
    """A quantising kernel may decline such values; none may answer otherwise than the framework."""
    runnable(kernel)
    operator = pool.operator("linear")
    default = pool.kernels()[operator.default]
    for first, sized in problems(kernel):
        inputs = operator.make_inputs(sized[2], generator(), "normal")
        run, wanted = (k.bind(first, k.candidates()[0].params, *inputs.static) for k in (kernel, default))
        for name, change in NOT_FINITE.items():
            for i in range(len(inputs.dynamic)):
                given = [change(t) if i == j else t for j, t in enumerate(inputs.dynamic)]
                try:
                    y = run(*given)
                except Declined:
                    continue
                assert torch.equal(y.isfinite(), wanted(*given).isfinite()), (first.id, name, i)


@pytest.mark.parametrize("kernel", LINEAR)
def test_a_weight_that_no_integer_stands_for_is_refused(kernel: Kernel) -> None:
    runnable(kernel)
    operator = pool.operator("linear")
    for first, sized in problems(kernel):
        inputs = operator.make_inputs(sized[2], generator(), "normal")
        weight, bias = inputs.static[0].clone(), inputs.static[1]
        weight[3, 5] = math.nan
        try:
            y = kernel.bind(first, kernel.candidates()[0].params, weight, bias)(*inputs.dynamic)
        except ValueError as error:
            assert "weight" in str(error) and "finite" in str(error)
        else:
            assert y[:, 3].isnan().all() and y[:, :3].isfinite().all(), first.id


def test_one_bound_form_serves_all_sizes_and_outlives_the_weight() -> None:
    """What is bound must not point into tensors that the caller may free."""
    operator = pool.operator("linear")
    for kernel in pool.kernels_for("linear", "cpu"):
        if kernel.unavailable():
            continue
        for first, sized in problems(kernel):
            inputs = operator.make_inputs(sized[-1], generator(), "normal")
            reference = operator.reference(sized[-1], inputs)
            own = [None if t is None else t.clone() for t in inputs.static]
            run = kernel.bind(first, kernel.candidates()[0].params, *own)
            del own
            junk = [torch.full_like(inputs.static[0], 1e9) for _ in range(4)]
            error = relative_error(run(*inputs.dynamic), reference)
            assert error <= limit(kernel, first.trait("dtype")), (first.id, kernel.id)
            del junk
            break


@pytest.mark.parametrize("kernel", KERNELS)
def test_declares_itself(kernel: Kernel) -> None:
    operator = pool.operator(kernel.op)
    assert set(kernel.precision) <= set(DTYPES) and kernel.precision
    assert kernel.rank > 0 or kernel.id == operator.default
    traits = {name: values[0] for name, values in operator.traits.items()} | {"dtype": "float16"}
    dims = dict.fromkeys(operator.dims, 64)
    if "float16" not in kernel.precision:
        assert "not float16" in str(kernel.objection(Problem.of(kernel.op, traits, dims)))
    for dtype in kernel.precision:
        assert kernel.alignment_for(dtype) in (2, 4, 8, 16, 32, 64)
        low = Problem.of(kernel.op, traits | {"dtype": dtype}, dims, align=1)
        assert "alignment" in str(kernel.objection(low))
        assert kernel.form_bytes(Problem.of(kernel.op, traits | {"dtype": dtype}, dims)) >= 0
    if kernel.form:
        assert kernel.form_bytes(Problem.of(kernel.op, traits | {"dtype": next(iter(kernel.precision))}, dims)) > 0


@pytest.mark.parametrize(
    ("id", "dims", "said"),
    [
        ("torch.weight_int8", {"m": 1, "n": 64, "k": 33}, "multiples of 32"),
        ("torch.weight_int8", {"m": 1, "n": 65, "k": 64}, "multiples of 32"),
        ("torch.weight_int4", {"m": 1, "n": 64, "k": 96}, "multiple of 128"),
        ("torch.weight_int4", {"m": 1, "n": 32, "k": 128}, "of 64"),
    ],
)
def test_objects_to_shapes_it_would_get_wrong(id: str, dims: dict[str, int], said: str) -> None:
    traits = {"dtype": "bfloat16", "bias": "no", "epilogue": "none"}
    assert said in str(pool.kernels()[id].objection(Problem.of("linear", traits, dims)))


def test_int8_weights_need_the_alignment_of_their_vector_loads() -> None:
    """At 16 bytes the operator crashes the process: only the declaration keeps such calls away."""
    traits = {"dtype": "bfloat16", "bias": "no", "epilogue": "none"}
    problem = Problem.of("linear", traits, {"m": 1, "n": 64, "k": 64}, align=16)
    assert "32-byte alignment" in str(pool.kernels()["torch.weight_int8"].objection(problem))


def test_attention_kernels_without_masked_form_object() -> None:
    dims = {"b": 1, "q": 4, "kv": 4, "h": 2, "hkv": 2, "d": 8}
    plain = {"dtype": "float32", "mask": "none", "causal": "no", "layout": "bhsd"}
    matmul, sdpa = (pool.kernels()[id] for id in ("torch.matmul_attention", "torch.sdpa"))
    assert matmul.objection(Problem.of("attention", plain, dims)) is None
    for change in ({"mask": "bool"}, {"mask": "float"}, {"causal": "yes"}):
        assert "masked" in str(matmul.objection(Problem.of("attention", plain | change, dims)))
        assert sdpa.objection(Problem.of("attention", plain | change, dims)) is None
    both = plain | {"mask": "bool", "causal": "yes"}
    assert "not both" in str(sdpa.objection(Problem.of("attention", both, dims)))
    assert "key heads" in str(matmul.objection(Problem.of("attention", plain, dims | {"hkv": 1})))


@pytest.mark.parametrize("lowest", ["-inf", "finfo.min"])
def test_cast_attention_keeps_what_a_row_without_keys_means(lowest: str) -> None:
    """-inf in all of a row's mask hides all keys; the lowest float in all of it hides none of them."""
    dims = {"b": 1, "q": 4, "kv": 4, "h": 2, "hkv": 2, "d": 8}
    traits = {"dtype": "float32", "mask": "float", "causal": "no", "layout": "bhsd"}
    problem = Problem.of("attention", traits, dims)
    cast, sdpa = (pool.kernels()[id].bind(problem, ()) for id in ("torch.sdpa_cast", "torch.sdpa"))
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2, :] = -math.inf if lowest == "-inf" else torch.finfo(torch.float32).min
    want, got = sdpa(q, k, v, mask, None), cast(q, k, v, mask, None)
    assert torch.allclose(got, want, atol=3e-2, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_do_not_spoil_each_other(kernel: Kernel) -> None:
    """Rows from 0.01 to 100 beside one of 1,000: each as right as its class says, or the call is declined."""
    runnable(kernel)
    operator = pool.operator(kernel.op)
    for first, sized in problems(kernel):
        inputs = operator.make_inputs(sized[-1], generator(), "rows")
        try:
            y = kernel.bind(first, kernel.candidates()[0].params, *inputs.static)(*inputs.dynamic)
        except Declined:
            continue
        error = relative_error(y, operator.reference(sized[-1], inputs))
        assert error <= limit(kernel, first.trait("dtype"), y), (first.id, error)
