"""table.hpp and the compiled extension against the Python form of the lookup."""

from __future__ import annotations

import itertools
import random
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dks.dispatch
from dks.codegen.cpp import render_header
from dks.codegen.templating import cstring
from dks.dispatch import compiler, native
from dks.dispatch.native import build as native_build
from dks.dispatch.table import Group, Rule, Table

Find = Callable[..., int]

HARNESS = Path(__file__).parent / "harness.cpp"
LOOKUP = (Path(dks.dispatch.__file__).parent / "cpp" / "lookup.hpp").read_text(encoding="utf-8")
STRICT = ("-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror")
CLASSES = ((64, 16, 4), (64, 16, 4), (64, 16, 4), (64,), (32, 8, 1))
DIMS = (1, 2, 3, 1, 0)
ALIGNS = (-1, 0, *range(1, 65), 65, 128)
INT64 = np.iinfo(np.int64)
HOSTILE = (
    'quote " and \\" and \\',
    "continued \\\n#error",
    "*/ // /*",
    "NUL \0 1",
    "??/ ??=",
    "bidi \u202e\u2066 end",
    "\r\n\t\x7f\x1b[0m",
    'R"(raw)" %s {{ braces }} {% raw %}',
    "surrogate \ud800",
    "digits \x011234",
)

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")


def make_table(seed: int) -> Table:
    """Groups of every number of dims and set of classes, a quarter of the cells unmeasured."""
    rng = random.Random(seed)
    rules = tuple(Rule(f"kernel{i}/size{rng.randrange(999)}", 1 << rng.randrange(7)) for i in range(20))
    groups = []
    for number, (dims, classes) in enumerate(itertools.product(DIMS, CLASSES)):
        edges = tuple(make_edges(rng, top=40 if number % 4 == 0 else 8) for _ in range(dims))
        if dims == 1 and classes == (64,):  # more edges of one octave than are compared one by one
            edges = (tuple(sorted(rng.sample(range(129, 257), rng.randint(5, 40)))),)
        cells = {}
        for align in classes:
            fit = [i for i, rule in enumerate(rules) if rule.align <= align]
            width = prod(map(len, edges))
            cells[align] = tuple(rng.choice(fit) if rng.random() < 0.75 else -1 for _ in range(width))
        groups.append(Group("op", "direct", (("dtype", "float32"),), (("n", number + 1),), edges, cells))
    return Table(rules, tuple(groups))


def make_edges(rng: random.Random, top: int) -> tuple[int, ...]:
    return tuple(sorted({1 << top, *(int(2 ** rng.uniform(0, top)) for _ in range(rng.randint(0, 3)))}))


def boundary_queries(table: Table) -> np.ndarray:
    """Every group at every combination of an edge and its neighbours, at every alignment."""
    queries = []
    for index, group in enumerate(table.groups):
        axes = []
        for edges in group.edges:
            near = {edge + step for edge in (0, *edges, 2 * edges[-1]) for step in (-1, 0, 1)}
            axes.append(sorted(near | ({INT64.min, INT64.max} if len(group.edges) == 1 else set())))
        unused = [[7]] * (3 - len(axes))
        columns = np.meshgrid([index], ALIGNS, *axes, *unused, indexing="ij")
        queries.append(np.stack([column.ravel() for column in columns], axis=1))
    return np.concatenate(queries).astype(np.int64)


def random_queries(table: Table, count: int) -> np.ndarray:
    rng = np.random.default_rng(2)
    groups = rng.integers(0, len(table.groups), (count, 1))
    aligns = rng.integers(1, 65, (count, 1))
    reach = np.where(groups % 4 == 0, 42, 10)  # as far as the group's edges, and a little past
    sizes = np.exp2(rng.random((count, 3)) * reach).astype(np.int64) - (rng.random((count, 3)) < 0.01)
    return np.concatenate([groups, aligns, sizes], axis=1)


