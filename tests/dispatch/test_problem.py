"""Identity: ids parse back to what made them, and no hostile text becomes a name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dks.dispatch.problem import MAX_ALIGNMENT, MAX_DIM, Candidate, Precision, Problem, alignment, check_name

NAMES = st.text("az09_", max_size=6).map("k{}".format)
VALUES = st.text("az09_.", max_size=6).map("7{}".format)
PARAMS = st.tuples(st.text("az_", min_size=1, max_size=6), st.integers(0, 10**9))
TRAITS = st.dictionaries(NAMES, VALUES, max_size=4)
DIMS = st.dictionaries(NAMES, st.integers(1, MAX_DIM), max_size=4)
ALIGNMENTS = st.sampled_from((1, 2, 4, 8, 16, 32, 64))

HOSTILE = [
    "",
    "Linear",
    "a b",
    "a-b",
    "_a",
    ".a",
    "a\n",
    "a\0",
    "a,b",
    "a=b",
    'a"',
    "a'",
    "a/../b",
    "*/",
    "a\\\n",
    "a\u202eb",
    "\u0430",
    "a\u0663",
    "a]",
    "a)",
    "a@1",
]


def refused(op: str = "linear", traits: object = None, dims: object = None, align: object = 64) -> str:
    """The message with which a problem of these is refused."""
    with pytest.raises(ValueError) as caught:
        Problem.of(op, traits or {}, {"m": 1} if dims is None else dims, align)  # type: ignore[arg-type]
    return str(caught.value)


@given(NAMES, TRAITS, DIMS, ALIGNMENTS)
def test_a_problem_s_id_parses_back(op: str, traits: dict[str, str], dims: dict[str, int], align: int) -> None:
    problem = Problem.of(op, traits, dims, align)
    assert Problem.parse(problem.id) == problem
    assert "/" not in problem.slug
    assert "\n" not in problem.slug


@given(VALUES, st.lists(PARAMS, max_size=4))
def test_a_candidate_s_id_parses_back(kernel: str, params: list[tuple[str, int]]) -> None:
    candidate = Candidate(kernel, tuple(params))
    assert Candidate.parse(candidate.id) == candidate
    assert str(candidate) == candidate.id


def test_an_id_reads_as_documented() -> None:
    problem = Problem.of("linear", {"epilogue": "none", "bias": "yes"}, {"m": 64, "n": 384}, 32)
    assert problem.id == "linear[bias=yes,epilogue=none](m=64,n=384)@32"
    assert problem.slug == "linear.yes-none.m64-n384.a32"
    assert (problem.trait("bias"), problem.dim("n")) == ("yes", 384)
    assert Candidate("mkl.linear_packed", (("rows", 512),)).id == "mkl.linear_packed/rows512"


def test_traits_are_sorted_and_dims_keep_their_order() -> None:
    one = Problem.of("op", {"b": "x", "a": "y"}, {"m": 1, "k": 2})
    assert one == Problem.of("op", {"a": "y", "b": "x"}, {"m": 1, "k": 2})
    assert one != Problem.of("op", {"a": "y", "b": "x"}, {"k": 2, "m": 1})


def test_a_name_that_is_not_there_is_a_key_error() -> None:
    problem = Problem.of("op", {"a": "x"}, {"m": 1})
    with pytest.raises(KeyError):
        problem.trait("m")
    with pytest.raises(KeyError):
        problem.dim("a")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_name_is_refused_wherever_it_stands(text: str) -> None:
    assert refused(op=text).startswith("operator: found")
    assert refused(traits={text: "x"}).startswith("trait: found")
    assert refused(traits={"a": text}).startswith("trait a: found")
    assert refused(dims={text: 1}).startswith("dim: found")
    with pytest.raises(ValueError, match=r"(kernel|candidate): found"):
        Candidate.parse(text)
    with pytest.raises(ValueError, match="thing: found"):
        check_name(text, "thing")


@pytest.mark.parametrize("size", [0, -1, MAX_DIM + 1, 2**63, True, 1.0, float("nan"), "1", None])
def test_a_size_that_is_none_is_refused(size: object) -> None:
    assert "dim m: found" in refused(dims={"m": size})


@pytest.mark.parametrize("align", [0, 3, 65, 128, -1, None])
def test_an_alignment_that_is_none_is_refused(align: object) -> None:
    assert refused(align=align).startswith("alignment: found")


@pytest.mark.parametrize(
    "text",
    [
        "linear",
        "linear[](m=1)",
        "linear[](m=1)@",
        "linear[](m=1)@3",
        "linear[](m=0)@64",
        "linear[](m=-1)@64",
        "linear[](m)@64",
        "linear[](m=x)@64",
        "linear[a](m=1)@64",
        "linear[](m=1)@64\n",
        " linear[](m=1)@64",
        "linear[](m=" + "9" * 5000 + ")@64",
        "linear[a=b]](m=1)@64",
    ],
)
def test_what_is_no_problem_does_not_parse(text: str) -> None:
    with pytest.raises(ValueError):
        Problem.parse(text)


@pytest.mark.parametrize("text", ["a/", "a/1", "a/rows", "a/r1-", "a/r-1", "a/r1/r2", "a/r1\n", "/r1"])
def test_what_is_no_candidate_does_not_parse(text: str) -> None:
    with pytest.raises(ValueError):
        Candidate.parse(text)


@given(st.lists(st.integers(0, 2**48), max_size=5))
def test_alignment_is_the_largest_power_of_two_that_divides_all(values: list[int]) -> None:
    found = alignment(*values)
    assert found in (1, 2, 4, 8, 16, 32, 64)
    assert all(value % found == 0 for value in values)
    assert found == MAX_ALIGNMENT or any(value % (2 * found) for value in values)


def test_alignment_of_nothing_and_of_null_is_the_best() -> None:
    assert alignment() == alignment(0) == MAX_ALIGNMENT


def test_precision_limits_grow_with_the_class() -> None:
    limits = [each.limit for each in (Precision.EXACT, Precision.BF16, Precision.INT8, Precision.INT4)]
    assert limits == sorted(limits) == [1e-5, 1e-2, 5e-2, 2e-1]
