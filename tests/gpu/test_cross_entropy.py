"""Cross-entropy, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dks.dispatch.gpu import cross_entropy
from dks.dispatch.kernel import Params
from tests.gpu.interpreted import DTYPES, assert_close, blank, check_family, launch, placed, some

IGNORED = -100


def losses(form: Params, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    m, n = logits.shape
    dtype = next(name for name, dtype in DTYPES.items() if dtype is logits.dtype)
    found = blank(m, dtype=logits.dtype)
    values = {
        **{"logits": logits, "targets": targets, "losses": found, "m": m, "n": n},
        **{"stride": logits.stride(0), "ignored": IGNORED},
    }
    launch(cross_entropy.cross_entropy(dtype, form, 2), values, ("losses",))
    return found


def params(block: int) -> Params:
    return (("block", block), ("warps", 4), ("stages", 1))


@pytest.mark.parametrize(
    ("dtype", "block", "shape"), some(3, DTYPES, (16, 64), ((1, 1), (4, 64), (5, 61), (3, 65)))
)
def test_cross_entropy(dtype: str, block: int, shape: tuple[int, int]) -> None:
    m, n = shape
    logits = placed((torch.randn(m, n) * 3).to(DTYPES[dtype]), gap=3, offset=1)
    targets = torch.randint(0, n, (m,))
    targets[-1] = n - 1
    wide = logits.double()
    assert_close(losses(params(block), logits, targets), F.cross_entropy(wide, targets, reduction="none"), 2)
    targets[m // 2] = IGNORED
    assert_close(losses(params(block), logits, targets), F.cross_entropy(wide, targets, reduction="none"), 2)


@pytest.mark.parametrize("block", [8, 64])
def test_extremes_are_the_frameworks(block: int) -> None:
    logits = torch.randn(7, 29)
    targets = torch.arange(7)
    logits[0] = -torch.inf
    logits[1, 2:] = -torch.inf
    logits[2, :20] = -torch.inf  # whole blocks, and the target: an infinite loss
    logits[3] = 3e38
    logits[4, 4] = torch.inf
    logits[5, 28] = torch.nan
    logits[6] *= 1e30
    found = losses(params(block), logits, targets)
    assert_close(found, F.cross_entropy(logits, targets, reduction="none").double(), 2)
    assert found.isnan().tolist() == [True, False, False, False, True, True, False]


@pytest.mark.parametrize("target", [-1, 29, 2**40])
def test_a_target_that_is_no_column_makes_nan_and_reads_nothing(target: int) -> None:
    assert losses(params(8), torch.randn(1, 29), torch.tensor([target])).isnan().all()


@pytest.mark.parametrize("form", cross_entropy.PARAMS)
def test_every_parameter_set(form: Params) -> None:
    logits, targets = torch.randn(2, dict(form)["block"] + 7).bfloat16(), torch.tensor([0, dict(form)["block"]])
    reference = F.cross_entropy(logits.double(), targets, reduction="none")
    assert_close(losses(form, logits, targets), reference, 2)


def test_the_family() -> None:
    check_family(cross_entropy.programs())
