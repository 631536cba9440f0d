"""One generation of a table: what a loaded package holds, and what was made of it in this process.

A runtime serves one generation at a time. Nothing in it changes but its caches, so a call that has taken hold of
one sees the same table to its end, whatever is loaded meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from dks.dispatch import modes, pool
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.table import Group, Table

EMPTY = Table((), ())

Find = Callable[..., int]

_serials = count(1)


@dataclass(frozen=True, slots=True)
class Plan:
    """One group of the table, ready to be asked.

    Attributes:
        problem: traits and static dims; its dynamic dims are placeholders of 1.
        find: (alignment in bytes, *dynamic sizes) -> the lookup's number; None where there is no group.
        candidates: by rule index, of the group's rules that may run here.
        blocked: why there is no group, or None.
        group: the group itself.
        needs: the alignment in bytes that the kernel of each rule of the table needs.
    """

    problem: Problem
    find: Find | None = None
    candidates: Mapping[int, Candidate] = field(default_factory=dict)
    blocked: str | None = None
    group: Group | None = None
    needs: tuple[int, ...] = ()

    def form_bytes(self) -> int:
        """Bytes that binding the candidates adds to what the caller already holds."""
        kernels = pool.kernels()
        return sum(kernels[c.kernel].form_bytes(self.problem) for c in set(self.candidates.values()))

    @property
    def changes_anything(self) -> bool:
        """Whether some bin chose another kernel than the framework's own."""
        default = pool.operator(self.problem.op).default
        return any(candidate.kernel != default for candidate in self.candidates.values())


class Generation:
    """A table, and why parts of it must not serve here.

    Args:
        table: rules and groups.
        refused: why none of it may serve on this machine, or None. The framework then serves all.
        dead: candidates that must not run here, with the reason (source changed, not available).
        evidence: the text of the Lut, read only by ``explain``; held, so that going back needs no disk.
        origin: where it was loaded from, for people.
        hash: what all ranks of a server must have alike; empty where nothing was loaded.
        device: kind of device that it was measured on, ``cpu`` or ``cuda``: calls on another are the framework's.

    Attributes:
        blocked: what calls are counted as where it is refused, a name in ``reasons``; else None.
        serial: a number of its own in this process.
        modes: in which its table tells calls apart: eager, and graph where it was measured.
        dispatches: the bound kernels of calls without preparation, by operator and key. Only what the table has a
            group for is kept, so that the table bounds it, whatever shapes come.
        fast: the compiled forms of functional calls, by operator; bounded likewise.
    """

    def __init__(
        self,
        table: Table = EMPTY,
        *,
        refused: str | None = None,
        dead: Mapping[str, str] | None = None,
        evidence: str = "",
        origin: str = "",
        hash: str = "",
        device: str = "cpu",
    ) -> None:
        self.table = table
        self.refused = refused
        self.dead = dict(dead or {})
        self.evidence = evidence
        self.origin = origin
        self.hash = hash
        self.device = device
        self.blocked: str | None = None if refused is None else "refused"
        self.serial = next(_serials)
        self.dispatches: dict[tuple[object, ...], Any] = {}
        self.fast: dict[str, Any] = {}
        self.modes = tuple(dict.fromkeys((modes.EAGER, *(modes.mode_of(group.form) for group in table.groups))))
        self._groups = {group.key: index for index, group in enumerate(table.groups)}
        self._plans: dict[int, Plan] = {}  # by group
        self._needs = tuple(rule.align for rule in table.rules)

    def __str__(self) -> str:
        what = "a refused table" if self.refused is not None else f"table {self.hash[:12] or 'made by hand'}"
        return f"{what} of {self.origin}" if self.origin else what

    def losses(self) -> list[str]:
        """A line for each kernel whose entries must not serve here."""
        found = {Candidate.parse(id).kernel: why for id, why in self.dead.items()}
        return [f"entries of {kernel} are switched off: {why}" for kernel, why in found.items()]

    def plan(self, op: str, form: str, traits: Mapping[str, str], statics: Mapping[str, int]) -> Plan:
        """The plan for exactly these traits and static dims; never fails. Cached where the table has a group."""
        sorted_traits = tuple(sorted(traits.items()))
        index = self._groups.get((op, form, sorted_traits, tuple(statics.items())))
        if self.refused is None and index is not None:
            plan = self._plans.get(index)
            return self._plans.setdefault(index, self._make_plan(index)) if plan is None else plan
        # Not checked as a problem that is to be measured is: a call may have any sizes.
        dims = tuple((name, statics.get(name, 1)) for name in pool.operator(op).dims)
        return Plan(Problem(op, sorted_traits, dims), blocked=self.blocked or "unknown_shape")

    def _make_plan(self, index: int) -> Plan:
        group = self.table.groups[index]
        statics = dict(group.statics)
        dims = {name: statics.get(name, 1) for name in pool.operator(group.op).dims}
        problem = Problem.of(group.op, dict(group.traits), dims)
        used = sorted({rule for cells in group.cells.values() for rule in cells if rule >= 0})
        candidates = {
            rule: Candidate.parse(self.table.rules[rule].candidate)
            for rule in used
            if self.table.rules[rule].candidate not in self.dead
        }
        return Plan(problem, partial(self.table.find, index), candidates, None, group, self._needs)
