"""Sweep configs: what a good one means, and that a bad one is named in one kind of message."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dks.dispatch import pool
from dks.profiler.config import ConfigError, Measure, load
from dks.profiler.problems import MAX_PROBLEMS, kind_of

CONFIGS = Path(__file__).parents[2] / "configs"

GOOD = """\
version: 1
name: good
operators:
  linear:
    bins:
      m: {scheme: explicit, edges: [1, 8, 32]}
    problems:
      - dims: {n: 64, k: 32}
        traits: {dtype: float32, bias: yes, epilogue: none}
        count: 2
    candidates: ["*"]
  attention:
    bins:
      b: {scheme: explicit, edges: [2]}
      q: {scheme: powers_of_two, min: 8, max: 16}
    tie: {kv: q}
    problems:
      - dims: {h: 2, hkv: 2, d: 32}
measure: {min_rounds: 3, max_rounds: 10, seconds: 0.05}
"""
EDGES = "{scheme: explicit, edges: [1, 8, 32]}"
MESSAGE = re.compile(r".*:\d+: [^:]+(:.*)?: found .*[,;] expected .+|\.\.\. and \d+ more")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(text: str | bytes) -> str:
    """The message with which a config of this text is refused."""
    Path("a.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load("a.yaml")
    message = str(caught.value)
    for line in message.splitlines():
        assert MESSAGE.fullmatch(line), line
    return message


def good(*changes: tuple[str, str]) -> str:
    text = GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return text


def write(text: str) -> Path:
    path = Path("a.yaml")
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_of_the_project_loads(path: Path) -> None:
    sweep = load(path)
    assert sweep.name == path.stem.replace("-", "_")
    for part in sweep.operators:
        assert part.problems
        known = tuple(pool.candidates_for(part.op, sweep.device))
        if sweep.name != "gpu_smoke":  # that one takes one CUTLASS kernel of each kind, which are slow to compile
            assert part.candidates == known
        assert set(part.candidates) <= set(known) and part.candidates[0].kernel == pool.operator(part.op).default
        assert tuple(part.bins) == pool.operator(part.op).dynamic
        assert all(each.weight >= 0 for each in part.problems)


def test_minilm_counts_the_calls_of_one_pass() -> None:
    parts = {part.op: part for part in load(CONFIGS / "minilm.yaml").operators}
    calls = {
        op: sum(each.weight for each in part.problems if each.problem.trait("dtype") == "float32")
        for op, part in parts.items()
    }
    # Attention is listed with and without a mask: a pass takes one of the two.
    assert calls == {op: pytest.approx(n) for op, n in (("linear", 36), ("layer_norm", 13), ("attention", 12))}


def test_llama_bins_follow_the_recorded_traffic() -> None:
    linear, norm = load(CONFIGS / "llama3-8b-linear.yaml").operators
    assert linear.bins["m"].edges[:6] == (1, 2, 4, 8, 16, 32) and len(linear.bins["m"]) == 14
    assert linear.bins["m"].edges[-1] == 14064
    counted = [each.weight for each in linear.problems if each.problem.dim("n") == 14336]
    assert sum(counted) == pytest.approx(64)
    assert max(counted) < 2 * 64 / 8
    assert norm.op == "rms_norm" and norm.bins == linear.bins
    assert sum(each.weight for each in norm.problems) == pytest.approx(65)


def test_a_good_config_says_what_it_says(folder: Path) -> None:
    sweep = load(write(GOOD))
    assert (sweep.name, sweep.device, sweep.threads, sweep.source) == ("good", "cpu", None, Path("a.yaml"))
    assert sweep.measure == Measure(min_rounds=3, max_rounds=10, seconds=0.05, precision=0.02, seed=0)
    linear, attention = sweep.operators
    assert [each.problem.id for each in linear.problems] == [
        f"linear[bias=yes,dtype=float32,epilogue=none](m={m},n=64,k=32)@64" for m in (1, 8, 32)
    ]
    assert sum(each.weight for each in linear.problems) == pytest.approx(2)
    assert linear.candidates[0].id == "torch.linear"
    assert attention.bins["kv"] == attention.bins["q"]
    assert attention.problems[0].problem.traits == (
        ("causal", "no"), ("dtype", "float32"), ("layout", "bshd"), ("mask", "none"),
    )  # fmt: skip
    assert pickle.loads(pickle.dumps(sweep)) == sweep


@pytest.mark.parametrize(
    ("written", "bias"),
    [("yes", ["yes"]), ("no", ["no"]), ("[no, yes]", ["no", "yes"]), ('"no"', ["no"]), ("[no, no]", ["no"])],
)
def test_a_trait_is_a_value_or_a_list_and_booleans_are_yes_and_no(
    folder: Path, written: str, bias: list[str]
) -> None:
    linear = load(write(good(("bias: yes", f"bias: {written}")))).operators[0]
    assert list(dict.fromkeys(each.problem.trait("bias") for each in linear.problems)) == bias


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        ("[torch.addmm]", ["torch.linear", "torch.addmm"]),
        ("['mkl.linear_packed/rows6*']", ["torch.linear", "mkl.linear_packed/rows64"]),
        ("[torch.linear]", ["torch.linear"]),
        ("['torch.addm?', torch.addmm]", ["torch.linear", "torch.addmm"]),
    ],
)
def test_patterns_keep_candidates_and_never_lose_the_default(folder: Path, patterns: str, kept: list[str]) -> None:
    sweep = load(write(good(('["*"]', patterns))))
    assert [candidate.id for candidate in sweep.operators[0].candidates] == kept


def test_a_tied_dim_may_repeat_the_bins_of_its_source(folder: Path) -> None:
    same = "max: 16}\n      kv: {scheme: explicit, edges: [8, 16]}"
    assert load(write(good(("max: 16}", same)))) == load(write(GOOD))
    other = "max: 16}\n      kv: {scheme: explicit, edges: [8, 17]}"
    assert "attention.bins.kv: found other bins" in refusal(good(("max: 16}", other)))


def test_numbers_are_taken_as_written(folder: Path) -> None:
    measure = load(write(good(("seconds: 0.05", "seconds: 5e-1, precision: 1, seed: 1_000")))).measure
    assert (measure.seconds, measure.precision, measure.seed) == (0.5, 1, 1000)


def test_a_histogram_lies_beside_the_config_and_weighs_the_bins(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "t.csv").write_text("value,weight\n4,3\n8,1\n")
    text = good((EDGES, "{scheme: quantiles, histogram: t.csv, bins: 2}"))
    (folder / "sub" / "a.yaml").write_text(text)
    linear = load("sub/a.yaml").operators[0]
    assert linear.bins["m"].edges == (4, 8)
    assert [each.weight for each in linear.problems] == [1.5, 0.5]


def test_restrict_keeps_the_config_s_order_and_names_what_is_not_there(folder: Path) -> None:
    sweep = load(write(GOOD))
    assert [part.op for part in sweep.restrict(["attention", "linear"]).operators] == ["linear", "attention"]
    assert sweep.restrict(["attention"]).operators == sweep.operators[1:]
    with pytest.raises(
        ValueError, match="found 'linaer', expected one of linear, attention; did you mean 'linear'"
    ):
        sweep.restrict(["linaer", "attention"])
    with pytest.raises(ConfigError, match="found 'layer_norm', expected one of linear, attention"):
        sweep.restrict(["layer_norm"])
    with pytest.raises(ConfigError, match="found none, expected one of linear, attention"):
        sweep.restrict([])


UNKNOWN_AND_MISSING = [
    ("name: good", "name: good\nnmae: x", "3: nmae: found 'nmae', expected one of version, name, "),
    ("measure:", "mesure:", "19: mesure: found 'mesure', "),
    ("measure:", "mesure:", "; did you mean 'measure'?"),
    (
        "count:",
        "cuont:",
        "problems[0].cuont: found 'cuont', expected one of dims, traits, count, sizes, before, after; did you ",
    ),
    ("seconds:", "second:", "measure.second: found 'second', expected one of min_rounds, "),
    ("edges: [1", "of: 3, edges: [1", "6: operators.linear.bins.m.of: found 'of', expected one of scheme, "),
    ("    tie", "    ties", "16: operators.attention.ties: found 'ties', expected one of bins, tie, "),
    ("name: good\n", "", "1: name: found nothing, expected it: this key has no default"),
    ("version: 1\n", "", "1: version: found nothing, expected 1"),
    ("linear:", "linar:", "4: operators.linar: found 'linar', expected one of attention, cross_entropy, "),
    ("linear:", "linar:", "; did you mean 'linear'?"),
    ("float32", "flot32", "9: operators.linear.problems[0].traits.dtype: found 'flot32', expected one of "),
    ("float32", "flot32", "expected one of float32, bfloat16, float16; did you mean 'float32'?"),
    ("bias:", "bais:", "traits.bais: found 'bais', expected one of dtype, bias, epilogue; did you mean 'b"),
    ("n: 64, k: 32", "n: 64", "8: operators.linear.problems[0].dims: found no 'k', expected n, k"),
    ("n: 64", "n: 64, z: 3", "8: operators.linear.problems[0].dims.z: found 'z', expected one of n, k"),
    ("n: 64", "n: 64, m: 3", "dims.m: found 'm', expected one of n, k; a dynamic dim belongs in bins"),
    ("m: {", "n: {", "6: operators.linear.bins.n: found 'n', expected one of m; a static dim matches"),
    ("m: {", "n: {", "5: operators.linear.bins: found no 'm', expected bins for m"),
    ("m: {", "x: {", "6: operators.linear.bins.x: found 'x', expected one of m"),
    ("    tie: {kv: q}\n", "", "13: operators.attention.bins: found no 'kv', expected bins for b, q, kv"),
    ("{kv: q}", "{kv: q, b: kv}", "tie.b: found 'kv', expected one of q; a dim follows one that is not tied"),
    ("{kv: q}", "{kv: h}", "16: operators.attention.tie.kv: found 'h', expected one of b, q"),
    ("{kv: q}", "{kv: q, d: q}", "16: operators.attention.tie.d: found 'd', expected one of b, q, kv"),
    ('["*"]', "[torch.lineer]", "11: operators.linear.candidates[0]: found 'torch.lineer', expected one of "),
    ('["*"]', "[torch.lineer]", "; did you mean 'torch.linear'?"),
    ('["*"]', "['cutlass.*']", "11: operators.linear.candidates[0]: found 'cutlass.*', expected one of "),
    ("bias: yes", "bias: yes, bias: no", "traits.bias: found it twice (first in line 9), expected it once"),
    ("name: good", "name: good\nname: a", "3: name: found it twice (first in line 2), expected it once"),
]

VALUES = [
    ("version: 1", "version: 2", "1: version: found 2, expected 1; this release reads no other form"),
    ("version: 1", "version: yes", "1: version: found yes, expected 1"),
    ("version: 1", "version: 1.0", "1: version: found 1.0, expected 1"),
    ("name: good", "name: Good", "2: name: found 'Good', expected lower-case"),
    ("name: good", "name: [a]", "2: name: found a list, expected lower-case"),
    ("name: good", "name: 7", "2: name: found 7, expected lower-case"),
    ("name: good", "name: g\ndevice: gpu", "3: device: found 'gpu', expected cpu, cuda or cuda:N"),
    ("name: good", "name: g\nthreads: 0", "3: threads: found 0, expected a whole number from 1 to 1024"),
    ("name: good", "name: g\nbudget: 5", "3: budget: found 5, expected a positive number and s, m or h"),
    ("name: good", "name: g\nbudget: 0m", "3: budget: found '0m', expected a positive number"),
    ("name: good", "name: g\nthreads: yes", "3: threads: found yes, expected a whole number"),
    ("bias: yes", "bias: 1", "traits.bias: found '1', expected one of yes, no"),
    ("bias: yes", "bias:", "traits.bias: found nothing, expected a value"),
    ("bias: yes", "bias: []", "traits.bias: found a list, expected a value"),
    ("bias: yes", "bias: {a: b}", "traits.bias: found a mapping, expected a value"),
    ("count: 2", "count: 0", "10: operators.linear.problems[0].count: found 0, expected a whole number"),
    ("n: 64", "n: 0", "dims.n: found 0, expected a whole number from 1 to 2^40"),
    ("n: 64", "n: -64", "dims.n: found -64, expected a whole number from 1 to 2^40"),
    ("n: 64", "n: 64.0", "dims.n: found 64.0, expected a whole number"),
    ("n: 64", "n: 9999999999999", "dims.n: found 9999999999999, expected a whole number from 1 to 2^40"),
    ("n: 64", "n: " + "9" * 5000, "dims.n: found '999"),
    ("n: 64", "n: 0x40", "dims.n: found '0x40', expected a decimal number"),
    ("n: 64", "n: 064", "dims.n: found '064', expected a decimal number"),
    ("n: 64", "n: 0_", "dims.n: found '0_', expected a decimal number"),
    ("n: 64", "n: 1:30", "dims.n: found '1:30', expected a decimal number"),
    ("n: 64", "n: 2020-01-01", "dims.n: found '2020-01-01', expected a whole number"),
    ('["*"]', "[3]", "candidates[0]: found 3, expected a candidate's id"),
    ('["*"]', "[]", "candidates: found nothing in it, expected at least one"),
    ('["*"]', "'*'", "candidates: found '*', expected a list"),
    ("candidates:", "alignments: [48]\n    candidates:", "alignments[0]: found 48, expected a power of two"),
    (
        "candidates:",
        "alignments: [yes]\n    candidates:",
        "alignments[0]: found yes, expected a power of two",
    ),
    ("candidates:", "alignments: 64\n    candidates:", "alignments: found 64, expected a list"),
    ("seconds: 0.05", "seconds: .nan", "19: measure.seconds: found '.nan', expected a decimal number"),
    ("seconds: 0.05", "seconds: -1", "19: measure.seconds: found -1, expected a number from 0.001 to 3600"),
    ("seconds: 0.05", "seconds: 1e999", "19: measure.seconds: found inf, expected a number"),
    ("seconds: 0.05", "seconds: text", "19: measure.seconds: found 'text', expected a number"),
    ("max_rounds: 10", "max_rounds: 2", "measure.max_rounds: found 2, expected at least min_rounds (3)"),
    ("{min_rounds: 3, max_rounds: 10, seconds: 0.05}", "[]", "measure: found a list, expected a mapping"),
]

SCHEMES = [
    ("5", ": found 5, expected a mapping"),
    ("{edges: [1]}", ".scheme: found nothing, expected one of powers_of_two, multiples, explicit, quantiles"),
    ("{scheme: explict, edges: [1]}", ".scheme: found 'explict', expected one of powers_of_two, "),
    ("{scheme: [], edges: [1]}", ".scheme: found "),
    ("{scheme: explicit, edges: []}", ": found no edge, expected at least one"),
    ("{scheme: explicit, edges: [8, 8]}", ": found 8 before 8, expected strictly increasing"),
    ("{scheme: explicit, edges: [a, 0]}", ".edges[0]: found 'a', expected a whole number"),
    ("{scheme: explicit, edges: 8}", ".edges: found 8, expected a list"),
    ("{scheme: powers_of_two, min: 9, max: 3}", ": found min=9 and max=3, expected 1 <= min <= max"),
    ("{scheme: powers_of_two, min: 9}", ".max: found nothing, expected it"),
    ("{scheme: multiples, of: 0, min: 1, max: 8}", ".of: found 0, expected a whole number"),
    ("{scheme: multiples, of: 1, min: 1, max: 9999999}", ": found more than 4096 bins"),
    ("{scheme: quantiles, histogram: t.csv, bins: 3}", ".histogram: t.csv: found no such file"),
    ("{scheme: quantiles, histogram: ., bins: 3}", ".histogram: .: found a folder"),
    ("{scheme: quantiles, histogram: a.yaml, bins: 3}", ".histogram: a.yaml: found 'version: 1' in line 1"),
    ("{scheme: quantiles, histogram: t.csv, bins: 0}", ".bins: found 0, expected a whole number"),
]


@pytest.mark.parametrize(("old", "new", "message"), UNKNOWN_AND_MISSING + VALUES)
def test_a_fault_is_named_with_its_line(folder: Path, old: str, new: str, message: str) -> None:
    assert message in refusal(good((old, new)))


@pytest.mark.parametrize(("scheme", "message"), SCHEMES)
def test_a_bad_scheme_is_named(folder: Path, scheme: str, message: str) -> None:
    assert f"a.yaml:6: operators.linear.bins.m{message}" in refusal(good((EDGES, scheme)))


def test_all_faults_are_named_at_once_in_the_order_of_lines(folder: Path) -> None:
    message = refusal(good(("n: 64", "n: 64, z: 1"), ("bias: yes", "bias: maybe"), ("{kv: q}", "{kv: h}")))
    assert [int(line.split(":")[1]) for line in message.splitlines()] == [8, 9, 16]
    many = refusal("version: 1\n" + "".join(f"a{i}: 1\n" for i in range(40)))
    assert len(many.splitlines()) == 21
    assert many.endswith("... and 22 more")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "a.yaml:1: config: found nothing, expected a mapping"),
        (b"# only a comment\n", "a.yaml:1: config: found nothing, expected a mapping"),
        (b"- a\n", "a.yaml:1: config: found a list, expected a mapping"),
        (b"text", "a.yaml:1: config: found 'text', expected a mapping"),
        (b"a: 1\nb: [", "a.yaml:2: YAML: found a syntax error"),
        (b"a: b: c", "a.yaml:1: YAML: found a syntax error (mapping values are not allowed here)"),
        (b"a: 1\n\tb: 1", "a.yaml:2: YAML: found a syntax error"),
        (b"a: 1\n---\nb: 1", "a.yaml:2: YAML: found a syntax error"),
        (b"a: 1\n\xff", "a.yaml:1: file: found a byte that is no UTF-8 in line 2"),
        (b"a: 1\nb: \x00", "a.yaml:2: YAML: found the character 0x0"),
        (b'a: "\\U99999999"', "a.yaml:1: YAML: found a number or an escape that is out of range"),
        (b"%YAML 1." + b"9" * 5000 + b"\n---\na: 1", "a.yaml:1: YAML: found a number or an escape"),
        (b'a: "\\uD800"', "a.yaml:1: a: found '\\ud800', expected one line of printable text"),
        (b'version: 1\n"a\\nb": 1', "a.yaml:2: config: found a key that is no plain text"),
        (b"version: 1\n? [a]\n: 1", "a.yaml:2: config: found a key that is no plain text"),
        (b"version: 1\n1: 2", "a.yaml:2: 1: found '1', expected one of version"),
        (b"version: 1\n<<: {name: a}", "a.yaml:2: '<<': found '<<', expected one of version"),
        (
            b"version: 1\nname: a\noperators: {}",
            "a.yaml:3: operators: found nothing in it, expected at least one",
        ),
        (b"version: 1\nname: a\noperators: 3", "a.yaml:3: operators: found 3, expected a mapping"),
        (
            b"version: 1\nname: a\noperators:\n  linear:\n",
            "a.yaml:4: operators.linear: found nothing, expected a map",
        ),
        (b"a: &x 1\nb: *x", "a.yaml:1: YAML: found an anchor or alias"),
        (b"a: *x", "a.yaml:1: YAML: found an anchor or alias"),
        (b"a: !!python/object/apply:os.system [ls]", "a.yaml:1: YAML: found the tag"),
        (b"[" * 100_000, "a.yaml:1: YAML: found more than 16 levels"),
        (b"- " * 100_000, "a.yaml:1: YAML: found more than 16 levels"),
        (b"a: 1\n" * 30_000, "YAML: found more than 10000 values"),
        (b"#" * (2**20 + 1), "a.yaml:1: file: found more than 1 MiB"),
    ],
    ids=range(27),
)
def test_a_file_that_is_no_config_is_named(folder: Path, text: bytes, message: str) -> None:
    assert message in refusal(text)


def test_a_file_that_is_none_is_named(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    write(GOOD)
    for path, found in (
        ("b.yaml", "b.yaml:1: file: found no such file, expected a file; did you mean a.yaml?"),
        (".", ".:1: file: found a folder, expected a file"),
        ("pipe", "pipe:1: file: found a pipe or device, expected a file"),
        ("a.yaml/b", "a.yaml/b:1: file: found Not a directory, expected a readable file"),
        ("x" * 5000, "file: found File name too long, expected a readable file"),
        ("a\0b", "'a\\x00b':1: file: found a NUL in the name, expected a file"),
    ):
        with pytest.raises(ConfigError, match=re.escape(found)):
            load(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(folder: Path) -> None:
    write(GOOD).chmod(0)
    with pytest.raises(ConfigError, match="file: found Permission denied, expected a readable file"):
        load("a.yaml")


def test_too_many_problems_are_refused_before_one_is_built(folder: Path) -> None:
    bins = "{scheme: multiples, of: 1, min: 1, max: 4000}"
    text = good(("{scheme: explicit, edges: [2]}", bins), ("{scheme: powers_of_two, min: 8, max: 16}", bins))
    assert f"operators: found 16000003 problems, expected at most {MAX_PROBLEMS}" in refusal(text)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, len(GOOD)),
    st.integers(0, 12),
    st.text("{}[]:,-#&*!|>'\"%@?~.\n\t 0a9=\\\ue000", max_size=4),
)
def test_whatever_is_typed_into_a_config_it_loads_or_is_named(
    folder: Path, place: int, cut: int, typed: str
) -> None:
    path = write(GOOD[:place] + typed + GOOD[place + cut :])
    try:
        load(path)
    except ConfigError as error:
        assert all(MESSAGE.fullmatch(line) for line in str(error).split("\n"))


PIPELINE = """
version: 1
name: pipe
operators:
  linear:
    bins: {m: {scheme: explicit, edges: [1, 8]}}
    problems:
      - dims: {n: 32, k: 64}
        before: [{op: layer_norm, dims: {n: 64}}]
        after: [{op: layer_norm, dims: {n: n}}]
  attention:
    bins: {b: {scheme: explicit, edges: [4]}, q: {scheme: explicit, edges: [16]}}
    tie: {kv: q}
    problems:
      - dims: {h: 2, hkv: 2, d: 32}
        traits: {dtype: bfloat16}
        after: [{op: linear, traits: {bias: no}, dims: {m: b*q, n: 64, k: h*d}}]
