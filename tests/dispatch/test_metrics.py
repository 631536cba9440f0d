"""Metrics: what Prometheus reads, bounded labels, and that no sink ever holds up a call."""

from __future__ import annotations

import socket
import threading
import types
import urllib.request
from collections.abc import Iterator

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dks.dispatch.generation import Generation
from dks.dispatch.metrics import Collector, serve_metrics
from dks.dispatch.problem import Candidate
from dks.dispatch.runtime import Runtime
from dks.dispatch.table import Group, Rule, Table

TRAITS = (("bias", "yes"), ("dtype", "float32"), ("epilogue", "none"))
RULES = (Rule("torch.linear", 4), Rule("mkldnn.linear_packed", 4))
GROUP = Group("linear", "prepared", TRAITS, (("n", 64), ("k", 32)), ((1, 8, 64),), {4: (0, 1, 0)})

LABELS = ("table", "op", "served", "outcome", "state", "candidate", "generation", "lookup")
Samples = dict[tuple[str, ...], float]


def made(name: str = "a", **options: object) -> Runtime:
    return Runtime(name, Generation(Table(RULES, (GROUP,)), **options))  # type: ignore[arg-type]


def layer(runtime: Runtime) -> torch.nn.Module:
    found: torch.nn.Module = runtime.server("linear").prepare(torch.randn(64, 32), torch.randn(64))
    return found


def served(runtime: Runtime, *rows: int) -> None:
    linear = layer(runtime)
    for m in rows:
        linear(torch.randn(m, 32))


def read(registry: CollectorRegistry | Collector) -> Samples:
    """Every sample of the exposition: (name, label values) to value."""
    if isinstance(registry, Collector):
        collector, registry = registry, CollectorRegistry()
        registry.register(collector)
    return parsed(generate_latest(registry).decode())


def parsed(text: str) -> Samples:
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "each family comes once"
    return {
        (s.name, *(s.labels[label] for label in LABELS if label in s.labels)): s.value
        for family in families
        for s in family.samples
    }


def calls(samples: Samples) -> dict[tuple[str, ...], float]:
    return {labels[1:]: n for labels, n in samples.items() if labels[0] == "dks_dispatch_calls_total"}


def test_calls_by_table_operator_and_outcome() -> None:
    one, two = made("one"), made("two")
    served(one, 8, 8, 5, 500, 100)
    served(two, 1)
    assert calls(read(Collector(one, two))) == {
        ("one", "linear", "table", "exact"): 2,
        ("one", "linear", "table", "bin"): 1,
        ("one", "linear", "table", "nearest"): 1,
        ("one", "linear", "framework", "out_of_range"): 1,
        ("two", "linear", "table", "exact"): 1,
    }
    samples = read(Collector(one, two))
    assert samples["dks_dispatch_missed_shapes", "one"] == 2 and samples["dks_dispatch_missed_shapes", "two"] == 0


def test_the_table_and_its_candidates() -> None:
    runtime = made(dead={"mkldnn.linear_packed": "its source changed"}, hash="0123abcd")
    runtime.note_failure(Candidate("torch.linear"), RuntimeError("no"))
    samples = read(Collector(runtime))
    assert ("dks_dispatch_table_info", "a", "0123abcd", runtime.stats()["lookup"]["linear"]) in samples
    assert samples["dks_dispatch_refused", "a"] == 0
    assert samples["dks_dispatch_candidates", "a", "switched_off", "mkldnn.linear_packed"] == 1
    assert samples["dks_dispatch_candidates", "a", "failed", "torch.linear"] == 1
    assert samples["dks_dispatch_rules", "a", "serving"] == 1
    assert samples["dks_dispatch_rules", "a", "switched_off"] == 1


def test_a_refused_table_is_an_alarm_of_its_own() -> None:
    runtime = made(refused="threads: 2 != 4")
    served(runtime, 8)
    samples = read(Collector(runtime))
    assert samples["dks_dispatch_refused", "a"] == 1
    assert calls(samples) == {("a", "linear", "framework", "refused"): 1}
    assert not any("threads" in label for labels in samples for label in labels), (
        "reasons of any length are no label"
    )


def test_labels_are_bounded_whatever_is_counted() -> None:
    runtime = made()
    for i in range(500):
        runtime.counters.add(f"op{i}", f"outcome{i}")
        runtime.declined[f"kernel/x{i}"] = "no"
        runtime.note_failure(Candidate("unknown.kernel", (("x", i),)), RuntimeError("no"))
    samples = read(Collector(runtime))
    assert calls(samples) == {("a", "other", "framework", "other"): 500}
    assert samples["dks_dispatch_candidates", "a", "failed", "other"] == 500
    assert samples["dks_dispatch_candidates", "a", "declined", "other"] == 500
    assert len(samples) < 20


def test_packages_are_taken_as_they_are_imported() -> None:
    package = types.ModuleType("a")
    package._runtime = made()  # type: ignore[attr-defined]
    assert read(Collector(package)) == read(Collector(made()))
    with pytest.raises(TypeError, match="expected a package that dks-codegen generated"):
        Collector(types)
    with pytest.raises(TypeError, match="expected at least one"):
        Collector()
    with pytest.raises(ValueError, match="found a, a, expected each package once"):
        Collector(made(), package)


def test_a_registry_takes_one_collector_and_reads_no_table_for_it() -> None:
    registry, runtime = CollectorRegistry(), made()
    runtime.stats = lambda: pytest.fail("read")  # type: ignore[method-assign]
    registry.register(Collector(runtime))
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(Collector(made("b")))


def scrape(port: int) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return parsed(answer.read().decode())


def test_an_endpoint_beside_serving() -> None:
    runtime = made()
    server, thread = serve_metrics(runtime, port=0)
    try:
        assert server.server_address[0] == "127.0.0.1"
        with socket.create_connection(("127.0.0.1", server.server_port)) as stuck:
            stuck.sendall(b"GET /metrics HTTP/1.1\r\n")  # and never ends its question
            served(runtime, 8, 5)
            assert calls(scrape(server.server_port))["a", "linear", "table", "bin"] == 1
            served(runtime, 5)
            assert calls(scrape(server.server_port))["a", "linear", "table", "bin"] == 2
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_a_sink_that_blocks_holds_up_no_call() -> None:
    """A sink that stopped in the middle of reading, in a thread of its own."""
    runtime = made()
    held, release = threading.Event(), threading.Event()

    def sink() -> None:
        for _ in Collector(runtime).collect():
            held.set()
            release.wait(30)

    blocked = threading.Thread(target=sink)
    blocked.start()
    assert held.wait(10)
    done = threading.Thread(target=served, args=(runtime, 8, 8, 5))
    done.start()
    done.join(20)
    assert not done.is_alive() and blocked.is_alive()
    release.set()
    blocked.join(10)
    assert runtime.stats()["ops"]["linear"] == {"hits": {"exact": 2, "bin": 1}, "fallbacks": {}}


def test_a_sink_that_throws_changes_nothing() -> None:
    runtime = made()

    def throwing() -> Iterator[None]:
        for _ in Collector(runtime).collect():
            yield None
            raise RuntimeError("the sink is full")

    for _ in range(3):
        served(runtime, 8)
        with pytest.raises(RuntimeError, match="the sink is full"):
            list(throwing())
    assert calls(read(Collector(runtime))) == {("a", "linear", "table", "exact"): 3}


def test_a_table_that_cannot_be_read_fails_the_scrape_alone() -> None:
    runtime = made()
    runtime.stats = lambda: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        read(Collector(runtime))
    served(runtime, 8)
    assert runtime.counters.snapshot() == {"linear": {"exact": 1}}
