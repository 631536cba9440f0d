"""No kernel gets an address or stride that it did not declare, and none is refused that it could have taken.

Spies stand in for the kernels: each operator's table has one for every alignment class, which declares that class
and keeps what it gets. What generated kernels themselves declare is tested with them, in ``tests/tiles``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch import pool
from dks.dispatch.generation import Generation
from dks.dispatch.kernel import DTYPES, Inputs, Kernel, Launch, Output
from dks.dispatch.problem import Precision, Problem, alignment
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import ALIGNMENTS, Group, Match, Miss, Rule, Table
from tests.codegen.rows import problem as linear_problem
from tests.codegen.rows import row
from tests.conftest import EDGES
from tests.dispatch.swapping import form

__all__ = ["form"]  # a fixture

CLASSES = ALIGNMENTS[::-1]
OFFSETS = range(128)

DIMS: Mapping[str, Mapping[str, int]] = {
    "linear": {"m": 3, "n": 32, "k": 64},
    "layer_norm": {"m": 3, "n": 32},
    "rms_norm": {"m": 3, "n": 32},
    "softmax": {"m": 3, "n": 32},
    "attention": {"b": 2, "q": 3, "kv": 3, "h": 4, "hkv": 2, "d": 32},
    "paged_attention": {"b": 2, "kv": 20, "h": 4, "hkv": 2, "d": 32, "page": 16},
    "silu_and_mul": {"m": 3, "n": 32},
    "rotary": {"tokens": 3, "h": 4, "hkv": 2, "d": 64},
    "cross_entropy": {"m": 3, "n": 32},
}
"""Rows of whole cache lines in every dtype: what is not aligned is so by what a test does to it."""

ROWS_IN_STRIDES = {"attention": (0, 1, 2), "paged_attention": (0,), "rotary": (0, 1)}
"""Dynamic arguments whose rows may lie apart; of all others the framework takes such. Of rotary's caches both may,
by as much as each other."""

OUTERMOST = {op: next(iter(dims)) for op, dims in DIMS.items()}
"""The dim of rows or sequences: where there is one alone, its stride is never taken."""

Call = Callable[[Sequence[Any], Sequence[Any]], Output]


class Spies:
    """What the kernels of ``spy.<operator>_<alignment>`` got, in order: their alignment, and all arguments."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Problem, tuple[Any, ...]]] = []

    def kernel(self, op: str, align: int) -> Kernel:
        def bind(problem: Problem, _params: Any, *static: Any) -> Launch:
            def run(*given: Any) -> Output:
                self.seen.append((align, problem, (*given, *static)))
                x = given[0]
                if op == "cross_entropy":
                    return x.new_empty(x.shape[:1])
                last = problem.dim("n") if op in ("linear", "silu_and_mul") else x.shape[-1]
                y = x.new_empty(*x.shape[:-1], last)
                return (y, x.clone()) if op == "rotary" or dict(problem.traits).get("residual") == "yes" else y

            return run

        return Kernel(f"spy.{op}_{align}", op, dict.fromkeys(DTYPES, Precision.EXACT), bind, align=align)

    def chosen(self) -> int:
        """The alignment that the one spy declared that ran since the last time, held against all that it got."""
        ((align, problem, args),) = self.seen
        self.seen.clear()
        assert align == class_of(problem, args), f"{align} got {describe(args)}"
        return align


def describe(args: Sequence[Any]) -> list[object]:
    return [(t.data_ptr() % 128, t.shape, t.stride()) if isinstance(t, torch.Tensor) else t for t in args]


def class_of(problem: Problem, args: Sequence[Any]) -> int:
    """The strictest alignment in bytes that all of a call's pointers and row strides have.

    A stride counts where a second row follows. Masks, block tables, lengths, positions and targets are read element
    by element: of these only an address counts that is no element's. The width of softmax comes with each call and
    is none of its kernels' promises. The halves of silu_and_mul and rotary are rows as well.
    """
    bits = 0
    for i, t in enumerate(args):
        if not isinstance(t, torch.Tensor):
            continue
        if (i >= 3 and "attention" in problem.op) or t.dtype == torch.int64:
            bits |= t.data_ptr() % t.element_size()
            continue
        bits |= t.data_ptr()
        for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True):
            if size > 1 and problem.op != "softmax":
                bits |= stride * t.element_size()
    return alignment(bits, row_out(problem) * args[0].element_size())


def row_out(problem: Problem) -> int:
    """Elements between rows that are no input's: those of the output, or halves; 0 where there are none."""
    match problem.op:
        case "linear" | "silu_and_mul":
            return problem.dim("n")
        case "attention" | "paged_attention":
            return problem.dim("d")
        case "rotary":
            return problem.dim("d") // 2
    return 0