measure: {cache: pipeline}
"""


def test_neighbours_take_the_problem_s_sizes_and_dtype(folder: Path) -> None:
    (folder / "pipe.yaml").write_text(PIPELINE)
    sweep = load(folder / "pipe.yaml")
    linear, attention = sweep.operators
    problem = linear.problems[1].problem
    around = linear.neighbours[kind_of(problem)]
    assert around.before[0].beside(problem).dims == (("m", 8), ("n", 64))
    assert around.after[0].beside(problem).dims == (("m", 8), ("n", 32))
    problem = attention.problems[0].problem
    after = attention.neighbours[kind_of(problem)].after[0].beside(problem)
    assert after.dims == (("m", 64), ("n", 64), ("k", 64))
    assert (after.trait("dtype"), after.trait("bias")) == ("bfloat16", "no")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("op: layer_norm, dims: {n: n}", "op: layer_nrom, dims: {n: n}", "after[0].op: found 'layer_nrom'"),
        ("dims: {n: n}", "dims: {n: w}", "found 'w', expected one of m, n, k"),
        ("dims: {n: n}", "dims: {x: n}", "found 'x', expected one of m, n"),
        ("dims: {n: n}", "dims: {n: 0}", "expected a whole number from 1 to 2^40, or dims to multiply"),
        ("traits: {bias: no}", "traits: {bias: maybe}", "found 'maybe', expected one of yes, no"),
        ("{m: b*q, n: 64, k: h*d}", "{m: b*q, k: h*d}", "found no 'n', expected it: attention has no dim of that"),
        (
            "\n        after: [{op: linear, traits: {bias: no}, dims: {m: b*q, n: 64, k: h*d}}]",
            "",
            "neither before nor after",
        ),
        ("cache: pipeline", "cache: lukewarm", "cold, warm or pipeline"),
    ],
)
def test_a_faulty_neighbour_is_named(folder: Path, old: str, new: str, message: str) -> None:
    assert old in PIPELINE
    (folder / "a.yaml").write_text(PIPELINE.replace(old, new, 1))
    with pytest.raises(ConfigError) as error:
        load(folder / "a.yaml")
    assert message in str(error.value)


SIZED = "dims: {n: 64, k: 32}\n        sizes: [{dims: {m: 17}, weight: 120}, {dims: {m: 3}, align: 4, weight: 0.5}]"


def test_sizes_stand_in_place_of_the_bins(folder: Path) -> None:
    linear, attention = load(write(good(("dims: {n: 64, k: 32}", SIZED)))).operators
    found = [(each.problem.dim("m"), each.problem.align, each.weight) for each in linear.problems]
    assert found == [(17, 64, 240.0), (3, 4, 1.0)], "weight times count, in the order given"
    assert attention.problems == load(write(GOOD)).operators[1].problems
    bare = load(write(good(("dims: {n: 64, k: 32}", SIZED), (f"    bins:\n      m: {EDGES}\n", "")))).operators[0]
    assert bare.problems == linear.problems and bare.bins["m"].edges == (3, 17)
    assert linear.bins["m"].edges == (1, 8, 32)


def test_entries_with_sizes_and_entries_on_bins_are_one_sweep(folder: Path) -> None:
    (linear,) = load(write(good(("dims: {n: 64, k: 32}", SIZED)) .replace(
        '    candidates: ["*"]\n', '      - dims: {n: 64, k: 32}\n    candidates: ["*"]\n'
    ))).restrict(["linear"]).operators  # fmt: skip
    assert [each.problem.dim("m") for each in linear.problems] == [17, 3, 1, 8, 32]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("{dims: {}}", "9: operators.linear.problems[0].sizes[0].dims: found no 'm', expected m"),
        ("{dims: {m: 1, n: 2}}", "sizes[0].dims.n: found 'n', expected one of m; a static dim matches exactly"),
        ("{dims: {m: 1, x: 2}}", "sizes[0].dims.x: found 'x', expected one of m"),
        ("{dims: {m: 0}}", "sizes[0].dims.m: found 0, expected a whole number from 1 to 2^40"),
        ("{m: 1}", "found 'm', expected one of dims, align, weight"),
        ("{weight: 1}", "sizes[0].dims: found nothing, expected it: this key has no default"),
        ("{dims: {m: 1}, weight: 0}", "sizes[0].weight: found 0, expected a number from 1e-9 to 1e+15"),
        ("{dims: {m: 1}, weight: 1.0e+16}", "sizes[0].weight: found "),
        ("{dims: {m: 1}, align: 3}", "sizes[0].align: found 3, expected a power of two from 1 to 64"),
        ("3", "sizes[0]: found 3, expected a mapping"),
    ],
)
def test_bad_sizes_are_named(folder: Path, sizes: str, message: str) -> None:
    entry = ("dims: {n: 64, k: 32}", f"dims: {{n: 64, k: 32}}\n        sizes: [{sizes}]")
    assert message in refusal(good(entry))


def test_sizes_and_a_tie_contradict_each_other(folder: Path) -> None:
    sizes = "dims: {h: 2, hkv: 2, d: 32}\n        sizes: [{dims: {b: 1, q: 2, kv: 3}}]"
    assert "found sizes beside a tie" in refusal(good(("dims: {h: 2, hkv: 2, d: 32}", sizes)))
