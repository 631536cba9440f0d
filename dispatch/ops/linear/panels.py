"""Weights of the generated kernels: panels of output channels, as ``dispatch/tiles/abi.h`` has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch.utils.weak import WeakIdKeyDictionary

from dks.dispatch.kernel import DTYPES, Params, Run
from dks.dispatch.ops.linear.epilogue import EPILOGUES
from dks.dispatch.problem import Problem
from dks.dispatch.tiles import launch, library, threads
from dks.dispatch.tiles.unit import Unit

_EPILOGUES = {name: number for number, name in enumerate(("none", "relu", "gelu", "gelu_tanh", "silu", "add"))}
"""Numbers of ``enum dks_epilogue``."""


_T = TypeVar("_T")

_forms: WeakIdKeyDictionary = WeakIdKeyDictionary()


def shared(weight: torch.Tensor, key: tuple[object, ...], make: Callable[[], _T]) -> _T:
    """``make()``, once for all kernels of a layer that read the same form of its weight; it goes with the weight.

    Args:
        key: the form: element, panel, whatever else tells two forms apart.
    """
    if weight.is_inference():  # nothing would tell that it was written to since
        return make()
    version, forms = _forms.get(weight, (None, {}))  # type: ignore[no-untyped-call]
    if version != weight._version:
        forms = {}
        _forms[weight] = (weight._version, forms)
    if key not in forms:
        forms[key] = make()
    made: _T = forms[key]
    return made


def pack(weight: torch.Tensor, panel: int, group: int = 1, depth: int = 1) -> torch.Tensor:
    """(n, k) -> (ceil(n / panel), ceil(k / group), panel, group), zeros where n or k end.

    Args:
        panel: output channels that lie together.
        group: inputs of one channel that lie together.
        depth: k is filled up to a multiple of this, itself one of ``group``.
    """
    n, k = weight.shape
    step = max(group, depth)
    wide = torch.nn.functional.pad(weight.detach(), (0, -k % step, 0, -n % panel))
    return wide.view(-1, panel, wide.shape[1] // group, group).permute(0, 2, 1, 3).contiguous()


def packed_bytes(problem: Problem, panel: int, element: int, depth: int = 1) -> int:
    """Bytes of ``pack``'s result, for elements of so many bytes."""
    n, k = problem.dim("n"), problem.dim("k")
    return (n + -n % panel) * (k + -k % depth) * element


def threads_objection(problem: Problem, params: Params, rows: int, panel: int) -> str | None:
    """Why these threads are not meant for a problem, or None; a tile has at most so many rows, and one panel."""
    m, n, t, by_rows = problem.dim("m"), problem.dim("n"), dict(params)["t"], dict(params)["r"]
    if by_rows and m < t * rows:
        return f"less than {rows} rows, a whole tile, for each of {t} threads"
    return threads.objection(params, m * n * problem.dim("k"), -(-m // rows) if by_rows else -(-n // panel))


def bound(
    problem: Problem,
    params: Params,
    unit: Unit,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    scale: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
) -> Run:
    """The run of a generated kernel.

    Args:
        unit: the function.
        weight: packed, 64-byte aligned.
        bias: (n,) or None.
        scale: float32, as the kernel wants it.
        sums: int32 (n,).

    Raises:
        Missing: there is no compiled form of it.
    """
    wide_bias = None if bias is None else bias.detach().float().contiguous()
    kept: Sequence[torch.Tensor | None] = (weight, wide_bias, scale, sums)
    n, k = problem.dim("n"), problem.dim("k")
    given = dict(params)
    constant = library.Linear(
        *(None if t is None else t.data_ptr() for t in kept),
        n,
        k,
        _EPILOGUES[problem.trait("epilogue")],
        given["t"],
        given["r"],
    )
    return launch.linear(unit, constant, DTYPES[problem.trait("dtype")], kept)


assert set(EPILOGUES) <= set(_EPILOGUES)