def ask(find: Find, table: Table, queries: np.ndarray) -> np.ndarray:
    """Answers of a ``find(group, align, *sizes)``."""
    dims = [2 + len(group.edges) for group in table.groups]
    answers = [find(*query[: dims[query[0]]]) for query in queries.tolist()]
    return np.array(answers, dtype=np.int32)


def planned(table: Table) -> Find:
    """The compiled fast path's ``find(group, align, *sizes)``."""
    assert native.module is not None
    needs = tuple(rule.align for rule in table.rules)
    plans = [
        native.module.Plan(
            tuple(map(tuple, group.edges)),
            tuple((align, tuple(cells)) for align, cells in group.cells.items()),
            needs,
            {},
            native.module.Counts(),
        )
        for group in table.groups
    ]
    return lambda group, align, *sizes: plans[group].find(align, *sizes)


def build(folder: Path, main: str, *options: str) -> Path:
    """Compile ``main`` against the headers in ``folder``, strictly."""
    (folder / "main.cpp").write_text(main, encoding="utf-8")
    program = folder / "main"
    command = ["g++", *STRICT, *options, "-iquote", str(folder), str(folder / "main.cpp"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def table() -> Table:
    return make_table(seed=1)


@pytest.fixture(scope="module")
def package(table: Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    (folder / "table.hpp").write_text(render_header("sample", table, LOOKUP), encoding="utf-8")
    return folder


@needs_compiler
def test_three_forms_agree(table: Table, package: Path) -> None:
    program = build(package, HARNESS.read_text(), "-O1", "-fsanitize=undefined", "-fno-sanitize-recover=undefined")
    queries = np.concatenate([boundary_queries(table), random_queries(table, 1_000_000)])
    done = subprocess.run([program], input=queries.tobytes(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    from_header = np.frombuffer(done.stdout, dtype=np.int32)
    wanted = ask(table.find, table, queries)
    assert set(wanted[wanted < 0]) == {-1, -2, -3, -4} and set(wanted[wanted >= 0] & 3) == {0, 1, 2}
    for form, answers in (("header", from_header), ("extension", ask(planned(table), table, queries))):
        wrong = np.flatnonzero(answers != wanted)
        assert wrong.size == 0, f"{form}: {queries[wrong[0]]} {answers[wrong[0]]} {wanted[wrong[0]]}"


@pytest.mark.parametrize(
    "asked",
    [(0, 64), (0, 64, 1, 2)]
    + [(0, align, size) for align in (2**40, -(2**40), 2**80) for size in (1, 2**63, 2**80, -(2**80))],
)
def test_extension_fails_as_python_does(table: Table, asked: tuple[int, ...]) -> None:
    def outcome(find: Find) -> object:
        try:
            return find(*asked)
        except (TypeError, IndexError) as error:
            return type(error)

    assert outcome(planned(table)) == outcome(table.find)


@pytest.mark.parametrize("asked", [(0, 64, 1.5), (0, "64", 1)])
def test_extension_takes_whole_numbers_only(table: Table, asked: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        planned(table)(*asked)


@needs_compiler
def test_same_bytes_anywhere(tmp_path: Path) -> None:
    made = []
    for name in ("here", "a much longer path"):
        (tmp_path / name).mkdir()
        assert native_build.compile_into(tmp_path / name) == ""
        assert [path.name for path in (tmp_path / name).iterdir()] == [native.BINARY]
        made.append((tmp_path / name / native.BINARY).read_bytes())
    assert made[0] == made[1] and native.digest().encode() in made[0]


@needs_compiler
def test_two_tables_in_one_unit_and_an_empty_one(table: Table, package: Path, tmp_path: Path) -> None:
    shutil.copy(package / "table.hpp", tmp_path)
    for name, held in (("other", make_table(seed=3)), ("empty", Table((), ()))):
        (tmp_path / f"{name}.hpp").write_text(render_header(name, held, LOOKUP), encoding="utf-8")
    width = table.groups[0].edges[0][0]
    code = table.find(0, 64, width)
    main = f"""
        #include "table.hpp"
        #include "other.hpp"
        #include "empty.hpp"
        #include "table.hpp"
        static_assert(sample::group("op", "direct", "dtype=float32", {{1}}) == 0);
        static_assert(other::group("op", "direct", "dtype=float32", {{2}}) == 1);
        static_assert(sample::group("op", "direct", "dtype=bfloat16", {{1}}) == -1);
        static_assert(sample::group("op", "direct", "dtype=float32", {{1, 1}}) == -1);
        static_assert(sample::choose(0, {{{width}}}, 64).rule == {code >> 2});
        static_assert(sample::choose(sample::Group::op_direct_dtype_float32_n1, {{{width}}}, 64).hit);
        static_assert(!sample::choose(-1, {{1}}, 64).hit && !sample::choose(0, {{1, 1}}, 64).hit);
        static_assert(!empty::choose(0, {{}}, 64).hit && empty::group("op", "direct", "", {{}}) == -1);
        int main() {{}}
    """
    build(tmp_path, main)


@needs_compiler
def test_hostile_text_keeps_its_bytes_and_its_place(tmp_path: Path) -> None:
    def header(candidates: tuple[str, ...]) -> str:
        rules = tuple(Rule(candidate, 1) for candidate in candidates)
        return render_header("sample", Table(rules, ()), LOOKUP)

    hostile, tame = header(HOSTILE), header(("tame",) * len(HOSTILE))
    assert hostile.isascii() and "\0" not in hostile
    literal = re.compile(r'"(?:[^"\\\n]|\\.)*"')
    assert literal.sub("", hostile) == literal.sub("", tame)
    (tmp_path / "table.hpp").write_text(hostile, encoding="utf-8")
    shown = "".join(f"show({cstring(text)});\n" for text in HOSTILE)
    show = "template <std::size_t N> void show(const char (&t)[N]) { std::fwrite(t, 1, N, stdout); }"
    main = f'#include "table.hpp"\n#include <cstdio>\n{show}\nint main() {{\n{shown}}}\n'
    output = subprocess.run([build(tmp_path, main)], capture_output=True, check=True).stdout
    assert output == b"".join(text.encode("utf-8", "surrogatepass") + b"\0" for text in HOSTILE)


@pytest.mark.parametrize("name", ["", "1a", "a-b", "class", "std", "dks", "linux", "_a", "a\n", "a b", "ü", "a."])
def test_name_that_is_no_namespace(name: str) -> None:
    with pytest.raises(ValueError, match="name: found"):
        render_header(name, Table((), ()), LOOKUP)


def test_key_that_is_no_identifier() -> None:
    group = Group("op\n#error", "direct", (), (), (), {64: (-1,)})
    with pytest.raises(ValueError, match="operator: found"):
        render_header("sample", Table((), (group,)), LOOKUP)


def test_groups_that_read_alike_get_different_names() -> None:
    groups = tuple(Group(op, "direct", (), (), (), {64: (-1,)}) for op in ("a.b", "a_b", "a__b", "0"))
    text = render_header("sample", Table((), groups), LOOKUP)
    for name in ("a_b_direct = 0", "a_b_direct_2 = 1", "a_b_direct_3 = 2", "group_0_direct = 3"):
        assert f"  {name},\n" in text


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("/nowhere/g++", "no such program"), ("'", "No closing quotation"), ("false", "ended with code 1")],
)
def test_no_compiler_is_a_reason(
    compiler: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert reason in native_build.compile_into(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_installed_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert "No such file" in native_build.compile_into(tmp_path / "nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "found none of g++" in native_build.compile_into(tmp_path)


@needs_compiler
def test_a_slow_compiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "TIMEOUT", 0.0)
    assert "took more than" in native_build.compile_into(tmp_path)


@needs_compiler
def test_no_python_headers_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "no Python.h" in native_build.compile_into(tmp_path)
