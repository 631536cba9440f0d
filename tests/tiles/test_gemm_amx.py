"""linear by tile instructions, emulated: few machines have them. The emulation ends the process on misuse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from dks.dispatch.tiles.unit import Unit
from tests.tiles import gemm
from tests.tiles.gemm import EMULATE, Call, Form, Layer


def form_of(dot: str, x: str, *numbers: int) -> Form:
    """``numbers``: MT, NT, KC, PACK, PF."""
    mt, nt, kc, pack, pf = numbers
    name = f"dks::AmxGemm<dks::Amx{dot}, {x}, {mt}, {nt}, {kc}, {'true' if pack else 'false'}, {pf}>"
    symbol = "_".join(map(str, ("dks_test_amx", dot.lower(), *numbers)))
    unit = Unit(symbol, "avx512", "linear", "gemm_amx.hpp", name, EMULATE)
    weight, group = (torch.int8, 4) if dot == "Int8" else (torch.bfloat16, 2)
    return Form(unit, torch.float32 if x == "float" else torch.bfloat16, weight, 16 * nt, group, 16 * group)


# Between them: both elements of x, blocks of k and none, prefetching and none, x in place and packed.
INT8 = [form_of("Int8", "float", 2, 2, 64, 1, 1), form_of("Int8", "dks::bf16", 1, 3, 0, 1, 0)]
BF16 = [form_of("Bf16", "dks::bf16", 2, 2, 32, 0, 1), form_of("Bf16", "float", 1, 4, 0, 1, 0)]
REAL = replace(INT8[0], unit=replace(INT8[0].unit, symbol="dks_test_amx_real", isa="amx_int8", defines=()))

both = pytest.mark.parametrize("form", INT8 + BF16, ids=str)
integers = pytest.mark.parametrize("form", INT8, ids=str)


@pytest.fixture(autouse=True, scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        gemm.units_of(patch, str(tmp_path_factory.mktemp("units")), [*INT8, *BF16, REAL])
        yield


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


def test_in_place_and_packed_agree() -> None:
    """Whole tiles of aligned x are read where they are; the last, lower tile is not."""
    torch.manual_seed(5)
    form = BF16[0]
    for m in (1, 16, 31, 32, 33, 48, 70):
        gemm.check(form, Layer.drawn(form, 40, 128), torch.randn(m, 128).bfloat16(), Call(x_offset=0))
        gemm.check(form, Layer.drawn(form, 40, 128), torch.randn(m, 128).bfloat16(), Call(x_offset=2))


def test_tiles_are_right_or_declined() -> None:
    """The instructions themselves where the system grants them; elsewhere the call says so and touches nothing."""
    torch.manual_seed(6)
    layer, x = Layer.drawn(REAL, 70, 200), torch.randn(45, 200)
    if REAL.unit.needs.unavailable() is None and gemm.run(REAL, layer, x, None, Call()) is not None:
        gemm.check_every_small_shape(REAL)
        gemm.check_int8_extremes(REAL)
        gemm.check_not_finite(REAL)
    else:
        assert gemm.run(REAL, layer, x, None, Call()) is None


def test_what_the_preprocessor_knows_is_part_of_a_unit() -> None:
    unit = INT8[0].unit
    assert unit.digest() != replace(unit, defines=()).digest()
    assert unit.options == (*unit.needs.options, "-DDKS_EMULATE")