@pytest.fixture
def spies(monkeypatch: pytest.MonkeyPatch) -> Spies:
    """In the pool, for every operator and class."""
    made = Spies()
    for op, align in itertools.product(pool.operators(), CLASSES):
        kernel = made.kernel(op, align)
        monkeypatch.setitem(pool.kernels(), kernel.id, kernel)
    return made


def prepares(op: str) -> bool:
    return hasattr(pool.operator(op).server, "prepare")


def runtime_for(problems: Sequence[Problem], classes: Mapping[int, int]) -> Runtime:
    """Every bin of these problems, in both forms, has in each of ``classes`` the spy that declares its value."""
    op = problems[0].op
    declared = sorted(set(classes.values()))
    bins = prod(len(edges) for edges in EDGES[op])
    cells = {align: (declared.index(classes[align]),) * bins for align in sorted(classes, reverse=True)}
    groups = [
        Group(op, kind, p.traits, tuple((s, p.dim(s)) for s in pool.operator(op).static), EDGES[op], cells)
        for p in problems
        for kind in (("prepared", "direct") if prepares(op) else ("direct",))
    ]
    return Runtime("t", Generation(Table(tuple(Rule(f"spy.{op}_{a}", a) for a in declared), tuple(groups))))


def problems_of(op: str, dtype: str, **dims: int) -> list[Problem]:
    """One of each combination of traits that a call can have."""
    operator = pool.operator(op)
    found = []
    for values in itertools.product(*operator.traits.values()):
        traits = dict(zip(operator.traits, values, strict=True)) | {"dtype": dtype}
        if traits.get("causal") == "yes" and traits["mask"] != "none":
            continue
        found.append(Problem.of(op, traits, {**DIMS[op], **dims}))
    return list(dict.fromkeys(found))


def inputs_for(problem: Problem) -> Inputs:
    return pool.operator(problem.op).make_inputs(problem, torch.Generator().manual_seed(5), "normal")


def placed(t: Any, offset: int, strides: Sequence[int] | None = None) -> Any:
    """``t`` at an address ``offset`` bytes past a multiple of 128, be that one of an element's or not.

    With ``strides`` (in elements), zeros of t's shape.
    """
    if not isinstance(t, torch.Tensor):
        return t
    size = t.element_size()
    steps = t.stride() if strides is None else strides
    span = 1 + sum((n - 1) * step for n, step in zip(t.shape, steps, strict=True))
    room = bytearray(span * size + 256)
    begin = (offset - torch.frombuffer(room, dtype=torch.uint8).data_ptr()) % 128
    there = torch.frombuffer(room, dtype=t.dtype, count=span, offset=begin).as_strided(t.shape, steps)
    assert there.data_ptr() % 128 == offset
    return there if strides is not None else there.copy_(t)


def direct(runtime: Runtime, problem: Problem) -> Call:
    """The functional form of a problem's operator, of (constant, dynamic) arguments."""
    call = runtime.server(problem.op).call
    traits = dict(problem.traits)
    match problem.op:
        case "linear" if traits["epilogue"] == "add":
            return lambda static, given: call(given[0], *static, residual=given[1])
        case "linear":
            return lambda static, given: call(*given, *static, traits["epilogue"])
        case "layer_norm" | "rms_norm":
            return lambda static, given: call(given[0], (problem.dim("n"),), *static, *given[1:])
        case "attention":
            causal = traits["causal"] == "yes"
            return lambda _, given: call(*given[:4], 0.0, causal, scale=given[4], enable_gqa=True)
    return lambda _, given: call(*given)


def prepared(runtime: Runtime, problem: Problem, static: Sequence[Any]) -> Callable[..., Output]:
    """A layer with the constant arguments."""
    epilogue = (problem.trait("epilogue"),) if problem.op == "linear" else ()
    layer: Callable[..., Output] = runtime.server(problem.op).prepare(*static, *epilogue)
    return layer


def turns(args: Sequence[Any], offset: int) -> Iterator[list[Any]]:
    """These arguments on cache lines, but one of them at ``offset``: each tensor in turn."""
    home = [placed(t, 0) for t in args]
    for i, t in enumerate(args):
        if isinstance(t, torch.Tensor):
            yield [*home[:i], placed(t, offset), *home[i + 1 :]]


def ops_and_dtypes() -> list[Any]:
    """Not float16, which lies in memory as bfloat16 does."""
    return [
        pytest.param(op, dtype, id=f"{op}-{dtype}")
        for op, operator in pool.operators().items()
        for dtype in operator.traits["dtype"]
        if dtype != "float16"
    ]


every_operator = pytest.mark.parametrize(("op", "dtype"), ops_and_dtypes())


