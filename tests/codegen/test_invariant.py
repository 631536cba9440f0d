"""Batch invariance: one kernel a layer for every size, its price, and the bits of a row on real kernels."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from dks.codegen.choose import choose
from dks.codegen.lut import Lut
from dks.codegen.policy import Policy, load_policy
from dks.codegen.select import select
from dks.dispatch import pool
from dks.dispatch.errors import BadInput
from dks.dispatch.evidence import Measurement
from dks.dispatch.generation import Generation
from dks.dispatch.kernel import Kernel, take_rows
from dks.dispatch.problem import MAX_DIM
from dks.dispatch.runtime import Runtime
from tests.codegen.rows import problem, row

POLICY = Policy(max_error=1e-5, batch_invariant=True)
PACKED = "mkl.linear_packed/rows8"
FEW, MANY = "tile.f32_avx2/mr4-nv2-kc0-pack0-pf8-t1-r0", "tile.f32_avx2/mr4-nv3-kc0-pack0-pf0-t1-r0"


def measured(times: dict[str, tuple[float, float]], weights: tuple[float, float] = (1.0, 1.0)) -> list[Measurement]:
    """Rows of two bins, m = 8 and 64: microseconds of each candidate in both."""
    return [
        row(name, us, problem(m), weight=weight)
        for name, both in times.items()
        for m, us, weight in zip((8, 64), both, weights, strict=True)
    ]


TIMES = {"torch.linear": (40.0, 400.0), PACKED: (10.0, 100.0), FEW: (20.0, 240.0), MANY: (30.0, 160.0)}


def of_form(lut: Lut, form: str) -> int:
    return next(i for i, group in enumerate(lut.groups) if group.form == form)


def test_one_declared_candidate_serves_every_size_and_alignment() -> None:
    rows = measured(TIMES) + [
        row(name, us, problem(m, align=4)) for name in TIMES for m, us in zip((8, 64), TIMES[name], strict=True)
    ]
    table = select(rows, POLICY).table()
    lut = select(rows, POLICY)
    prepared = of_form(lut, "prepared")
    sizes = (1, 2, 7, 8, 9, 64, 65, 129, 10**6, MAX_DIM)
    codes = {(m, align): table.find(prepared, align, m) for m in sizes for align in (4, 16, 64)}
    assert min(codes.values()) >= 0
    assert {table.rules[code >> 2].candidate for code in codes.values()} == {MANY}
    assert table.groups[prepared].edges == ((8, 64, MAX_DIM),)


def test_the_least_cost_by_traffic_wins_and_the_price_is_told() -> None:
    (price,) = [each for each in select(measured(TIMES), POLICY).invariant if each.form == "prepared"]
    assert price.candidate == MANY and price.bin_by_bin == (PACKED,)
    assert price.weighted == pytest.approx(190 / 110 - 1) and price.worst == pytest.approx(2.0)
    (price,) = [each for each in select(measured(TIMES, (100.0, 1.0)), POLICY).invariant if each.form == "prepared"]
    assert price.candidate == FEW and price.weighted == pytest.approx(2240 / 1100 - 1)


def test_a_candidate_behind_the_default_may_be_the_one() -> None:
    times = {"torch.linear": (10.0, 100.0), FEW: (20.0, 200.0)}
    lut = select(measured(times), POLICY)
    (price,) = [each for each in lut.invariant if each.form == "prepared"]
    assert price.candidate == FEW and price.weighted == pytest.approx(1.0)
    (rule, *_) = [rule for rule in lut.rules if rule.form == "prepared"]
    assert rule.candidate == FEW and rule.reason.startswith("batch-invariant: one kernel for every size")


@pytest.mark.parametrize("why", ["not declared", "not in every bin", "outside the budget"])
def test_a_layer_without_such_a_kernel_is_left_to_the_framework_and_named(why: str) -> None:
    times = {name: us for name, us in TIMES.items() if name in ("torch.linear", PACKED)}
    rows = measured(times)
    if why == "not in every bin":
        rows.append(row(FEW, 5.0, problem(8)))
    if why == "outside the budget":
        rows += [row(FEW, us, problem(m), error=error) for m, us, error in ((8, 5.0, 1e-7), (64, 5.0, 1e-3))]
    lut = select(rows, POLICY)
    assert [each.candidate for each in lut.invariant] == [None, None]
    assert {rule.candidate for rule in lut.rules} == {"torch.linear"}
    assert all(rule.reason.startswith("not batch-invariant") for rule in lut.rules)
    served = Runtime("t", Generation(lut.table()))
    with torch.no_grad():
        served.server("linear").call(torch.randn(8, 32), torch.randn(64, 32), torch.randn(64))
    assert served.stats()["ops"]["linear"] == {"hits": {}, "fallbacks": {"unknown_shape": 1}}


def test_the_lut_keeps_it_and_nothing_changes_without_the_policy() -> None:
    lut = json.loads(select(measured(TIMES), POLICY).to_json())
    assert lut["policy"]["batch_invariant"] is True and lut["batch_invariant"][0]["candidate"] == MANY
    free = select(measured(TIMES), dataclasses.replace(POLICY, batch_invariant=False))
    assert free.invariant == () and free.groups[0].edges == ((8, 64),)
    assert {rule.candidate for rule in free.rules if rule.form == "prepared"} == {PACKED}


def test_the_policy_is_true_or_false(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "policy.yaml"
    path.write_text("batch_invariant: true\n")
    assert load_policy(str(path)).batch_invariant and load_policy("latency", batch_invariant=True).batch_invariant
    with pytest.raises(BadInput, match="batch_invariant: found 'yes', expected true or false"):
        Policy(batch_invariant="yes")  # type: ignore[arg-type]


def _of_this_machine() -> Kernel:
    found = [
        k for k in pool.kernels_for("linear", "cpu") if k.id.startswith("tile.f32_") and k.unavailable() is None
    ]
    if not found:
        pytest.skip("no generated fp32 linear runs here")
    return found[0]


def test_a_row_has_the_same_bits_in_every_batch() -> None:
    """A built table, with kernels that differ from bin to bin without the policy."""
    kernel = _of_this_machine()
    few, many = [c.id for c in kernel.candidates() if dict(c.params)["t"] == 1][:2]
    times = {"torch.linear": (40.0, 400.0), few: (10.0, 300.0), many: (30.0, 100.0)}
    lut = select(measured(times), POLICY)
    served = Runtime("t", Generation(lut.table()))
    weight, bias, x = torch.randn(64, 32), torch.randn(64), torch.randn(200, 32)
    layer = served.server("linear").prepare(weight, bias).requires_grad_(False)
    with torch.no_grad():
        whole = layer(x)
        for m in (1, 2, 7, 64):
            for first in (0, 3, 5, 200 - m):
                end = min(first + m, 200)
                assert torch.equal(layer(*take_rows((x[:end].clone(),), first, end)), whole[first:end]), (m, first)
    counted = served.stats()["ops"]["linear"]
    assert not counted["fallbacks"] and sum(counted["hits"].values()) == 17
    assert choose(problem(8), "prepared", measured(times), Policy(max_error=1e-5)).candidate == few
