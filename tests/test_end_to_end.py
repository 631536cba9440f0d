"""The whole way on a tiny config: sweep, select, generate, import, serve, with the package's own numbers."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dks.codegen.cli import main as codegen
from dks.profiler.cli import main as profile
from tests.commands import run

ROOT = Path(__file__).parent.parent

SERVING = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import torch
    import tiny_table as served

    torch.manual_seed(0)
    x, w, b = torch.randn(5, 64), torch.randn(64, 64), torch.randn(64)
    with torch.inference_mode():
        expected = torch.nn.functional.linear(x, w, b)
        assert torch.allclose(served.linear(x, w, b), expected, atol=1e-4)
        layer = served.prepare_linear(w, b)
        assert torch.allclose(layer(x), expected, atol=1e-4)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
        before = model(x)
        print(served.optimize(model))
        assert torch.allclose(model(x), before, atol=1e-4)
        w, r = torch.ones(64), torch.randn(5, 64)
        norm = served.prepare_rms_norm(w)
        for y, h in (served.rms_norm(x, (64,), w, residual=r), norm(x, r)):
            assert torch.equal(h, x + r)
            assert torch.allclose(y, torch.nn.functional.rms_norm(h, (64,), w), atol=1e-5)
        assert torch.allclose(served.softmax(x), torch.softmax(x, -1), atol=1e-6)
        q, cache = torch.randn(2, 2, 16), torch.randn(5, 16, 1, 16)
        y = served.paged_attention(q, cache, cache, torch.tensor([[3, 1], [4, -1]]), torch.tensor([20, 7]))
        keys = cache[[3, 1]].reshape(1, 32, 16)[:, :20]
        alone = torch.nn.functional.scaled_dot_product_attention(q[:1], keys, keys)
        assert torch.allclose(y[:1], alone, atol=1e-4)
        gate, values = x.chunk(2, -1)
        assert torch.allclose(served.silu_and_mul(x), torch.nn.functional.silu(gate) * values, atol=1e-6)
        angles, at = torch.rand(9, 8) * 6, torch.tensor([8, 0])
        turned = served.rotary(q, q[:, :1], angles.cos(), angles.sin(), at)
        turn = torch.polar(torch.ones(2, 1, 8), angles[at][:, None])
        for y, given in zip(turned, (q, q[:, :1])):
            wanted = torch.complex(*given.chunk(2, -1)) * turn
            assert torch.allclose(y, torch.cat((wanted.real, wanted.imag), -1), atol=1e-5)
        targets = torch.tensor([3, 63, -100, 0, 1])
        for how in ("none", "mean", "sum"):
            wanted = torch.nn.functional.cross_entropy(x, targets, reduction=how)
            assert torch.allclose(served.cross_entropy(x, targets, reduction=how), wanted, atol=1e-5)
    for op, calls in (("linear", 2), ("rms_norm", 2), ("softmax", 1), ("silu_and_mul", 1), ("rotary", 1),
                      ("cross_entropy", 3)):
        hits = served.stats()["ops"][op]["hits"]
        assert sum(hits.values()) >= calls, served.stats()
    print(served.explain("softmax", m=5, n=64))
    ops = served.stats()["ops"]
    assert ops["paged_attention"] == {"hits": {"bin": 1}, "fallbacks": {}}, ops
    print(served.explain("linear", m=5, n=64, k=64))
    forbidden = {"pandas", "pyarrow", "jinja2", "click", "rich", "pydantic", "yaml", "dks.profiler", "dks.codegen"}
    assert not forbidden & set(sys.modules), forbidden & set(sys.modules)
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated package, from commands alone."""
    home = tmp_path_factory.mktemp("end_to_end")
    done = run(profile, "run", ROOT / "configs" / "tiny.yaml", "-o", home / "run")
    assert done.returncode == 0, done.stderr
    done = run(codegen, "build", home / "run", "-o", home / "out", "--name", "tiny_table", "--max-error", "1e-5")
    assert done.returncode == 0, done.stderr
    return home / "out"


def test_a_serving_process_needs_torch_and_the_package_alone(out: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", textwrap.dedent(SERVING), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "modules dispatch" in done.stdout and "bin match" in done.stdout


def test_the_package_checks_out(out: Path) -> None:
    assert run(codegen, "check", out).returncode == 0
    told = run(codegen, "explain", out, "linear", "m=8", "n=64", "k=64")
    assert told.returncode == 0 and "exact match" in told.stdout


def test_the_header_compiles_and_agrees(out: Path, tmp_path: Path) -> None:
    program = tmp_path / "main.cpp"
    program.write_text(
        '#include <cstdio>\n#include "table.hpp"\n'
        "int main() {\n"
        '  constexpr auto traits = "bias=yes,dtype=float32,epilogue=none";\n'
        '  const auto layer = tiny_table::group("linear", "prepared", traits, {64, 64});\n'
        "  const auto choice = tiny_table::choose(layer, {8}, 64);\n"
        "  std::puts(choice.candidate);\n"
        "}\n"
    )
    binary = tmp_path / "main"
    compiler = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{out / 'tiny_table'}"]
    try:
        subprocess.run([*compiler, str(program), "-o", str(binary)], check=True)
    except FileNotFoundError:
        pytest.skip("no g++ on this machine")
    chosen = subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout.strip()
    assert chosen in run(codegen, "explain", out, "linear", "m=8", "n=64", "k=64").stdout
