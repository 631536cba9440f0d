"""The generated layer_norm as a kernel of the pool."""

from __future__ import annotations

import gc

import pytest
import torch

from dks.dispatch import pool
from dks.dispatch.kernel import Kernel, relative_error
from dks.dispatch.ops.layer_norm.tile_layer_norm import KERNELS
from dks.dispatch.problem import Problem
from dks.dispatch.tiles import build, library
from dks.dispatch.tiles.isa import ISAS

ISA = "avx2" if ISAS["avx512"].unavailable() else "avx512"
OP = pool.operator("layer_norm")


def problem(dtype: str, affine: str, m: int = 5, n: int = 70) -> Problem:
    return Problem.of("layer_norm", {"dtype": dtype, "affine": affine}, {"m": m, "n": n})


@pytest.fixture
def kernel() -> Kernel:
    found = pool.kernels()[f"tile.layer_norm_{ISA}"]
    if (why := found.unavailable()) is not None:
        pytest.skip(why)
    assert found.unit is not None
    units = [found.unit(problem(dtype, "yes"), found.params[0]) for dtype in found.precision]
    assert build.build(units) == {}
    library.look_in(build.locate)
    return found


@pytest.mark.parametrize("affine", ["yes", "no"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_binds_once_and_keeps_what_it_reads(kernel: Kernel, dtype: str, affine: str) -> None:
    asked = problem(dtype, affine)
    inputs = OP.make_inputs(asked, torch.Generator().manual_seed(1), "normal")
    wanted = OP.reference(asked, inputs)
    own = [t.clone() if isinstance(t, torch.Tensor) else t for t in inputs.static]
    run = kernel.bind(asked, kernel.params[0], *own)
    del own
    gc.collect()
    junk = [torch.full((70,), 1e9).to(wanted.dtype) for _ in range(8)]
    (x,) = inputs.dynamic
    for shape in ((5, 70), (5, 1, 70), (1, 5, 70)):
        y = run(x.view(shape))
        assert y.shape == shape and y.dtype == x.dtype
        assert relative_error(y.view(5, 70), wanted) < kernel.precision[dtype].limit
    assert run(x[0]).shape == (70,) and run(x[:0]).shape == (0, 70)
    del junk


def test_refuses_parameters_of_another_dtype_or_shape(kernel: Kernel) -> None:
    asked = problem("bfloat16", "yes")
    good = torch.ones(70, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"weight: found \(70,\) torch.float32, expected \(70,\) torch.bfloat16"):
        kernel.bind(asked, kernel.params[0], torch.ones(70), good, 1e-5)
    with pytest.raises(ValueError, match=r"bias: found \(3,\)"):
        kernel.bind(asked, kernel.params[0], good, good[:3], 1e-5)


def test_threads_are_tried_where_there_are_some_and_work_for_them(kernel: Kernel) -> None:
    two = (("ahead", 0), ("t", 2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert kernel.suits(problem("float32", "yes", 512, 384), two) is None
        assert "less than" in str(kernel.suits(problem("float32", "yes", 1, 384), two))
        torch.set_num_threads(1)
        assert "torch has 1" in str(kernel.suits(problem("float32", "yes", 512, 384), two))
    finally:
        torch.set_num_threads(before)


def test_each_candidate_of_other_code_has_a_symbol_of_its_own() -> None:
    made = [
        k.unit(problem(dtype, "yes"), params)
        for k in KERNELS
        for dtype in k.precision
        for params in k.params
        if k.unit
    ]
    assert len({u.symbol for u in made}) == len({(u.isa, u.type) for u in made}) == 12
