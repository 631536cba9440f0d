"""How C++ servers launch generated kernels: the panels they pack are those that Python packs."""

from __future__ import annotations

import itertools
from pathlib import Path
from unittest import mock

import pytest
import torch

from dks.codegen.launch import KernelView, compile_library, kernel_view, panels_of, render_launch, ship_headers
from dks.codegen.lut import Lut
from dks.codegen.package import build
from dks.codegen.policy import Policy
from dks.codegen.select import select
from dks.dispatch import pool
from dks.dispatch.compiler import find_compiler
from dks.dispatch.ops.linear import panels
from tests.codegen.rows import problem, row
from tests.codegen.test_package import made_lut, made_rows

TILES = [
    kernel for id, kernel in sorted(pool.kernels().items()) if kernel.op == "linear" and id.startswith("tile.")
]
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "int8"}


@pytest.mark.parametrize("kernel", TILES, ids=lambda kernel: kernel.id)
def test_panels_are_those_that_python_packs(kernel: pool.Kernel) -> None:
    """For every tile of every kernel, what ``bind`` asks ``panels.pack`` for."""
    for params in kernel.params:
        found = panels_of(kernel.id, dict(params))
        if kernel.id.startswith("tile.w4"):
            assert found == ("other", 0, 0, 0)
            continue
        with mock.patch.object(panels, "pack") as pack, mock.patch.object(panels, "bound"):
            kernel.bind(problem(), params, torch.ones(64, 32), None)
        tensor, panel, group, depth = (*pack.call_args.args, 1, 1)[:4]
        assert found == (DTYPES[tensor.dtype], panel, group, max(group, depth)), (kernel.id, params)


def test_every_generated_kernel_has_a_way_to_be_launched() -> None:
    """Whatever a table may choose, of every operator."""
    for kernel, dtype in itertools.product(pool.kernels().values(), ("float32", "bfloat16")):
        if kernel.op != "linear" or dtype not in kernel.precision:
            continue
        for candidate in kernel.candidates():
            rule = mock.Mock(candidate=candidate.id, problem=problem(dtype=dtype).id)
            view = kernel_view(rule)
            if kernel.unit is None:
                assert view is None
                continue
            assert view is not None and view.threads == dict(candidate.params)["t"] > 0
            assert view.symbol == kernel.unit(problem(dtype=dtype), candidate.params).symbol


def lut_of(candidate: str) -> Lut:
    return select([row("torch.linear", 100), row(candidate, 10)], Policy(max_error=1e-5))


def test_launch_header_is_as_expected() -> None:
    text = render_launch(lut_of("tile.f32_avx2/mr4-nv2-kc0-pack0-pf8-t1-r0"), "sample", "abc")
    symbol = "dks_linear_f32_avx2_float32_mr4_nv2_kc0_pack0_pf8"
    assert f'{{"{symbol}", dks::Kind::linear, 1, 0, dks::Weights::f32, 16, 1, 1}},  // 0\n' in text
    assert 'dks::package_abi, "sample", "abc",\n    "TestVendor 1 2 3", "avx2", "2", 1e-05, &table,\n' in text
    assert "kernels[]" not in render_launch(lut_of("torch.addmm"), "sample", "abc")


def test_of_other_operators_the_function_and_its_threads_are_known() -> None:
    of = "layer_norm[affine=yes,dtype=float32](m=8,n=64)@64"
    view = kernel_view(mock.Mock(candidate="tile.layer_norm_avx2/ahead1-t2", problem=of))
    assert view == KernelView("dks_layer_norm_avx2_float32_ahead1", "norm", 2)


needs_compiler = pytest.mark.skipif(bool(find_compiler()[1]), reason=f"no compiler: {find_compiler()[1]}")


@needs_compiler
def test_the_library_is_the_same_anywhere_and_says_why_it_is_not(tmp_path: Path) -> None:
    one = build(made_lut(), made_rows(), tmp_path / "a", "same").folder / "_server.so"
    two = build(made_lut(), made_rows(), tmp_path / "longer" / "b", "same").folder / "_server.so"
    assert one.read_bytes() == two.read_bytes()
    empty = tmp_path / "empty"
    empty.mkdir()
    ship_headers(empty, made_lut(), "sample", "abc")
    assert "table.hpp" in compile_library(empty)
    assert not (empty / "_server.so").exists()