def expected_at(problem: Problem, i: int, offset: int) -> int:
    """The class of a call whose i-th tensor alone is off a cache line."""
    if problem.op == "paged_attention" and i >= 3:
        return alignment()  # pages and lengths that are no whole elements are copied
    if (problem.op, i) in (("rotary", 4), ("cross_entropy", 1)):
        return alignment()  # so are positions and targets
    if problem.op == "attention" and i == 3:
        size = 1 if problem.trait("mask") == "bool" else DTYPES[problem.trait("dtype")].itemsize
        return alignment(offset % size)
    return alignment(offset)


@pytest.mark.usefixtures("form")
@every_operator
def test_functions_with_every_pointer_at_every_offset(spies: Spies, op: str, dtype: str) -> None:
    problems = problems_of(op, dtype)
    runtime = runtime_for(problems, {align: align for align in CLASSES})
    for problem in problems:
        inputs, call = inputs_for(problem), direct(runtime, problem)
        args, split = (*inputs.static, *inputs.dynamic), len(inputs.static)
        for offset in OFFSETS:
            for i, moved in enumerate(turns(args, offset)):
                call(moved[:split], moved[split:])
                assert spies.chosen() == expected_at(problem, i, offset), (problem.id, i, offset)
    counted = runtime.stats()["ops"][op]
    assert not counted["fallbacks"] and not counted["hits"].get("nearest"), counted


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("op", "dtype"), [case for case in ops_and_dtypes() if prepares(case.values[0])])
def test_layers_with_every_pointer_at_every_offset(spies: Spies, op: str, dtype: str) -> None:
    problems = [p for p in problems_of(op, dtype) if dict(p.traits).get("affine") != "no"]
    runtime = runtime_for(problems, {align: align for align in CLASSES})
    for problem in problems:
        inputs = inputs_for(problem)
        layer = prepared(runtime, problem, inputs.static)
        for offset in OFFSETS:
            for moved in turns(inputs.dynamic, offset):
                layer(*moved)
                assert spies.chosen() == alignment(offset), (problem.id, offset)
            # Of a constant that would lower every call's class, a layer keeps a copy.
            home = [placed(t, 0) for t in inputs.dynamic]
            prepared(runtime, problem, [placed(t, offset) for t in inputs.static])(*home)
            assert spies.chosen() == alignment(), (problem.id, offset)
    counted = runtime.stats()["ops"][op]
    assert not counted["fallbacks"] and not counted["hits"].get("nearest"), counted


@pytest.mark.usefixtures("form")
@every_operator
def test_rows_of_every_width(spies: Spies, op: str, dtype: str) -> None:
    """The stride of rows that follow one another, in and out: n, k or d elements."""
    size = DTYPES[dtype].itemsize
    widths = [name for name in ("n", "k", "d") if name in DIMS[op]]
    for name, width in itertools.product(widths, (1, 2, 3, 4, 8, 12, 16, 24, 31, 32)):
        if pool.operator(op).odd_dims({**DIMS[op], name: width}) is not None:
            continue
        problems = problems_of(op, dtype, **{name: width})
        runtime = runtime_for(problems, {align: align for align in CLASSES})
        for problem in problems:
            inputs = inputs_for(problem)
            static, dynamic = ([placed(t, 0) for t in part] for part in (inputs.static, inputs.dynamic))
            row = width // 2 if op == "rotary" else width
            wanted = alignment() if op == "softmax" else alignment(row * size)
            for _ in range(2):  # the fast path serves functions from their second call on
                direct(runtime, problem)(static, dynamic)
                assert spies.chosen() == wanted, problem.id
            if prepares(op) and static[0] is not None:
                prepared(runtime, problem, static)(*dynamic)
                assert spies.chosen() == wanted, problem.id


def apart(t: torch.Tensor) -> Iterator[tuple[int, list[int]]]:
    """Strides of ``t`` with one row dim's made longer, by 1 to 16 elements: (that dim, strides)."""
    for dim, by in itertools.product(range(t.dim() - 1), (1, 2, 4, 8, 16)):
        strides = list(t.stride())
        strides[dim] += by
        yield dim, strides


