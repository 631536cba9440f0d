"""linear by dot-product instructions; bf16's is emulated where it is lacking, to test what surrounds it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dks.dispatch.tiles.isa import ISAS
from dks.dispatch.tiles.unit import Unit
from tests.tiles import gemm
from tests.tiles.gemm import EMULATE, Form


def int8(x: str, mr: int, nv: int, kc: int, pf: int) -> Form:
    name = f"dks::DotGemm<dks::DotInt8, {x}, {mr}, {nv}, {kc}, {pf}>"
    symbol = f"dks_test_dot_int8_{mr}_{nv}_{kc}_{pf}"
    unit = Unit(symbol, "avx512_vnni", "linear", "gemm_dot.hpp", name)
    return Form(unit, torch.float32 if x == "float" else torch.bfloat16, torch.int8, 16 * nv, 4, 4)


def bf16(x: str, mr: int, nv: int, kc: int, pf: int) -> Form:
    name = f"dks::DotGemm<dks::DotBf16, {x}, {mr}, {nv}, {kc}, {pf}>"
    symbol = f"dks_test_dot_bf16_{mr}_{nv}_{kc}_{pf}"
    lacking = ISAS["avx512_bf16"].unavailable() is not None
    unit = Unit(
        symbol, "avx512" if lacking else "avx512_bf16", "linear", "gemm_dot.hpp", name, EMULATE if lacking else ()
    )
    return Form(unit, torch.float32 if x == "float" else torch.bfloat16, torch.bfloat16, 16 * nv, 2, 2)


# Between them: both elements of x, blocks of k and none, prefetching and none.
INT8 = [int8("float", 4, 2, 64, 1), int8("dks::bf16", 3, 3, 0, 0)]
BF16 = [bf16("dks::bf16", 3, 2, 32, 1), bf16("float", 2, 3, 0, 0)]

both = pytest.mark.parametrize("form", INT8 + BF16, ids=str)
integers = pytest.mark.parametrize("form", INT8, ids=str)


@pytest.fixture(autouse=True, scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    forms = [form for form in INT8 + BF16 if form.unit.needs.unavailable() is None]
    with pytest.MonkeyPatch.context() as patch:
        gemm.units_of(patch, str(tmp_path_factory.mktemp("units")), forms)
        yield


@pytest.fixture(autouse=True)
def runs_here(form: Form) -> None:
    if reason := form.unit.needs.unavailable():
        pytest.skip(reason)


@both
def test_every_small_shape(form: Form) -> None:
    gemm.check_every_small_shape(form)


@both
def test_any_alignment(form: Form) -> None:
    gemm.check_any_alignment(form)


@both
def test_nan_and_infinity(form: Form) -> None:
    gemm.check_not_finite(form)


@integers
def test_zeros_denormals_and_the_longest_rows(form: Form) -> None:
    gemm.check_int8_extremes(form)
