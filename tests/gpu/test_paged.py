"""Paged attention, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

from dks.dispatch.gpu import paged
from dks.dispatch.kernel import Inputs, Params
from dks.dispatch.ops.paged_attention import OPERATOR
from dks.dispatch.problem import Problem
from tests.gpu.interpreted import DTYPES, assert_close, blank, check_family, launch, some

NAMES = ("b", "kv", "h", "hkv", "d", "page")


def params(splits: int, bn: int = 16) -> Params:
    return (("splits", splits), ("bn", bn), ("warps", 4), ("stages", 2))


def problem(dtype: str, dims: tuple[int, ...]) -> Problem:
    return Problem.of("paged_attention", {"dtype": dtype}, dict(zip(NAMES, dims, strict=True)))


def drawn(asked: Problem) -> Inputs:
    """The operator's own inputs: NaN and pages that are not there, wherever no kernel may look."""
    return OPERATOR.make_inputs(asked, torch.Generator().manual_seed(0), "normal")


def decode(form: Params, inputs: Inputs) -> torch.Tensor:
    q, k, v, block_table, lengths, scale = inputs.dynamic
    (b, h, d), (_, page, hkv, _) = q.shape, k.shape
    splits = dict(form)["splits"]
    room = paged.workspace_bytes(b, h, d, form)
    dtype = next(name for name, dtype in DTYPES.items() if dtype is q.dtype)
    values = {
        **{"q": q, "k": k, "v": v, "block_table": block_table, "lengths": lengths},
        **{"y": blank(b, h, d, dtype=q.dtype), "workspace": blank(room // 4, dtype=torch.float32)},
        **{"b": b, "h": h, "hkv": hkv, "splits": splits, "q_b": q.stride(0), "q_h": q.stride(1)},
        **{f"{name}_{dim}": t.stride(i) for name, t in (("k", k), ("v", v)) for i, dim in enumerate("psh")},
        **{"table_stride": block_table.stride(0), "scale": scale},
    }
    programs = paged.decode(dtype, d, page, h // hkv, form, 2)
    assert len(programs) == (1 if splits == 1 else 2)
    launch(programs, values, ("y", "workspace"))
    return values["y"]


DIMS = (
    (1, 1, 1, 1, 64, 16),  # one key
    (3, 50, 4, 2, 64, 16),
    (2, 48, 3, 1, 128, 16),
    (2, 37, 2, 2, 64, 1),
    (2, 90, 8, 1, 64, 24),  # pages that blocks of keys do not divide
)


@pytest.mark.parametrize(("dtype", "splits", "dims"), some(2, ("float32", "bfloat16"), (1, 2, 5), DIMS))
def test_decode(dtype: str, splits: int, dims: tuple[int, ...]) -> None:
    asked = problem(dtype, dims)
    inputs = drawn(asked)
    assert_close(decode(params(splits), inputs), OPERATOR.reference(asked, inputs), 2)


def test_float16() -> None:
    asked = problem("float32", (2, 40, 4, 2, 64, 16))
    q, k, v, *rest = drawn(asked).dynamic
    inputs = Inputs((), (*(t.half() for t in (q, k, v)), *rest))
    assert_close(decode(params(2), inputs), OPERATOR.reference(asked, inputs), 2)


@pytest.mark.parametrize("form", [form for (form,) in some(7, paged.PARAMS)])
def test_every_parameter_set(form: Params) -> None:
    asked = problem("bfloat16", (1, 333, 2, 1, 64, 16))
    inputs = drawn(asked)
    assert_close(decode(form, inputs), OPERATOR.reference(asked, inputs), 2)


def test_more_query_heads_of_a_key_head_than_the_fewest_rows() -> None:
    asked = problem("float32", (1, 20, 17, 1, 64, 16))
    inputs = drawn(asked)
    assert_close(decode(params(2), inputs), OPERATOR.reference(asked, inputs))


def test_caches_that_share_memory_and_a_wide_block_table() -> None:
    asked = problem("float32", (2, 50, 2, 2, 64, 16))
    q, k, v, block_table, lengths, scale = drawn(asked).dynamic
    both = torch.stack((k, v), 1)  # (pages, 2, page, hkv, d), as FlashInfer keeps them
    table = torch.full((2, 9), 2**30, dtype=torch.int32)
    table[:, : block_table.shape[1]] = block_table
    inputs = Inputs((), (q, both[:, 0], both[:, 1], table[:, : block_table.shape[1]], lengths, scale))
    assert_close(decode(params(2), inputs), OPERATOR.reference(asked, inputs))


@pytest.mark.parametrize("splits", [1, 3])
def test_a_sequence_without_keys_is_zero_and_nan_stays_in_its_own(splits: int) -> None:
    asked = problem("float32", (3, 50, 2, 1, 64, 16))
    inputs = drawn(asked)
    q, _, _, block_table, lengths, _ = inputs.dynamic
    lengths[1], block_table[1] = 0, 2**30
    q[2, 0] = torch.nan
    y = decode(params(splits), inputs)
    assert (y[1] == 0).all() and y[2, 0].isnan().all()
    assert not y[0].isnan().any() and not y[2, 1].isnan().any()


def test_large_scores_and_a_split_whose_weights_vanish() -> None:
    asked = problem("float32", (1, 64, 1, 1, 64, 16))
    q, k, v, *rest = drawn(asked).dynamic
    inputs = Inputs((), (q * 100, k, v, *rest))
    assert_close(decode(params(4), inputs), OPERATOR.reference(asked, inputs), 20)


def test_the_workspace_holds_what_is_written() -> None:
    assert paged.workspace_bytes(3, 4, 64, params(1)) == 0
    assert paged.workspace_bytes(3, 4, 64, params(8)) == 4 * 3 * 4 * 8 * 65


def test_what_there_is_no_program_of() -> None:
    with pytest.raises(ValueError, match="d: found 80, expected one of 64, 128"):
        paged.decode("bfloat16", 80, 16, 1, params(1), 2)
    with pytest.raises(ValueError, match="splits: found 33, expected 1 to 32"):
        paged.decode("bfloat16", 64, 16, 1, params(33), 2)


def test_the_family() -> None:
    check_family(paged.programs())
    programs = list(paged.programs())
    assert len(programs) == 2 * (2 * (3 + 1) + 2)  # splits share one compiled program