@pytest.mark.usefixtures("form")
@every_operator
def test_rows_that_lie_apart(spies: Spies, op: str, dtype: str) -> None:
    """Each row stride counts where an operator takes rows that lie apart; elsewhere the framework takes these."""
    for few in ({}, {OUTERMOST[op]: 1}):
        problems = problems_of(op, dtype, **few)
        runtime = runtime_for(problems, {align: align for align in CLASSES})
        refused = 0
        for problem in problems:
            inputs = inputs_for(problem)
            home, static = [placed(t, 0) for t in inputs.dynamic], [placed(t, 0) for t in inputs.static]
            calls = [partial(direct(runtime, problem), static)]
            if prepares(op) and static[0] is not None:
                layer = prepared(runtime, problem, static)
                calls.append(lambda moved, layer=layer: layer(*moved))
            given = [(i, t) for i, t in enumerate(inputs.dynamic[:3]) if isinstance(t, torch.Tensor)]
            for call, (i, t) in itertools.product(calls, given):
                for dim, strides in apart(t):
                    call([*home[:i], placed(t, 0, strides), *home[i + 1 :]])
                    if i in ROWS_IN_STRIDES.get(op, ()) or t.shape[dim] == 1:
                        own = (strides[dim] * t.element_size()) if t.shape[dim] > 1 else 0
                        wanted = alignment() if op == "paged_attention" else alignment(own)
                        assert spies.chosen() == wanted, (problem.id, i, strides)
                    else:
                        refused += 1
                        assert not spies.seen, (problem.id, i, strides)
        assert runtime.stats()["ops"][op]["fallbacks"] == ({"strides": refused} if refused else {})


@pytest.mark.parametrize("dtype", pool.operator("attention").traits["dtype"])
def test_rows_of_the_output_count(spies: Spies, dtype: str) -> None:
    """Inputs in rows of whole cache lines, 24 elements used: those of the output are 24 elements apart."""
    for problem in problems_of("attention", dtype, d=24):
        runtime = runtime_for([problem], {align: align for align in CLASSES})
        q, k, v, mask, scale = inputs_for(problem).dynamic
        wide = [placed(t, 0, [-(-stride // 32) * 32 for stride in t.stride()[:3]] + [1]) for t in (q, k, v)]
        direct(runtime, problem)((), (*wide, mask, scale))
        assert spies.chosen() == alignment(24 * DTYPES[dtype].itemsize)


@pytest.mark.usefixtures("form")
@every_operator
@pytest.mark.parametrize("declared", [1, 2, 4, 8, 16, 32, 64])
def test_measured_in_one_class_it_takes_all_that_it_declared(
    spies: Spies, op: str, dtype: str, declared: int
) -> None:
    """A table with the class of cache lines alone, as most sweeps make it."""
    problem = problems_of(op, dtype)[0]
    runtime = runtime_for([problem], {64: declared})
    inputs, call = inputs_for(problem), direct(runtime, problem)
    home, static = [placed(t, 0) for t in inputs.dynamic], [placed(t, 0) for t in inputs.static]
    taken, offsets = 0, range(0, 128, inputs.dynamic[0].element_size())
    for offset in offsets:
        call(static, [placed(inputs.dynamic[0], offset), *home[1:]])
        assert [align for align, *_ in spies.seen] == [declared] * (offset % declared == 0), offset
        taken += len(spies.seen)
        spies.seen.clear()
    counted = runtime.stats()["ops"][op]
    refused = len(offsets) - taken
    assert counted["fallbacks"] == ({"misaligned": refused} if refused else {}), counted


FLOAT = CLASSES[:5]  # what a kernel of float32 can declare: 64 to 4

Times = dict[int, float]
"""Microseconds of the spies of one bin and class, by what they declare; torch.linear always takes 100."""


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from((1, 16, 256)), st.sampled_from(FLOAT)),
        st.dictionaries(st.sampled_from(FLOAT), st.sampled_from((20.0, 50.0, 150.0))),
        min_size=1,
    )
)
def test_a_built_table_has_a_winner_for_every_class(drawn: dict[tuple[int, int], Times]) -> None:
    """The fastest of those that may have such a call, wherever a bin's loosest class was measured."""
    measured = {(m, 4): {} for m, _ in drawn} | drawn
    with pytest.MonkeyPatch.context() as patched:
        rows = []
        for declared in FLOAT:
            kernel = Spies().kernel("linear", declared)
            patched.setitem(pool.kernels(), kernel.id, kernel)
        for (m, align), times in measured.items():
            of = linear_problem(m, align)
            rows.append(row("torch.linear", 100, of))
            rows += [row(f"spy.linear_{declared}", us, of) for declared, us in times.items()]
        table = select(rows, Policy(max_error=1e-5)).table()
    for index, group in enumerate(table.groups):
        for m, align in itertools.product(group.edges[0], FLOAT):
            code = table.find(index, align, m)
            assert code >= 0 and Match(code & 3) is Match.EXACT, (m, align)
            rule = table.rules[code >> 2]
            assert rule.align <= align, (m, align, rule)
            least = max(c for c in FLOAT if c <= align and (m, c) in measured)
            times = {a: us for a, us in measured[m, least].items() if a <= least} | {0: 100.0}
            won = times[0 if rule.candidate == "torch.linear" else rule.align]
            assert won == min(times.values()), (m, align, rule)
        for align in (1, 2):  # of half an element, none
            assert table.find(index, align, group.edges[0][0]) == -1 - Miss.MISALIGNED
