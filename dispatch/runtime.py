"""The runtime of a generated package: plans a call against the table, and serves what it finds.

The way of a call: eligibility (``ambient``) -> bin and alignment class (``table`` or its compiled form) ->
one rule -> the bound kernel. Whatever has no rule goes to the framework's own operator and is counted with
its reason. Nothing here searches, compiles or times.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dks.dispatch import pool, traced
from dks.dispatch.choice import Choice
from dks.dispatch.problem import MAX_ALIGNMENT, Candidate, Problem
from dks.dispatch.stats import Counters
from dks.dispatch.table import NEAREST_REACH, Match, Miss, Table

Find = Callable[..., int]

MATCH_NAMES = tuple(match.name.lower() for match in Match)
MISS_NAMES = tuple(miss.name.lower() for miss in Miss)

_WHY_MISSED = {
    Miss.ZERO_SIZED: "a dim is zero: there is nothing to choose",
    Miss.OUT_OF_RANGE: f"a dim lies past {NEAREST_REACH} times the last measured size",
    Miss.UNMEASURED: "this combination of bins was not measured",
    Miss.MISALIGNED: "less aligned than the chosen kernel needs",
}
_WHY_MATCHED = {
    "exact": "this very size was measured",
    "bin": "a size in the same bin was measured",
    "nearest": "past the last edge, or less aligned than what was measured: the nearest evidence there is",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """One group of the table, ready to be asked.

    Attributes:
        problem: traits and static dims; its dynamic dims are placeholders of 1.
        find: (alignment in bytes, *dynamic sizes) -> the lookup's number; None where there is no group.
        candidates: by rule index, of the group's rules that may run here.
        blocked: why there is no group, or None.
    """

    problem: Problem
    find: Find | None = None
    candidates: Mapping[int, Candidate] = field(default_factory=dict)
    blocked: str | None = None

    def form_bytes(self) -> int:
        """Bytes that binding the candidates adds to what the caller already holds."""
        kernels = pool.kernels()
        return sum(kernels[c.kernel].form_bytes(self.problem) for c in set(self.candidates.values()))

    @property
    def changes_anything(self) -> bool:
        """Whether some bin chose another kernel than the framework's own."""
        default = pool.operator(self.problem.op).default
        return any(candidate.kernel != default for candidate in self.candidates.values())


@dataclass(frozen=True, slots=True)
class Swap:
    """One thing that ``optimize`` did, or left, and why."""

    path: str
    op: str
    done: bool
    note: str


@dataclass(frozen=True)
class Report:
    """What ``optimize`` did to a model. Prints a line for each kind of swap; ``swaps`` names every module."""

    swaps: tuple[Swap, ...]

    @property
    def swapped(self) -> int:
        """How many modules now dispatch."""
        return sum(swap.done for swap in self.swaps)

    def __str__(self) -> str:
        alike: dict[tuple[bool, str, str], list[str]] = {}
        for swap in self.swaps:
            alike.setdefault((swap.done, swap.op, swap.note), []).append(swap.path)
        lines = [f"{self.swapped} of {len(self.swaps)} modules dispatch"]
        for (done, op, note), paths in alike.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            lines.append(f"  {'+' if done else '-'} {paths[0]}{more}  {op}: {note}")
        return "\n".join(lines)


