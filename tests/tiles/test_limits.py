"""Compiled units are kept where nobody else writes; how many threads and inputs kernels are tried with."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dks.dispatch import pool
from dks.dispatch.compiler import find_compiler, run_compiler
from dks.dispatch.kernel import Params
from dks.dispatch.problem import Problem
from dks.dispatch.tiles import build, library, threads
from dks.dispatch.tiles.unit import HEADERS, Unit

SOFTMAX = Unit("dks_softmax_test", "avx2", "softmax", "rows.hpp", "dks::Softmax<dks::Avx2, float, 1, 1>")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if reason := find_compiler()[1]:
        pytest.skip(reason)
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_shipped", {})
    monkeypatch.setattr(library, "_locate", library._nowhere)


def test_a_folder_that_others_write_to_is_not_trusted() -> None:
    assert build.build([SOFTMAX]) == {}
    assert build.locate(SOFTMAX).is_file()
    build.cache().chmod(0o777)
    with pytest.raises(library.Missing, match="others may write there"):
        build.locate(SOFTMAX)
    assert "others may write there" in build.build([SOFTMAX])[SOFTMAX.symbol]


FORKED = """
import os, sys, torch
from dks.dispatch import pool
from dks.dispatch.problem import Problem
from dks.dispatch.tiles import build, library
library.look_in(build.locate)
torch.set_num_threads(2)
kernel = pool.kernels()[sys.argv[1]]
problem = Problem.of("softmax", {"dtype": "float32"}, {"m": 64, "n": 64})
params = (("unroll", 2), ("rows", 4), ("t", 2))
assert build.build([kernel.unit(problem, params)]) == {}
run, x = kernel.bind(problem, params), torch.randn(64, 64)
y, big = x.softmax(1), torch.randn(2**22)
big.exp()  # torch's threads exist now, and none of ours
if (child := os.fork()) == 0:
    torch.set_num_threads(1)  # as a data loader's workers do
    os._exit(0 if torch.allclose(run(x), y) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_on_one_thread_waits_for_no_others() -> None:
    able = [k for k in pool.kernels_for("softmax", "cpu") if k.unit is not None and not k.unavailable()]
    if not able:
        pytest.skip("no generated softmax runs here")
    done = subprocess.run([sys.executable, "-c", FORKED, able[0].id], timeout=120, check=False, env=os.environ)
    assert done.returncode == 0


def test_all_cores_are_tried_whatever_their_number() -> None:
    assert threads.counts(1) == (1,)
    assert threads.counts(2) == (1, 2)
    assert threads.counts(48) == (1, 2, 4, 8, 16, 24, 32, 48)


@pytest.mark.parametrize(
    ("id", "dims", "params"),
    [
        ("tile.f32_avx512", {"m": 512, "n": 64, "k": 4096}, (("mr", 4), ("nv", 4), ("kc", 0), ("t", 2), ("r", 0))),
        ("tile.softmax_avx512", {"m": 4, "n": 2**20}, (("unroll", 2), ("rows", 4), ("t", 2))),
    ],
)
def test_more_threads_than_parts_are_not_tried(
    id: str, dims: dict[str, int], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 2)
    kernel = pool.kernels()[id]
    problem = Problem.of(kernel.op, {"dtype": "float32"}, dims)
    assert "of which there are 1," in str(kernel.suits(problem, params))


def test_int8_sums_have_a_most_of_inputs() -> None:
    kernel = pool.kernels()["tile.i8_avx512_vnni"]
    traits = {"dtype": "float32", "bias": "no", "epilogue": "none"}
    assert kernel.supports(Problem.of("linear", traits, {"m": 1, "n": 8, "k": 2**17})) is None
    assert "at most 131072" in str(kernel.supports(Problem.of("linear", traits, {"m": 1, "n": 8, "k": 2**17 + 1})))


def test_the_structs_are_those_of_the_c_interface(tmp_path: Path) -> None:
    """ctypes lays them out by its own reading of the fields' order and types."""
    structs = {"dks_linear": library.Linear, "dks_norm": library.Norm, "dks_decode": library.Decode}
    lines = [
        f'printf("{name}.{field[0]} %zu\\n", offsetof(struct {name}, {field[0]}));'
        for name, made in structs.items()
        for field in made._fields_
    ]
    lines += [f'printf("{name} %zu\\n", sizeof(struct {name}));' for name in structs]
    includes = '#include <cstddef>\n#include <cstdio>\n#include "abi.h"\n'
    (tmp_path / "main.cpp").write_text(includes + "int main() {\n" + "\n".join(lines) + "\n}\n")
    command, why = find_compiler()
    assert not why
    code, output = run_compiler([*command, "-iquote", str(HEADERS), "main.cpp", "-o", "main"], tmp_path)
    assert code == 0, output
    found = dict(line.split() for line in subprocess.check_output([tmp_path / "main"], text=True).splitlines())
    wanted = {f"{n}.{f[0]}": getattr(made, f[0]).offset for n, made in structs.items() for f in made._fields_}
    wanted |= {name: ctypes.sizeof(made) for name, made in structs.items()}
    assert {name: int(size) for name, size in found.items()} == wanted
