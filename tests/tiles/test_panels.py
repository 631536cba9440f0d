"""Packed weights: shared by the kernels that read the same, and never those of an earlier weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dks.dispatch.ops.linear import panels
from dks.dispatch.problem import Candidate
from tests.tiles.generated import CASES, assert_right, inputs_for, problem_for, with_threads

FIRST = next((case.values for case in CASES if case.values[0].op == "linear"), None)


def test_one_form_is_made_once_and_again_after_a_write() -> None:
    weight, made = torch.randn(4, 4), []
    for _ in range(3):
        panels.shared(weight, ("a", 1), lambda: made.append(1))
        panels.shared(weight, ("b", 1), lambda: made.append(1))
    assert len(made) == 2
    weight.add_(1)
    panels.shared(weight, ("a", 1), lambda: made.append(1))
    assert len(made) == 3 and len(panels._forms[weight][1]) == 1, "the old forms are gone"


def test_a_weight_made_in_inference_mode_is_packed_each_time() -> None:
    """It has no version to tell that it was written to."""
    with torch.inference_mode():
        weight, made = torch.randn(4, 4), []
        for _ in range(2):
            panels.shared(weight, ("a", 1), lambda: made.append(1))
    assert len(made) == 2


@pytest.mark.skipif(FIRST is None, reason="no generated linear runs on this machine")
def test_a_layer_made_in_inference_mode_is_served(route: Any) -> None:
    assert FIRST is not None
    kernel, dtype = FIRST
    problem = problem_for(kernel, dtype, 64)
    with torch.inference_mode():
        inputs, wanted = inputs_for(problem)
        name = Candidate(kernel.id, with_threads(kernel, 1)).id
        runtime = route("linear", (name,), [{"n": problem.dim("n"), "k": problem.dim("k")}])
        layer = runtime.server("linear").prepare(*inputs.static)
        assert_right(layer(*inputs.dynamic), wanted, kernel, problem)
    assert sum(runtime.stats()["ops"]["linear"]["hits"].values()) == 1, runtime.stats()