class Runtime:
    """Serves one table. A generated package makes one and hands out its methods.

    Args:
        name: the package's name, for messages.
        table: rules and groups.
        refused: why the table must not serve on this machine, or None. The default then serves all.
        dead: candidates that must not run here, with the reason (source changed, not available).
        find: compiled form of ``table.find``, or None for the Python form.
        evidence: the Lut's file, read only by ``explain``.
    """

    def __init__(
        self,
        name: str,
        table: Table,
        *,
        refused: str | None = None,
        dead: Mapping[str, str] | None = None,
        find: Find | None = None,
        evidence: Path | None = None,
    ) -> None:
        self.name = name
        self.table = table
        self.refused = refused
        self.counters = Counters()
        self.failures: dict[str, str] = {}
        self.declined: dict[str, str] = {}
        self.compiled = find is not None
        self._dead = dict(dead or {})
        self._find = find or table.find
        self._evidence = evidence
        self._groups = {group.key: index for index, group in enumerate(table.groups)}
        self._plans: dict[tuple[object, ...], Plan] = {}
        self._servers = {op: operator.server(self) for op, operator in pool.operators().items()}
        traced.enroll(self)

    def server(self, op: str) -> Any:
        """The object that serves one operator. Raises KeyError with the names there are."""
        pool.operator(op)
        return self._servers[op]

    def plan(self, op: str, form: str, traits: Mapping[str, str], statics: Mapping[str, int]) -> Plan:
        """The plan for exactly these traits and static dims; cached, never fails."""
        key = (op, form, tuple(sorted(traits.items())), tuple(statics.items()))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._make_plan(key, op, traits, statics)
        return plan

    def _make_plan(
        self, key: tuple[object, ...], op: str, traits: Mapping[str, str], statics: Mapping[str, int]
    ) -> Plan:
        dims = {name: statics.get(name, 1) for name in pool.operator(op).dims}
        problem = Problem.of(op, traits, dims)
        if self.refused is not None:
            return Plan(problem, blocked="refused")
        index = self._groups.get(key)
        if index is None:
            return Plan(problem, blocked="unknown_shape")
        group = self.table.groups[index]
        used = sorted({rule for cells in group.cells.values() for rule in cells if rule >= 0})
        candidates = {
            rule: Candidate.parse(self.table.rules[rule].candidate)
            for rule in used
            if self.table.rules[rule].candidate not in self._dead
        }
        return Plan(problem, partial(self._find, index), candidates)

    def note_failure(self, candidate: Candidate, error: Exception) -> None:
        """Remember why a kernel could not be bound or launched; ``stats`` shows it."""
        first = (str(error) or "no message").splitlines()[0]
        self.failures[candidate.id] = f"{type(error).__name__}: {first}"

    def optimize(self, model: torch.nn.Module) -> Report:
        """Swap the modules of ``model`` that the table can make faster, in place.

        A module is left alone where the table holds nothing for its shape, or only the framework's own
        kernel. Parameters stay the model's own: ``state_dict`` keeps its keys.
        """
        if self.refused is not None:
            warnings.warn(f"{self.name}: nothing optimized: {self.refused}", RuntimeWarning, stacklevel=2)
            return Report(())
        swaps: list[Swap] = []
        for server in self._servers.values():
            swaps += server.swap(model)
        return Report(tuple(swaps))

    def explain(self, op: str, /, *, align: int = MAX_ALIGNMENT, **asked: int | str) -> Choice:
        """What a call would run, and why.

        Args:
            op: the operator.
            align: bytes that divide every pointer and row stride of the call.
            **asked: every dim (``m=17``), and any trait (``dtype="bfloat16"``) or ``form``; a trait that is
                left out takes the value the table holds where that is one, else the operator's first.

        Raises:
            KeyError: an unknown operator.
            ValueError: a dim is missing, or a name or value is none of the operator's.
        """
        if isinstance(align, bool) or not isinstance(align, int) or align < 1 or align & (align - 1):
            raise ValueError(f"{op}: found align={align!r}, expected a power of two")
        operator = pool.operator(op)
        form, traits, dims = self._parse_question(op, asked)
        statics = {name: dims[name] for name in operator.static}
        plan = self.plan(op, form, traits, statics)
        wanted = f"{op}[{','.join(f'{k}={v}' for k, v in sorted(traits.items()))}]"
        if plan.blocked == "refused":
            return Choice(op, operator.default, "default", f"the table is refused: {self.refused}")
        if plan.find is None:
            held = sorted({str(dict(g.statics)) for g in self.table.groups if g.op == op})
            known = ", ".join(held) or "nothing"
            return Choice(
                op, operator.default, "default",
                f"no entry for {wanted} with {statics} ({form}); the table holds {known}",
            )  # fmt: skip
        code = plan.find(align, *(dims[name] for name in operator.dynamic))
        if code < 0:
            return Choice(op, operator.default, "default", _WHY_MISSED[Miss(-1 - code)])
        rule = self.table.rules[code >> 2]
        if rule.candidate in self._dead:
            why = f"{rule.candidate} was chosen and may not run: {self._dead[rule.candidate]}"
            return Choice(op, operator.default, "default", why)
        match = MATCH_NAMES[code & 3]
        evidence = self._rule_evidence(code >> 2)
        reason = str(evidence.get("reason", "")) or _WHY_MATCHED[match]
        if rule.candidate in self.failures:
            reason += f"; it failed in this process: {self.failures[rule.candidate]}"
        return Choice(op, rule.candidate, match, reason, evidence)

    def _parse_question(
        self, op: str, asked: Mapping[str, int | str]
    ) -> tuple[str, dict[str, str], dict[str, int]]:
        operator = pool.operator(op)
        known = {*operator.dims, *operator.traits, "form"}
        odd = sorted(set(asked) - known)
        if odd:
            raise ValueError(f"{op}: found {', '.join(odd)}, expected names among {', '.join(sorted(known))}")
        missing = [name for name in operator.dims if name not in asked]
        if missing:
            found = ", ".join(missing)
            raise ValueError(f"{op}: found no {found}, expected all of {', '.join(operator.dims)}")
        dims = {}
        for name in operator.dims:
            size = asked[name]
            if not isinstance(size, int) or isinstance(size, bool):
                raise ValueError(f"{op}: found {name}={size!r}, expected a whole number")
            dims[name] = size
        statics = tuple((name, dims[name]) for name in operator.static)
        held = [g for g in self.table.groups if g.op == op and g.statics == statics]
        traits = {}
        for name, allowed in operator.traits.items():
            values = {dict(group.traits)[name] for group in held}
            traits[name] = str(asked.get(name, values.pop() if len(values) == 1 else allowed[0]))
            if traits[name] not in allowed:
                raise ValueError(f"{op}: found {name}={traits[name]}, expected {' or '.join(allowed)}")
        forms = {group.form for group in held}
        prepared = "prepared" in forms or (not forms and hasattr(self._servers[op], "prepare"))
        form = str(asked.get("form", "prepared" if prepared else "direct"))
        if form not in ("prepared", "direct"):
            raise ValueError(f"{op}: found form={form}, expected prepared or direct")
        return form, traits, dims

    def _rule_evidence(self, rule: int) -> dict[str, object]:
        if self._evidence is None:
            return {}
        rules = json.loads(self._evidence.read_text(encoding="utf-8"))["rules"]
        found: dict[str, object] = rules[rule]
        return found

    def stats(self) -> dict[str, Any]:
        """Hits, misses and fallbacks since the import.

        Returns:
            ``table``: "serving" or "refused: why"; ``lookup``: "compiled" or "python"; ``ops``: by
            operator, ``hits`` by match (exact, bin, nearest) and ``fallbacks`` by reason; each call that
            returned is counted once, in compiled and exported graphs too; what such a graph holds as the
            framework's own operator is counted once a trace, as ``compiling``. ``failed``: the last error
            of each candidate that could not be bound or launched. ``declined``: why each candidate last
            left a call to the framework.
        """
        ops: dict[str, Any] = {}
        for op, outcomes in self.counters.snapshot().items():
            hits = {name: n for name, n in outcomes.items() if name in MATCH_NAMES}
            rest = {name: n for name, n in outcomes.items() if name not in MATCH_NAMES}
            ops[op] = {"hits": hits, "fallbacks": rest}
        return {
            "table": "serving" if self.refused is None else f"refused: {self.refused}",
            "lookup": "compiled" if self.compiled else "python",
            "ops": ops,
            "failed": dict(self.failures),
            "declined": dict(self.declined),
        }
