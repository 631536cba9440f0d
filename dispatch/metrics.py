"""What ``stats`` counts, for Prometheus. Needs the extra ``metrics``; nothing else in serving imports this module.

    import minilm_exact, minilm_bf16
    from prometheus_client import REGISTRY
    from dks.dispatch.metrics import Collector

    REGISTRY.register(Collector(minilm_exact, minilm_bf16))

Everything is read when somebody asks, in the asking thread: a call costs the same with and without it, and a sink
that blocks or fails holds up nobody else. Every label's values are bounded: by the operators, the outcomes of
``reasons`` and the table's own candidates; any other name is ``other``.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from threading import Thread
from types import ModuleType
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector as BaseCollector

from dks.dispatch import pool
from dks.dispatch.reasons import HITS, OTHER, REASONS
from dks.dispatch.runtime import Runtime

STATES: Mapping[str, str] = {
    "failed": "it could not be bound or launched in this process",
    "declined": "it left a call to the framework, whose values it does not compute",
    "switched_off": "it may not run here (its source changed, or this machine can't run it) or failed too often",
}


class Collector(BaseCollector):
    """Reads the tables of one or several packages, one label ``table`` each.

    Args:
        packages: generated packages, or their runtimes.

    Raises:
        TypeError: something else, or none.
        ValueError: two of one name.
    """

    def __init__(self, *packages: ModuleType | Runtime) -> None:
        if not packages:
            raise TypeError("Collector: found no package, expected at least one, such as Collector(minilm_exact)")
        runtimes = [_runtime(package) for package in packages]
        self._runtimes = {runtime.name: runtime for runtime in runtimes}
        if len(self._runtimes) < len(packages):
            names = ", ".join(runtime.name for runtime in runtimes)
            raise ValueError(f"Collector: found {names}, expected each package once")

    def describe(self) -> list[Metric]:
        """The names alone, so that a registry reads no table to learn them, and refuses a second collector."""
        return [make() for make in _FAMILIES.values()]

    def collect(self) -> Iterator[Metric]:
        """The numbers as they are now."""
        families = {name: make() for name, make in _FAMILIES.items()}
        for name, runtime in self._runtimes.items():
            _read(families, name, runtime)
        yield from families.values()


def serve_metrics(*packages: ModuleType | Runtime, port: int, addr: str = "127.0.0.1") -> tuple[WSGIServer, Thread]:
    """Answer scrapes of these packages on ``http://ADDR:PORT/metrics``, from a thread of its own.

    Args: as those of ``Collector``.
        port: 0 takes a free one; the server's ``server_port`` says which.
        addr: who may ask; ``0.0.0.0`` is everybody who reaches this machine.

    Returns:
        The server and its thread; ``server.shutdown()`` ends both.

    Raises:
        OSError: the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(Collector(*packages))
    return start_http_server(port, addr, registry)


_FAMILIES: Mapping[str, Callable[[], Any]] = {
    "calls": lambda: CounterMetricFamily(
        "dks_dispatch_calls",
        "Calls, by who served them (table or framework) and the match or the reason.",
        labels=("table", "op", "served", "outcome"),
    ),
    "info": lambda: InfoMetricFamily("dks_dispatch_table", "The table that is loaded.", labels=("table",)),
    "refused": lambda: GaugeMetricFamily(
        "dks_dispatch_refused", "1 where the whole table is refused: the framework serves all.", labels=("table",)
    ),
    "states": lambda: GaugeMetricFamily(
        "dks_dispatch_candidates",
        "Candidates of the table that " + "; ".join(f"{state}: {what}" for state, what in STATES.items()) + ".",
        labels=("table", "state", "candidate"),
    ),
    "rules": lambda: GaugeMetricFamily(
        "dks_dispatch_rules", "Entries of the table, by whether they may serve here.", labels=("table", "state")
    ),
    "shapes": lambda: GaugeMetricFamily(
        "dks_dispatch_missed_shapes", "Distinct shapes that export_misses would write of.", labels=("table",)
    ),
    "forgotten": lambda: CounterMetricFamily(
        "dks_dispatch_missed_others", "Misses whose shapes were too many to keep.", labels=("table",)
    ),
}


def _runtime(package: object) -> Runtime:
    found = getattr(package, "_runtime", package)
    if not isinstance(found, Runtime):
        raise TypeError(f"Collector: found {package!r}, expected a package that dks-codegen generated")
    return found


def _read(families: Mapping[str, Any], name: str, runtime: Runtime) -> None:
    stats, now = runtime.stats(), runtime.generation
    calls: Tally[tuple[str, str, str]] = Tally()
    for op, outcomes in stats["ops"].items():
        known = op if op in pool.operators() else OTHER
        for match, n in outcomes["hits"].items():
            calls[known, "table", match if match in HITS else OTHER] += n
        for reason, n in outcomes["fallbacks"].items():
            calls[known, "framework", reason if reason in REASONS else OTHER] += n
    for labels, n in calls.items():
        families["calls"].add_metric((name, *labels), n)
    families["info"].add_metric(
        (name,), {"generation": now.hash, "lookup": "compiled" if stats["lookup"] == "compiled" else "python"}
    )
    families["refused"].add_metric((name,), int(now.refused is not None))
    candidates = {rule.candidate for rule in now.table.rules}
    states = {
        "failed": stats["failed"],
        "declined": stats["declined"],
        "switched_off": {*now.dead, *stats["switched_off"]},
    }
    for state, ids in states.items():
        for id, n in Tally(id if id in candidates else OTHER for id in ids).items():
            families["states"].add_metric((name, state, id), n)
    off = sum(rule.candidate in now.dead for rule in now.table.rules)
    families["rules"].add_metric((name, "serving"), len(now.table.rules) - off)
    families["rules"].add_metric((name, "switched_off"), off)
    families["shapes"].add_metric((name,), len(runtime.misses.snapshot()))
    families["forgotten"].add_metric((name,), runtime.misses.others)
