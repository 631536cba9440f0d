"""The Lut: what was chosen, by which policy, on what evidence. Reviewable as JSON; the table follows from it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from dks.codegen.certificate import Certificate
from dks.codegen.policy import Policy
from dks.dispatch import pool
from dks.dispatch.environment import Environment
from dks.dispatch.problem import Candidate, Problem
from dks.dispatch.table import Group, Rule, Table

LUT_VERSION = 3


@dataclass(frozen=True, slots=True)
class Other:
    """Candidates that were not chosen for the same reason: how many, by kernel."""

    reason: str
    kernels: dict[str, int]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Why one cell of the table holds what it holds. Times are microseconds, null where not measured.

    Attributes:
        candidate: what was chosen.
        problem: id of the problem that was measured.
        form: ``prepared`` or ``direct``; in graphs ``prepared_graph`` or ``direct_graph``.
        reason: one sentence.
        median_us: of the chosen candidate; default_us: of the framework's own kernel.
        ratio: default / chosen: value and ends of the 95 % interval (null: too few rounds to say).
        rounds: pairs behind the ratio; processes: how many processes took them.
        error: relative error of the chosen candidate against float64.
        form_bytes: what its packed weight adds, in bytes.
        weight: of the problem in traffic.
        runner_up: the next best eligible candidate; margin: runner-up / chosen, as ``ratio``.
        tied: the candidates that no measurement tells apart from the choice, itself and the default included,
            the simplest first; empty where nothing was tied.
        others: the other measured candidates by the reason that they were not chosen, the nearest to it first. In
            the JSON, positions in the list of that name: many rules share them.
    """

    candidate: str
    problem: str
    form: str
    reason: str
    median_us: float | None = None
    default_us: float | None = None
    ratio: list[float | None] | None = None
    rounds: int = 0
    error: float | None = None
    form_bytes: int = 0
    weight: float = 0.0
    runner_up: str | None = None
    margin: list[float | None] | None = None
    processes: int = 0
    tied: tuple[str, ...] = ()
    others: tuple[Other, ...] = ()


@dataclass(frozen=True, slots=True)
class Few:
    """What the policy's ``max_kernels`` changed for one operator, form and activation dtype.

    Attributes:
        before: the candidates that would be chosen without it; after: those that are. Both with the default.
        changed: how many rules have another candidate for it.
        weighted: what a call costs more, over all bins by traffic, as a share; None where no weight is known.
        worst: the same of the bin where it is most; worst_problem: its id.
    """

    op: str
    form: str
    dtype: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    changed: int
    weighted: float | None
    worst: float
    worst_problem: str


@dataclass(frozen=True, slots=True)
class Invariant:
    """The one candidate of a group in a batch-invariant table, and its price.

    Attributes:
        candidate: None if none may serve every bin: then the framework serves, and makes no promise.
        bin_by_bin: the candidates that would be chosen without the restriction.
        cost, free_cost: of the group's bins with it and without, in nanoseconds (joules if the objective is energy)
            times the bins' weights.
        worst: what the bin in which it costs most costs more, as a share.
    """

    op: str
    form: str
    traits: dict[str, str]
    statics: dict[str, int]
    candidate: str | None
    bin_by_bin: tuple[str, ...]
    cost: float
    free_cost: float
    worst: float

    @property
    def weighted(self) -> float | None:
        """What a call costs more, over all bins by traffic, as a share; None if no weight is known."""
        return self.cost / self.free_cost - 1.0 if self.free_cost > 0.0 else None


@dataclass(frozen=True, slots=True)
class Lut:
    """A selected table with its evidence.

    Attributes:
        rules: one a measured problem and form, in the order the cells name them.
        expected_us: by activation dtype, expected time of one model call over the shared problems, in the mode that
            was measured first: eager, where it was.
        certificate: what the choices are worth on shapes that none of them was made from.
        few: where more candidates were ahead than the policy's ``max_kernels``.
        invariant: of a batch-invariant table, each group's one candidate and its price.
        toolchains: what compiled the code that was measured, by chosen kernel, of those that compile any.
    """

    environment: Environment
    policy: Policy
    rules: tuple[Evidence, ...]
    groups: tuple[Group, ...]
    expected_us: dict[str, float]
    certificate: Certificate = dataclasses.field(default_factory=Certificate)
    few: tuple[Few, ...] = ()
    invariant: tuple[Invariant, ...] = ()
    toolchains: dict[str, str] = dataclasses.field(default_factory=dict)

    def table(self) -> Table:
        """The dispatch table, without the evidence."""
        return Table(tuple(Rule(rule.candidate, _alignment(rule)) for rule in self.rules), self.groups)

    def candidates(self) -> list[str]:
        """Every candidate that some rule chose, sorted."""
        return sorted({rule.candidate for rule in self.rules})

    def to_json(self) -> str:
        """Readable, and the same bytes for the same Lut: one rule, shape and group a line."""
        head = {
            "version": LUT_VERSION,
            "environment": self.environment.to_dict(),
            "policy": dataclasses.asdict(self.policy),
            "expected_us": self.expected_us,
            "toolchains": self.toolchains,
        }
        head |= self.certificate.to_json()
        others = list({json.dumps(dataclasses.asdict(o)): o for rule in self.rules for o in rule.others}.values())
        lists = {
            "rules": [_rule_json(rule, others) for rule in self.rules],
            "others": [dataclasses.asdict(other) for other in others],
            "few": [dataclasses.asdict(few) for few in self.few],
            "batch_invariant": [dataclasses.asdict(each) for each in self.invariant],
            "held_out": [dataclasses.asdict(shape) for shape in self.certificate.shapes],
            "groups": [_group_json(group) for group in self.groups],
        }
        parts = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        for key, items in lists.items():
            lines = ",\n".join(f"    {json.dumps(item)}" for item in items)
            parts.append(f'  "{key}": [\n{lines}\n  ]' if lines else f'  "{key}": []')
        return "{\n" + ",\n".join(parts) + "\n}\n"


def _rule_json(rule: Evidence, others: list[Other]) -> dict[str, object]:
    shared = [others.index(other) for other in rule.others]
    return dataclasses.asdict(dataclasses.replace(rule, others=())) | {"others": shared}


def _group_json(group: Group) -> dict[str, object]:
    return {
        "op": group.op,
        "form": group.form,
        "traits": dict(group.traits),
        "statics": dict(group.statics),
        "edges": group.edges,
        "cells": {str(align): cells for align, cells in group.cells.items()},
    }


def _alignment(rule: Evidence) -> int:
    kernel = pool.kernels()[Candidate.parse(rule.candidate).kernel]
    return kernel.alignment_for(Problem.parse(rule.problem).trait("dtype"))
