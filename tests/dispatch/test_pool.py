"""The pool finds what is in the folders, and what it finds fits together."""

from __future__ import annotations

import types

import pytest

from dks.dispatch import pool
from dks.dispatch.kernel import DTYPES
from dks.dispatch.problem import Candidate, Problem


def test_operators_are_the_folders() -> None:
    assert set(pool.operators()) == {
        "attention", "cross_entropy", "layer_norm", "linear", "paged_attention", "rms_norm", "rotary",
        "silu_and_mul", "softmax",
    }  # fmt: skip
    for name, operator in pool.operators().items():
        assert operator.name == name and set(operator.dynamic) <= set(operator.dims)
        assert set(operator.static) | set(operator.dynamic) == set(operator.dims)
        default = pool.kernels()[operator.default]
        assert default.op == name and not default.form and default.unavailable() is None
        assert set(operator.traits["dtype"]) <= set(default.precision)


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(
        KeyError,
        match="found 'conv', expected one of attention, cross_entropy, layer_norm, linear, paged_attention",
    ):
        pool.operator("conv")


@pytest.mark.parametrize("op", pool.operators())
def test_the_default_comes_first_and_candidates_parse(op: str) -> None:
    kernels = pool.kernels_for(op)
    assert kernels[0].id == pool.operator(op).default
    assert [k.rank for k in kernels] == sorted(k.rank for k in kernels)
    candidates = pool.candidates_for(op)
    assert len({c.id for c in candidates}) == len(candidates)
    assert all(Candidate.parse(c.id) == c and c.kernel in pool.kernels() for c in candidates)


def test_each_default_serves_every_trait_that_can_be_asked() -> None:
    """Whatever has no rule goes to the default, so a kernel may beat it only where it could run."""
    for operator in pool.operators().values():
        default = pool.kernels()[operator.default]
        for dtype in operator.traits["dtype"]:
            traits = {name: values[0] for name, values in operator.traits.items()} | {"dtype": dtype}
            problem = Problem.of(operator.name, traits, dict.fromkeys(operator.dims, 7), DTYPES[dtype].itemsize)
            assert default.objection(problem) is None
            assert operator.max_align(problem) in (2, 4, 8, 16, 32, 64)
            assert operator.key_bytes(problem) >= 0


def test_two_kernels_of_one_id_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = types.SimpleNamespace(KERNEL=pool.kernels()["torch.linear"], __name__="twin")
    folder = types.SimpleNamespace(__name__="folder")
    monkeypatch.setattr(pool, "_modules", lambda package: [twin, twin] if package is folder else [folder])
    with pytest.raises(ValueError, match=r"kernel torch\.linear: declared twice"):
        pool.kernels.__wrapped__()
