"""What a table is selected for: the error budget, the objective, and what a challenger must show."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dks.dispatch.errors import BadInput

OBJECTIVES = ("latency", "throughput", "energy", "memory")


@dataclass(frozen=True, slots=True)
class Policy:
    """How winners are chosen.

    Attributes:
        max_error: largest ||y - ref|| / ||ref|| that a challenger may show.
        objective: ``latency`` compares medians; ``throughput`` total times, tails included; ``memory``
            takes the fastest kernel that packs no second copy of a weight; ``energy`` compares joules.
        overhead_ns: what a dispatched call costs beyond the framework's own, in Python: a challenger must
            save more than this, or dispatching to it makes the call slower.
        tie: two candidates closer than this share of their time are tied, whatever their intervals say, and
            a challenger's whole interval must lie beyond it: less is nothing to change a kernel for. How far
            processes may differ is not in it but in the intervals of ``block_ratio``, which expect a spread even
            where the few processes of a sweep show none; those of throughput and energy do not include it.
        max_form_bytes: largest packed form of one weight, in bytes; None is no limit.
        min_processes: a challenger must have been measured beside the default in at least so many processes,
            and be faster in four of five of them: what one process likes may be its own luck with memory.
        require_stable: only kernels that gave the same bits each time may challenge.
        max_regret: largest 95th percentile of the regret over held-out shapes with which a package is built,
            as a share of the best time; None builds with any. See ``dks.codegen.certificate``.
        max_kernels: at most so many distinct candidates serve an operator, form and activation dtype, over all
            its bins, the default counted: it is always there, for what is not in the table. One is the default
            alone; None is no limit. See ``dks.codegen.few``.
        batch_invariant: one candidate for all sizes of a layer, so that a row's result has the same bits in every
            batch; ``max_kernels`` then limits nothing. See ``dks.codegen.invariant``.
    """

    max_error: float = 1e-2
    objective: str = "latency"
    overhead_ns: float = 2000.0
    tie: float = 0.02
    max_form_bytes: int | None = None
    min_processes: int = 2
    require_stable: bool = False
    max_regret: float | None = None
    max_kernels: int | None = 8
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        """Raises BadInput for a value out of range."""
        if self.objective not in OBJECTIVES:
            raise BadInput(
                f"objective: found {self.objective!r}, expected one of {', '.join(OBJECTIVES)} or a file"
            )
        for name, low, high in (
            ("max_error", 0.0, 1.0),
            ("overhead_ns", 0.0, 1e9),
            ("tie", 0.0, 0.5),
            ("max_regret", 0.0, 100.0),
        ):
            value = getattr(self, name)
            if value is None and name == "max_regret":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise BadInput(f"{name}: found {value!r}, expected a number from {low:g} to {high:g}")
        limit = self.max_form_bytes
        if limit is not None and not _is_whole(limit, 0):
            raise BadInput(f"max_form_bytes: found {limit!r}, expected a whole number of bytes")
        if self.max_kernels is not None and not _is_whole(self.max_kernels, 1):
            raise BadInput(f"max_kernels: found {self.max_kernels!r}, expected a whole number from 1")
        if not _is_whole(self.min_processes, 1):
            raise BadInput(f"min_processes: found {self.min_processes!r}, expected a whole number from 1")
        for name in ("require_stable", "batch_invariant"):
            if not isinstance(getattr(self, name), bool):
                raise BadInput(f"{name}: found {getattr(self, name)!r}, expected true or false")


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def load_policy(
    objective: str,
    max_error: float | None = None,
    max_regret: float | None = None,
    max_kernels: int | None = None,
    batch_invariant: bool | None = None,
) -> Policy:
    """The policy of the command line: an objective's name, or a YAML file with the fields of ``Policy``.

    Args:
        max_error, max_regret, max_kernels, batch_invariant: override the file's; None keeps it.

    Raises:
        BadInput: no such file, unknown keys, or values out of range.
    """
    given = {
        "max_error": max_error,
        "max_regret": max_regret,
        "max_kernels": max_kernels,
        "batch_invariant": batch_invariant,
    }
    overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if objective in OBJECTIVES:
        return Policy(objective=objective, **overrides)
    path = Path(objective)
    if not path.is_file():
        raise BadInput(
            f"objective: found {objective!r}, expected one of {', '.join(OBJECTIVES)}, or the path of a YAML file"
        )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: {error}; expected a YAML mapping of policy fields") from None
    names = {field.name for field in dataclasses.fields(Policy)}
    if not isinstance(data, dict) or not set(data) <= names:
        odd = sorted(map(str, set(data) - names)) if isinstance(data, dict) else type(data).__name__
        raise BadInput(f"{path}: found {odd}, expected keys among {', '.join(sorted(names))}")
    try:
        return Policy(**{**data, **overrides})
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
