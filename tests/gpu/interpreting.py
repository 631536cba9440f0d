"""Kernels of the pool on CPU tensors: bound as they are for a GPU, their programs run by Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch

from dks.dispatch.gpu import launch
from dks.dispatch.gpu.library import Steps
from tests.gpu import interpreted


class Plan:
    """In the place of ``launch.Plan``: the same names, the same checks of alignment, no device."""

    steps = None
    scratches = False

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        names: dict[str, bool] = {}
        for program, bound in steps:
            for each in program.arguments:
                name = bound.get(each.name, each.name)
                if isinstance(name, str):
                    names.setdefault(name, each.type == "fp32")
            for axis in program.grid:
                for name, _ in axis:
                    if name and isinstance(bound.get(name, name), str):
                        names.setdefault(str(bound.get(name, name)), False)
        self.names = tuple(names)
        self.floats = tuple(names.values())

    def __call__(self, *values: Any, device: int, stream: int, scratch: tuple[int, int]) -> None:
        assert (device, stream, scratch) == (0, 0, (0, 0))
        call = dict(zip(self.names, values, strict=True))
        told = []
        for program, bound in self._steps:
            found = {name: call[value] if isinstance(value, str) else value for name, value in bound.items()}
            told.append((program, found))
            for position, divisor in program.divisible().items():
                value = found[program.arguments[position].name]
                number = value.data_ptr() if isinstance(value, torch.Tensor) else value
                if number % divisor:
                    raise launch.Misaligned(f"{program.arguments[position].name} is not divisible by {divisor}")
        for program, found in told:
            pointers = {each.name for each in program.arguments if each.type.startswith("*")}
            written = {name for name in OUTPUTS & pointers if isinstance(found[name], torch.Tensor)}
            interpreted.launch([program], found, written)


OUTPUTS = {"y", "total", "q_out", "k_out", "losses", "workspace", "scale"}
"""What programs name the memory that they write to."""
