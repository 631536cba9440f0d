"""The metrics there are, and their values in this process. Knows nothing of prometheus_client."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dks.dispatch import pool
from dks.dispatch.reasons import HITS, OTHER, REASONS
from dks.dispatch.runtime import Runtime

Labels = tuple[str, ...]

STATES: Mapping[str, str] = {
    "failed": "it could not be bound or launched in this process",
    "declined": "it left a call to the framework, whose values it does not compute",
    "switched_off": "it may not run here (its source changed, or this machine can't run it) or failed too often",
}

_SUFFIXES = {"counter": "_total", "info": "_info", "gauge": ""}


@dataclass(frozen=True, slots=True)
class Family:
    """One metric.

    Attributes:
        kind: ``counter``, ``gauge`` or ``info``.
        labels: names; the first is the table's.
    """

    name: str
    kind: str
    text: str
    labels: Labels

    @property
    def sample(self) -> str:
        """The name that a scrape shows."""
        return self.name + _SUFFIXES[self.kind]


CALLS = Family(
    "dks_dispatch_calls",
    "counter",
    "Calls, by who served them (table or framework) and the match or the reason.",
    ("table", "op", "served", "outcome"),
)
OTHERS = Family(
    "dks_dispatch_missed_others", "counter", "Misses whose shapes were too many to keep.", ("table",)
)  # fmt: skip
TABLE = Family("dks_dispatch_table", "info", "The table that is loaded.", ("table", "generation", "lookup"))
REFUSED = Family(
    "dks_dispatch_refused", "gauge", "1 where the whole table is refused: the framework serves all.", ("table",)
)
CANDIDATES = Family(
    "dks_dispatch_candidates",
    "gauge",
    "Candidates of the table that " + "; ".join(f"{state}: {what}" for state, what in STATES.items()) + ".",
    ("table", "state", "candidate"),
)
RULES = Family(
    "dks_dispatch_rules", "gauge", "Entries of the table, by whether they may serve here.", ("table", "state")
)
SHAPES = Family(
    "dks_dispatch_missed_shapes", "gauge", "Distinct shapes that export_misses would write of.", ("table",)
)

FAMILIES = (CALLS, TABLE, REFUSED, CANDIDATES, RULES, SHAPES, OTHERS)

Values = Mapping[Family, Mapping[Labels, float]]


def read(runtimes: Iterable[Runtime]) -> Values:
    """What each of these tables shows now."""
    values: dict[Family, dict[Labels, float]] = {family: {} for family in FAMILIES}
    for runtime in runtimes:
        for family, own in (counts(runtime) | _states(runtime)).items():
            values[family].update(own)
    return values


def counts(runtime: Runtime) -> dict[Family, dict[Labels, float]]:
    """What only grows."""
    return _counted(runtime.name, runtime.stats()["ops"], runtime.misses.others)


def inherited(runtime: Runtime) -> dict[Family, dict[Labels, float]]:
    """The same of what this process was forked with, which its parent counted."""
    return _counted(runtime.name, *runtime.inherited)


def _counted(
    table: str, ops: Mapping[str, Mapping[str, Mapping[str, int]]], others: int
) -> dict[Family, dict[Labels, float]]:
    calls: defaultdict[Labels, float] = defaultdict(float)
    for op, outcomes in ops.items():
        known = op if op in pool.operators() else OTHER
        for match, n in outcomes["hits"].items():
            calls[table, known, "table", match if match in HITS else OTHER] += n
        for reason, n in outcomes["fallbacks"].items():
            calls[table, known, "framework", reason if reason in REASONS else OTHER] += n
    return {CALLS: calls, OTHERS: {(table,): others}}


def _states(runtime: Runtime) -> dict[Family, dict[Labels, float]]:
    name, now, lookup = runtime.name, runtime.generation, set(runtime.lookup().values())
    named = {rule.candidate for rule in now.table.rules}
    found = {
        "failed": list(runtime.failures),
        "declined": list(runtime.declined),
        "switched_off": {*now.dead, *list(runtime.switched_off)},
    }
    candidates: dict[Labels, float] = {
        (name, state, id): float(n)
        for state, ids in found.items()
        for id, n in Counter(id if id in named else OTHER for id in ids).items()
    }
    off = sum(rule.candidate in now.dead for rule in now.table.rules)
    return {
        TABLE: {(name, now.hash, "compiled" if lookup == {"compiled"} else "python"): 1},
        REFUSED: {(name,): int(now.refused is not None)},
        CANDIDATES: candidates,
        RULES: {(name, "serving"): len(now.table.rules) - off, (name, "switched_off"): off},
        SHAPES: {(name,): runtime.misses.kept},
    }
